"""Whether a model says of enumerated values what it says of each of them alone.

Enumeration puts the values of a discrete latent in a dimension of their own, to the left of all plates. A program that
indexes with them, ``table[c]``, or stacks them, may move that dimension to where another latent has its own, or none.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from pyro_lvm.errors import SiteError
from pyro_lvm.tracing.intercept import Site, Trace, Values, is_latent, is_observed, run, site_log_prob

__all__ = ["check_enumerated"]

_CELLS = 8  # joint values that are looked at


def check_enumerated(
    model: Any, args: Sequence[Any], values: Values, names: Sequence[str], free: Collection[str], nesting: int
) -> None:
    """The log-densities of a run with ``names`` enumerated are those of runs with some of their values set.

    Args:
        model: the model.
        args: its arguments.
        values: of the other latents.
        names: of the latents that are summed out.
        free: latents whose densities do not count.
        nesting: number of batch dimensions that plates use.

    Raises:
        SiteError: those of a site are not.
    """
    if not names:
        return
    every = run(model, args, values=values, nesting=nesting, enumerated=names)
    where = {name: every[name]["infer"]["_enumerate_dim"] for name in names}
    ids = {every[name]["infer"]["_dim_to_id"][dim]: name for name, dim in where.items()}
    sizes = {name: every[name]["value"].shape[dim - every[name]["fn"].event_dim] for name, dim in where.items()}
    for _ in range(_CELLS):
        chosen = {name: int(torch.randint(size, ())) for name, size in sizes.items()}
        given = {**values, **_values(every, where, chosen)}
        alone = run(model, args, values=given, nesting=nesting)
        cell = {each: chosen[name] for each, name in ids.items()}
        for name in (n for n, s in every.items() if (is_latent(s) or is_observed(s)) and n not in free):
            site = every[name]
            expected = _log_prob(alone, site)
            got = _at(site, site_log_prob(site), cell, nesting)
            if got is not None and _alike(got, expected):
                continue
            if not _alike(_log_prob(run(model, args, values=given, nesting=nesting), site), expected):
                return  # it has noise of its own, and no run is like another
            raise SiteError(
                f"site {name!r}: expected a log-density for each value of {list(names)} in a dimension of its own, "
                f"left of the plates, got batch shape {tuple(site_log_prob(site).shape)}, which is not what the values "
                "give one by one. Index with `Vindex(table)[..., c, :]` (pyro.ops.indexing) rather than `table[c]`, "
                "and do not stack, reshape or flatten what is made of them; a dimension more, c.unsqueeze(-1), is for "
                "where they meet an event.",
                finding="moved-values",
            )


def _log_prob(trace: Trace, site: Site) -> torch.Tensor:
    """The log-density of a site in another run, taken as in this one."""
    return site_log_prob({**trace[site["name"]], "infer": site["infer"]})


def _values(every: Mapping[str, Site], where: Mapping[str, int], chosen: Mapping[str, int]) -> Values:
    """The chosen value of each enumerated site, for all elements of its plates."""
    found = {}
    for name, dim in where.items():
        value, fn = every[name]["value"], every[name]["fn"]
        one = value.select(dim - fn.event_dim, chosen[name])
        plates = {frame.dim: frame.size for frame in every[name]["cond_indep_stack"] if frame.dim is not None}
        rank = max((-dim for dim in plates), default=0)
        shape = [plates.get(dim, 1) for dim in range(-rank, 0)]
        found[name] = one.reshape(fn.event_shape).expand((*shape, *fn.event_shape))
    return found


def _at(site: Site, log_prob: torch.Tensor, cell: Mapping[int, int], nesting: int) -> torch.Tensor | None:
    """What a site says of one joint value; None where a dimension is of no variable, or of one with other values."""
    ids = site["infer"].get("_dim_to_id", {})
    for dim in range(-log_prob.dim(), -nesting):
        if log_prob.shape[dim] == 1:
            continue
        index = cell.get(ids.get(dim, -1))
        if index is None or index >= log_prob.shape[dim]:
            return None
        log_prob = log_prob.narrow(dim, index, 1)
    return log_prob


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    try:
        one, other = torch.broadcast_tensors(one, other)
    except RuntimeError:
        return False
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-3, equal_nan=True)
