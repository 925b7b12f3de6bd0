"""A loss and the model as it sees it; where none is named, the ELBO with what the guide leaves out summed out."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)

from pyro_lvm._checks import refuse
from pyro_lvm.errors import DataTypeError, SiteError
from pyro_lvm.objectives.annealing import KLAnnealing
from pyro_lvm.objectives.importance_weighted import ImportanceWeightedELBO
from pyro_lvm.tracing.intercept import Trace, base_distribution, is_latent, is_unobserved, without
from pyro_lvm.tracing.params import anchor
from pyro_lvm.tracing.plates import nesting
from pyro_lvm.tracing.sites import check_observes

__all__ = ["check_loss", "default_loss", "drawn_latents", "model_and_loss", "summed_latents"]

Program = Callable[..., Any]

_DRAWING = (Trace_ELBO, TraceGraph_ELBO, RenyiELBO, ReweightedWakeSleep)
_ENUMERATING = (TraceEnum_ELBO, TraceTMC_ELBO)  # what is marked for it


def check_loss(loss: Any) -> None:
    """Refuse what is neither None, nor a loss object, nor a function.

    Raises:
        DataTypeError: it is a class, or cannot be called.
    """
    if loss is not None and (not callable(loss) or isinstance(loss, type)):
        cure = "Pass e.g. pyro.infer.Trace_ELBO(), or a function loss(model, guide, *args)."
        raise DataTypeError(refuse("loss", "a loss object or function", repr(loss), cure))


def model_and_loss(program: Program, owner: Program, model: Trace, guide: Trace, loss: Any) -> tuple[Program, Any]:
    """The model as the loss sees it, and the loss, which is `default_loss` for None.

    Args:
        program: the model.
        owner: the model as the user wrote it, where ``program`` wraps it.
        model: a run of the model.
        guide: a run of the guide.
        loss: what the user gave.

    Raises:
        SiteError: no loss is given and the guide lacks a latent that cannot be enumerated; or the guide lacks a latent
            and the model observes nothing.
    """
    unobserved = [n for n, s in model.items() if is_latent(s) and n not in guide and is_unobserved(n)]
    if unobserved and not isinstance(loss, ImportanceWeightedELBO):  # whose log-weights leave these sites out
        # The half of an obs_mask that is not there: drawn from the model, it cancels.
        program = without(program, unobserved.__contains__)
    seen = {n: s for n, s in model.items() if n not in unobserved}
    if loss is not None:
        if isinstance(loss, ELBO):
            check_observes(seen, _missing(seen, guide))
        return program, loss
    loss, enumerate_model = default_loss(owner, seen, guide)
    return config_enumerate(program) if enumerate_model else program, loss


def default_loss(program: Program, model: Trace, guide: Trace) -> tuple[Any, bool]:
    """`Trace_ELBO`, or `TraceEnum_ELBO` where a discrete latent is left to it; and whether the model must be marked.

    Without a guide, a model with latents that Pyro cannot enumerate is trained by its own exact ``log_prob``.
    """
    missing = _missing(model, guide)
    lacking = [n for n, fn in missing.items() if not getattr(fn, "has_enumerate_support", False)]
    if lacking and not guide and callable(getattr(anchor(program), "log_prob", None)):
        return _exact(anchor(program)), False
    check_observes(model, missing)
    if lacking:
        latents = [n for n, s in model.items() if is_latent(s)]
        sampled = [n for n, s in guide.items() if is_latent(s)]
        cure = f"Sample {lacking} in the guide: only discrete latents may be left out, to be enumerated."
        message = refuse("guide", f"the latent sites {latents} of the model", sampled, cure)
        raise SiteError(message, finding="missing-site")
    marked = any(is_latent(s) and s["infer"].get("enumerate") for s in guide.values())
    if not (missing or marked):
        return Trace_ELBO(), False
    return TraceEnum_ELBO(max_plate_nesting=nesting(model, guide)), bool(missing)


def drawn_latents(model: Trace, guide: Trace, loss: Any) -> list[str]:
    """Discrete latents that the guide lacks and the loss of a user draws from the prior, where others sum them out."""
    loss = loss.wrapped if isinstance(loss, KLAnnealing) else loss
    drawn = _discrete(model, guide) if isinstance(loss, _DRAWING + _ENUMERATING) else []
    if isinstance(loss, _ENUMERATING):
        drawn = [n for n in drawn if model[n]["infer"].get("enumerate") != "parallel"]
    return drawn


def summed_latents(model: Trace, guide: Trace, loss: Any) -> list[str]:
    """Discrete latents that the guide lacks and Pyro sums out, for a loss of its own or where none is given."""
    loss = loss.wrapped if isinstance(loss, KLAnnealing) else loss
    if loss is not None and not isinstance(loss, _ENUMERATING):
        return []
    drawn = drawn_latents(model, guide, loss)
    return [name for name in _discrete(model, guide) if name not in drawn]


def _discrete(model: Trace, guide: Trace) -> list[str]:
    """Latents that the guide lacks and that could be summed out."""
    missing = _missing({n: s for n, s in model.items() if not is_unobserved(n)}, guide)
    return [n for n, fn in missing.items() if getattr(fn, "has_enumerate_support", False)]


def _missing(model: Trace, guide: Trace) -> dict[str, Any]:
    """The distributions of the latents that the guide lacks and that are not determined by others."""
    latents = {n: s["fn"] for n, s in model.items() if is_latent(s) and n not in guide}
    return {n: fn for n, fn in latents.items() if not isinstance(base_distribution(fn), Delta)}


def _exact(owner: Any) -> Callable[..., torch.Tensor]:
    def negative_log_prob(model: Program, guide: Program, *args: Any) -> torch.Tensor:
        if isinstance(owner, torch.nn.Module):
            pyro.module(type(owner).__name__, owner)  # where `SVI` looks for parameters
        return -owner.log_prob(*args).sum()

    return negative_log_prob
