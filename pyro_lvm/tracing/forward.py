"""Running a model forwards: what it would observe, given some of its latents; and the values of a discrete latent."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import infer_discrete

from pyro_lvm._checks import refuse
from pyro_lvm.errors import PlateError, SiteError, SupportError
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.intercept import Site, Trace, Values, base_distribution, is_observed, run
from pyro_lvm.tracing.particles import Draws, Latent
from pyro_lvm.tracing.probe import Plan, model_runner
from pyro_lvm.tracing.tables import Table

__all__ = [
    "class_table",
    "classes",
    "forward",
    "has_values",
    "observed_site",
    "one_of",
    "summed_out_values",
    "template",
]


def template(batch: Batch, num_rows: int) -> Batch:
    """The arguments for that many rows: those given if there are as many, else the first row over and over."""
    return batch if len(batch) == num_rows else batch.rows(slice(0, 1)).repeat(num_rows)


def forward(model: Any, batch: Batch, values: Values | None = None) -> Trace:
    """The model with ``values`` of some latents; all else is drawn, what it observes in ``batch`` too.

    Raises:
        PlateError: the model draws another number of data than ``batch`` has.
    """
    trace = run(poutine.uncondition(model), batch.args, values=values)
    drawn = [site for name, site in trace.items() if site["infer"].get("was_observed") and has_values(site)]
    sizes = [{frame.name: frame.size for frame in site["cond_indep_stack"]} for site in drawn]
    if not all(len(batch) in each.values() for each in sizes):
        cure = 'Give the plate the size len(x): `with pyro.plate("data", len(x)):`.'
        raise PlateError(refuse("model", f"a plate that follows x, here of {len(batch)} rows", sizes, cure))
    return trace


def one_of(site: str | None, there: Sequence[str], what: str) -> str:
    """``site`` if it is among those that are ``there``, or the only one of them.

    Raises:
        SiteError: it is not there, or is None and there are none or several.
    """
    if (isinstance(site, str) and site in there) or (site is None and len(there) == 1):
        return site or there[0]
    raise SiteError(refuse("site", f"one of the {what} {list(there)}", repr(site), "Name one with site=."))


def observed_site(trace: Trace, site: str | None) -> str:
    """`one_of` the sites that a model observes; factors are none."""
    there = [name for name, each in trace.items() if is_observed(each) and has_values(each)]
    return one_of(site, there, "observed sites")


def has_values(site: Site) -> bool:
    """Neither a factor, which has a density alone, nor what follows from other sites."""
    return not (site["infer"].get("_deterministic") or isinstance(base_distribution(site["fn"]), dist.Unit))


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


def classes(site: Site) -> torch.Tensor:
    """The values of a discrete latent with one value a datum, ``(C,)`` or ``(C, event)``.

    Raises:
        SupportError: the site is not discrete, or has more than one value for each datum.
    """
    fn, base = site["fn"], base_distribution(site["fn"])
    plates = [frame for frame in site["cond_indep_stack"] if frame.dim is not None]
    single = len(plates) == 1 and fn.event_dim == int(isinstance(base, dist.OneHotCategorical))
    if not (fn.has_enumerate_support and single):
        got = f"{type(base).__name__} of shape {tuple(fn.shape())}"
        cure = "For any other ask expectation(model, guide, x, fn)."
        raise SupportError(refuse(f"site {site['name']!r}", "a discrete latent with one value a datum", got, cure))
    values = fn.enumerate_support(expand=False)
    return values.reshape(len(values), *fn.event_shape)


def class_table(plan: Plan, model: Any, batch: Batch, draws: Draws, name: str, value: torch.Tensor, size: int) -> Table:
    """log p(x, y = value, z) of a discrete latent y that the guide lacks, at ``size`` draws of z, ``(K, N)``."""
    others = tuple(other for other in plan.match.enumerated if other != name)
    match = replace(plan.match, enumerated=others)
    layout = plan.model_layout
    rank = -layout.dim if layout.dim is not None else 0
    shape = (size, *(1,) * (layout.nesting - rank), len(batch), *(1,) * (rank - 1), *value.shape)
    given = {name: Latent(value.expand(shape), rank)}
    return model_runner(model, layout, match).run(batch, plan.model_mode, size, {**draws, **given})[0]
