"""Data made by a model, together with the latents that made them, in the place of the data of a call."""

from collections.abc import Mapping, Sequence

import torch

from pyro_lvm._checks import refuse
from pyro_lvm._typing import Model
from pyro_lvm.errors import SiteError
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.forward import forward, has_values
from pyro_lvm.tracing.intercept import Site, Trace, is_latent, is_observed, is_unobserved, run
from pyro_lvm.tracing.particles import Latent, Layout

__all__ = ["canonical", "observed_arguments", "simulate"]


def observed_arguments(model: Model, batch: Batch) -> dict[str, int]:
    """Site -> the position of the argument that it observes: where what the model draws can be put.

    Raises:
        SiteError: the model has a factor, which cannot be drawn, or missing values; or it observes what is no argument
            as it stands, one argument twice, or nothing.
    """
    trace = run(model, batch.args)
    found = {n: _argument(s, batch) for n, s in trace.items() if is_observed(s) or is_unobserved(n)}
    if not found:
        raise SiteError(refuse("model", "a site with obs=", "none", "Observe x, so that it can be drawn."))
    if len(set(found.values())) < len(found):
        cure = "Pass what each of them observes as an argument of its own."
        raise SiteError(refuse("model", "one site for each argument that is observed", f"sites {list(found)}", cure))
    return found


def simulate(model: Model, batch: Batch, arguments: Mapping[str, int]) -> tuple[Trace, Batch]:
    """One forward run, and ``batch`` with what it observed in the place of these `observed_arguments`.

    Raises:
        SiteError: what the model draws depends on the data that it is given.
        PlateError: the plate does not follow x.
    """
    trace = forward(model, batch)
    args = list(batch.args)
    for name, i in arguments.items():
        args[i] = trace[name]["value"].reshape(args[i].shape).to(args[i])
    made = Batch(tuple(args), batch.per_datum)
    _check_reads_no_data(model, trace, made, arguments)
    return trace, made


def canonical(trace: Trace, names: Sequence[str], layout: Layout, rows: slice) -> dict[str, Latent]:
    """Latents of a plain run as one particle ``(1, *batch, *event)``, of some of the data."""
    latents = {}
    for name in names:
        value = trace[name]["value"]
        rank = value.dim() - trace[name]["fn"].event_dim
        padded = value.reshape(1, *[1] * (layout.nesting - rank), *value.shape)
        latents[name] = Latent(padded, rank).rows(rows, layout)
    return latents


def _argument(site: Site, batch: Batch) -> int:
    """The position of the argument that a site observes."""
    name, value = site["name"], site["value"]
    if is_unobserved(name):
        cure = "Leave out obs_mask=: simulated data are complete."
        raise SiteError(refuse(f"site {name!r}", "data without missing values", "an obs_mask", cure))
    if not has_values(site):
        cure = "Write the likelihood as `pyro.sample(..., obs=x)`, so that x can be drawn from it."
        raise SiteError(refuse(f"site {name!r}", "a distribution of the data", "a factor", cure))
    tensors = [(i, arg) for i, arg in enumerate(batch.args) if isinstance(arg, torch.Tensor)]
    same = [i for i, arg in tensors if arg is value] or [i for i, arg in tensors if _equal(arg, value)]
    if not same:
        cure = "Observe the argument as it stands, `obs=x`; what is made of x cannot be put back into it."
        raise SiteError(refuse(f"site {name!r}", "x or another argument as obs=", "other values", cure))
    return same[0]


def _equal(argument: torch.Tensor, value: torch.Tensor) -> bool:
    """The same numbers in the same order, in any shape."""
    return argument.numel() == value.numel() and torch.equal(argument.reshape(-1), value.reshape(-1).to(argument))


def _check_reads_no_data(model: Model, trace: Trace, made: Batch, arguments: Mapping[str, int]) -> None:
    """The densities at what was drawn are the same when the model is handed that as its data."""
    names = [name for name, site in trace.items() if is_latent(site) and has_values(site)]
    values = {name: trace[name]["value"] for name in names if name not in arguments}
    again = run(model, made.args, values=values)
    for name in names:
        before, after = (of[name]["fn"].log_prob(trace[name]["value"]) for of in (trace, again))
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-3, equal_nan=True):
            cure = "A model that is given x to predict x (an autoregressive likelihood) makes no data in one run."
            raise SiteError(
                refuse(f"site {name!r}", "a density that x does not enter", "another one for other x", cure)
            )
