"""What a training run carries: the state that callbacks see, and the record that it ends with."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributions import transform_to

from pyro_lvm._typing import Guide, Model
from pyro_lvm.tracing.params import Fitted, Params
from pyro_lvm.training.history import History

__all__ = ["FitResult", "TrainingState", "make_result"]


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
        modules: those that the pair calls; of one that is part of another only the whole.
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
    modules: list[torch.nn.Module] = field(default_factory=list)
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
        provenance: of the run: seed, loss, optimizer, number of data and of batches an epoch, device, versions;
            ``resumed_at``, the steps at which it went on from a file.
        modules: those that the pair calls.
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
    provenance: dict[str, Any] = field(default_factory=dict)
    modules: tuple[torch.nn.Module, ...] = ()

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


def make_result(
    pair: tuple[Model, Guide],
    names: tuple[Collection[str], Collection[str]],
    params: Params,
    history: History,
    **rest: Any,
) -> FitResult:
    """The record of a pair whose halves use the parameters of these ``names``."""
    model, guide = (
        Fitted(program, {name: param for name, param in params.items() if name in own})
        for program, own in zip(pair, names, strict=True)
    )
    return FitResult(
        losses=torch.tensor([row["loss"] for row in history], dtype=torch.float64),
        num_steps=len(history),
        history=history,
        params={name: transform_to(constraint)(t).detach().clone() for name, (t, constraint) in sorted(params.items())},
        model=model,
        guide=guide,
        **rest,
    )


def _name(program: Callable[..., Any]) -> str:
    return getattr(program, "__qualname__", None) or type(program).__name__
