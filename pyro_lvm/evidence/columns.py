"""The results of all data, filled from the front as chunks of data are finished: all that grows with their number."""

import numpy as np
import torch

from pyro_lvm.ops import STATUSES, WeightSummary

__all__ = ["COLUMNS", "Columns"]

#: What a record keeps of each datum.
COLUMNS = ("value", "stderr", "bias", "elbo", "elbo_stderr", "ess", "khat", "status")


class Columns:
    """One float64 tensor ``(N,)`` for each of `COLUMNS`; status codes are small integers, which float64 holds.

    Attributes:
        done: how many results there are.
    """

    def __init__(self, num_results: int, device: torch.device) -> None:
        self.done = 0
        self._tensors = {name: torch.empty(num_results, dtype=torch.float64, device=device) for name in COLUMNS}

    def __len__(self) -> int:
        return len(self._tensors["value"])

    def __getitem__(self, name: str) -> torch.Tensor:
        """The results of one name so far."""
        return self._tensors[name][: self.done]

    @property
    def numbers(self) -> dict[str, torch.Tensor]:
        """All results so far but the status."""
        return {name: self[name] for name in COLUMNS if name != "status"}

    @property
    def status(self) -> np.ndarray:
        """The words."""
        return np.array(STATUSES)[self["status"].long().cpu().numpy()]

    def add(self, summary: WeightSummary) -> None:
        """Append the results of a chunk of data."""
        stop = self.done + len(summary.value)
        for name, tensor in self._tensors.items():
            tensor[self.done : stop] = getattr(summary, name)
        self.done = stop

    def read(self, table: torch.Tensor) -> None:
        """Begin with the results in ``table``, ``(columns, n)``."""
        self.done = table.shape[1]
        for tensor, column in zip(self._tensors.values(), table, strict=True):
            tensor[: self.done] = column

    def table(self, start: int, stop: int) -> torch.Tensor:
        """Some results, ``(columns, stop - start)`` on the CPU."""
        return torch.stack([tensor[start:stop] for tensor in self._tensors.values()]).cpu()
