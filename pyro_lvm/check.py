"""What is wrong with a pair, told before training: most wrong results of latent-variable models are silent.

`check` runs a pair on some data, in several ways, and reports findings; what each of them looks for is in `findings`.
"""

import copy
import html
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO

from pyro_lvm._checks import check_program, data_tensor
from pyro_lvm._typing import DataPlate, Guide, Model, TensorLike
from pyro_lvm.findings import Finding, Subject, examine
from pyro_lvm.objectives.default import check_loss
from pyro_lvm.tracing.batch import Batch, make_batch
from pyro_lvm.tracing.isolation import eval_mode, evaluation_rng, uncalled_copy, validation
from pyro_lvm.tracing.params import held_by_others, own_store
from pyro_lvm.tracing.probe import empty_guide

__all__ = ["CheckReport", "Finding", "check"]

_WORDS = {"error": "results would be wrong", "warning": "look at it before you train", "note": "good to know"}


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; prints as a page.

    Attributes:
        findings: errors first, then warnings, then notes.
        num_data: N, the data that were looked at.
    """

    findings: tuple[Finding, ...]
    num_data: int

    @property
    def ok(self) -> bool:
        """No finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)

    @property
    def codes(self) -> tuple[str, ...]:
        """The names of the findings."""
        return tuple(finding.code for finding in self.findings)

    def __str__(self) -> str:
        counts = [(level, sum(f.level == level for f in self.findings)) for level in _WORDS]
        said = ", ".join(f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts if count)
        lines = [f"check on {self.num_data} data: {said or 'nothing found'}"]
        for level, words in _WORDS.items():
            found = [finding for finding in self.findings if finding.level == level]
            lines += ["", f"{level.upper()}: {words}"] if found else []
            for finding in found:
                lines += [f"  [{finding.code}] {finding.message}", textwrap.indent(finding.cure, " " * 6)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def check(
    model: Model, guide: Guide | None, x: TensorLike, *args: Any, loss: Any = None, data_plate: DataPlate = "auto"
) -> CheckReport:
    """Look for what makes the training or the evaluation of a pair wrong, without training it.

    The pair is run on x a few times, at two sizes of the data, with its densities and the gradients of its loss. An
    error is something that makes results wrong or training impossible; a warning, what is right for some pairs and a
    mistake in others; a note says how a pair is going to be treated. Each finding has a page in ``docs/findings.md``.

    What runs cannot show is not found: a model that is not the one you meant, a posterior mode that no draw reaches.
    Nothing is changed: parameters, gradients, modes, random states and ``loss`` are as before.

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x); None for a model without latents.
        x: data ``(N, ...)``; a batch is enough, unless there are parameters for each datum.
        *args: further arguments of both.
        loss: the loss that `fit` is going to get; None is what `fit` takes for None.
        data_plate: as evaluators are going to get it; None where one joint result is wanted.

    Returns:
        `CheckReport`.

    Raises:
        DataTypeError: model or guide cannot be called, x is no tensor, or ``loss`` no loss.
        ShapeError: x has no data.
        Exception: what the pair's own code raises passes as it is.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("Z", dist.Normal(loc, 1.0))
        >>> report = check(model, guide, torch.randn(10))
        >>> report.ok, report.codes
        (False, ('extra-site',))
        >>> print(report.findings[0].message)
        guide site 'Z': expected latent sites of the model ['z'], got a site that the model lacks.
    """
    check_program("model", model)
    guide = empty_guide if guide is None else guide
    check_program("guide", guide)
    check_loss(loss)
    batch = make_batch(data_tensor("x", x), args)
    guide, loss = uncalled_copy(guide), _copied(loss)
    foreign = held_by_others(model, guide)
    with _no_trace(model, guide, batch) as in_train_mode:
        subject = Subject(model, guide, batch, loss, in_train_mode, foreign, data_plate)
        found = sorted(examine(subject), key=lambda finding: list(_WORDS).index(finding.level))
    return CheckReport(tuple(found), len(batch))


def _copied(loss: Any) -> Any:
    """A loss whose counters and guesses are its own; modules and whatever else it holds are those of the original."""
    copied = copy.copy(loss)
    for name, value in vars(copied).items() if isinstance(copied, ELBO) else ():
        if isinstance(value, ELBO):
            setattr(copied, name, copy.copy(value))
    return copied


@contextmanager
def _no_trace(model: Model, guide: Guide, batch: Batch) -> Iterator[list[torch.nn.Module]]:
    with (
        own_store(model, guide),
        evaluation_rng(0),
        nullcontext() if not batch.has_nan() else validation(False),  # else torch refuses what an encoder makes of it
        eval_mode(model, guide) as in_train_mode,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of Pyro, on what is found here
        yield in_train_mode
