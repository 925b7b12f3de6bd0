"""Whether there are results datum by datum, and what they are worth."""

from collections.abc import Iterator

import torch

from pyro_lvm.findings.record import Finding, Subject, finding, quoted
from pyro_lvm.objectives.dependence import moved, rerun
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.intercept import is_latent
from pyro_lvm.tracing.plates import draws_rows
from pyro_lvm.tracing.probe import probe_pair

__all__ = ["OTHER_MODES", "QUESTIONS"]

#: Ways of running particles that are not one dimension more.
OTHER_MODES = ("folded", "looped")


def _evaluation(subject: Subject) -> Iterator[Finding]:
    if subject.needs_no_guide:
        return
    subject.plan = plan = probe_pair(subject.model, subject.guide, subject.batch, subject.data_plate)
    if plan.tied and subject.data_plate is not None:
        message = "pair: runs on all of x only, for it has parameters for each datum or a plate of fixed size."
        yield finding("whole-data", message, "Train it with batch_size=len(x), and evaluate it on these very data.")
    modes = {"model": plan.model_mode, "guide": plan.guide_mode}
    words = " and ".join(f"the {program} are {mode}" for program, mode in modes.items() if mode in OTHER_MODES)
    if words:
        message = f"particles in {words}: reshapes or control flow do not take them as a further dimension."
        yield finding("particles", message, "The evaluators see to it; do not use Pyro's vectorize_particles=True.")


def _subsample(subject: Subject) -> Iterator[Finding]:
    """A plate whose rows the guide draws anew, where the model has chosen them: Pyro then takes the guide's."""
    frames = {f for s in subject.pair.guide.values() if s["type"] == "sample" for f in s["cond_indep_stack"]}
    for name in sorted(f.name for f in frames if f.full_size not in (None, f.size)):
        if draws_rows(subject.guide, name, subject.batch) and not draws_rows(subject.model, name, subject.batch):
            message = f"guide plate {name!r}: expected the rows that the model names, got rows that the guide draws."
            cure = "Pyro gives them to the model, in the place of those of x: pass the same `subsample=` in the guide."
            yield finding("redrawn-subsample", message, cure, name)


def _looks_at_x(subject: Subject) -> Iterator[Finding]:
    """Whether q(z | x) changes where the data change places; with parameters for each datum it need not."""
    plan, batch = subject.plan, subject.batch
    x = batch.args[0]
    if plan is None or plan.tied or plan.guide_layout.plate is None or torch.equal(x, x.roll(1, 0)):
        return
    other = Batch(
        tuple(a.roll(1, 0) if own else a for a, own in zip(batch.args, batch.per_datum, strict=True)), batch.per_datum
    )
    latents = {n: s["value"] for n, s in subject.pair.guide.items() if is_latent(s)}
    before, after = (rerun(subject.guide, each.args, latents) for each in (batch, other))
    if latents and not any(moved(before[name], after[name], value) for name, value in latents.items()):
        message = f"guide: expected q(z | x) that changes with x, got the same for all data at {quoted(latents)}."
        cure = "Use x in the guide; a guide without it is right only where the posterior is one for all data."
        yield finding("guide-ignores-x", message, cure, next(iter(latents)))


#: In the order in which they are asked.
QUESTIONS = (_evaluation, _subsample, _looks_at_x)
