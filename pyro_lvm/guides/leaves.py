"""Tensors with a row of its own for each datum, for a guide to be optimised by."""

from collections.abc import Callable

import torch

from pyro_lvm._checks import refuse
from pyro_lvm.errors import ShapeError

__all__ = ["Leaves"]


class Leaves:
    """Leaves to optimise, made at the first run of a guide, of the shapes that are met there.

    Attributes:
        tensors: name -> leaf ``(*batch, ...)``, with the batch shape of its site.
        units: name -> in what steps are counted, shaped as the leaf, where that is not 1.
        rows: name -> dimension of the data in the leaf.
        fixed: what has no leaves -> why.
        complete: no more are made.

    Args:
        data_dim: the dimension of the data in the batch shape of a site, counted from its end; None for no such.
    """

    def __init__(self, data_dim: int | None) -> None:
        self.data_dim = data_dim
        self.tensors: dict[str, torch.Tensor] = {}
        self.units: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        self.fixed: dict[str, str] = {}
        self.complete = False
        self._ranks: dict[str, int] = {}

    def get(
        self, name: str, initial: Callable[[], torch.Tensor], batch_shape: torch.Size, row: int | None = None
    ) -> torch.Tensor:
        """The leaf ``name``, repeated where ``batch_shape`` has the data several times over.

        Raises:
            ShapeError: the shape is that of other data.
        """
        if name not in self.tensors:
            if self.complete:
                raise NotImplementedError(f"{name} was not there in the first run")
            self.tensors[name] = initial().detach().clone().requires_grad_(True)
            self._ranks[name] = len(batch_shape)
            if self.data_dim is not None:
                self.rows[name] = len(batch_shape) + self.data_dim if row is None else row
        leaf, rank = self.tensors[name], self._ranks[name]
        sizes = batch_shape[len(batch_shape) - rank :]
        if any(size % own for size, own in zip(sizes, leaf.shape, strict=False)):
            cure = "Parameters of single data belong to the x that they were refined for: pass all of it, in its order."
            raise ShapeError(refuse("x", f"{tuple(leaf.shape[:rank])} data", tuple(sizes), cure))
        times = [size // own if size > own > 1 else 1 for size, own in zip(sizes, leaf.shape, strict=False)]
        return leaf.repeat(*times, *[1] * (leaf.dim() - rank)) if any(t > 1 for t in times) else leaf

    def shift(self, name: str, value: torch.Tensor, batch_shape: torch.Size, row: int | None = None) -> torch.Tensor:
        """``value`` plus the offset of this name."""
        return value + self.get(name, lambda: torch.zeros_like(value), batch_shape, row)

    def copy(self) -> dict[str, torch.Tensor]:
        """The values of all leaves."""
        return {name: leaf.detach().clone() for name, leaf in self.tensors.items()}

    def restore(self, values: dict[str, torch.Tensor], where: torch.Tensor | None = None) -> None:
        """Put ``values`` back, for those data ``(N,)`` where it says so."""
        with torch.no_grad():
            for name, leaf in self.tensors.items():
                value = values[name]
                if where is not None:
                    shape = [1] * leaf.dim()
                    shape[self.rows[name]] = -1
                    value = torch.where(where.reshape(shape), value, leaf)
                leaf.copy_(value)
