"""Data in, batches out: the arguments of the model for one step after the other."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from pyro_lvm._checks import data_tensor, from_array, refuse
from pyro_lvm._typing import Data
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.tracing.batch import Batch, make_batch
from pyro_lvm.tracing.digest import ends_digest

__all__ = ["Batches", "make_batches", "parts_in_order"]


@dataclass(frozen=True)
class Batches:
    """The batches of a data set.

    Attributes:
        epoch: starts one pass over the data; each batch is the tuple of arguments of the model.
        num_data: N, or None where a stream does not say.
        num_batches: batches an epoch, or None.
        foreseen: whether all batches of an epoch follow from torch's generator as it was at its start.
        generators: those of a loader's own.
        digest: of the first and last rows, where they can be looked at.
    """

    epoch: Callable[[], Iterator[tuple[Any, ...]]]
    num_data: int | None
    num_batches: int | None
    foreseen: bool = False
    generators: tuple[torch.Generator, ...] = ()
    digest: str | None = None

    def stream(self, start: int = 1) -> Generator[tuple[int, tuple[Any, ...] | None], None, None]:
        """``(epoch, batch)`` from the start of an epoch without end; ``(epoch, None)`` marks the end of one."""
        for epoch in count(start):
            empty = True
            for batch in self.epoch():
                empty = False
                yield epoch, batch
            if empty:
                raise ShapeError(
                    refuse("data", "at least one batch an epoch", "none", "Check the length and drop_last.")
                )
            yield epoch, None


def make_batches(data: Data, batch_size: int, device: torch.device | None) -> Batches:
    """Batches of tensors, arrays, a tuple of them, a ``Dataset`` or a ``DataLoader``.

    Raises:
        DataTypeError: data of another kind.
        ShapeError: no data, or nothing but NaN.
    """
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, DataLoader):
        return _from_loader(data, device)
    if isinstance(data, Dataset):
        if isinstance(data, IterableDataset):
            return _from_loader(DataLoader(data, batch_size), device)
        num_data = len(data)  # type: ignore[arg-type]
        if num_data == 0:
            raise ShapeError(refuse("data", "at least one datum", "an empty Dataset", "Check how it was made."))
        return _from_loader(DataLoader(data, batch_size, shuffle=batch_size < num_data), device)
    x, *rest = data if isinstance(data, tuple) and data else (data,)
    arrays = [from_array(a) if isinstance(a, np.ndarray) else a for a in rest]
    return _from_tensors(make_batch(data_tensor("data", x), arrays), batch_size, device)


def _from_tensors(whole: Batch, batch_size: int, device: torch.device | None) -> Batches:
    """A new permutation each epoch, drawn on the CPU; a full batch keeps the order, so that local parameters match."""
    num_data = len(whole)
    ends = ends_digest(whole)
    if batch_size >= num_data:
        only = whole.to(device).args
        return Batches(lambda: iter((only,)), num_data, 1, foreseen=True, digest=ends)

    def epoch() -> Iterator[tuple[Any, ...]]:
        order = torch.randperm(num_data, device="cpu").to(whole.args[0].device)
        for rows in order.split(batch_size):
            yield whole.rows(rows).to(device).args

    return Batches(epoch, num_data, -(-num_data // batch_size), foreseen=True, digest=ends)


def _order_makers(loader: DataLoader[Any]) -> tuple[Any, ...]:
    return loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)


def _from_loader(loader: DataLoader[Any], device: torch.device | None) -> Batches:
    def epoch() -> Iterator[tuple[Any, ...]]:
        for batch in loader:
            args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
            if not args or not isinstance(args[0], torch.Tensor) or args[0].dim() == 0:
                cure = "Make the data set return a tensor, or a tuple that starts with one."
                raise DataTypeError(refuse("data", "batches of tensors", type(batch).__name__, cure))
            yield Batch(args, (True,) * len(args)).to(device).args

    sized = not isinstance(loader.dataset, IterableDataset)
    num_data, num_batches = (len(loader.sampler), len(loader)) if sized else (None, None)  # type: ignore[arg-type]
    found = (getattr(owner, "generator", None) for owner in _order_makers(loader))
    own = tuple({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())
    return Batches(epoch, num_data, num_batches, generators=own)


def parts_in_order(
    argument: str, x: Data, args: Sequence[Any], size: int, device: torch.device | None
) -> tuple[int, Callable[[], Iterator[tuple[Any, ...]]]]:
    """N, and what reads the data once, ``size`` at a time: the arguments of the model, x first.

    Raises:
        DataTypeError: x is neither a tensor nor a data set with a length, or is a loader of some of its data.
        ShapeError: no data, or nothing but NaN.
    """
    collate: Callable[[Any], Any] = default_collate
    if isinstance(x, DataLoader) and not isinstance(x.dataset, IterableDataset):
        if not isinstance(x.sampler, SequentialSampler | RandomSampler):
            cure = "Pass torch.utils.data.Subset(dataset, indices) of those that count."
            got = f"one with a {type(x.sampler).__name__}"
            raise DataTypeError(refuse(argument, "a DataLoader of all its data", got, cure))
        collate = collate if x.batch_sampler is None else x.collate_fn
    x = x.dataset if isinstance(x, DataLoader) else x
    if isinstance(x, IterableDataset):
        cure = "Pass a data set with __len__ and __getitem__, or a tensor."
        raise DataTypeError(refuse(argument, "data with a length", "an IterableDataset", cure))
    if isinstance(x, TensorDataset) and collate is default_collate:
        x, args = x.tensors[0], (*x.tensors[1:], *args)
    if not isinstance(x, Dataset):
        whole = make_batch(data_tensor(argument, x), args)
        starts = range(0, len(whole), size)
        return len(whole), lambda: (whole.rows(slice(i, i + size)).to(device).args for i in starts)
    num_data = len(x)  # type: ignore[arg-type]
    beside = make_batch(data_tensor(argument, torch.zeros(num_data)), args)
    loader = _from_loader(DataLoader(x, size, collate_fn=collate), device)

    def parts() -> Iterator[tuple[Any, ...]]:
        for start, items in zip(range(0, num_data, size), loader.epoch(), strict=True):
            yield (*items, *beside.rows(slice(start, start + size)).to(device).args[1:])

    return num_data, parts
