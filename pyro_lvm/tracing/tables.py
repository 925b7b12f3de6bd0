"""From a trace to a table: the log-densities of its sites, reduced to one number per particle and datum.

A table has shape ``(K, N)``: particles by data. Its magnitude, per datum, is the size of the terms that were added up,
which tells rounding noise from real spread.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from pyro.ops.contract import contract_to_tensor

from pyro_lvm.errors import SiteError
from pyro_lvm.tracing.intercept import PARTICLES, Site, Trace, site_log_prob, vectorised_frames

__all__ = ["Table", "agree", "tabulate"]


@dataclass(frozen=True)
class Table:
    """log-densities ``total (K, N)`` in nats, and ``magnitude (N,)``, the largest sum of absolute site terms."""

    total: torch.Tensor
    magnitude: torch.Tensor

    def __sub__(self, other: "Table") -> "Table":
        device = self.total.device  # a program without sites has a table, of zeros, on no device in particular
        return Table(self.total - other.total.to(device), torch.maximum(self.magnitude, other.magnitude.to(device)))


def tabulate(
    trace: Trace,
    names: Iterable[str],
    plate: str | None,
    num_data: int,
    *,
    batch_dims: int,
    check_support: Collection[str] = (),
) -> Table:
    """Sum the log-densities of the sites ``names`` over every dimension but the particles and the data plate.

    Args:
        trace: of a program, run by `intercept.run`.
        names: the sites to add up.
        plate: name of the data plate; with None everything is one datum.
        num_data: N.
        batch_dims: number of dimensions that plates use, particles included; enumeration is to their left.
        check_support: sites where a value outside the support has log-density -inf.

    Returns:
        `Table`; a site outside the particle plate counts as K = 1. A sequential data plate has one site per datum, told
        apart by the plate's counter.
    """
    enumerating = any(
        site["type"] == "sample" and site["infer"].get("_enumerate_dim") is not None for site in trace.values()
    )
    terms = []
    by_counter: dict[int, list[torch.Tensor]] = defaultdict(list)
    to_eliminate: dict[int | None, list[tuple[Site, torch.Tensor]]] = defaultdict(list)
    for name in names:
        site = trace[name]
        log_prob = _expanded(site, site_log_prob(site, name in check_support), batch_dims, enumerating)
        counter = _sequential_counter(site, plate)
        if any(size != 1 for size in log_prob.shape[: max(log_prob.dim() - batch_dims, 0)]):
            to_eliminate[counter].append((site, log_prob))
        elif counter is not None:
            by_counter[counter].append(_keep(site, log_prob, None))
        else:
            terms.append(_keep(site, log_prob, plate))
    for counter, factors in to_eliminate.items():
        table = _eliminate(factors, plate, batch_dims)
        (terms if counter is None else by_counter[counter]).append(table)
    if by_counter:
        terms.append(torch.cat([torch.stack(by_counter[c]).sum(0) for c in sorted(by_counter)], dim=-1))  # (K, N)
    if not terms:
        zero = torch.zeros(1, num_data)
        return Table(zero, zero[0])
    total = sum(terms[1:], terms[0])
    magnitude = sum((_size(term) for term in terms[1:]), _size(terms[0]))
    return Table(total.expand(total.shape[0], num_data), magnitude.amax(0).expand(num_data))


def _size(term: torch.Tensor) -> torch.Tensor:
    """What the rounding error of a term is proportional to: an infinite one, of a zero density, has none."""
    return term.detach().abs().masked_fill(term.isinf(), 0.0)


def _expanded(site: Site, log_prob: torch.Tensor, batch_dims: int, enumerating: bool) -> torch.Tensor:
    """``log_prob`` at the full sizes of its plates; any other dimension must come from enumeration."""
    sizes = {frame.dim: frame.size for frame in vectorised_frames(site)}
    rank = max(log_prob.dim(), *(-dim for dim in sizes), 0) if sizes else log_prob.dim()
    shape = [1] * (rank - log_prob.dim()) + list(log_prob.shape)
    innermost_enumeration = -batch_dims - 1 if enumerating else -rank - 1
    if any(shape[d] != 1 and d not in sizes and d > innermost_enumeration for d in range(-rank, 0)):
        raise SiteError(
            f"site {site['name']!r}: expected one log-density per element of its plates "
            f"{[(f.name, f.size) for f in vectorised_frames(site) if f.name != PARTICLES]}, got batch shape "
            f"{tuple(log_prob.shape)}. Declare the other dimensions as the event: `dist.Normal(...).to_event(1)`.",
            finding="event-dims",
        )
    for dim, size in sizes.items():
        shape[dim] = size if size >= 0 else shape[dim]
    return log_prob.expand(shape)


def _sequential_counter(site: Site, plate: str | None) -> int | None:
    counters = [f.counter for f in site["cond_indep_stack"] if f.name == plate and f.dim is None]
    return counters[0] if counters else None


def _keep(site: Site, log_prob: torch.Tensor, plate: str | None) -> torch.Tensor:
    """Sum a site over all but particles and data: ``(K, N)``, 1 where the site lacks the dimension."""
    dims = {frame.name: frame.dim for frame in vectorised_frames(site)}
    kept = [dims[name] for name in (PARTICLES, plate) if name in dims]
    summed = [dim for dim in range(-log_prob.dim(), 0) if dim not in kept]
    table = log_prob.sum(summed) if summed else log_prob
    if PARTICLES not in dims:
        table = table.unsqueeze(0)
    return table if plate in dims else table.unsqueeze(-1)


def _eliminate(factors: list[tuple[Site, torch.Tensor]], plate: str | None, batch_dims: int) -> torch.Tensor:
    """log of the sum over all enumerated values of the product of these sites, ``(K, N)``.

    Plated variable elimination (Obermeyer et al. 2019): a variable inside an inner plate is summed out before that
    plate's product, which a sum after adding up the log-densities would get wrong.
    """
    symbols: dict[Any, str] = defaultdict(lambda: chr(ord("a") + len(symbols)))
    tree: OrderedDict[frozenset[str], list[torch.Tensor]] = OrderedDict()
    dtype = reduce(torch.promote_types, (log_prob.dtype for _, log_prob in factors))
    for site, log_prob in factors:
        plates = {frame.dim: symbols[frame.name] for frame in vectorised_frames(site)}
        left = range(-log_prob.dim(), -batch_dims)
        identity = site["infer"].get("_dim_to_id", {})  # a Markov chain uses a dimension for one variable after another
        kept = plates | {dim: symbols[identity.get(dim, dim)] for dim in left if log_prob.shape[dim] != 1}
        term = log_prob.to(dtype).squeeze([dim for dim in range(-log_prob.dim(), 0) if dim not in kept])
        term._pyro_dims = "".join(kept[dim] for dim in sorted(kept))  # type: ignore[attr-defined]
        tree.setdefault(frozenset(plates.values()), []).append(term)
    variables = {letter for key, letter in symbols.items() if isinstance(key, int)}
    names = [name for name in (PARTICLES, plate) if name in symbols]
    result = contract_to_tensor(tree, variables, target_ordinal=frozenset(symbols[name] for name in names))
    result = result.permute([result._pyro_dims.index(symbols[name]) for name in names])
    if PARTICLES not in names:
        result = result.unsqueeze(0)
    return result if plate in names else result.unsqueeze(-1)


def agree(expected: Table, got: Table) -> bool:
    """Whether two tables are equal up to rounding."""
    if got.total.shape not in (expected.total.shape, (1, *expected.total.shape[1:])):
        return False
    eps = torch.finfo(got.total.dtype).eps
    allowed = 256 * eps * torch.maximum(expected.magnitude, got.magnitude).clamp(min=1.0)
    same = (expected.total - got.total).abs() <= allowed
    same |= (expected.total == got.total) | (expected.total.isnan() & got.total.isnan())
    return bool(same.all())
