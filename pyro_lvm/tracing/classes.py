"""Discrete latents that a guide lacks: their values, the density at each, and draws from their posterior."""

from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import infer_discrete

from pyro_lvm._checks import refuse
from pyro_lvm.errors import SupportError
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.intercept import Site, Values, base_distribution, vectorised_frames
from pyro_lvm.tracing.particles import Draws, Latent
from pyro_lvm.tracing.probe import Plan, model_runner
from pyro_lvm.tracing.tables import Table

__all__ = ["class_table", "classes", "summed_out_values"]


def summed_out_values(plan: Plan, model: Any, batch: Batch, values: Values) -> Values:
    """One draw from p(y | x, z) of the discrete latents y that the guide lacks, given the others, ``values``."""
    names = plan.match.enumerated
    if not names:
        return {}
    given = poutine.condition(model, data=dict(values))
    given = poutine.infer_config(given, lambda site: {"enumerate": "parallel"} if site["name"] in names else {})
    with poutine.block(hide_fn=lambda msg: msg["type"] != "param"):
        drawn = infer_discrete(given, first_available_dim=-plan.model_layout.nesting - 1)
        trace = poutine.trace(drawn).get_trace(*batch.args)
    return {name: trace.nodes[name]["value"] for name in names}


def classes(site: Site, joint: bool = False) -> torch.Tensor:
    """The values of a discrete latent with one value a datum, or with one in all, ``(C,)`` or ``(C, event)``.

    Raises:
        SupportError: the site is not discrete, or has more than one value for each result.
    """
    fn, base = site["fn"], base_distribution(site["fn"])
    single = fn.event_dim == int(isinstance(base, dist.OneHotCategorical))
    if not (fn.has_enumerate_support and single and len(vectorised_frames(site)) == (0 if joint else 1)):
        got = f"{type(base).__name__} of shape {tuple(fn.shape())}"
        cure = "For any other ask expectation(model, guide, x, fn)."
        expected = f"a discrete latent with one value {'of all data' if joint else 'a datum'}"
        raise SupportError(refuse(f"site {site['name']!r}", expected, got, cure))
    values = fn.enumerate_support(expand=False)
    return values.reshape(len(values), *fn.event_shape)


def class_table(plan: Plan, model: Any, batch: Batch, draws: Draws, name: str, value: torch.Tensor, size: int) -> Table:
    """log p(x, y = value, z) of a discrete latent y that the guide lacks, at ``size`` draws of z, ``(K, N)``."""
    others = tuple(other for other in plan.match.enumerated if other != name)
    match = replace(plan.match, enumerated=others)
    layout = plan.model_layout
    rank = -layout.dim if layout.dim is not None else 0  # else it is one value of all data
    plates = (len(batch), *(1,) * (rank - 1)) if rank else ()
    shape = (size, *(1,) * (layout.nesting - rank), *plates, *value.shape)
    given = {name: Latent(value.expand(shape), rank)}
    return model_runner(model, layout, match).run(batch, plan.model_mode, size, {**draws, **given})[0]
