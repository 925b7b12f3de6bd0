"""The optimizer that `SVI` steps: it refuses what is not finite, leaves out what is frozen, and drives one optimizer.

`SVI.step` computes gradients and then calls its optimizer with the parameters that the step used. Everything that is to
happen between gradients and update therefore lives in that call.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler

from pyro_lvm._checks import refuse
from pyro_lvm.errors import DataTypeError, ParameterError
from pyro_lvm.training.callbacks import Checkpoint, EarlyStopping, Log, Schedule

__all__ = ["GuardedOptimizer", "adam", "check_stepped", "clear_gradients", "refused_as_nonfinite"]

#: Makes one torch optimizer of a list of parameters.
MakeOptimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def adam(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    """The default: Adam with learning rate 1e-3."""
    return torch.optim.Adam(params, lr=1e-3)


def check_stepped(optim: Any, callbacks: Sequence[Any]) -> None:
    """A Pyro scheduler is stepped by nobody but a callback of the user's.

    Raises:
        DataTypeError: there is none that could.
    """
    passive = (Checkpoint, EarlyStopping, Log, Schedule)
    if isinstance(optim, PyroLRScheduler) and all(type(callback) in passive for callback in callbacks):
        cure = (
            "`fit` would never step it: pass the optimizer, `lambda params: torch.optim.Adam(params, lr=1e-3)`, and "
            "`callbacks.Schedule` with the scheduler, or call `state.optimizer.step()` in a callback of yours."
        )
        raise DataTypeError(refuse("optim", "an optimizer", type(optim).__name__, cure))


class GuardedOptimizer(PyroOptim):
    """Updates ``trainable`` parameters with one optimizer, unless the loss or a gradient is not finite.

    Attributes:
        optimizer: the torch or Pyro optimizer; a torch optimizer is made at the first gradient.
        params: name -> live tensor of each parameter that it updates.
        adopted: their names, in the groups in which the optimizer was given them.
        loss: total loss of the latest step, a float or a 0-dim tensor.
        finite: whether the latest step's loss and gradients were finite.
        updated: whether the latest step changed the parameters.
        check_loss: whether a loss that is not finite speaks against a step.
        keep_gradients: whether to fill `gradients`.
        gradients: name -> gradient of each parameter that the latest step updated.
    """

    def __init__(
        self,
        optim: MakeOptimizer | PyroOptim,
        trainable: Callable[[str], bool],
        on_start: Callable[[Any], None],
    ) -> None:
        # PyroOptim's own state, one optimizer per tensor, is what this class replaces
        self._make, self._trainable, self._on_start = optim, trainable, on_start
        self.check_loss = True
        self.optimizer: Any = None
        self.params: dict[str, torch.Tensor] = {}
        self.adopted: list[list[str]] = []
        self.loss: Any = math.nan
        self.finite = True
        self.updated = False
        self.keep_gradients = False
        self.gradients: dict[str, torch.Tensor] = {}
        self._before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # (live, its value before the latest update)

    def watch(self, loss_and_grads: Callable[..., Any]) -> Callable[..., Any]:
        """``loss_and_grads``, noting the value; losses that are tuples (reweighted wake-sleep) are added up."""

        def watched(*args: Any) -> Any:
            self.loss, self.finite, self.updated = math.nan, False, False
            value = loss_and_grads(*args)
            total = sum(value) if isinstance(value, tuple) else value
            self.loss = total.detach() if isinstance(total, torch.Tensor) else total
            return value

        return watched

    def __call__(self, params: Iterable[torch.Tensor], *_: Any, **__: Any) -> None:
        """Update the parameters of a step, and clear all gradients."""
        params = list(params)
        name_of = pyro.get_param_store().param_name
        named = {str(name_of(p)): p for p in params if p.grad is not None}
        chosen = {name: named[name] for name in sorted(named) if self._trainable(name)}  # one order in every process
        kept = chosen if self.keep_gradients else {}
        self.gradients = {name: p.grad.clone() for name, p in kept.items() if p.grad is not None}
        self.finite = self._finite(chosen.values())
        if not self.finite:
            self.undo_overflow()
        elif chosen:
            self._update(chosen)
        elif self.optimizer is None:
            cure = "Check `update`, `requires_grad`, and that the loss depends on a parameter."
            raise ParameterError(refuse("loss", "a gradient for at least one parameter", "none", cure))
        clear_gradients(params)

    def _finite(self, params: Iterable[torch.Tensor]) -> bool:
        """Decided on the device and read once, as ``torch.amp.GradScaler`` does."""
        tensors = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in params if p.grad is not None]
        tensors += [live for live, _ in self._before.values()]
        if self.check_loss:
            tensors.append(torch.as_tensor(self.loss))
        return _all_finite(tensors)

    def _update(self, chosen: dict[str, torch.Tensor]) -> None:
        self.adopt(chosen)
        self.remember(chosen)
        if isinstance(self.optimizer, PyroOptim):
            self.optimizer(list(chosen.values()))
        else:
            self.optimizer.step()
        self.updated = True

    def remember(self, chosen: dict[str, torch.Tensor]) -> None:
        """Keep the values of parameters for `undo_overflow`."""
        self._before = {name: (p, p.detach().clone()) for name, p in chosen.items()}

    def update(self, params: Mapping[str, torch.Tensor], gradients: Iterable[torch.Tensor], loss: torch.Tensor) -> None:
        """Update by gradients that were computed elsewhere."""
        for param, gradient in zip(params.values(), gradients, strict=True):
            param.grad = gradient
        self.loss, self.updated = loss, False
        self(params.values())

    def params_are_finite(self) -> bool:
        """Whether the latest update left all parameters finite."""
        return _all_finite(list(self.params.values()))

    def undo_overflow(self) -> None:
        """Take the latest update back if it made a parameter infinite or NaN, which finite gradients can do."""
        store = pyro.get_param_store()
        with torch.no_grad():
            if not _all_finite([store[name] for name in self._before if name in store]):
                for live, value in self._before.values():
                    live.copy_(value)

    def adopt(self, chosen: Mapping[str, torch.Tensor]) -> None:
        """Make the optimizer of all parameters, or hand it those that came into being since."""
        new = {name: p for name, p in chosen.items() if self.params.get(name) is not p}
        if not new:
            return
        self.params.update(new)
        self.adopted.append(list(new))
        if self.optimizer is None:
            self.optimizer = self._make if isinstance(self._make, PyroOptim) else _made(self._make, list(new.values()))
            self._on_start(self.optimizer)
        elif isinstance(self.optimizer, torch.optim.Optimizer):
            for param in new.values():
                self.optimizer.add_param_group({"params": [param]})


def _made(make: MakeOptimizer, params: list[torch.Tensor]) -> torch.optim.Optimizer:
    optimizer = make(params)
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        cure = "Pass a function such as `lambda params: torch.optim.Adam(params, lr=1e-3)`."
        raise DataTypeError(refuse("optim", "a first-order torch optimizer", type(optimizer).__name__, cure))
    return optimizer


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    # A sum is finite only if all its terms are, and is far cheaper than a look at each; it may overflow.
    return _all(tensors, lambda t: t.sum().isfinite()) or _all(tensors, lambda t: t.isfinite().all())


def _all(tensors: list[torch.Tensor], test: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    flags = [test(tensor) for tensor in tensors]
    return bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()) if flags else True


def clear_gradients(params: Iterable[torch.Tensor]) -> None:
    """Forget gradients: an optimizer leaves a parameter without one alone, with its momentum."""
    for param in params:
        param.grad = None


def refused_as_nonfinite(error: ValueError) -> bool:
    """Whether torch's validation refused a NaN or an infinity: what a non-finite loss is where validation is on.

    The refused tensor is the local ``value`` of the frame that raised.
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    value = traceback.tb_frame.f_locals.get("value") if traceback is not None else None
    return isinstance(value, torch.Tensor) and not bool(value.isfinite().all())
