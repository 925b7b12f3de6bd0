"""Running a model forwards: what it would observe, given some of its latents."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from pyro.poutine.uncondition_messenger import UnconditionMessenger

from pyro_lvm._checks import refuse
from pyro_lvm.errors import PlateError, SiteError
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.intercept import Site, Trace, Values, base_distribution, is_observed, run

__all__ = ["forward", "has_values", "observed_site", "one_of", "template"]


class _Uncondition(UnconditionMessenger):
    """Draws what is observed; not what follows from other sites, to which Pyro would give the shape of its plates."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


def template(batch: Batch, num_rows: int) -> Batch:
    """The arguments for that many rows: those given if there are as many, else the first row over and over."""
    return batch if len(batch) == num_rows else batch.rows(slice(0, 1)).repeat(num_rows)


def forward(model: Any, batch: Batch, values: Values | None = None) -> Trace:
    """The model with ``values`` of some latents; all else is drawn, what it observes in ``batch`` too.

    Raises:
        PlateError: the model draws another number of data than ``batch`` has.
    """

    def drawing(*args: Any) -> None:
        with _Uncondition():
            model(*args)

    trace = run(drawing, batch.args, values=values)
    drawn = [site for site in trace.values() if site["infer"].get("was_observed") and has_values(site)]
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
