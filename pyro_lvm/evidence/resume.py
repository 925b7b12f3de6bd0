"""An estimate that outlives its process: finished chunks of data, kept in a directory while it runs.

``columns.npy`` holds the results, ``(columns, N)`` float64, mapped into memory. ``state.pt`` says how many of them
count, and in which states the generators of random numbers were when the last of them was finished; it is written
beside and then renamed, after the results are on disk. Whenever the process ends, the two fit together. Neither is a
pickle of objects: what is read runs no code.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_lvm._checks import refuse
from pyro_lvm._files import read_tensors, write_tensors
from pyro_lvm._typing import Guide, Model
from pyro_lvm.errors import CheckpointError, DataTypeError
from pyro_lvm.evidence.columns import COLUMNS, Columns
from pyro_lvm.ops import STATUSES
from pyro_lvm.tracing.batch import Rows
from pyro_lvm.tracing.digest import digest_of
from pyro_lvm.tracing.isolation import evaluation_rng, generator_states, set_generators, validation
from pyro_lvm.tracing.probe import PROBE_ROWS, Plan
from pyro_lvm.tracing.weights import Proposal, weight_table

__all__ = ["Checkpoint", "Progress", "fingerprint"]

_SECONDS = 1.0  # between two saves: what a killed process loses beside the chunk in progress
_CLOSE = 1e-3  # relative difference that log-weights of one pair on one x may have between machines
_SECRET = ("x", "parameters")  # digests, of which a message need not show the figures


@dataclass(frozen=True)
class Progress:
    """How far an estimate is.

    Attributes:
        rows: data that are finished.
        results: their results: as many, or one joint one.
        chunks: (data, particles) computed at once by now; running out of memory makes it smaller.
        dtype: of the log-weights.
        chains: of the digest of the data so far.
        more: what else an estimate has to say of them.
    """

    rows: int
    results: int
    chunks: tuple[int, int]
    dtype: str
    chains: list[str]
    more: dict[str, Any] = field(default_factory=dict)


class Checkpoint:
    """The directory of one estimate.

    Args:
        path: the directory; made if it is not there.
        expected: `fingerprint` of the call.
        columns: the results, which `load` fills and `save` writes.
        device: whose generator is kept beside that of the CPU.

    Raises:
        DataTypeError: ``path`` is no path.
        CheckpointError: there is a file in its place.
    """

    def __init__(
        self, path: str | os.PathLike[str], expected: Mapping[str, Any], columns: Columns, device: torch.device
    ) -> None:
        self.path, self.expected, self.columns, self.device = _directory(path), dict(expected), columns, device
        self.resumed_at: list[int] = []
        self._latest: tuple[Progress, dict[str, Any]] | None = None
        self._saved, self._time = 0, time.monotonic()

    def load(self) -> Progress | None:
        """Fill the results, and set the generators as they were after them; None if nothing is kept.

        Raises:
            CheckpointError: its files are damaged, or belong to another call; the message says what differs.
        """
        if not (self.path / "state.pt").exists():
            return None
        kept = f"what an estimate keeps in {self.path}", f"Delete {self.path} to begin anew."
        with self._told(*kept):
            state = read_tensors(self.path / "state.pt", "kept estimate")
            progress = Progress(**state["progress"])
            found, generators, self.resumed_at[:] = state["fingerprint"], state["generators"], state["resumed_at"]
        self._check(found)
        with self._told(*kept):
            table = torch.from_numpy(self._open("r+")[:, : progress.results])
        self.columns.read(table)
        self._saved = progress.results
        if progress.results < len(self.columns):
            self.resumed_at.append(progress.rows)
            set_generators(generators)
        return progress

    @contextmanager
    def _told(self, expected: str, cure: str) -> Iterator[None]:
        """Whatever goes wrong with its files, say what was expected and what to do."""
        try:
            yield
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(refuse("resume", expected, repr(error), cure)) from error

    def _check(self, found: Mapping[str, Any]) -> None:
        other = [name for name in self.expected | dict(found) if not _same(self.expected.get(name), found.get(name))]
        if other:
            words = (n if n in _SECRET else f"{n} ({found.get(n)} there, {self.expected.get(n)} here)" for n in other)
            cure = f"Pass another path, or delete {self.path} to begin anew."
            got = f"one that differs in {', '.join(words)}"
            raise CheckpointError(refuse("resume", f"the call that {self.path} was begun with", got, cure))

    def note(self, progress: Progress) -> None:
        """A chunk of data is finished; from time to time it is saved at once."""
        self._latest = progress, generator_states([self.device])
        if time.monotonic() - self._time >= _SECONDS:
            self.save()

    def save(self) -> None:
        """Write what is finished: first the results, then the state that counts them.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._latest is not None:
            with self._told(f"a directory {self.path} to write to", "Pass another path, or make room there."):
                self._write(*self._latest)

    def _write(self, progress: Progress, generators: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        table = self._open("r+" if self._saved else "w+")
        table[:, self._saved : progress.results] = self.columns.table(self._saved, progress.results).numpy()
        table.flush()
        state = {"fingerprint": self.expected, "progress": asdict(progress), "generators": generators}
        write_tensors(self.path / "state.pt", "kept estimate", state | {"resumed_at": self.resumed_at})
        self._saved, self._time = progress.results, time.monotonic()

    def _open(self, mode: Any) -> np.memmap:
        shape = (len(COLUMNS), len(self.columns))
        if mode == "w+":
            return np.lib.format.open_memmap(self.path / "columns.npy", mode, np.float64, shape)
        table = np.lib.format.open_memmap(self.path / "columns.npy", mode)
        if table.shape != shape or table.dtype != np.float64:
            raise OSError(f"columns.npy holds {table.dtype} {table.shape}")
        return table


def _directory(path: Any) -> Path:
    """``path``, where there is a directory or room for one."""
    if not isinstance(path, str | os.PathLike):
        raise DataTypeError(refuse("resume", "the path of a directory, or None", repr(path), 'Pass e.g. "kept".'))
    there = next((each for each in (Path(path), *Path(path).parents) if each.exists()), None)
    if there is not None and not there.is_dir():
        cure = "Pass a path where there is a directory, or nothing yet."
        raise CheckpointError(refuse("resume", "the path of a directory", f"{path}, where {there} is a file", cure))
    return Path(path)


# ----------------------------------------------------------------------------------------------------------------------
# Whether two calls are one.


def fingerprint(plan: Plan, model: Model, guide: Guide, source: Rows, options: Mapping[str, Any]) -> dict[str, Any]:
    """What tells calls apart: options, a digest of the parameters among them, and one of all data.

    Log-weights of the first and last rows, of one draw with a seed of their own, see what has no name: a constant in a
    model's code.
    """
    last = len(source) - min(PROBE_ROWS, len(source))
    ends = (slice(0, len(source)),) if plan.tied else (slice(0, PROBE_ROWS), slice(last, len(source)))
    log_weights = []
    for rows in ends:
        with evaluation_rng(0), validation(False):
            batch = source.rows(rows)
            log_weights.append(float(weight_table(plan, model, Proposal(plan, guide, batch), 1).total.sum()))
    found: dict[str, Any] = {name: str(value) for name, value in options.items()}
    found |= {"num_data": str(len(source)), "dtype": str(batch.args[0].dtype), "data_plate": plan.model_layout.plate}
    found |= {"particles": f"model {plan.model_mode}, guide {plan.guide_mode}", "log_weights": log_weights}
    found["statuses"] = ", ".join(STATUSES)  # which are kept as their numbers
    return found | {"x": digest_of(source).hexdigest()}


def _same(one: Any, other: Any) -> bool:
    """Equal, or numbers that are close."""
    if not (isinstance(one, list) and isinstance(other, list)):
        return bool(one == other)
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=_CLOSE, abs_tol=_CLOSE) or (a != a and b != b)
        for a, b in zip(one, other, strict=True)
    )
