"""What `pyro_lvm.check` looks for: one function a question, which returns findings or raises the error that is one."""

from collections.abc import Callable, Iterable

from pyro_lvm.errors import PyroLVMError
from pyro_lvm.findings import evaluation, loss, runs, treatment
from pyro_lvm.findings.record import LEVELS, Finding, Subject, finding, told

__all__ = ["LEVELS", "Finding", "Subject", "examine"]

Question = Callable[[Subject], Iterable[Finding]]


def examine(subject: Subject) -> list[Finding]:
    """Ask all questions; after an error of those that a pair must pass to be run at all, no further one."""
    found: list[Finding] = []
    for question in runs.QUESTIONS:
        found += _asked(question, subject)
        if any(finding.level == "error" for finding in found):
            return found
    for question in (*evaluation.QUESTIONS, *loss.QUESTIONS, *treatment.QUESTIONS):
        found += [each for each in _asked(question, subject) if each not in found]
    return found


def _asked(question: Question, subject: Subject) -> list[Finding]:
    """The answer; a pair that runs may still fail under a question, which then is a finding."""
    try:
        return list(question(subject))
    except PyroLVMError as error:
        return [told(error)]
    except Exception as error:
        if question in runs.PLAIN:  # what the pair's own code raises
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}."
        if question in loss.QUESTIONS:
            return [
                finding("fails", f"loss: expected a value and gradients, got {what}", "Try it on one batch by itself.")
            ]
        return [finding("unanswered", f"one question could not be asked: {what}", "The other findings stand.")]
