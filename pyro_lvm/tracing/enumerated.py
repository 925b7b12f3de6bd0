"""Whether a model says of enumerated values what it says of each of them alone.

Enumeration puts the values of a discrete latent in a dimension of their own, to the left of all plates. A program that
indexes with them, ``table[c]``, or stacks them, may move that dimension to where another latent has its own, or none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyro_lvm.errors import SiteError
from pyro_lvm.tracing.intercept import Site, Values, run, site_log_prob
from pyro_lvm.tracing.sites import Match

__all__ = ["check_enumerated"]

_CELLS = 8  # joint values that are looked at


def check_enumerated(model: Any, args: Sequence[Any], values: Values, match: Match, nesting: int) -> None:
    """The log-densities of an enumerated run are those of runs with some of the values set.

    Raises:
        SiteError: those of a site are not.
    """
    if not match.enumerated:
        return
    every = run(model, args, values=values, nesting=nesting, enumerated=match.enumerated)
    where = {name: every[name]["infer"]["_enumerate_dim"] for name in match.enumerated}
    ids = {every[name]["infer"]["_dim_to_id"][dim]: name for name, dim in where.items()}
    sizes = {name: every[name]["value"].shape[dim - every[name]["fn"].event_dim] for name, dim in where.items()}
    for _ in range(_CELLS):
        chosen = {name: int(torch.randint(size, ())) for name, size in sizes.items()}
        alone = run(model, args, values={**values, **_values(every, where, chosen, nesting)}, nesting=nesting)
        cell = {each: chosen[name] for each, name in ids.items()}
        for name in match.model_sites(every):
            site = every[name]
            expected = site_log_prob({**alone[name], "infer": site["infer"]})
            got = _at(site, site_log_prob(site), cell, nesting)
            if got is None or not _alike(got, expected):
                raise SiteError(
                    f"site {name!r}: expected a log-density for each value of {list(match.enumerated)} in a dimension "
                    f"of its own, left of the plates, got batch shape {tuple(site_log_prob(site).shape)}, which is not "
                    "what the values give one by one. Index with `Vindex(table)[..., c, :]` (pyro.ops.indexing) rather "
                    "than `table[c]`, and do not stack, reshape or flatten what is made of them; a dimension more, "
                    "c.unsqueeze(-1), is for where they meet an event."
                )


def _values(every: Mapping[str, Site], where: Mapping[str, int], chosen: Mapping[str, int], nesting: int) -> Values:
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
