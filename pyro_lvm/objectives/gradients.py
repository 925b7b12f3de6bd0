"""Gradients of a loss on one batch, repeated, with nothing of them left behind."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pyro_lvm._typing import Guide, Model
from pyro_lvm.objectives.default import model_and_loss
from pyro_lvm.ops.running import RunningMoments
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.params import current_params, module_parameters
from pyro_lvm.tracing.probe import run_pair

__all__ = ["gradient_moments", "gradients_put_aside", "program_and_loss"]

Leaves = dict[str, torch.Tensor]


def program_and_loss(model: Model, guide: Guide, batch: Batch, loss: Any) -> tuple[Model, Any]:
    """The model as the loss sees it, and a copy of the loss."""
    with torch.no_grad():
        pair = run_pair(model, guide, batch)
    program, objective = model_and_loss(model, model, pair.model, pair.guide, loss)
    return program, copy.copy(objective)


@contextmanager
def gradients_put_aside(*holders: Any) -> Iterator[None]:
    """Give parameters the gradients back that they had."""
    inside = [part for holder in holders for part in getattr(holder, "__dict__", {}).values()]  # a baseline of the loss
    tensors = [t for t, _ in current_params().values()]
    tensors += [p for holder in (*holders, *inside) if callable(holder) for p in module_parameters(holder)]
    before = [(t, t.grad) for t in tensors]
    try:
        yield
    finally:
        for tensor, grad in before:
            tensor.grad = grad


def gradient_moments(
    loss: Any, model: Model, guide: Guide, batch: Batch, leaves: Leaves, num_repeats: int
) -> tuple[RunningMoments, dict[str, RunningMoments]]:
    """Moments of the loss and of the gradient of each parameter."""
    values, moments = RunningMoments(), {name: RunningMoments() for name in leaves}
    backward: Callable[..., Any] = getattr(loss, "loss_and_grads", None) or _backward(loss)
    for _ in range(num_repeats):
        for leaf in leaves.values():
            leaf.grad = None
        values.add(torch.as_tensor(backward(model, guide, *batch.args)))
        for name, leaf in leaves.items():
            moments[name].add(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    return values, moments


def _backward(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def backward(*args: Any) -> torch.Tensor:
        value = loss(*args)
        value.backward()
        return value.detach()

    return backward
