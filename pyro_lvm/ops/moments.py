"""Mean and variance of the weights of each datum, held so that chunks of particles can be merged.

With s the largest log-weight of a datum, the scaled weights v_k = w_k / e^s lie in [0, 1] and neither under- nor
overflow. Their count, mean and sum of squared deviations give the evidence, its standard error and the effective
sample size. Centred sums (Chan, Golub & LeVeque 1983) keep their digits where the weights are almost equal;
K sum w^2 / (sum w)^2 - 1 computed as it stands would not.
"""

import math
from dataclasses import dataclass

import torch

from pyro_lvm.ops.log_space import check_table

__all__ = ["WeightMoments", "merge_moments", "weight_moments"]

_MAX_ELEMENTS = 2**18  # float64 elements of a temporary: 2 MiB


@dataclass(frozen=True, eq=False)
class WeightMoments:
    """First two moments of the scaled weights v = w / exp(shift), per datum, in float64.

    Attributes:
        count: Number of particles K.
        shift: Largest log-weight in nats, ``(N,)``.
        mean: Mean of v, ``(N,)``.
        squares: Sum over the particles of (v - mean)^2, ``(N,)``.

    Example:
        >>> weight_moments(torch.tensor([[1.0], [3.0]]).log()).log_mean.exp()
        tensor([2.0000], dtype=torch.float64)
    """

    count: int
    shift: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor

    @property
    def log_mean(self) -> torch.Tensor:
        """Log of the mean weight in nats, ``(N,)``."""
        return _finite_shift(self.shift) + self.mean.log()  # (N,)

    @property
    def relative_variance(self) -> torch.Tensor:
        """Estimated variance of the mean weight over its square, ``(N,)``; NaN for one particle or no support."""
        scatter = self.squares / (self.count - 1) if self.count > 1 else torch.full_like(self.squares, math.nan)
        return scatter / self.count / self.mean.square()  # (N,)

    @property
    def effective_sample_size(self) -> torch.Tensor:
        """(sum w)^2 / sum w^2, ``(N,)``; NaN where every weight is zero."""
        spread = self.squares / (self.count * self.mean.square())  # (N,), K - 1 for a single weight up to rounding
        return (self.count / (1 + spread)).clamp(min=1)


def weight_moments(log_weights: torch.Tensor) -> WeightMoments:
    """The moments of one table of log-weights.

    Args:
        log_weights: Log-weights in nats, ``(K, N)``.

    Returns:
        The moments per datum; no support gives a mean of zero, NaN and +inf propagate into the mean.

    Raises:
        DataTypeError: see :func:`~pyro_lvm.ops.log_weight_table`.
        ShapeError: likewise.

    Example:
        >>> weight_moments(torch.zeros(3, 1)).mean
        tensor([1.], dtype=torch.float64)
    """
    table = check_table(log_weights)  # (K, N)
    width = max(1, _MAX_ELEMENTS // len(table))
    if table.shape[1] <= width:
        return _moments(table.double())
    parts = [_moments(part.double()) for part in table.split(width, dim=1)]
    shift, mean, squares = (torch.cat([getattr(p, name) for p in parts]) for name in ("shift", "mean", "squares"))
    return WeightMoments(len(table), shift, mean, squares)


def _moments(table: torch.Tensor) -> WeightMoments:
    """Of a float64 table of a size that a cache holds: each temporary is read while it is still there."""
    shift = table.detach().amax(dim=0)  # (N,)
    scaled = (table - _finite_shift(shift)).exp_()  # (K, N)
    mean = scaled.mean(dim=0)  # (N,)
    centered = scaled - mean  # (K, N)
    return WeightMoments(len(table), shift, mean, (centered * centered).sum(dim=0))


def merge_moments(first: WeightMoments, second: WeightMoments) -> WeightMoments:
    """The moments of two disjoint sets of particles together.

    Args:
        first: Moments of some particles, ``(N,)`` data.
        second: Moments of other particles of the same data.

    Returns:
        What :func:`weight_moments` gives for both tables stacked, up to rounding.

    Example:
        >>> one, two = torch.zeros(2, 1), torch.ones(3, 1)
        >>> merge_moments(weight_moments(one), weight_moments(two)).count
        5
    """
    count = first.count + second.count
    shift = torch.maximum(first.shift, second.shift)  # (N,)
    scales = [torch.exp(part.shift - _finite_shift(shift)) for part in (first, second)]  # each (N,)
    means = [part.mean * scale for part, scale in zip((first, second), scales, strict=True)]
    squares = [part.squares * scale.square() for part, scale in zip((first, second), scales, strict=True)]
    step = means[1] - means[0]  # (N,)
    mean = (means[0] * first.count + means[1] * second.count) / count
    between = step.square() * (first.count * second.count / count)
    return WeightMoments(count, shift, mean, squares[0] + squares[1] + between)


def _finite_shift(shift: torch.Tensor) -> torch.Tensor:
    """``shift`` with zero where nothing finite can be subtracted: exp(-inf - (-inf)) would be NaN."""
    return torch.where(shift.isfinite(), shift, 0.0)
