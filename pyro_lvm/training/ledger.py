"""The rows of a history, filled when the device has the numbers."""

from typing import Any

import torch

from pyro_lvm.training.plain import Outcome
from pyro_lvm.training.state import TrainingState

__all__ = ["Ledger"]


class Ledger:
    """Writes one row a step, and reads losses from the device for ``every`` steps at once.

    Attributes:
        skipped: steps that were not finite.
        streak: the latest of them in a row.
    """

    def __init__(self, state: TrainingState, every: int) -> None:
        self.state, self.every = state, every
        self.skipped = self.streak = 0
        self._open: list[tuple[dict[str, Any], Outcome, int]] = []  # (row, what is to be read, number of data)

    def write(self, outcome: Outcome, num_data: int, epoch: int, seconds: float) -> None:
        """Add the row of a step."""
        state = self.state
        state.step, state.epoch = state.step + 1, epoch
        row = {"step": state.step, "epoch": epoch, "loss": float("nan"), "seconds": seconds}
        state.history.append(row)
        self._open.append((row, outcome, num_data))

    @property
    def is_due(self) -> bool:
        """Whether enough steps wait to be read."""
        return len(self._open) >= self.every

    def settle(self) -> None:
        """Fill the rows that wait."""
        losses = _read([outcome.loss for _, outcome, _ in self._open])
        finite = _read([outcome.finite for _, outcome, _ in self._open])
        for (row, outcome, num_data), loss, is_finite in zip(self._open, losses, finite, strict=True):
            row["loss"] = self.state.loss = loss / num_data
            self.state.updated = bool(is_finite if outcome.updated is outcome.finite else outcome.updated)
            self.streak = 0 if is_finite else self.streak + 1
            self.skipped += not is_finite
        self._open.clear()


def _read(values: list[Any]) -> list[float]:
    """Numbers, from the device in one go."""
    if len(values) < 2 or not all(isinstance(value, torch.Tensor) for value in values):
        return [float(value) for value in values]
    return torch.stack(values).tolist()  # type: ignore[no-any-return]
