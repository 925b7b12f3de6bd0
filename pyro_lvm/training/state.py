"""What a training run carries: its history, the state that callbacks see, and the record that it ends with."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from pyro_lvm._typing import Guide, Model
from pyro_lvm.tracing.params import Fitted

__all__ = ["FitResult", "History", "TrainingState"]


class History(list[dict[str, Any]]):
    """One row a step: ``step``, ``epoch``, ``loss`` (nats per datum), ``seconds``, and what callbacks recorded.

    Steps and epochs count from 1. A list of dictionaries goes into ``pandas.DataFrame(history)`` as it is.

    Example:
        >>> history = History([{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}])
        >>> history.record(score=-1.0)
        >>> history[-1]
        {'step': 2, 'loss': 1.5, 'score': -1.0}
    """

    def record(self, **values: Any) -> None:
        """Add columns to the row of the latest step."""
        self[-1].update(values)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write all rows to ``path``; a column that a row lacks stays empty."""
        columns = list(dict.fromkeys(name for row in self for name in row))
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self)


@dataclass(eq=False)
class TrainingState:
    """What a callback sees.

    Attributes:
        model: the model that is trained; call it or evaluate it as it is, the param store in use is that of the run.
        guide: the guide that is trained.
        history: one row a step; ``history.record(name=value)`` adds to the row of this step.
        optimizer: the torch optimizer of all parameters, or the Pyro optimizer that was given; None until the first
            gradient is there.
        params: name -> unconstrained live tensor of each parameter that is updated.
        step: steps done, skipped ones included.
        epoch: the epoch of this step.
        loss: loss of this step, nats per datum.
        updated: whether this step updated the parameters (False where it was skipped).
    """

    model: Model
    guide: Guide
    history: History
    optimizer: Any = None
    params: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    epoch: int = 1
    loss: float = math.nan
    updated: bool = False
    stop_reason: str | None = None

    def stop(self, reason: str) -> None:
        """End training after this step; ``reason`` becomes `FitResult.stop_reason`."""
        self.stop_reason = self.stop_reason or reason


@dataclass(frozen=True, repr=False, eq=False)
class FitResult:
    """What `fit` returns.

    Attributes:
        losses: float64 ``(num_steps,)``, nats per datum: the loss of each batch divided by the number of its data, or
            by N where the loss is scaled to the whole data set. Not finite where the step was skipped.
        num_steps: steps done, skipped ones included.
        seconds: wall time of the training loop.
        stop_reason: ``"num_epochs"``, ``"num_steps"``, ``"interrupted"``, ``"nonfinite"``, or what a callback said.
        skipped: number of steps whose loss or gradient was not finite; they changed no parameter.
        captured: number of steps that replayed a captured graph, see ``compile`` of `fit`.
        history: one row a step.
        params: name -> constrained value, detached copies, sorted by name.
        model: the model with the parameters that it learned.
        guide: the guide with the parameters that it learned.
        notes: what model, guide and loss say about themselves, see `fit`.
    """

    losses: torch.Tensor
    num_steps: int
    seconds: float
    stop_reason: str
    skipped: int
    history: History
    params: dict[str, torch.Tensor]
    model: Fitted
    guide: Fitted
    notes: tuple[str, ...] = ()
    captured: int = 0

    def __repr__(self) -> str:
        finite = self.losses[self.losses.isfinite()]
        latest = finite[-100:]
        first, last = (float(part.mean()) if len(part) else math.nan for part in (finite[:1], latest))
        size = sum(value.numel() for value in self.params.values())
        window = f"mean of the last {len(latest)} steps"
        return "\n".join(
            (
                f"FitResult: {self.num_steps} steps in {self.seconds:.1f} s, stopped by {self.stop_reason}",
                f"  loss        {last:.4f} nats per datum ({window}), {first:.4f} at the first",
                f"  skipped     {self.skipped} steps with a loss or gradient that was not finite",
                f"  parameters  {size} numbers under {len(self.params)} names",
                f"  pair        {_name(self.model.program)}, {_name(self.guide.program)}",
                *(f"  note        {note}" for note in self.notes),
            )
        )


def _name(program: Callable[..., Any]) -> str:
    return getattr(program, "__qualname__", None) or type(program).__name__
