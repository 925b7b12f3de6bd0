"""What an estimate was made of, as SHA-256: whether two numbers are of the same data and the same parameters."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from pyro_lvm._files import tensor_bytes
from pyro_lvm._typing import Guide, Model
from pyro_lvm.tracing.batch import Batch, Rows
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.params import anchor
from pyro_lvm.tracing.probe import PROBE_ROWS, run_pair

__all__ = ["DataDigest", "add_values", "digest_of", "ends_digest", "parameter_digest"]

_ROWS = 256  # data that are read at once


class DataDigest:
    """Of data that come in chunks: a chain over rows, h <- SHA-256(h, row), however they are cut.

    Attributes:
        chains: h of each argument so far; a digest that begins with them goes on where they were taken.
    """

    def __init__(self) -> None:
        self.chains: list[str] = []

    def add(self, batch: Batch) -> None:
        """The next data."""
        pairs = list(zip(batch.args, batch.per_datum, strict=True))
        if not self.chains:
            self.chains = [_kind(value[:0] if own else value) for value, own in pairs]
        for i, (value, own) in enumerate(pairs):
            if own:
                self.chains[i] = _chained(self.chains[i], value)

    def hexdigest(self) -> str:
        """Of all so far."""
        return hashlib.sha256("".join(self.chains).encode()).hexdigest()


def digest_of(source: Rows, dtype: torch.dtype | None = None, seed: int = 0) -> DataDigest:
    """That of all data, read in pieces, with ``seed`` for those that are drawn anew; reals as ``dtype`` if given."""
    digest = DataDigest()
    with evaluation_rng(seed):
        for start in range(0, len(source), _ROWS):
            batch = source.rows(slice(start, min(start + _ROWS, len(source))))
            digest.add(batch if dtype is None else _in_precision(batch, dtype))
    return digest


def _in_precision(batch: Batch, dtype: torch.dtype) -> Batch:
    args = (a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in batch.args)
    return Batch(tuple(args), batch.per_datum)


def _kind(value: Any) -> str:
    digest = hashlib.sha256()
    add_values(digest, [("", value)])
    return digest.hexdigest()


def _chained(chain: str, value: torch.Tensor) -> str:
    content, link = tensor_bytes(value), bytes.fromhex(chain)
    size = len(content) // len(value)
    for row in range(len(value)):
        link = hashlib.sha256(link + content[row * size : (row + 1) * size]).digest()
    return link.hex()


def parameter_digest(model: Model, guide: Guide | None, batch: Batch | None) -> str:
    """Of the state of its modules, and where there is a guide of the parameters that a run on ``batch`` uses."""
    sites: list[tuple[str, torch.Tensor]] = []
    if guide is not None and batch is not None:
        with evaluation_rng(0), validation(False), torch.no_grad():
            run = run_pair(model, guide, batch)
        sites = [(n, s["value"]) for t in (run.model, run.guide) for n, s in t.items() if s["type"] == "param"]
    owners = [owner for owner in map(anchor, (model, guide)) if isinstance(owner, torch.nn.Module)]
    digest = hashlib.sha256()
    add_values(digest, [*sites, *(item for owner in owners for item in owner.state_dict().items())])
    return digest.hexdigest()


def ends_digest(data: Batch) -> str:
    """Of the first and the last few data."""
    digest = hashlib.sha256()
    for rows in (slice(0, PROBE_ROWS), slice(-PROBE_ROWS, None)):
        add_values(digest, ((str(i), value) for i, value in enumerate(data.rows(rows).args)))
    return digest.hexdigest()


def add_values(digest: Any, items: Iterable[tuple[str, Any]]) -> None:
    """Names and values of tensors and of plain arguments."""
    for name, value in items:
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
        elif isinstance(value, str | int | float | None):
            digest.update(f"{name} {value!r}".encode())
