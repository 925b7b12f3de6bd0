"""The arguments of a call, with what belongs to each datum: sliced, repeated and moved together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pyro_lvm._checks import check_device, from_array, refuse
from pyro_lvm.errors import DataTypeError, ShapeError

__all__ = ["Batch", "DataArgs", "Rows", "Selected", "make_batch"]

#: "auto", or the positions among ``*args`` of the arguments that have one row per datum.
DataArgs = str | Sequence[int]


class Rows(Protocol):
    """Data of which any rows can be had."""

    def __len__(self) -> int: ...

    def rows(self, index: slice | torch.Tensor) -> "Batch":
        """The arguments of some data."""


@dataclass(frozen=True)
class Selected:
    """Some of the data, by their numbers."""

    source: Rows
    numbers: torch.Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, index: slice | torch.Tensor) -> "Batch":
        """As of any data."""
        return self.source.rows(self.numbers[index])


@dataclass(frozen=True)
class Batch:
    """Arguments of a model or guide; ``per_datum`` says which of them have one row per datum."""

    args: tuple[Any, ...]
    per_datum: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.args[0])

    def rows(self, index: slice | torch.Tensor) -> "Batch":
        """Some of the data."""

        def chosen(a: torch.Tensor) -> torch.Tensor:
            return a[index] if isinstance(index, slice) else a.index_select(0, index)  # copies rows, and is faster

        pairs = zip(self.args, self.per_datum, strict=True)
        return Batch(tuple(chosen(a) if own else a for a, own in pairs), self.per_datum)

    def repeat(self, times: int) -> "Batch":
        """All data ``times`` times over: row ``k * N + n`` is datum n."""
        pairs = zip(self.args, self.per_datum, strict=True)
        return Batch(tuple(a.repeat(times, *[1] * (a.dim() - 1)) if own else a for a, own in pairs), self.per_datum)

    def has_nan(self) -> bool:
        """Whether x or a companion has an entry that is not a number."""
        tensors = [a for a in self.args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        return any(bool(a.isnan().any()) for a in tensors)

    def to(self, device: torch.device | str | None) -> "Batch":
        """On another device; ``None`` leaves it where it is."""
        if device is None:
            return self
        device = check_device(device)
        return Batch(tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in self.args), self.per_datum)


def make_batch(x: torch.Tensor, args: Sequence[Any], data_args: DataArgs = "auto") -> Batch:
    """x and its companions; tensors with ``len(x)`` rows go with x unless ``data_args`` lists those that do.

    Raises:
        DataTypeError: ``data_args`` is neither ``"auto"`` nor a list of integers.
        ShapeError: an argument named in ``data_args`` has not one row per datum.
    """
    args = [from_array(a) if isinstance(a, np.ndarray) else a for a in args]

    def has_rows(a: Any) -> bool:
        return isinstance(a, torch.Tensor) and a.dim() > 0 and len(a) == len(x)

    if isinstance(data_args, str) and data_args == "auto":
        return Batch((x, *args), (True, *map(has_rows, args)))
    cure = "List the positions, from 0, of the arguments after x that have one row per datum."
    if not isinstance(data_args, list | tuple) or not all(isinstance(i, int | np.integer) for i in data_args):
        raise DataTypeError(refuse("data_args", '"auto" or integers', repr(data_args), cure))
    for i in data_args:
        if not (0 <= i < len(args) and has_rows(args[i])):
            got = tuple(args[i].shape) if 0 <= i < len(args) and isinstance(args[i], torch.Tensor) else "none"
            raise ShapeError(refuse("data_args", f"argument {i} to have {len(x)} rows", got, cure))
    return Batch((x, *args), (True, *(i in data_args for i in range(len(args)))))
