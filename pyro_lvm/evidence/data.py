"""Data in pieces: a tensor, an array, a ``Dataset`` or a ``DataLoader`` in the place of x."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from pyro_lvm._checks import data_tensor, refuse
from pyro_lvm._typing import Data
from pyro_lvm.errors import DataTypeError
from pyro_lvm.tracing.batch import Batch, DataArgs, Rows, make_batch
from pyro_lvm.tracing.isolation import forked_rng

__all__ = ["data_provenance", "data_source", "device_of"]

_CHECKED = 1024  # rows of an array that are looked at for numbers at once


class _ReadRows:
    """Data that are read when they are asked for; ``read(numbers)`` gives x, or a tuple that begins with it."""

    def __init__(
        self, length: int, read: Callable[[Sequence[int]], Any], args: Sequence[Any], data_args: DataArgs, device: Any
    ) -> None:
        self.length, self.read, self.device = length, read, device
        _, *own = make_batch(torch.empty(length, 0), args, data_args).per_datum
        self.args = list(zip(args, own, strict=True))

    def __len__(self) -> int:
        return self.length

    def rows(self, index: slice | torch.Tensor) -> Batch:
        """Read some items."""
        items = self.read(range(*index.indices(len(self))) if isinstance(index, slice) else index.tolist())
        x, *others = items if isinstance(items, list | tuple) else (items,)
        others += [a[index if isinstance(index, slice) else index.to(a.device)] if own else a for a, own in self.args]
        per_datum = (True,) * (1 + len(others) - len(self.args)) + tuple(own for _, own in self.args)
        x = x if isinstance(x, torch.Tensor) else data_tensor("x", x)
        return Batch((x, *others), per_datum).to(self.device)


def _items(dataset: Any, collate: Callable[[Any], Any], indices: Sequence[int]) -> Any:
    """Items of a map-style data set, read together where it can."""
    if getattr(dataset, "__getitems__", None):
        return collate(dataset.__getitems__(list(indices)))
    return collate([dataset[i] for i in indices])


def _copied(array: np.ndarray, indices: Sequence[int]) -> torch.Tensor:
    """A copy, since an array that is mapped from a file may be read-only, which tensors cannot be."""
    rows = slice(indices.start, indices.stop) if isinstance(indices, range) else list(indices)
    return torch.from_numpy(np.array(array[rows], order="C"))


def _has_numbers(array: np.ndarray) -> bool:
    """Whether there is anything but NaN; stops at the first rows that have it."""
    parts = (array[i : i + _CHECKED] for i in range(0, len(array), _CHECKED))
    return any(part.dtype.kind != "f" or not np.isnan(part).all() for part in parts)


def _check_sampler(sampler: Any) -> None:
    """Every item counts once: of a loader it is the data set that is read, in its own order."""
    if not isinstance(sampler, SequentialSampler | RandomSampler):
        cure = "Results are per datum, in order: pass torch.utils.data.Subset(dataset, indices) of those that count."
        raise DataTypeError(refuse("x", "a DataLoader of all its data", f"one with a {type(sampler).__name__}", cure))


def data_source(x: Data, args: Sequence[Any], data_args: DataArgs, device: torch.device | str | None) -> Rows:
    """x and its companions in a form that gives rows; data sets are read in their own order, tuples are splatted.

    Arrays, which may be mapped from a file, and data sets are read, converted and moved chunk by chunk.

    Raises:
        DataTypeError: x is no tensor, array, map-style ``Dataset`` or ``DataLoader`` of one, or its sampler chooses.
        ShapeError: x is empty or all NaN.
    """
    collate = default_collate
    if isinstance(x, DataLoader):
        if not isinstance(x.dataset, IterableDataset):  # which is refused below
            _check_sampler(x.sampler)
        collate = collate if x.batch_sampler is None else x.collate_fn
        x = x.dataset
    if isinstance(x, IterableDataset):
        cure = "Results are per datum, in order: pass a map-style Dataset (with __len__ and __getitem__) or a tensor."
        raise DataTypeError(refuse("x", "data with a length", "an IterableDataset", cure))
    if isinstance(x, Dataset):
        if len(x) == 0:  # type: ignore[arg-type]
            data_tensor("x", torch.empty(0))
        return _ReadRows(len(x), partial(_items, x, collate), args, data_args, device)  # type: ignore[arg-type]
    if isinstance(x, np.ndarray) and x.dtype.kind in "buif" and x.ndim and _has_numbers(x):
        return _ReadRows(len(x), partial(_copied, x), args, data_args, device)
    return make_batch(data_tensor("x", x), args, data_args).to(device)


def data_provenance(x: Data) -> dict[str, Any] | None:
    """What a data set says of itself (its name, its binarisation), for the record."""
    found = getattr(x.dataset if isinstance(x, DataLoader) else x, "provenance", None)
    return dict(found) if isinstance(found, dict) else None


def device_of(source: Rows) -> torch.device:
    """Where the data are; a data set that draws its items anew draws none here."""
    with forked_rng(0):
        return source.rows(slice(0, 1)).args[0].device  # type: ignore[no-any-return]
