"""All values of finite latents, numbered, and the model's log-density at any stretch of them."""

import math
from dataclasses import dataclass, replace

import torch

from pyro_lvm._typing import Guide, Model
from pyro_lvm.errors import SupportError
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.intercept import base_distribution, run, vectorised_frames
from pyro_lvm.tracing.particles import Latent
from pyro_lvm.tracing.probe import Plan

__all__ = ["Grid", "finite_grid"]

_MOST = 2**62  # that an index can count


@dataclass(frozen=True)
class _Axis:
    """A latent vector: its name, event shape, and the number of values of one element."""

    name: str
    shape: torch.Size
    values: torch.Tensor

    @property
    def size(self) -> int:
        return int(len(self.values) ** self.shape.numel())

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """Values number ``index (k,)``: the digits of each number, ``(k, *event)``."""
        powers = len(self.values) ** torch.arange(self.shape.numel(), device=index.device)
        digits = index[:, None].div(powers, rounding_mode="floor") % len(self.values)  # (k, elements)
        return self.values[digits].reshape(len(index), *self.shape)


@dataclass(frozen=True)
class Grid:
    """The product of all values of some latents; ``shared`` if one value serves all data at once."""

    axes: tuple[_Axis, ...]
    shared: bool = True

    @property
    def size(self) -> int:
        """Number of joint values."""
        return math.prod(axis.size for axis in self.axes)

    def log_joint(self, plan: Plan, model: Model, batch: Batch, start: int, stop: int) -> torch.Tensor:
        """Log p(x, z) at the values ``start`` to ``stop``, ``(k, N)`` nats."""
        layout = plan.model_layout
        index = torch.arange(start, stop, device=batch.args[0].device)
        draws = {}
        for axis in self.axes:
            index, here = index.div(axis.size, rounding_mode="floor"), index % axis.size
            value = axis.at(here).reshape(stop - start, *[1] * layout.nesting, *axis.shape)
            rank = 0 if layout.dim is None else -layout.dim
            if not self.shared and layout.dim is not None:
                sizes = list(value.shape)
                sizes[1 + layout.nesting + layout.dim] = len(batch)
                value = value.expand(sizes)
            draws[axis.name] = Latent(value, rank)
        return (
            plan.model_runner(model).run(batch, plan.model_mode, stop - start, draws)[0].total.expand(stop - start, -1)
        )


def finite_grid(plan: Plan, model: Model, guide: Guide, batch: Batch) -> Grid:
    """The values of the latents that ``guide`` has, as a uniform guide on finite supports.

    Raises:
        SupportError: a latent vector lies in a plate of its own within the data, so that each of its elements is one;
            or there are too many values to number them.
    """
    axes = []
    for name, site in run(guide, batch.args).items():
        others = [f.name for f in vectorised_frames(site) if f.name != plan.model_layout.plate]
        if others and name in plan.match.sampled:
            raise SupportError(
                f"latent site {name!r}: expected vectors in the data plate only, got plates {others} around it. "
                "Declare their dimensions as the event with to_event."
            )
        if name in plan.match.sampled:
            values = base_distribution(site["fn"]).enumerate_support(expand=False).reshape(-1)
            axes.append(_Axis(name, site["fn"].event_shape, values.to(batch.args[0].device)))
    grid = Grid(tuple(axes))
    if grid.size > _MOST:
        raise SupportError(
            f"latent sites {[axis.name for axis in axes]}: expected fewer than 2^62 joint values, got about "
            f"2^{grid.size.bit_length() - 1}. No computer sums them: estimate log p(x) with a guide."
        )
    return replace(grid, shared=_shared(grid, plan, model, batch))


def _shared(grid: Grid, plan: Plan, model: Model, batch: Batch) -> bool:
    """Whether the model broadcasts one value over all data, and computes what depends on z alone only once."""
    if plan.model_mode != "vectorised":
        return False
    stop = min(grid.size, 3)
    try:
        once = grid.log_joint(plan, model, batch, 0, stop)
    except Exception:  # noqa: BLE001 - a model that was not written for it may raise anything
        return False
    return torch.allclose(once, replace(grid, shared=False).log_joint(plan, model, batch, 0, stop), equal_nan=True)
