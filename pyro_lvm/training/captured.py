"""The captured step: a loss with its gradients as one graph for each shape of batch, replayed without Pyro.

The first step is a plain one: parameters, optimizer and what a loss finds out about a pair come into being there. Then
the step is captured, and compared with two plain ones and with one in `CHECK_EVERY` from there on. Whatever speaks
against the graph, the run goes on by plain steps and says why.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro.infer import ELBO

from pyro_lvm.objectives.annealing import KLAnnealing
from pyro_lvm.tracing.capture import Graph, NotCapturable, agree, capture, likeness, pays
from pyro_lvm.training.fused_adam import FusedAdam, Slice
from pyro_lvm.training.objective import Args, Objective
from pyro_lvm.training.plain import Outcome, PlainStep

__all__ = ["CHECK_EVERY", "CapturedStep"]

logger = logging.getLogger("pyro_lvm")

#: Steps from one comparison with a plain step to the next.
CHECK_EVERY = 500

_TIMED = 10  # replays whose time says whether to compile
_REMEMBER_EVERY = 100  # replays from one copy of the parameters to the next, for an update that overflows
_FROZEN = ": something that is no tensor has changed, such as a Python number or a random number of NumPy"


@dataclass(eq=False)
class _Replay:
    """What there is to know of batches of one shape."""

    calls: int = 0
    seconds: float = 0.0
    graph: Graph | None = None
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)  # those with a gradient
    slices: list[Slice] | None = None  # what `FusedAdam` updates; None leaves it to the guarded optimizer


class CapturedStep:
    """One update by a captured graph, or by a plain step where there is none.

    Attributes:
        replayed: number of updates by a graph.
        notes: what did not work, and why.
    """

    def __init__(
        self,
        plain: PlainStep,
        objective: Objective,
        programs: Sequence[Any],
        modules: Sequence[torch.nn.Module],
        num_steps: float,
    ) -> None:
        self.plain, self.guard, self.objective = plain, plain.guard, objective
        self.programs, self.num_steps = programs, num_steps
        self.modules = [part for module in modules for part in module.modules()]
        self.replays: dict[Any, _Replay] = {}
        self.adam: FusedAdam | None = None
        self.calls = self.replayed = 0
        self.notes: list[str] = []
        self.over = False
        if isinstance(objective.loss, ELBO) and not hasattr(objective.loss, "differentiable_loss"):
            self._end(f"{type(objective.loss).__name__} has no differentiable_loss")

    def __call__(self, batch: Args) -> Outcome:
        """Update by a batch."""
        self.calls += 1
        if self.over:
            return self.plain(batch)
        key = (*map(likeness, batch), *(module.training for module in self.modules))
        replay = self.replays.setdefault(key, _Replay())
        replay.calls += 1
        try:
            if replay.calls == 1:
                return self.plain(batch)
            if replay.graph is None:
                self._capture(replay, batch)
            if replay.calls <= 3 or replay.calls % CHECK_EVERY == 0:
                return self._compared(replay, batch)
            return self._replayed(replay, batch)
        except NotCapturable as error:
            self._end(str(error))
            return self.plain(batch)

    def _end(self, reason: str) -> None:
        self.over = True
        self.replays.clear()
        self._note(f"compile=True: plain steps, because {reason}")

    def _note(self, note: str) -> None:
        self.notes.append(note)
        logger.warning("%s", note)

    def _capture(self, replay: _Replay, batch: Args) -> None:
        """Write the step down for batches like this one."""
        candidates = list(self.guard.params.items())
        function, used = _loss_and_gradients(self.objective, batch, [param for _, param in candidates])
        replay.graph = self._captured(function, batch)
        replay.leaves = dict(candidates[i] for i in used)
        leaves = list(replay.leaves.values())
        if FusedAdam.drives(self.guard.optimizer, leaves):
            self.adam = self.adam or FusedAdam(self.guard.optimizer)
            replay.slices = self.adam.slices(leaves)
        if batch[0].is_cuda:
            replay.graph.record(*self._inputs(batch))

    def _captured(self, function: Callable[..., tuple[torch.Tensor, ...]], batch: Args) -> Graph:
        """The graph; a buffer that is assigned anew, and not changed in place, would not be in it."""
        held = [(part._buffers, name, buffer) for part in self.modules for name, buffer in part._buffers.items()]
        try:
            graph = capture(function, self._inputs(batch), self.programs)
            anew = [name for buffers, name, buffer in held if buffers[name] is not buffer]
        finally:
            for buffers, name, buffer in held:
                buffers[name] = buffer
        if anew:
            raise NotCapturable(
                f"modules assign their buffers {sorted(set(anew))} anew, and do not change them in place"
            )
        return graph

    def _inputs(self, batch: Args) -> list[torch.Tensor]:
        """The tensors of a step: the weight of the KL terms, where that is annealed, and those of the batch."""
        loss = self.objective.loss
        device = batch[0].device
        weight = [torch.tensor(loss.beta, dtype=torch.float64, device=device)] if isinstance(loss, KLAnnealing) else []
        return weight + [arg for arg in batch if isinstance(arg, torch.Tensor)]

    def _compared(self, replay: _Replay, batch: Args) -> Outcome:
        """A plain step, and whether a replay would have come to the same."""
        assert replay.graph is not None
        inputs = self._inputs(batch)
        loss, finite, *rest = replay.graph.tried(*inputs)
        gradients = rest[: len(replay.leaves)]
        self.guard.keep_gradients = True
        try:
            outcome = self.plain(batch)
        finally:
            self.guard.keep_gradients = False
        if self.guard.finite and bool(finite):
            terms = sum(tensor.numel() for tensor in inputs)
            expected = torch.as_tensor(outcome.loss, dtype=loss.dtype)
            if not agree([expected], [loss], 100, terms):
                self._end(f"a replay has the loss {float(loss):.6g} where it is {float(expected):.6g}{_FROZEN}")
            elif self.guard.gradients.keys() != replay.leaves.keys() or not agree(
                [self.guard.gradients[name] for name in replay.leaves], gradients, 1e4, terms
            ):
                self._end(f"a replay has other gradients than a plain step{_FROZEN}")
        elif self.guard.finite or bool(finite):
            self._end(f"a replay is not finite where a plain step is, or the other way round{_FROZEN}")
        return outcome

    def _replayed(self, replay: _Replay, batch: Args) -> Outcome:
        assert replay.graph is not None
        started = time.perf_counter()
        inputs = self._inputs(batch)
        loss, finite, *gradients = replay.graph(*inputs)
        if isinstance(self.objective.loss, KLAnnealing):
            self.objective.loss.step += 1
        if self.replayed % _REMEMBER_EVERY == 0:
            self.guard.undo_overflow()
            self.guard.remember(replay.leaves)
        self.replayed += 1
        if self.adam is None or replay.slices is None:
            self.guard.update(replay.leaves, gradients, loss)
            outcome = self.plain.outcome
        else:
            self.adam.step(replay.slices, gradients, finite)
            finite = finite.clone()
            outcome = Outcome(loss.clone(), finite, finite)  # on CUDA the next replay overwrites what this one returned
        replay.seconds += time.perf_counter() - started
        if replay.calls == 3 + _TIMED:
            self._compile_if_it_pays(replay, inputs)
        return outcome

    def _compile_if_it_pays(self, replay: _Replay, inputs: list[torch.Tensor]) -> None:
        assert replay.graph is not None
        left = (self.num_steps - self.calls) * replay.calls / self.calls  # of this shape
        if not pays(left * replay.seconds / _TIMED):
            return
        logger.info("compiling the step for batches of %s", tuple(inputs[-1].shape))
        try:
            replay.graph.compile(*inputs)
        except NotCapturable as error:
            self._note(f"compile=True: the captured step runs as it is, because {error}")


def _loss_and_gradients(
    objective: Objective, batch: Args, params: Sequence[torch.Tensor]
) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[int]]:
    """A function of the tensors of a step: its loss, 1 if that and all gradients are finite or 0, and the gradients.

    The list says, once it has run, which of ``params`` have a gradient.
    """
    loss, used = objective.loss, list[int]()

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        if isinstance(loss, KLAnnealing):
            differentiable: Any = partial(loss.weighed_loss, next(given))
        else:
            differentiable = getattr(loss, "differentiable_loss", loss)
        args = [next(given) if isinstance(arg, torch.Tensor) else arg for arg in batch]
        value = differentiable(objective.model, objective.guide, *args)
        gradients = torch.autograd.grad(value, params, allow_unused=True)
        used[:] = [i for i, gradient in enumerate(gradients) if gradient is not None]
        present = [gradient for gradient in gradients if gradient is not None]
        value = value.detach()
        zero = sum((gradient.sum() * 0 for gradient in present), value * 0)  # NaN if anything is not finite
        return value, (zero == 0).to(torch.float32), *present

    return function, used
