"""Adam by one kernel for all parameters, which skips a step on the device.

`torch.optim.Adam.step` spends more time in Python than its kernel does in arithmetic, and counts the steps of each
parameter by itself. Here the kernel is called directly, on the state that the optimizer holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["FusedAdam", "Slice"]


@dataclass(frozen=True)
class Slice:
    """Some parameters of one group, with their state."""

    group: dict[str, Any]
    where: list[int]  # positions of their gradients
    params: list[torch.Tensor]
    first_moments: list[torch.Tensor]
    second_moments: list[torch.Tensor]
    steps: list[torch.Tensor]  # views of `counts`
    counts: torch.Tensor
    counted: torch.Tensor  # 1 where a parameter is among `params`


class FusedAdam:
    """Drives a `torch.optim.Adam` or ``AdamW``, whose learning rate and state stay where everyone looks for them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._counts: dict[int, torch.Tensor] = {}

    @staticmethod
    def drives(optimizer: Any, params: Sequence[torch.Tensor]) -> bool:
        """Whether the kernel does what the optimizer would."""
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            return False
        options = ("amsgrad", "maximize", "capturable", "differentiable")
        kinds = {(p.dtype, p.device) for p in params}
        hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        plain = not any(group[name] for group in optimizer.param_groups for name in options)
        return plain and not hooked and len(kinds) == 1 and all(p.is_floating_point() for p in params)

    def slices(self, params: Sequence[torch.Tensor]) -> list[Slice]:
        """The parameters by groups of the optimizer; those without state get one."""
        found = []
        place = {id(param): i for i, param in enumerate(params)}
        for group in self.optimizer.param_groups:
            chosen = [param for param in group["params"] if id(param) in place]
            if not chosen:
                continue
            counts = self._counts_of(group)
            states = [self.optimizer.state[param] for param in chosen]
            found.append(
                Slice(
                    group=group,
                    where=[place[id(param)] for param in chosen],
                    params=chosen,
                    first_moments=[state["exp_avg"] for state in states],
                    second_moments=[state["exp_avg_sq"] for state in states],
                    steps=[state["step"] for state in states],
                    counts=counts,
                    counted=counts.new_tensor([float(id(param) in place) for param in group["params"]]),
                )
            )
        return found

    def _counts_of(self, group: dict[str, Any]) -> torch.Tensor:
        """The numbers of steps of a group in one tensor, of which each parameter's state has its element."""
        params = group["params"]
        if id(group) not in self._counts:
            group["fused"] = True  # for plain steps in between
            self.optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
            states = [self.optimizer.state[param] for param in params]
            for param, state in zip(params, states, strict=True):
                state.setdefault("exp_avg", torch.zeros_like(param))
                state.setdefault("exp_avg_sq", torch.zeros_like(param))
            counts = torch.tensor([float(state.get("step", 0.0)) for state in states], device=params[0].device)
            for state, count in zip(states, counts, strict=True):
                state["step"] = count
            self._counts[id(group)] = counts
        return self._counts[id(group)]

    def step(self, slices: list[Slice], gradients: Sequence[torch.Tensor], finite: torch.Tensor) -> None:
        """Update, unless ``finite`` is 0; the host does not look at it."""
        with torch.no_grad():
            skip = 1 - finite
            for part in slices:
                part.counts.addcmul_(part.counted, finite)
                group = part.group
                kernel = torch._fused_adamw_ if _decoupled(self.optimizer, group) else torch._fused_adam_
                kernel(
                    part.params,
                    [gradients[i] for i in part.where],
                    part.first_moments,
                    part.second_moments,
                    [],
                    part.steps,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                    found_inf=skip,
                )


def _decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    return isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
