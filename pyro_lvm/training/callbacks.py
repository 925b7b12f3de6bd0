"""What happens around the steps of `fit`: early stopping, learning-rate schedules, loggers, files to go on from.

A callback is a function of the `TrainingState`, called after each whole epoch, or an object with any of these methods:

* ``on_start(state)``: once, with the optimizer made and before its first update;
* ``on_step(state)``: after each step;
* ``on_epoch(state)``: after each whole epoch;
* ``on_end(state)``: when training has ended, also by Ctrl-C.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from statistics import fmean
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_lvm._checks import check_device, check_positive_int, refuse
from pyro_lvm._typing import Data, Guide, Model
from pyro_lvm.errors import DataTypeError
from pyro_lvm.tracing import elbo
from pyro_lvm.tracing.isolation import forked_rng
from pyro_lvm.training.batches import parts_in_order
from pyro_lvm.training.checkpoint import Checkpoint
from pyro_lvm.training.state import TrainingState

__all__ = ["Checkpoint", "EarlyStopping", "Log", "Schedule", "validation_elbo"]

#: ``score(model, guide)``, higher is better.
Score = Callable[[Model, Guide], float]

_PART = 1000  # held-out data that are scored at once


class EarlyStopping:
    """Stop when ``score(model, guide)`` has not risen for ``patience`` evaluations; keep the best parameters.

    The score goes into the history under ``score``. A NaN counts as no improvement.

    Args:
        score: higher is better, e.g. `validation_elbo`.
        patience: evaluations without a new best before training stops; None never stops it, and scores are recorded
            all the same.
        every: epochs between evaluations.
        restore_best: put the trained parameters, and the buffers of modules that are model or guide, back to where the
            score was best when training ends, for whatever reason.

    Attributes:
        best_score: the highest score so far.
        best_step: the step after which it was reached.

    Example:
        >>> stopper = EarlyStopping(lambda model, guide: 0.0, patience=3)
        >>> stopper.best_score
        -inf
    """

    def __init__(self, score: Score, patience: int | None, every: int = 1, restore_best: bool = True) -> None:
        if not callable(score):
            raise DataTypeError(refuse("score", "a function of (model, guide)", score, "Pass e.g. validation_elbo(x)."))
        self.score = score
        self.patience = None if patience is None else check_positive_int("patience", patience)
        self.every = check_positive_int("every", every)
        self.restore_best = restore_best
        self._reset()

    def _reset(self) -> None:
        self.best_score, self.best_step, self._waited = -math.inf, 0, 0
        self._best: dict[str, torch.Tensor] = {}

    def on_start(self, state: TrainingState) -> None:
        """Forget an earlier run."""
        self._reset()

    def on_epoch(self, state: TrainingState) -> None:
        """Score the pair."""
        if state.epoch % self.every:
            return
        value = _one_number(self.score(state.model, state.guide))
        state.history.record(score=value)
        if value > self.best_score:
            self.best_score, self.best_step, self._waited = value, state.step, 0
            self._best = {n: t.detach().clone() for n, t in _tensors(state).items()} if self.restore_best else {}
        else:
            self._waited += 1
            if self.patience is not None and self._waited >= self.patience:
                state.stop("early_stopping")

    def on_end(self, state: TrainingState) -> None:
        """Put the best parameters back."""
        live = _tensors(state)
        with torch.no_grad():
            for name, copy in self._best.items():
                live[name].copy_(copy)
        self._best = {}

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on has to know."""
        return {"best": (self.best_score, self.best_step), "waited": self._waited, "tensors": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        (self.best_score, self.best_step), self._waited, self._best = state["best"], state["waited"], state["tensors"]


def _one_number(score: Any) -> float:
    try:
        return float(score.detach() if isinstance(score, torch.Tensor) else score)
    except (RuntimeError, TypeError, ValueError) as error:
        shape, kind = getattr(score, "shape", None), None if score is None else type(score).__name__
        got = kind if shape is None else f"shape {tuple(shape)}"
        cure = "Return the mean of the scores of all data, e.g. `lvm.elbo(model, guide, x).mean()`."
        raise DataTypeError(refuse("score", "one number", got, cure)) from error


def _tensors(state: TrainingState) -> dict[str, torch.Tensor]:
    """Everything that training changes: parameters that are updated, and buffers such as batch statistics."""
    buffers = {f"{i}.{name}": b for i, module in enumerate(state.modules) for name, b in module.named_buffers()}
    return state.params | {f"buffer {name}": buffer for name, buffer in buffers.items()}


def validation_elbo(
    x: Data, *args: Any, num_particles: int = 1, seed: int = 0, device: torch.device | str | None = None
) -> Score:
    """A score: the mean ELBO of held-out data, in nats per datum, a lower bound of the mean of log p(x).

    Args:
        x: ``(N, ...)``, or a ``Dataset`` of x, or of all arguments of the model, which is read in its own order as it
            is scored; of a ``DataLoader`` it is the data set that counts.
        args: further arguments of the model; those with N rows go with x.
        num_particles: draws per datum.
        seed: the same draws at each evaluation, so that scores differ by the parameters alone.
        device: where the data are moved to, piece by piece.

    Returns:
        A function of ``(model, guide)``, to be given to `EarlyStopping`.

    Raises:
        DataTypeError: x is neither a tensor nor a data set with a length, or is a loader of some of its data.
        ShapeError: x is empty or all NaN, or a number is too small.
    """
    num_data, parts = parts_in_order("x", x, args, _PART, check_device(device))
    check_positive_int("num_particles", num_particles)
    check_positive_int("seed", seed, minimum=0)

    def score(model: Model, guide: Guide) -> float:
        total = 0.0
        with torch.no_grad(), forked_rng(seed):  # a data set may draw its items
            for start, part in zip(range(0, num_data, _PART), parts(), strict=True):
                values = elbo(model, guide, *part, num_particles=num_particles, seed=seed + start)  # (B,)
                total += float(values.double().sum())
        return total / num_data

    return score


class Schedule:
    """Drive a torch learning-rate scheduler; it counts updates, so that skipped steps do not advance it.

    A ``ReduceLROnPlateau`` is given the loss of the step, or the mean loss of the epoch, skipped steps left out.

    Args:
        make_scheduler: makes the scheduler from the torch optimizer, once, before the first update.
        every: ``"step"`` or ``"epoch"``.

    Example:
        >>> schedule = Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99))
        >>> schedule.every
        'step'
    """

    def __init__(self, make_scheduler: Callable[[Any], Any], every: Literal["step", "epoch"] = "step") -> None:
        if not callable(make_scheduler):
            cure = "Pass e.g. `lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 100)`."
            raise DataTypeError(refuse("make_scheduler", "a function of the optimizer", make_scheduler, cure))
        if every not in ("step", "epoch"):
            raise DataTypeError(refuse("every", '"step" or "epoch"', repr(every), "Choose one of the two."))
        self.make_scheduler = make_scheduler
        self.every = every
        self._scheduler: Any = None

    def on_start(self, state: TrainingState) -> None:
        """Make the scheduler, which sets the learning rate of the first update."""
        if not isinstance(state.optimizer, torch.optim.Optimizer):
            cure = "Pass `optim` as a function of the parameters, or step the Pyro scheduler in a callback of yours."
            raise DataTypeError(refuse("optim", "a torch optimizer", type(state.optimizer).__name__, cure))
        self._scheduler = self.make_scheduler(state.optimizer)
        if isinstance(self._scheduler, ReduceLROnPlateau) and self._scheduler.mode != "min":
            cure = "It is given the loss, which is to fall; for a score that is to rise step it in a callback of yours."
            raise DataTypeError(refuse("make_scheduler", 'mode="min"', f'"{self._scheduler.mode}"', cure))

    def on_step(self, state: TrainingState) -> None:
        """Advance after an update."""
        if self.every == "step" and state.updated:
            self._advance([state.loss])

    def on_epoch(self, state: TrainingState) -> None:
        """Advance after an epoch."""
        if self.every == "epoch" and state.optimizer is not None:
            rows = takewhile(lambda row: row["epoch"] == state.epoch, reversed(state.history))
            self._advance([row["loss"] for row in rows if math.isfinite(row["loss"])])

    def _advance(self, losses: Sequence[float]) -> None:
        if not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()
        elif losses:
            self._scheduler.step(fmean(losses))

    def state_dict(self) -> dict[str, Any]:
        """The state of the scheduler, once there is one."""
        return {} if self._scheduler is None else self._scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; the scheduler has been made."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state)


class Log:
    """Send each row of the history to a logger.

    Args:
        logger: has ``log_metrics(dict, step)`` (Lightning) or ``log(dict, step)`` (Weights & Biases), or is one of the
            standard library, which gets a line at level INFO.
        every: steps between rows; what callbacks before this one recorded at the end of an epoch is always sent.

    Example:
        >>> class Printer:
        ...     def log(self, metrics, step): print(step, sorted(metrics))
        >>> Log(Printer(), every=10).every
        10
    """

    def __init__(self, logger: Any, every: int = 1) -> None:
        self._send: Any = getattr(logger, "log_metrics", None) or getattr(logger, "log", None)
        if isinstance(logger, logging.Logger | logging.LoggerAdapter):
            self._send = partial(_say, logger)
        if not callable(self._send):
            cure = "Pass a logger with one of the two methods, or a logging.Logger."
            raise DataTypeError(
                refuse("logger", "log_metrics(dict, step) or log(dict, step)", type(logger).__name__, cure)
            )
        self.every = check_positive_int("every", every)

    def on_step(self, state: TrainingState) -> None:
        """Send the row of this step."""
        if state.step % self.every == 0:
            self._send({name: value for name, value in state.history[-1].items() if name != "step"}, state.step)

    def on_epoch(self, state: TrainingState) -> None:
        """Send what callbacks recorded at the end of the epoch."""
        recorded = {n: v for n, v in state.history[-1].items() if n not in ("step", "epoch", "loss", "seconds")}
        if recorded:
            self._send(recorded, state.step)


def _say(logger: Any, row: Mapping[str, Any], step: int) -> None:
    """A row as a line."""
    values = (f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    logger.info("step %d: %s", step, ", ".join(values))
