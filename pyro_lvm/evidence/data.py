"""Data in pieces: a tensor, an array, a ``Dataset`` or a ``DataLoader`` in the place of x."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from pyro_lvm._checks import data_tensor, refuse
from pyro_lvm._typing import Data
from pyro_lvm.errors import DataTypeError
from pyro_lvm.tracing.batch import Batch, DataArgs, Rows, make_batch

__all__ = ["data_source"]


class _DatasetRows:
    """The items of a map-style data set read when they are asked for."""

    def __init__(self, dataset: Any, args: Sequence[Any], collate: Any, device: torch.device | str | None) -> None:
        self.dataset, self.extra, self.collate, self.device = dataset, tuple(args), collate, device

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, index: slice) -> Batch:
        """Read some items."""
        items = self.collate([self.dataset[i] for i in range(*index.indices(len(self)))])
        own = tuple(items) if isinstance(items, list | tuple) else (items,)
        own = (data_tensor("x", own[0]), *own[1:])
        return Batch(own + self.extra, (True,) * len(own) + (False,) * len(self.extra)).to(self.device)


def data_source(x: Data, args: Sequence[Any], data_args: DataArgs, device: torch.device | str | None) -> Rows:
    """x and its companions in a form that gives rows; data sets are read in their own order, tuples are splatted.

    Raises:
        DataTypeError: x is no tensor, array, map-style ``Dataset`` or ``DataLoader`` of one.
        ShapeError: x is empty or all NaN.
    """
    collate = default_collate
    if isinstance(x, DataLoader):
        x, collate = x.dataset, x.collate_fn
    if isinstance(x, IterableDataset):
        cure = "Results are per datum, in order: pass a map-style Dataset (with __len__ and __getitem__) or a tensor."
        raise DataTypeError(refuse("x", "data with a length", "an IterableDataset", cure))
    if isinstance(x, Dataset):
        source = _DatasetRows(x, args, collate, device)
        if len(source) == 0:
            data_tensor("x", torch.empty(0))
        return source
    return make_batch(data_tensor("x", x), args, data_args).to(device)
