"""Three ways to run a program for K particles, all giving the same numbers for the same latents.

* vectorised: once, inside a particle plate to the left of all others; values are ``(K, N, ...)``.
* folded: once, on x repeated to K * N rows; convolutions and reshapes see an ordinary, larger batch.
* looped: K times; Python control flow takes its own branch for each particle.

Between programs the values of latents are *canonical*: ``(K, *batch, *event)``, with as many batch dimensions as the
pair's plates use.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.intercept import PARTICLES, Site, Trace, is_latent, run, vectorised_frames
from pyro_lvm.tracing.tables import Table, tabulate

__all__ = ["Draws", "Latent", "Layout", "Mode", "draw_from", "run_program"]

Mode = Literal["vectorised", "folded", "looped"]


@dataclass(frozen=True)
class Layout:
    """Where a program keeps its data: name and dimension of the data plate, and how many dimensions plates use.

    ``plate=None`` is one joint result; ``dim=None`` a sequential plate.
    """

    plate: str | None
    dim: int | None
    nesting: int


@dataclass(frozen=True)
class Latent:
    """Canonical value ``(K, *batch, *event)`` of a site, and the number of batch dimensions that its plates use."""

    value: torch.Tensor
    rank: int

    def folded(self, layout: Layout) -> torch.Tensor:
        """Particles and data in one dimension: rows ``k * N + n``."""
        assert layout.dim is not None
        data = layout.nesting + layout.dim  # position of the data among the batch dimensions
        rows = self.value.movedim(0, data).flatten(data, data + 1)
        return rows.reshape(rows.shape[layout.nesting - self.rank :])

    def single(self, k: int, layout: Layout) -> torch.Tensor:
        """The value of particle ``k``, as the program itself would draw it."""
        value = self.value[k]
        return value.reshape(value.shape[layout.nesting - self.rank :])

    def rows(self, index: slice, layout: Layout) -> "Latent":
        """Some of the data."""
        if layout.dim is None:
            return self
        where = (slice(None),) * (1 + layout.nesting + layout.dim) + (index,)
        return Latent(self.value[where], self.rank)


Draws = Mapping[str, Latent]


def run_program(  # noqa: PLR0913
    program: Callable[..., Any],
    batch: Batch,
    layout: Layout,
    mode: Mode,
    num_particles: int,
    names: Callable[[Trace], Sequence[str]],
    draws: Draws | None = None,
    *,
    enumerated: Sequence[str] = (),
    check_support: frozenset[str] = frozenset(),
    ranks: dict[str, int] | None = None,
) -> tuple[Table, dict[str, Latent]]:
    """Run ``program`` for K particles; returns the table of the sites that ``names`` picks, and its latent values.

    ``draws`` sets latent sites; those not in it are drawn.
    """
    draws = draws or {}
    num_data = 1 if layout.plate is None else len(batch)

    def table(trace: Trace, rows: int, batch_dims: int) -> Table:
        return tabulate(trace, names(trace), layout.plate, rows, batch_dims=batch_dims, check_support=check_support)

    if mode == "vectorised":
        values = {n: d.value for n, d in draws.items()}
        trace = run(
            program,
            batch.args,
            values=values,
            num_particles=num_particles,
            nesting=layout.nesting,
            enumerated=enumerated,
            ranks=ranks,
        )
        latents = _latents(trace, lambda value, rank: value)
        return table(trace, num_data, layout.nesting + 1), latents

    if mode == "folded":
        values = {n: d.folded(layout) for n, d in draws.items()}
        repeated = batch.repeat(num_particles)
        trace = run(program, repeated.args, values=values, nesting=layout.nesting, enumerated=enumerated)
        rows = table(trace, num_particles * num_data, layout.nesting)
        folded = Table(
            rows.total.reshape(num_particles, num_data), rows.magnitude.reshape(num_particles, num_data).amax(0)
        )
        return folded, _latents(trace, lambda value, rank: _unfold(value, rank, layout, num_particles))

    tables, latents_of = [], []
    for k in range(num_particles):
        values = {n: d.single(k, layout) for n, d in draws.items()}
        trace = run(program, batch.args, values=values, nesting=layout.nesting, enumerated=enumerated)
        tables.append(table(trace, num_data, layout.nesting))
        latents_of.append(_latents(trace, lambda value, rank: _pad(value, rank, layout)[None]))
    stacked = {n: Latent(torch.cat([ls[n].value for ls in latents_of]), d.rank) for n, d in latents_of[0].items()}
    total = torch.cat([t.total for t in tables])
    return Table(total, torch.stack([t.magnitude for t in tables]).amax(0)), stacked


def _latents(trace: Trace, canonical: Callable[[torch.Tensor, int], torch.Tensor]) -> dict[str, Latent]:
    latents = {}
    for name, site in trace.items():
        if is_latent(site) and site["infer"].get("_enumerate_dim") is None:
            rank = _rank(site)
            latents[name] = Latent(canonical(site["value"], rank), rank)
    return latents


def _rank(site: Site) -> int:
    """Number of batch dimensions that a site's own plates use."""
    return max((-f.dim for f in vectorised_frames(site) if f.name != PARTICLES), default=0)


def _pad(value: torch.Tensor, rank: int, layout: Layout) -> torch.Tensor:
    """With as many batch dimensions as the pair uses."""
    return value.reshape((1,) * (layout.nesting - rank) + tuple(value.shape))


def _unfold(value: torch.Tensor, rank: int, layout: Layout, num_particles: int) -> torch.Tensor:
    assert layout.dim is not None
    data = layout.nesting + layout.dim
    return _pad(value, rank, layout).unflatten(data, (num_particles, -1)).movedim(data, 0)


def draw_from(trace: Trace, num_particles: int, layout: Layout, num_data: int) -> tuple[Table, dict[str, Latent]]:
    """Draw K particles from the distributions of one guide run, whose sites do not depend on one another."""
    drawn: Trace = {}
    for name, site in trace.items():
        if not is_latent(site):
            continue
        fn = site["fn"]
        shape = (num_particles, *(1,) * (layout.nesting - len(fn.batch_shape)), *fn.batch_shape)
        many = fn.expand(torch.Size(shape))
        if many.has_rsample != fn.has_rsample:
            many.has_rsample = fn.has_rsample  # expand() forgets an attribute that was set on the instance
        frame = CondIndepStackFrame(PARTICLES, -layout.nesting - 1, num_particles, 0, num_particles)
        stack = (frame, *site["cond_indep_stack"])
        drawn[name] = {**site, "fn": many, "value": many(), "cond_indep_stack": stack}
    latents = _latents(drawn, lambda value, rank: value)
    table = tabulate(drawn, list(drawn), layout.plate, num_data, batch_dims=layout.nesting + 1)
    return table, latents
