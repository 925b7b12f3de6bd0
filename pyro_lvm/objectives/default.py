"""The loss of a pair where none is named: the ELBO, with what the guide leaves out summed or integrated out."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from pyro_lvm._checks import refuse
from pyro_lvm.errors import SiteError
from pyro_lvm.tracing.intercept import Trace, base_distribution, is_latent
from pyro_lvm.tracing.params import anchor
from pyro_lvm.tracing.plates import nesting

__all__ = ["default_loss"]

Program = Callable[..., Any]


def default_loss(program: Program, model: Trace, guide: Trace) -> tuple[Any, bool]:
    """`Trace_ELBO`, or `TraceEnum_ELBO` where a discrete latent is left to it; and whether the model must be marked.

    Without a guide, a model with latents that Pyro cannot enumerate is trained by its own exact ``log_prob``.
    """
    latents = {n: s["fn"] for n, s in model.items() if is_latent(s)}
    missing = {n: fn for n, fn in latents.items() if n not in guide and not isinstance(base_distribution(fn), Delta)}
    lacking = [n for n, fn in missing.items() if not getattr(fn, "has_enumerate_support", False)]
    if lacking and not guide and callable(getattr(anchor(program), "log_prob", None)):
        return _exact(anchor(program)), False
    if lacking:
        sampled = [n for n, s in guide.items() if is_latent(s)]
        cure = f"Sample {lacking} in the guide: only discrete latents may be left out, to be enumerated."
        raise SiteError(refuse("guide", f"the latent sites {list(latents)} of the model", sampled, cure))
    marked = any(is_latent(s) and s["infer"].get("enumerate") for s in guide.values())
    if not (missing or marked):
        return Trace_ELBO(), False
    return TraceEnum_ELBO(max_plate_nesting=nesting(model, guide)), bool(missing)


def _exact(owner: Any) -> Callable[..., torch.Tensor]:
    def negative_log_prob(model: Program, guide: Program, *args: Any) -> torch.Tensor:
        if isinstance(owner, torch.nn.Module):
            pyro.module(type(owner).__name__, owner)  # where `SVI` looks for parameters
        return -owner.log_prob(*args).sum()

    return negative_log_prob
