"""The loss of a pair and its gradients."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import ELBO, TraceEnum_ELBO, TraceTailAdaptive_ELBO

from pyro_lvm._typing import Model
from pyro_lvm.findings.evaluation import OTHER_MODES
from pyro_lvm.findings.record import Finding, Subject, finding, quoted, told
from pyro_lvm.objectives.default import drawn_latents, model_and_loss
from pyro_lvm.objectives.gradients import gradient_moments, gradients_put_aside
from pyro_lvm.objectives.mean_field import check_mean_field, uses_mean_field
from pyro_lvm.objectives.setting import needs_score
from pyro_lvm.ops.running import RunningMoments
from pyro_lvm.tracing.intercept import is_latent, run
from pyro_lvm.tracing.isolation import validation
from pyro_lvm.tracing.leaves import stray_tensors
from pyro_lvm.tracing.params import current_params
from pyro_lvm.tracing.plates import nesting
from pyro_lvm.training.diagnosis import explained

__all__ = ["QUESTIONS"]


_REPEATS = 3  # gradients: a parameter may have none by chance in one


def _gradients(subject: Subject) -> Iterator[Finding]:
    pair, given = subject.pair, subject.loss
    program, loss = model_and_loss(subject.model, subject.model, pair.model, pair.guide, given)
    found = [*_options(subject, loss), *_score(subject, loss), *_kl(subject, program, loss)]
    yield from found
    if any(each.level == "error" for each in found):
        return
    leaves = {n: t for n, (t, _) in current_params().items() if n in subject.names[0] | subject.names[1]}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not leaves:
        yield finding("nothing-to-train", "pair: expected a parameter with a gradient, got none.", "See pyro.param.")
        return
    try:
        with _put_aside(subject, loss), validation(not subject.batch.has_nan()), torch.enable_grad():
            values, moments = gradient_moments(loss, program, subject.guide, subject.batch, leaves, _REPEATS)
    except ValueError as error:
        named = explained(error, subject.model, subject.guide, subject.batch.args, len(subject.batch))
        if named is None:
            raise
        yield told(named)
        return
    infinite = [name for name in leaves if not moments[name].mean.isfinite().all()]
    of_no_value = isinstance(loss, TraceTailAdaptive_ELBO)  # which returns NaN on purpose
    if infinite or not (of_no_value or values.mean.isfinite().all()):
        where = f", and in the gradients of {quoted(infinite)}" if infinite else ""
        message = f"loss: expected finite numbers, got {float(values.mean):g}{where}."
        yield finding("not-finite", message, "Look for NaN in x, divisions by 0, and scales that underflow.")
        return
    still = _without_gradient(moments)
    if still:  # a last layer that begins at zero keeps gradients from those before it, at that point only
        with _moved(leaves), _put_aside(subject, loss), torch.enable_grad(), validation(False):
            moments = gradient_moments(loss, program, subject.guide, subject.batch, leaves, _REPEATS)[1]
        still = [name for name in _without_gradient(moments) if name in still]
    if still:
        message = f"parameters: expected a gradient for each, got 0 in {_REPEATS} repeats for {quoted(still)}."
        cure = (
            "Does the density depend on them? A second module under one name, a detach() or a branch leaves them out."
        )
        yield finding("no-gradient", message, cure, still[0])


@contextmanager
def _put_aside(subject: Subject, loss: Any) -> Iterator[None]:
    """Give all that has a gradient of this loss the one back that it had, in the param store or not."""
    strays = [(t, t.grad) for t in stray_tensors(subject.model, subject.guide, subject.batch.args, "both")]
    with gradients_put_aside(subject.model, subject.guide, loss):
        try:
            yield
        finally:
            for tensor, grad in strays:
                tensor.grad = grad


def _without_gradient(moments: Mapping[str, RunningMoments]) -> list[str]:
    return [name for name, each in moments.items() if not (each.mean.any() or each.variance.any())]


@contextmanager
def _moved(leaves: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Parameters a little beside their values."""
    values = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    try:
        with torch.no_grad():
            for leaf in leaves.values():
                leaf.add_(0.01 * torch.randn_like(leaf))
        yield
    finally:
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(values[name])


def _options(subject: Subject, loss: Any) -> Iterator[Finding]:
    """What the options of a Pyro loss make of this pair."""
    if not isinstance(loss, ELBO):
        return
    depth, known = nesting(subject.pair.model, subject.pair.guide), getattr(loss, "max_plate_nesting", math.inf)
    if known < depth:
        message = f"loss: expected max_plate_nesting of {depth} or more, as deep as the plates are, got {known:g}."
        yield finding("plate-nesting", message, "A loss keeps that number from its first pair: make a new one.")
    plan = subject.plan
    modes = [] if plan is None else [mode for mode in (plan.model_mode, plan.guide_mode) if mode in OTHER_MODES]
    if modes and loss.vectorize_particles and loss.num_particles > 1:
        message = f"loss: expected a pair that takes particles as a further dimension, got one that is {modes[0]}."
        yield finding("vectorised-particles", message, "Pass vectorize_particles=False: it fails or is wrong as it is.")


def _drawn(subject: Subject) -> Iterator[Finding]:
    """Discrete latents that are left to a loss that does not enumerate them."""
    drawn = drawn_latents(subject.pair.model, subject.pair.guide, subject.loss)
    if drawn:
        kind = type(getattr(subject.loss, "wrapped", subject.loss)).__name__
        message = f"latents {quoted(drawn)}: the guide lacks them, and {kind} draws them from the prior."
        cure = (
            "Its bound is looser than with these summed out: loss=None does that, and so does TraceEnum_ELBO of a "
            'model under config_enumerate (or with infer={"enumerate": "parallel"} at the site).'
        )
        yield finding("drawn-from-prior", message, cure, drawn[0])


def _score(subject: Subject, loss: Any) -> Iterator[Finding]:
    """Discrete latents, which have no gradient of their own."""
    if not isinstance(loss, ELBO) or uses_mean_field(loss):
        return
    kind = type(loss).__name__
    with torch.enable_grad():
        guide = run(subject.guide, subject.batch.args)
    latents = {n: s for n, s in guide.items() if is_latent(s)}
    if isinstance(loss, TraceEnum_ELBO):
        latents = {n: s for n, s in latents.items() if not s["infer"].get("enumerate")}
    for name in (n for n, s in latents.items() if needs_score(s)):
        message = f"guide site {name!r}: {kind} has no reparameterised draws of it to differentiate."
        cure = "Its gradient is that of the score function, which is noisy: see objectives.gradient_snr."
        yield finding("score-function", message, cure, name)


def _kl(subject: Subject, program: Model, loss: Any) -> Iterator[Finding]:
    """The KL terms of ``TraceMeanField_ELBO``."""
    if not uses_mean_field(loss):
        return
    drawn = check_mean_field(program, subject.guide, subject.batch.args).monte_carlo
    if drawn:
        message = f"latents {quoted(drawn)}: TraceMeanField_ELBO has no closed form of the KL."
        yield finding("kl-from-draws", message, "It is taken from one draw, as in Trace_ELBO.", drawn[0])


#: In the order in which they are asked.
QUESTIONS = (_drawn, _gradients)
