"""The training loop: one step after the other, with callbacks around it."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.nn import PyroModule
from pyro.optim import PyroOptim
from pyro.params import param_with_module_name

from pyro_lvm._checks import refuse, shown
from pyro_lvm._interrupts import whole_results
from pyro_lvm._typing import Guide, Model
from pyro_lvm.errors import DataTypeError, ParameterError
from pyro_lvm.objectives.importance_weighted import BASELINE, ImportanceWeightedELBO
from pyro_lvm.ops.memory import keep_freed_memory
from pyro_lvm.tracing.isolation import called_modules, eval_mode, generator_states, set_generators, validation
from pyro_lvm.tracing.params import add_to_store, anchor, current_params
from pyro_lvm.tracing.questions import parameter_names
from pyro_lvm.training.batches import Batches
from pyro_lvm.training.captured import CapturedStep
from pyro_lvm.training.checkpoint import Checkpoint, restore
from pyro_lvm.training.diagnosis import explained, why_nonfinite
from pyro_lvm.training.history import History
from pyro_lvm.training.ledger import Ledger
from pyro_lvm.training.objective import Args, Objective, make_objective
from pyro_lvm.training.optimizers import GuardedOptimizer, MakeOptimizer, clear_gradients, refused_as_nonfinite
from pyro_lvm.training.plain import Outcome, PlainStep
from pyro_lvm.training.state import TrainingState
from pyro_lvm.training.statistics import BatchStatistics

__all__ = ["Engine", "check_one_tensor_a_name"]

logger = logging.getLogger("pyro_lvm")

#: What a callback may implement.
HOOKS = ("on_start", "on_step", "on_epoch", "on_end")
Hooks = dict[str, Callable[[TrainingState], None]]

_SETTLE_EVERY = 100  # steps of which CUDA reports together, where no callback looks at each
_MAX_STREAK = 10  # steps in a row that are not finite
_MAX_SHARE = 0.1  # of all steps that are not finite, once there are 100


class Engine:
    """One run of `fit`: first `look`, then, in the store that is trained, `train`."""

    def __init__(
        self,
        model: Model,
        guide: Guide,
        batches: Batches,
        update: str,
        callbacks: Sequence[Any],
        devices: list[torch.device],
    ) -> None:
        self.model, self.guide, self.batches = model, guide, batches
        self.update, self.callbacks, self.devices = update, callbacks, devices
        self.checkpoints = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
        self.hooks = [_hooks(callback) for callback in callbacks if not isinstance(callback, Checkpoint)]
        self.position = self._start_of(1)
        self.source = batches.stream()
        first = next(self.source)
        self.batch: Args = first[1] or ()
        self.stream: Iterator[tuple[int, Args | None]] = chain([first], self.source)
        self.names: tuple[set[str], set[str]] = (set(), set())  # of the model, of the guide
        self.state = TrainingState(model, guide, History())
        self.ledger = Ledger(self.state, every=_SETTLE_EVERY if devices and not self._watched() else 1)
        self.captured: CapturedStep | None = None
        self.objective: Objective
        self.guard: GuardedOptimizer
        self.statistics: BatchStatistics
        self.created: dict[str, torch.Tensor] = {}
        self.foreign: dict[str, torch.Tensor] = {}  # what the store held before the first step
        self.declared: tuple[list[str], list[str]] = ([], [])  # `names` on the first batch
        self.fingerprint: dict[str, Any] = {}  # of the arguments
        self.resumed_at: list[int] = []
        self.total = 0  # steps of the run, if the data say so
        self._started, self._replayed = time.perf_counter(), 0

    def look(self, loss: Any) -> tuple[set[str], set[str]]:
        """Run the pair on the first batch: which parameters belong to which half, and what is the loss.

        Raises:
            ParameterError: nothing to train.
            PlateError, SiteError: the pair does not fit the batch.
        """
        check_one_tensor_a_name(self.model, self.guide)
        known = current_params()
        try:
            with self._unnoticed():
                with called_modules(self.model, self.guide) as self.state.modules:
                    self.names = parameter_names(self.model, self.guide, *self.batch)
                num_data = self.batches.num_data
                self.objective = make_objective(self.model, self.guide, self.batch, loss, self.update, num_data)
                if isinstance(loss, ImportanceWeightedELBO) and loss.baseline is not None:
                    self.state.modules.append(loss.baseline)
                    self.names[1].update(_baseline_names(loss.baseline))
        except ValueError as error:
            self._explain(error)
            raise
        if not any(map(self.trainable, self.names[0] | self.names[1])):
            half = "pair" if self.update == "both" else self.update
            cure = 'Declare one by pyro.param, pyro.module or a PyroModule; what both halves use is trained by "both".'
            raise ParameterError(refuse("update", f"a parameter of the {half}", "none", cure))
        self._clear_gradients()
        self.created = {name: tensor for name, (tensor, _) in current_params().items() if name not in known}
        self.declared = sorted(self.names[0]), sorted(self.names[1])
        return self.names

    @contextmanager
    def _unnoticed(self) -> Iterator[None]:
        """Run the pair and leave no random number drawn, no batch statistic updated; a NaN in the data is no error."""
        generators = generator_states(self.devices)
        try:
            with eval_mode(self.model, self.guide), validation(False):
                yield
        finally:
            set_generators(generators)

    def _explain(self, error: ValueError) -> None:
        """Raise what Pyro's error on this batch means, if that is sure."""
        with self._unnoticed():
            named = explained(error, self.model, self.guide, self.batch, self.batches.num_data)
        if named is not None:
            raise named from error

    def _forget_initial_values(self) -> None:
        """Leave creating parameters to the first step, so that they use the random numbers that `SVI` would use."""
        kept = {name: param for name, param in current_params().items() if self.created.get(name) is not param[0]}
        pyro.get_param_store().clear()  # to delete one by one fails where a tensor has two names
        add_to_store(kept)

    def _clear_gradients(self) -> None:
        names = self.names[0] | self.names[1]
        clear_gradients(tensor for name, (tensor, _) in current_params().items() if name in names)

    def trainable(self, name: str) -> bool:
        """Whether a parameter is updated: it belongs to no frozen half."""
        model_names, guide_names = self.names
        if name not in model_names | guide_names:
            self._meet(name)
        return self.update == "both" or name not in (model_names if self.update == "guide" else guide_names)

    def _meet(self, name: str) -> None:
        """Find out whose a parameter is that came into being after the first batch; if neither's, it is both's."""
        with self._unnoticed():
            found = parameter_names(self.model, self.guide, *self.batch)
        for known, new in zip(self.names, found, strict=True):
            known.update(new if name in found[0] | found[1] else {name})

    def train(
        self,
        optim: MakeOptimizer | PyroOptim,
        num_epochs: int | None,
        num_steps: int | None,
        compile: bool,
        progress: bool | None,
        kept: Mapping[str, Any] | None,
    ) -> None:
        """Step until something says stop, from the beginning or from where a `Checkpoint` was ``kept``."""
        objective, state = self.objective, self.state
        total = self.total = num_steps or (num_epochs or 0) * (self.batches.num_batches or 0)
        guard = self.guard = GuardedOptimizer(optim, self.trainable, self._start)
        state.params = guard.params
        plain = PlainStep(objective, guard)
        if compile:
            self.captured = CapturedStep(plain, objective, (self.model, self.guide), state.modules, total or math.inf)
        step = self.captured or plain
        self._begin(kept)
        keep_freed_memory()
        try:
            with _bar(progress, total, state.step) as bar, whole_results():
                if self.position[1] == 0:  # a run that went on may have nothing left to do
                    self._limit(self.position[0], num_epochs, num_steps)
                while not state.stop_reason:
                    epoch, batch = next(self.stream)
                    if batch is None:
                        self._settle()
                        guard.undo_overflow()
                        self._call("on_epoch")
                        epoch += 1
                        self.position = self._start_of(epoch)
                        self._write()
                    self._limit(epoch, num_epochs, num_steps)
                    if batch is None or state.stop_reason:
                        continue
                    outcome = self._step(step, epoch, batch)
                    self.position = (epoch, self.position[1] + 1, self.position[2])
                    self.ledger.write(outcome, objective.num_data(batch), epoch, self.seconds)
                    if self.ledger.is_due:
                        self._settle()
                    self._call("on_step")
                    self._write()
                    bar.update()
            self._write(last=True)
            for checkpoint in self.checkpoints:
                checkpoint.end()
        except KeyboardInterrupt:
            state.stop_reason = "interrupted"
        finally:
            self.source.close()  # workers of a loader end at once, and not when garbage is collected
            self._settle()
            guard.undo_overflow()
            self._clear_gradients()
        self._call("on_end")
        if state.stop_reason == "nonfinite" and self.ledger.skipped == state.step:
            with self._unnoticed():
                raise why_nonfinite(self.model, self.guide, self.batch)

    def _begin(self, kept: Mapping[str, Any] | None) -> None:
        """The state before the first step of this process."""
        self.foreign = {n: t for n, (t, _) in current_params().items() if n not in self.created}
        self.statistics = BatchStatistics(self.state.modules)
        for checkpoint in self.checkpoints:
            checkpoint.start()
        if kept is not None:
            restore(self, kept)
            self._replayed = kept["replayed"]
        elif isinstance(self.objective.loss, ELBO):
            self._forget_initial_values()
        self._started = time.perf_counter() - (kept["seconds"] if kept else 0.0)

    def _limit(self, epoch: int, num_epochs: int | None, num_steps: int | None) -> None:
        """Stop where this epoch, or any further step, is more than was asked for."""
        self._stop_if(num_epochs is not None and epoch > num_epochs, "num_epochs")
        self._stop_if(num_steps is not None and self.state.step >= num_steps, "num_steps")

    def _start_of(self, epoch: int) -> tuple[int, int, torch.Tensor | None]:
        """A position: the epoch, batches done of it, and torch's generator at its start."""
        return epoch, 0, torch.get_rng_state() if self.checkpoints else None

    def _write(self, last: bool = False) -> None:
        """Write the checkpoints that are due, where a run can go on."""
        trained = self.ledger.skipped < self.state.step
        if trained and (self.batches.foreseen or self.position[1] == 0):
            for checkpoint in self.checkpoints:
                if last or checkpoint.due(self):
                    self._settle()
                    if self.guard.params_are_finite():  # else the next step takes an update back
                        checkpoint.write(self)
        elif not (last or self.batches.foreseen) and (self.batches.num_batches or math.inf) > self.total:
            for checkpoint in self.checkpoints:
                checkpoint.wait(self.state.step)

    @property
    def seconds(self) -> float:
        """Of training so far, in all processes."""
        return time.perf_counter() - self._started

    @property
    def replayed(self) -> int:
        """Number of updates by a captured graph so far, in all processes."""
        return self._replayed + (self.captured.replayed if self.captured else 0)

    def _step(self, step: PlainStep | CapturedStep, epoch: int, batch: Args) -> Outcome:
        """One update. What the first epoch has validated is not validated again."""
        self.batch = batch
        self.statistics.remember()
        try:
            with nullcontext() if epoch == 1 else validation(False):
                outcome = step(batch)
        except ValueError as error:
            if not refused_as_nonfinite(error):
                self._explain(error)
                raise
            self._clear_gradients()  # of the particles before the one that was refused
            self.guard.undo_overflow()
            outcome = Outcome(self.guard.loss, finite=False, updated=False)
        self.statistics.settle(outcome.finite)
        if self.state.step == 0 and self.objective.outside:  # a likelihood that is validated would have raised
            logger.warning(
                "observed sites %s have values outside of their support (grey pixels under a Bernoulli?), where no "
                "density is: they are trained on as they are, and the evaluators will refuse them",
                self.objective.outside,
            )
        return outcome

    def _settle(self) -> None:
        """Read what the steps came to, and give up where too little is finite."""
        ledger = self.ledger
        ledger.settle()
        if ledger.streak:
            self.guard.undo_overflow()
        self._stop_if(ledger.streak >= _MAX_STREAK, "nonfinite")
        self._stop_if(self.state.step >= 100 and ledger.skipped > _MAX_SHARE * self.state.step, "nonfinite")

    def _watched(self) -> bool:
        return any("on_step" in hook for hook in self.hooks)

    def _stop_if(self, condition: bool, reason: str) -> None:
        if condition:
            self.state.stop(reason)

    def _start(self, optimizer: Any) -> None:
        self.state.optimizer = optimizer
        self._call("on_start")

    def _call(self, name: str) -> None:
        for hook in self.hooks:
            if name in hook:
                hook[name](self.state)


def _baseline_names(baseline: torch.nn.Module) -> list[str]:
    """Parameters of a baseline that a loss trains for the guide, and with it."""
    return [param_with_module_name(BASELINE, name) for name, _ in baseline.named_parameters()]


def check_one_tensor_a_name(model: Model, guide: Guide) -> None:
    """A `PyroModule` names its parameters by its attributes alone: of two tensors of one name Pyro trains the first."""
    owners = [
        owner for owner in (anchor(model), anchor(guide)) if isinstance(owner, PyroModule) and not owner._pyro_name
    ]
    ours, theirs = (dict(owner.named_parameters()) for owner in owners) if len(owners) == 2 else ({}, {})
    clash = [name for name in ours if name in theirs and ours[name] is not theirs[name]]
    if clash:
        cure = "Name the attributes differently in model and guide: Pyro would train one and never the other."
        message = refuse("guide", "names that the model does not use", clash, cure)
        raise ParameterError(message, finding="shared-name")


def _hooks(callback: Any) -> Hooks:
    """The methods of a callback; a plain function is called after each epoch."""
    found = {name: getattr(callback, name) for name in HOOKS if hasattr(callback, name)}
    if isinstance(callback, type) or not (found or callable(callback)):
        cure = f"Pass an instance with any of the methods {', '.join(HOOKS)}."
        raise DataTypeError(refuse("callbacks", "functions of the state, or objects", repr(callback), cure))
    return found or {"on_epoch": callback}


def _bar(progress: bool | None, total: int, done: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total or None, initial=done, unit="step", disable=not shown(progress))
