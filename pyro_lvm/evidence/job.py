"""One streamed estimate under way: the data in chunks, and for each of them the particles in chunks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from tqdm.auto import tqdm

from pyro_lvm._checks import shown
from pyro_lvm._interrupts import kept_if
from pyro_lvm._typing import DataPlate, Guide, Model, Vectorize
from pyro_lvm._version import versions
from pyro_lvm.evidence.columns import Columns
from pyro_lvm.evidence.resume import Checkpoint, Progress
from pyro_lvm.ops import WeightAccumulator, WeightSummary
from pyro_lvm.ops.memory import keep_freed_memory, ran_out_of_memory
from pyro_lvm.tracing.batch import Batch, Rows
from pyro_lvm.tracing.captured_weights import Tables
from pyro_lvm.tracing.digest import DataDigest, parameter_digest
from pyro_lvm.tracing.isolation import evaluation_rng
from pyro_lvm.tracing.probe import PROBE_ROWS, Plan, probe_pair
from pyro_lvm.tracing.tables import Table
from pyro_lvm.tracing.weights import check_data

__all__ = ["Collector", "Job", "look"]

_SLAB = 8  # chunks of data that are read together, to be grouped by the number of particles that they take


class Collector(Protocol):
    """Takes in tables of log-weights ``(k, N)`` one after the other."""

    def update(self, log_weights: torch.Tensor, noise_scale: torch.Tensor) -> None:
        """One more table, and the size of the terms of its log-weights, ``(N,)``."""


Collecting = TypeVar("Collecting", bound=Collector)


def look(
    model: Model, guide: Guide, source: Rows, data_plate: DataPlate, vectorize: Vectorize
) -> tuple[Plan, dict[str, str]]:
    """How a pair runs, and what it is: the names of its programs and the digest of its parameters."""
    with evaluation_rng(0):
        plan = probe_pair(model, guide, source, data_plate, vectorize)
        few = source.rows(slice(0, len(source) if plan.tied else PROBE_ROWS))
        parameters = parameter_digest(model, guide, few)
    return plan, {"model": _name(model), "guide": _name(guide), "parameters": parameters}


def _name(program: Any) -> str:
    return str(getattr(program, "__qualname__", type(program).__name__))


@dataclass
class Job:
    """Fills the columns with what K weights say of each datum.

    Attributes:
        plan: how the pair runs.
        pair: what it is, see `look`.
        tables: draws the weights.
        source: the data.
        num_particles: K.
        chunks: (data, particles) computed at once; halved when memory runs out.
        columns: the results.
        checkpoint: keeps finished chunks, or None.
        dtype: of the log-weights, once there are some.
        digest: of the data that are finished.
    """

    plan: Plan
    pair: dict[str, str]
    tables: Tables
    source: Rows
    num_particles: int
    chunks: tuple[int, int]
    columns: Columns
    checkpoint: Checkpoint | None = None
    dtype: str = "None"
    digest: DataDigest = field(default_factory=DataDigest)

    def run(self, progress: bool | None) -> None:
        """Go through all data; what is finished when Ctrl-C comes, stays."""
        keep_freed_memory()
        num_data, done = len(self.source), self._load()
        total = num_data * self.num_particles
        shows = {"unit": " weights", "unit_scale": True, "disable": not shown(progress)}
        bar = tqdm(total=total, initial=done * self.num_particles, **shows)
        with kept_if(lambda: self.columns.done), bar:
            try:
                while done < num_data:
                    rows = num_data if self.plan.tied else min(self.chunks[0], num_data - done)
                    try:
                        batch = self.source.rows(slice(done, done + rows))
                        summary = self._chunk(batch, done, bar)
                    except (RuntimeError, MemoryError) as error:
                        self._shrink(error)
                        continue
                    done += rows
                    self.keep(summary)
                    self.digest.add(batch)
                    if self.checkpoint:
                        chains = self.digest.chains.copy()
                        now = Progress(done, self.columns.done, self.chunks, self.dtype, chains, self.more())
                        self.checkpoint.note(now)
            finally:
                if self.checkpoint:
                    self.checkpoint.save()

    def drawing(self, batch: Batch, num_weights: int) -> Callable[[int], Table]:
        """A function of K that draws a table ``(K, N)`` of these data; ``num_weights`` are to come in all."""
        return self.tables.of(batch, num_weights)

    @property
    def granted(self) -> torch.Tensor:
        """Particles of each datum that is finished, ``(N,)``."""
        return torch.full_like(self.columns["value"], self.num_particles)

    def keep(self, summary: WeightSummary) -> None:
        """Take the results of a chunk that is finished."""
        self.columns.add(summary)

    def more(self) -> dict[str, Any]:
        """What a checkpoint is to keep beside the results; `tell` takes it back."""
        return {}

    def tell(self, more: dict[str, Any]) -> None:
        """Go on with what `more` gave."""

    def provenance(self) -> dict[str, Any]:
        """What was estimated, and how."""
        names = {name: self.pair[name] for name in ("model", "guide")}
        digests = {"parameters": self.pair["parameters"], "data": self.digest.hexdigest()}
        return names | {
            "sha256": digests,
            "num_data": len(self.source),
            "finished": self.columns.done == len(self.columns),
            "dtype": self.dtype,
            "data_plate": self.plan.model_layout.plate,
            "chunks": self.chunks,
            "tables": self.tables.note,
            "particles": {"model": self.plan.model_mode, "guide": self.plan.guide_mode},
            "streamed": "particles" if self.plan.tied else "data and particles",
            "enumerated": self.plan.match.enumerated,
            "versions": versions(),
        }

    def _load(self) -> int:
        """Go on from where a checkpoint is; the number of data that are done."""
        if self.checkpoint is None or (found := self.checkpoint.load()) is None:
            return 0
        self.chunks, self.dtype, self.digest.chains = found.chunks, found.dtype, found.chains
        self.tell(found.more)
        return found.rows

    def _chunk(self, batch: Batch, done: int, bar: Any) -> WeightSummary:
        """All particles of some data, before which others are ``done``."""
        check_data(self.plan, self.tables.model, self.tables.guide, batch, done)
        weights = WeightAccumulator(self.plan.model_layout.num_data(batch), self.num_particles, batch.args[0].device)
        num_weights = (len(self.source) - done) * self.num_particles
        self.weigh(batch, self.num_particles, num_weights, self.chunks[1], weights, bar)
        return weights.summary()

    def weigh(
        self, batch: Batch, num_particles: int, num_weights: int, at_once: int, collector: Collector, bar: Any
    ) -> None:
        """Draw K log-weights of some data, ``at_once`` of them at a time; ``num_weights`` are to come in all."""
        draw = self.drawing(batch, num_weights)
        left = num_particles
        while left:
            now = min(at_once, left)
            table = draw(now)
            collector.update(table.total, table.magnitude)
            self.dtype = str(table.total.dtype)
            left -= now
            bar.update(now * len(batch))

    def slabs(self) -> Iterator[tuple[int, Batch]]:
        """The data, several chunks together, each with the number of data before it."""
        size = len(self.source) if self.plan.tied else _SLAB * self.chunks[0]
        for start in range(0, len(self.source), size):
            yield start, self.source.rows(slice(start, min(start + size, len(self.source))))

    def pieces(
        self,
        batch: Batch,
        rows: torch.Tensor,
        num_particles: int,
        collector: Callable[[int], Collecting],
        bar: Any,
    ) -> Iterator[tuple[torch.Tensor, Collecting]]:
        """Draw K log-weights of some rows of a batch, as many rows at once as fit.

        Yields which results they are, and the collector, made by ``collector(number of results)``, that has them. A
        pair that is tied to its data has all of them at once.
        """
        layout, tied = self.plan.model_layout, self.plan.tied
        while len(rows):
            now = rows if tied else rows[: self.chunks[0]]
            part = batch if tied else batch.rows(now)
            collected = collector(layout.num_data(part))
            at_once = self.chunks[1] if tied else max(1, self.chunks[0] * self.chunks[1] // len(part))
            try:
                self.weigh(part, num_particles, len(rows) * num_particles, at_once, collected, bar)
            except (RuntimeError, MemoryError) as error:
                self._shrink(error)
                continue
            rows = rows[len(now) :]
            yield torch.arange(layout.num_data(part), device=now.device) if tied else now, collected

    def _shrink(self, error: Exception) -> None:
        """Halve what is computed at once after running out of memory; any other error passes."""
        data, particles = self.chunks
        if not ran_out_of_memory(error) or data * particles == 1:
            raise error
        self.chunks = (data, particles // 2) if particles > 1 else (data // 2, 1)
