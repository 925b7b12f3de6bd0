"""Tables of log-weights by captured graphs: the pair without Pyro, the encoder once for each chunk of data."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyro_lvm._typing import Guide, Model
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.capture import Graph, NotCapturable, capture, hoisted, likeness, pays
from pyro_lvm.tracing.probe import Plan
from pyro_lvm.tracing.tables import Table, agree
from pyro_lvm.tracing.weights import Proposal, weight_table

__all__ = ["CapturedTables", "Tables"]

logger = logging.getLogger("pyro_lvm")

_TIMED = 2  # plain tables whose time says whether to capture
_COMPARED = 2  # chunks of data on which a graph is compared with a plain run


class Tables:
    """Log-weights of a pair, chunk by chunk.

    Attributes:
        note: how they are made.
    """

    note = "plain"

    def __init__(self, plan: Plan, model: Model, guide: Guide) -> None:
        self.plan, self.model, self.guide = plan, model, guide

    def of(self, batch: Batch, num_weights: int) -> Callable[[int], Table]:
        """For some data, a function of a number of particles K that draws a table ``(K, N)`` at each call.

        ``num_weights`` are still to come in all, on these data and on others.
        """
        proposal = Proposal(self.plan, self.guide, batch)
        return lambda num_particles: weight_table(self.plan, self.model, proposal, num_particles)


@dataclass(eq=False)
class _Replay:
    """What there is to know of tables of one shape."""

    calls: int = 0
    seconds: float = 0.0
    compared: int = 0
    first: Graph | None = None  # what all tables of a chunk of data share
    rest: Graph | None = None


class CapturedTables(Tables):
    """`Tables` by graphs, where that pays and works; the random numbers are the same.

    Args:
        plan: of the pair.
        model: p(x, z).
        guide: q(z | x).

    Attributes:
        note: how the tables are made, or why they are plain ones.
    """

    def __init__(self, plan: Plan, model: Model, guide: Guide) -> None:
        super().__init__(plan, model, guide)
        self.left = self.calls = 0
        self.replays: dict[Any, _Replay] = {}
        self.note, self.over = "plain: too short to pay for a capture", False
        if "looped" in (plan.model_mode, plan.guide_mode):
            self._end("the pair runs one particle at a time")

    def of(self, batch: Batch, num_weights: int) -> Callable[[int], Table]:
        """As `Tables.of`; from the number of weights to come follows what pays."""
        self.left = num_weights
        proposal = Proposal(self.plan, self.guide, batch)
        shared: dict[int, tuple[torch.Tensor, ...]] = {}  # number of particles -> what the first graph returns

        def table(num_particles: int) -> Table:
            if self.over:
                return weight_table(self.plan, self.model, proposal, num_particles)
            replay = self.replays.setdefault((*map(likeness, batch.args), num_particles), _Replay())
            replay.calls += 1
            self.calls += 1
            try:
                return self._table(replay, proposal, num_particles, shared)
            except NotCapturable as error:
                self._end(str(error))
                return weight_table(self.plan, self.model, proposal, num_particles)
            finally:
                self.left -= num_particles * len(batch)

        return table

    def _end(self, reason: str) -> None:
        self.over, self.note = True, f"plain, because {reason}"
        self.replays.clear()
        logger.warning("compile=True: plain tables of log-weights, because %s", reason)

    def _table(
        self,
        replay: _Replay,
        proposal: Proposal,
        num_particles: int,
        shared: dict[int, tuple[torch.Tensor, ...]],
    ) -> Table:
        batch = proposal.batch
        inputs = [arg for arg in batch.args if isinstance(arg, torch.Tensor)]
        if replay.rest is None:
            if replay.calls <= _TIMED or not self._pays(replay, num_particles * len(batch)):
                return self._timed(replay, proposal, num_particles)
            self._capture(replay, proposal, num_particles, inputs)
        assert replay.first is not None
        assert replay.rest is not None
        new = num_particles not in shared
        if new:
            shared[num_particles] = replay.first(*inputs)
        given = (*inputs, *shared[num_particles])
        if new and replay.compared < _COMPARED:
            replay.compared += 1
            got = Table(*replay.rest.tried(*given)[:2])
            table = weight_table(self.plan, self.model, proposal, num_particles)
            if not agree(table, got):
                raise NotCapturable("a replay has other values than a plain run")
            if replay.compared == 1:
                self._compile(replay, given)
            return table
        return Table(*replay.rest(*given)[:2])

    def _pays(self, replay: _Replay, size: int) -> bool:
        share = replay.calls / self.calls
        return pays(share * self.left / size * replay.seconds / _TIMED)

    def _capture(self, replay: _Replay, proposal: Proposal, num_particles: int, inputs: list[torch.Tensor]) -> None:
        batch, values = proposal.batch, proposal.values

        def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = iter(tensors)
            args = tuple(next(given) if isinstance(arg, torch.Tensor) else arg for arg in batch.args)
            again = Proposal(self.plan, self.guide, Batch(args, batch.per_datum), values)
            table = weight_table(self.plan, self.model, again, num_particles)
            return table.total, table.magnitude

        replay.first, replay.rest = hoisted(capture(function, inputs, (self.model, self.guide)))
        self.note = "captured"

    def _compile(self, replay: _Replay, given: tuple[torch.Tensor, ...]) -> None:
        assert replay.rest is not None
        try:
            logger.info("compiling tables of log-weights")
            replay.rest.compile(*given)
            self.note = "captured and compiled"
        except NotCapturable as error:
            self.note = f"captured, not compiled, because {error}"
            logger.warning("compile=True: tables of log-weights are %s", self.note)
        if given[0].is_cuda:
            replay.rest.record(*given)

    def _timed(self, replay: _Replay, proposal: Proposal, num_particles: int) -> Table:
        started = time.perf_counter()
        table = weight_table(self.plan, self.model, proposal, num_particles)
        if replay.calls <= _TIMED:
            replay.seconds += time.perf_counter() - started
        return table
