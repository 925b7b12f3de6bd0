"""The plain step: Pyro's `SVI` with a guarded optimizer."""

from dataclasses import dataclass

import torch
from pyro.infer import SVI, TraceTailAdaptive_ELBO

from pyro_lvm.training.objective import Args, Objective
from pyro_lvm.training.optimizers import GuardedOptimizer

__all__ = ["Outcome", "PlainStep"]


@dataclass(frozen=True)
class Outcome:
    """What a step came to; a tensor ``()`` is still on its device.

    Attributes:
        loss: of the whole batch, nats.
        finite: whether the loss and the gradients were finite.
        updated: whether the parameters changed.
    """

    loss: float | torch.Tensor
    finite: bool | torch.Tensor
    updated: bool | torch.Tensor


class PlainStep:
    """One update by `SVI`."""

    def __init__(self, objective: Objective, guard: GuardedOptimizer) -> None:
        self.guard = guard
        guard.check_loss = not isinstance(objective.loss, TraceTailAdaptive_ELBO)  # inf for want of a value
        self.svi = SVI(objective.model, objective.guide, guard, objective.loss)
        self.svi.loss_and_grads = guard.watch(self.svi.loss_and_grads)

    def __call__(self, batch: Args) -> Outcome:
        """Update by a batch."""
        self.svi.step(*batch)
        return self.outcome

    @property
    def outcome(self) -> Outcome:
        """Of the latest step, also where it raised an error."""
        return Outcome(self.guard.loss, self.guard.finite, self.guard.updated)
