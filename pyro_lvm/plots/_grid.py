"""Where a density of one or two dimensions has its mass, and how much of it lies above a level."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pyro_lvm.errors import SupportError

__all__ = ["Grid", "Mass", "find_mass", "grid_over"]

#: log-density in nats of points ``(G, d)``: ``(G,)``.
LogDensity = Callable[[torch.Tensor], torch.Tensor]

_NODES = {1: 1025, 2: 65}  # a dimension, while the mass is sought
_REACH = 12.0  # nats below the largest value: what lies lower does not count while it is sought
_ZOOMS = 60
_TAIL = 1e-3  # of the mass, that may be left out at each end


@dataclass(frozen=True)
class Grid:
    """Points of a product of lines, and the length or area around each, by the trapezoidal rule."""

    lines: tuple[np.ndarray, ...]

    @property
    def points(self) -> torch.Tensor:
        """``(G, d)``; the last dimension runs fastest."""
        return torch.cartesian_prod(*map(torch.from_numpy, self.lines)).reshape(-1, len(self.lines))

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of points along each line."""
        return tuple(map(len, self.lines))

    @property
    def cells(self) -> np.ndarray:
        """Of the shape of the grid."""
        sizes = [np.gradient(line) for line in self.lines]  # half of both neighbours; a whole one at the ends
        for size in sizes:
            size[[0, -1]] /= 2
        return sizes[0] if len(sizes) == 1 else np.outer(*sizes)

    def values(self, log_density: LogDensity) -> np.ndarray:
        """The log-density on the grid, of its shape."""
        return log_density(self.points).double().cpu().numpy().reshape(self.shape)


@dataclass(frozen=True)
class Mass:
    """A density on an even grid over all that is not negligible of it.

    Attributes:
        grid: the points.
        log_density: there, in nats, of the shape of the grid; -inf where it is not finite.
    """

    grid: Grid
    log_density: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """The share of the mass that each point stands for."""
        mass = np.exp(self.log_density - self.log_density.max()) * self.grid.cells
        return mass / mass.sum()

    @property
    def total(self) -> tuple[float, float]:
        """Log of the integral, in nats, and how far the grid of twice the spacing is off."""
        best, every_second = self.log_density.max(), (slice(None, None, 2),) * len(self.grid.lines)
        coarse = Grid(tuple(line[::2] for line in self.grid.lines))
        sums = [
            (np.exp(values - best) * grid.cells).sum()
            for grid, values in ((self.grid, self.log_density), (coarse, self.log_density[every_second]))
        ]
        return float(best + np.log(sums[0])), float(abs(np.log(max(sums[1], 1e-300) / sums[0])))

    @property
    def box(self) -> np.ndarray:
        """The interval or rectangle with all but a thousandth of the mass at each end, ``(2, d)``."""
        return np.array([_interval(line, self.weights, i) for i, line in enumerate(self.grid.lines)]).T

    def levels(self, shares: Sequence[float]) -> list[float]:
        """The log-densities above which these shares of the mass lie, in nats."""
        order = self.log_density.ravel().argsort()[::-1]
        within = self.weights.ravel()[order].cumsum()
        ends = np.searchsorted(within, shares).clip(max=len(order) - 1)
        return self.log_density.ravel()[order][ends].tolist()

    def mean(self, values: np.ndarray) -> tuple[float, float]:
        """The mean of ``values`` on the grid under the density, and how far the grid of twice the spacing is off."""
        every_second = (slice(None, None, 2),) * len(self.grid.lines)
        found = []
        for weights, part in ((self.weights, values), (self.weights[every_second], values[every_second])):
            counts = weights > 0  # what has no mass may have any value
            found.append(float((weights[counts] * part[counts]).sum() / weights.sum()))
        return found[0], abs(found[0] - found[1]) if np.isfinite(found).all() else 0.0


def grid_over(limits: np.ndarray, num_points: int, boxes: Sequence[np.ndarray]) -> Grid:
    """A grid of ``num_points`` a dimension over ``limits`` ``(2, d)``, and as many over each box that is narrow."""
    lines = []
    for i, (low, high) in enumerate(limits.T):
        nodes = [np.linspace(low, high, num_points)]
        for box in boxes:
            start, stop = np.clip(box[:, i], low, high)
            if 0 < stop - start < (high - low) / 3:
                nodes.append(np.linspace(start, stop, num_points))
        lines.append(np.unique(np.concatenate(nodes)))
    return Grid(tuple(lines))


def find_mass(log_density: LogDensity, starts: torch.Tensor) -> Mass:
    """Zoom to, or out to, where a density is not negligible.

    Args:
        log_density: up to a constant, in nats.
        starts: points ``(M, d)`` to begin with. What lies far from all of them, and is narrower than the spacing of the
            first grid, is not seen.

    Raises:
        SupportError: there is no mass.
    """
    dim, known = starts.shape[1], _finite(log_density(starts))
    low, high = starts.amin(0).cpu().numpy(), starts.amax(0).cpu().numpy()
    margin = np.maximum(0.1 * (high - low), 1e-6 * np.maximum(1.0, np.abs(high)))
    low, high = low - margin, high + margin
    for _ in range(_ZOOMS):
        grid = _even(low, high, _NODES[dim])
        nodes = grid.points.to(starts)
        values = _finite(log_density(nodes))
        least = max(float(values.max()), float(known.max())) - _REACH
        if least == -np.inf:
            raise SupportError(
                "limits: expected a density that is finite somewhere, got none around the draws of guide and prior. "
                "Look at log p(x, z) of the pair: is x in the support of the model?"
            )
        inside = torch.cat([nodes[values >= least], starts[known >= least]]).cpu().numpy()
        first, last = inside.min(0), inside.max(0)
        step, width = (high - low) / (_NODES[dim] - 1), high - low
        # One step beyond the last point that matters, and further where that is the edge.
        new_low, new_high = (
            np.where(first <= low, low - 2 * width, first - step),
            np.where(last >= high, high + 2 * width, last + step),
        )
        if (np.abs([new_low - low, new_high - high]) < 0.1 * width).all():
            break
        low, high = new_low, new_high
    grid = _even(low, high, 2 * _NODES[dim] - 1)
    return Mass(grid, grid.values(lambda points: _finite(log_density(points))))


def _even(low: np.ndarray, high: np.ndarray, num_points: int) -> Grid:
    return Grid(tuple(np.linspace(*ends, num_points) for ends in zip(low, high, strict=True)))


def _finite(values: torch.Tensor) -> torch.Tensor:
    """What is not finite counts as no mass: a pole has none in a point."""
    return values.masked_fill(~values.isfinite(), -torch.inf)


def _interval(line: np.ndarray, mass: np.ndarray, axis: int) -> tuple[float, float]:
    """Where all but a little of the mass lies along one line."""
    own = mass.sum(tuple(j for j in range(mass.ndim) if j != axis))
    within = own.cumsum() / own.sum()
    first = max(int(np.searchsorted(within, _TAIL)) - 1, 0)
    last = min(int(np.searchsorted(within, 1 - _TAIL)) + 1, len(line) - 1)
    return line[first], line[last]
