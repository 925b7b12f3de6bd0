"""Batch statistics of a step that was skipped: one NaN in a batch would stay in their running averages for good."""

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["BatchStatistics"]


class BatchStatistics:
    """The buffers of modules that steps change; after a step that was not finite they are as before it.

    Which ones these are, the first finite step shows.

    Example:
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> statistics = BatchStatistics([norm])
        >>> for x in (torch.tensor([[0.0], [2.0]]), torch.full((2, 1), torch.nan)):
        ...     statistics.remember()
        ...     statistics.settle(finite=bool(norm(x).isfinite().all()))
        >>> norm.running_mean
        tensor([0.1000])
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        parts = [part for module in modules for part in module.modules()]
        self._moving = [(part._buffers, name) for part in parts for name, b in part._buffers.items() if b is not None]
        self._looked = False
        self._before: list[torch.Tensor] = []

    def remember(self) -> None:
        """Before a step."""
        self._before = [buffers[name].clone() for buffers, name in self._moving]  # type: ignore[union-attr]

    def settle(self, finite: bool | torch.Tensor) -> None:
        """After a step; a tensor ``finite`` is not read."""
        pairs = list(zip(self._moving, self._before, strict=True))
        for (buffers, name), before in pairs:
            live: Any = buffers[name]  # which a module may have assigned anew
            if isinstance(finite, torch.Tensor):
                live.copy_(torch.where(finite != 0, live, before))
            elif not finite:
                live.copy_(before)
        if not self._looked and (isinstance(finite, torch.Tensor) or finite):
            self._looked = True
            self._moving = [place for place, before in pairs if not torch.equal(place[0][place[1]], before)]  # type: ignore[arg-type]
