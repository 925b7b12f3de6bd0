"""Three ways to run a program for K particles, all giving the same numbers for the same latents.

* vectorised: once, inside a particle plate to the left of all others; values are ``(K, N, ...)``.
* folded: once, on x repeated to K * N rows; convolutions and reshapes see an ordinary, larger batch.
* looped: K times; Python control flow takes its own branch for each particle.

Between programs the values of latents are *canonical*: ``(K, *batch, *event)``, with as many batch dimensions as the
pair's plates use.
"""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_lvm.errors import SiteError
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.intercept import PARTICLES, Site, Trace, is_latent, run, vectorised_frames
from pyro_lvm.tracing.tables import Table, tabulate

__all__ = ["Draws", "Latent", "Layout", "Mode", "Runner", "draw_from"]

Mode = Literal["vectorised", "folded", "looped"]


@dataclass(frozen=True)
class Layout:
    """Where a program keeps its data: name and dimension of the data plate, and how many dimensions plates use.

    ``plate=None`` is one joint result; ``dim=None`` a sequential plate.
    """

    plate: str | None
    dim: int | None
    nesting: int

    def num_data(self, data: Sized) -> int:
        """N, 1 for a joint result."""
        return 1 if self.plate is None else len(data)

    def data_second(self, value: torch.Tensor) -> torch.Tensor:
        """``(K, N, ...)`` of a canonical value; N is 1 where no dimension holds the data."""
        return value.unsqueeze(1) if self.dim is None else value.movedim(1 + self.nesting + self.dim, 1)

    def canonical(self, value: torch.Tensor) -> torch.Tensor:
        """The way back from `data_second`."""
        return value.squeeze(1) if self.dim is None else value.movedim(1, 1 + self.nesting + self.dim)


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

    def per_datum(self, layout: Layout) -> torch.Tensor:
        """``(K, N, *other plates, *event)``; ``(K, *batch, *event)`` where no dimension holds the data."""
        plates = layout.nesting - self.rank
        value = self.value.reshape(self.value.shape[:1] + self.value.shape[1 + plates :])
        return value if layout.dim is None else value.movedim(1 + self.rank + layout.dim, 1)

    def rows(self, index: slice, layout: Layout) -> "Latent":
        """Some of the data."""
        if layout.dim is None:
            return self
        where = (slice(None),) * (1 + layout.nesting + layout.dim) + (index,)
        return Latent(self.value[where], self.rank)


Draws = Mapping[str, Latent]


@dataclass(frozen=True)
class Runner:
    """A program of a pair, to be run for K particles.

    Attributes:
        program: the model or the guide.
        layout: where its data are.
        names: picks the sites of a trace whose densities count.
        enumerated: discrete latents to sum out.
        check_support: latents that may be handed values from outside of their support.
    """

    program: Callable[..., Any]
    layout: Layout
    names: Callable[[Trace], Sequence[str]]
    enumerated: tuple[str, ...] = ()
    check_support: frozenset[str] = frozenset()

    def run(
        self,
        batch: Batch,
        mode: Mode,
        num_particles: int,
        draws: Draws | None = None,
        ranks: dict[str, int] | None = None,
    ) -> tuple[Table, dict[str, Latent]]:
        """The table ``(K, N)`` of the program, and its latent values.

        ``draws`` sets latents, others are drawn; ``ranks`` is filled in vectorised mode, see `intercept.run`.
        """
        draws = draws or {}
        if mode == "vectorised":
            return self._vectorised(batch, num_particles, draws, ranks)
        return (
            self._folded(batch, num_particles, draws) if mode == "folded" else self._looped(batch, num_particles, draws)
        )

    def _vectorised(
        self, batch: Batch, num_particles: int, draws: Draws, ranks: dict[str, int] | None
    ) -> tuple[Table, dict[str, Latent]]:
        trace = run(
            self.program,
            batch.args,
            values={n: d.value for n, d in draws.items()},
            num_particles=num_particles,
            nesting=self.layout.nesting,
            enumerated=self.enumerated,
            ranks=ranks,
        )
        table = self._table(trace, self.layout.num_data(batch), self.layout.nesting + 1)
        return table, _latents(trace, lambda value, rank: value)

    def _folded(self, batch: Batch, num_particles: int, draws: Draws) -> tuple[Table, dict[str, Latent]]:
        values = {n: d.folded(self.layout) for n, d in draws.items()}
        trace = self._plain(batch.repeat(num_particles), values)
        rows = self._table(trace, num_particles * len(batch), self.layout.nesting)
        shape = (num_particles, len(batch))
        table = Table(rows.total.reshape(shape), rows.magnitude.reshape(shape).amax(0))
        return table, _latents(trace, lambda value, rank: _unfold(value, rank, self.layout, num_particles))

    def _looped(self, batch: Batch, num_particles: int, draws: Draws) -> tuple[Table, dict[str, Latent]]:
        tables, latents = [], []
        for k in range(num_particles):
            trace = self._plain(batch, {n: d.single(k, self.layout) for n, d in draws.items()})
            tables.append(self._table(trace, self.layout.num_data(batch), self.layout.nesting))
            latents.append(_latents(trace, lambda value, rank: _pad(value, rank, self.layout)[None]))
        if any(each.keys() != latents[0].keys() for each in latents):
            differing = {n for each in latents for n in each if not all(n in other for other in latents)}
            raise SiteError(
                f"sites {sorted(differing)}: expected the same latent sites for every particle, got some that only "
                "some particles have. Give each path a model of its own, or mask the site where it is not used."
            )
        stacked = {n: Latent(torch.cat([each[n].value for each in latents]), d.rank) for n, d in latents[0].items()}
        total, magnitude = torch.cat([t.total for t in tables]), torch.stack([t.magnitude for t in tables])
        return Table(total, magnitude.amax(0)), stacked

    def _plain(self, batch: Batch, values: Mapping[str, torch.Tensor]) -> Trace:
        """One run without a particle plate."""
        return run(self.program, batch.args, values=values, nesting=self.layout.nesting, enumerated=self.enumerated)

    def _table(self, trace: Trace, rows: int, batch_dims: int) -> Table:
        return tabulate(
            trace,
            self.names(trace),
            self.layout.plate,
            rows,
            batch_dims=batch_dims,
            check_support=self.check_support,
        )


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


def draw_from(
    trace: Trace, num_particles: int, layout: Layout, batch: Batch, draws: Draws | None = None
) -> tuple[Table, dict[str, Latent]]:
    """Draw K particles from the distributions of one guide run, whose sites do not depend on one another.

    ``draws`` are particles from before, to be scored.
    """
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
        value = many() if draws is None else draws[name].value
        drawn[name] = {**site, "fn": many, "value": value, "cond_indep_stack": stack}
    latents = _latents(drawn, lambda value, rank: value)
    table = tabulate(drawn, list(drawn), layout.plate, layout.num_data(batch), batch_dims=layout.nesting + 1)
    return table, latents
