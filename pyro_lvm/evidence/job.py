"""One streamed estimate under way: the data in chunks, and for each of them the particles in chunks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from pyro_lvm._checks import shown
from pyro_lvm._version import versions
from pyro_lvm.evidence.columns import Columns
from pyro_lvm.evidence.resume import Checkpoint, Progress
from pyro_lvm.ops import WeightAccumulator, WeightSummary
from pyro_lvm.ops.memory import keep_freed_memory
from pyro_lvm.tracing.batch import Batch, Rows
from pyro_lvm.tracing.captured_weights import Tables
from pyro_lvm.tracing.digest import DataDigest
from pyro_lvm.tracing.probe import Plan
from pyro_lvm.tracing.tables import Table
from pyro_lvm.tracing.weights import check_data

__all__ = ["Job"]


@dataclass
class Job:
    """Fills the columns with what K weights say of each datum.

    Attributes:
        plan: how the pair runs.
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
        with tqdm(total=total, initial=done * self.num_particles, **shows) as bar:
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
                        self.checkpoint.note(
                            Progress(done, self.columns.done, self.chunks, self.dtype, self.digest.chains.copy())
                        )
            except KeyboardInterrupt:
                if not self.columns.done:
                    raise
            finally:
                if self.checkpoint:
                    self.checkpoint.save()

    def drawing(self, batch: Batch, num_weights: int) -> Callable[[int], Table]:
        """A function of K that draws a table ``(K, N)`` of these data; ``num_weights`` are to come in all."""
        return self.tables.of(batch, num_weights)

    def keep(self, summary: WeightSummary) -> None:
        """Take the results of a chunk that is finished."""
        self.columns.add(summary)

    def provenance(self) -> dict[str, Any]:
        """How the estimate was made."""
        return {
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
        return found.rows

    def _chunk(self, batch: Batch, done: int, bar: Any) -> WeightSummary:
        """All particles of some data, before which others are ``done``."""
        check_data(self.plan, self.tables.model, self.tables.guide, batch, done)
        draw = self.drawing(batch, (len(self.source) - done) * self.num_particles)
        weights = WeightAccumulator(self.plan.model_layout.num_data(batch), self.num_particles, batch.args[0].device)
        left = self.num_particles
        while left:
            now = min(self.chunks[1], left)
            table = draw(now)
            weights.update(table.total, table.magnitude)
            self.dtype = str(table.total.dtype)
            left -= now
            bar.update(now * len(batch))
        return weights.summary()

    def _shrink(self, error: Exception) -> None:
        """Halve what is computed at once after running out of memory; any other error passes."""
        words = ("out of memory", "can't allocate memory", "not enough memory")
        data, particles = self.chunks
        if not (isinstance(error, MemoryError) or any(word in str(error) for word in words)) or data * particles == 1:
            raise error
        self.chunks = (data, particles // 2) if particles > 1 else (data // 2, 1)
