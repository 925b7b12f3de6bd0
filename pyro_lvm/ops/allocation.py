r"""How many particles a datum takes for a wanted standard error, by what a pilot saw of its weights.

The standard error of log p-hat is about :math:`\sqrt{v / K}` with v the relative variance of the weights. A short pilot
says too little of v, the more so the heavier the tail is, and the final weights scatter in their turn: so five
standard errors of v are added to it, which even weights hardly have, and half of all that again. Lognormal weights met
an error of 0.05 in 98 to 100 % of 1,000 cases with sd(log w) = 0.7, 1.0 and 1.3, and in 95 % of 800 with 1.6. With v as
the pilot sees it, and a quarter added, it was 64 to 80 %.
"""

import math

import torch

from pyro_lvm._checks import check_positive_int
from pyro_lvm.ops.log_space import check_table

__all__ = ["PowerSums", "on_grid", "particles_needed"]

_ERRORS, _FACTOR = 5.0, 1.5


class PowerSums:
    """Number, and sums of the first four powers, of the weights of N data; each datum may have its own number.

    Args:
        num_data: Number of data N.
        device: Where the weights come from.

    Example:
        >>> sums = PowerSums(1)
        >>> sums.update(torch.tensor([[1.0], [3.0]]).log())
        >>> sums.relative_variance
        tensor([0.5000], dtype=torch.float64)
    """

    def __init__(self, num_data: int, device: torch.device | str = "cpu") -> None:
        zeros = torch.zeros(check_positive_int("num_data", num_data), dtype=torch.float64, device=device)
        self.shift = torch.full_like(zeros, -math.inf)  # (N,) the largest log-weight
        self.sums = zeros.repeat(5, 1)  # (5, N) of (w / exp(shift))^0 to ^4

    def update(self, log_weights: torch.Tensor, noise_scale: torch.Tensor | None = None) -> None:
        """Take in log-weights in nats, ``(k, N)``; ``noise_scale`` is for other collectors."""
        table = check_table(log_weights).detach().double()  # (k, N)
        new = PowerSums(table.shape[1], table.device)
        new.shift = table.amax(0)
        scaled = (table - _finite(new.shift)).exp()
        new.sums = torch.stack([scaled.pow(power).sum(0) for power in range(5)])
        self.add(new, torch.arange(table.shape[1], device=table.device))

    def add(self, other: "PowerSums", at: torch.Tensor) -> None:
        """Take in what another one has seen of the data ``at``, ``(n,)`` indices."""
        shift = torch.maximum(self.shift[at], other.shift)
        powers = torch.arange(5, device=shift.device)[:, None]
        scales = [(old - _finite(shift)).exp() ** powers for old in (self.shift[at], other.shift)]  # each (5, n)
        self.sums[:, at] = self.sums[:, at] * scales[0] + other.sums * scales[1]
        self.shift[at] = shift

    @property
    def count(self) -> torch.Tensor:
        """Number of weights, ``(N,)``."""
        return self.sums[0]

    @property
    def relative_variance(self) -> torch.Tensor:
        """Variance v of the weights over their squared mean, ``(N,)``; NaN for no or one weight, or none above zero."""
        return self._central(2) * self.count / (self.count - 1)

    @property
    def relative_variance_stderr(self) -> torch.Tensor:
        """Standard error of v (delta method), ``(N,)``."""
        v, third, fourth = (self._central(power) for power in (2, 3, 4))
        # With d = w / mean - 1, v moves by d^2 - v - 2 v d for each weight: this is the mean square of that.
        return ((fourth - 4 * v * third + 4 * v**3 - v**2).clamp(min=0) / self.count).sqrt()

    def _central(self, power: int) -> torch.Tensor:
        """Mean of (w / mean - 1)^power, ``(N,)``."""
        raw = self.sums / self.count  # (5, N)
        terms = (math.comb(power, i) * (-1) ** (power - i) * raw[i] / raw[1] ** i for i in range(power + 1))
        return sum(terms, torch.zeros_like(raw[0])).clamp(min=0 if power % 2 == 0 else -math.inf)


def particles_needed(seen: PowerSums, target: float) -> torch.Tensor:
    r"""Number of particles with which the standard error of log p-hat stays below ``target`` in nearly every run.

    .. math:: K = 1.5 \, (v + 5 \, \mathrm{se}(v)) / \mathrm{target}^2

    Args:
        seen: Weights of a pilot.
        target: Wanted standard error in nats.

    Returns:
        Not rounded, ``(N,)``: infinite where no weight is above zero or fewer than two were seen, 0 where one is NaN or
        infinite, which no number of particles cures.

    Example:
        >>> sums = PowerSums(1)
        >>> sums.update(torch.tensor([[1.0], [3.0]] * 500).log())  # v = 1/4 +- 0.008
        >>> round(particles_needed(sums, 0.05).item(), -1)
        170.0
    """
    needed = _FACTOR * (seen.relative_variance + _ERRORS * seen.relative_variance_stderr) / target**2
    needed = needed.masked_fill(seen.shift.isneginf() | (seen.count < 2), math.inf)
    return needed.masked_fill(seen.shift.isnan() | seen.shift.isposinf(), 0.0)


def on_grid(needed: torch.Tensor, least: int, most: int) -> torch.Tensor:
    r"""Numbers of particles rounded up to ``least`` times a power of :math:`\sqrt 2`, at most ``most``; int64.

    Example:
        >>> on_grid(torch.tensor([0.0, 257.0, 1e9]), 256, 1000)
        tensor([ 256,  363, 1000])
    """
    steps = ((needed.double() / least).log2() * 2 - 1e-9).ceil().clamp(min=0)
    return (least * 2 ** (steps / 2)).ceil().clamp(max=most).long()


def _finite(shift: torch.Tensor) -> torch.Tensor:
    return torch.where(shift.isfinite(), shift, 0.0)
