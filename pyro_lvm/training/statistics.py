"""Batch statistics of a step that was skipped: one NaN in a batch would stay in their running averages for good."""

from collections.abc import Iterable

import torch

__all__ = ["BatchStatistics"]


class BatchStatistics:
    """The buffers of modules that steps change; after a step that was not finite they are as before it.

    Which ones these are, the first step shows.

    Example:
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> statistics = BatchStatistics(norm.buffers())
        >>> for x in (torch.tensor([[0.0], [2.0]]), torch.full((2, 1), torch.nan)):
        ...     statistics.remember()
        ...     statistics.settle(finite=bool(norm(x).isfinite().all()))
        >>> norm.running_mean
        tensor([0.1000])
    """

    def __init__(self, buffers: Iterable[torch.Tensor]) -> None:
        self._moving, self._looked = list(buffers), False
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []  # (live, copy)

    def remember(self) -> None:
        """Before a step."""
        self._before = [(live, live.clone()) for live in self._moving]

    def settle(self, finite: bool | torch.Tensor) -> None:
        """After a step; a tensor ``finite`` is not read."""
        if not self._looked:
            self._moving, self._looked = [live for live, copy in self._before if not torch.equal(live, copy)], True
        for live, copy in self._before:
            if isinstance(finite, torch.Tensor):
                live.copy_(torch.where(finite != 0, live, copy))
            elif not finite:
                live.copy_(copy)
