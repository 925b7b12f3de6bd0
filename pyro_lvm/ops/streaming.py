"""Everything that :mod:`~pyro_lvm.ops.weights` and :mod:`~pyro_lvm.ops.pareto` say, from chunks of particles.

A table of K x N log-weights never exists: per datum a handful of float64 sums and the tail_size(K) + 1 largest
log-weights are kept, and of all data together the latest 32 MiB of log-weights, so that many small chunks cost no more
than a few large ones. The numbers agree with the one-shot functions to rounding for every way of cutting K.
"""

import math
from dataclasses import dataclass

import torch

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import ShapeError
from pyro_lvm.ops.log_space import check_table
from pyro_lvm.ops.moments import WeightMoments, merge_moments, weight_moments
from pyro_lvm.ops.pareto import MIN_TAIL, khat_from_tail, largest, tail_size
from pyro_lvm.ops.status import STATUSES, classify

__all__ = ["WeightAccumulator", "WeightSummary"]

# Rounding error of a log-weight in units of eps x noise_scale. A sum of n terms errs by about sqrt(n) eps / 2 of their
# size, so 64 covers tens of thousands of terms; a spread above it that means anything is far larger.
_NOISE_FACTOR = 64
_MAX_WAITING = 2**22  # log-weights that wait to be taken in together: 32 MiB
_MAX_ELEMENTS = 2**17  # of those, how many go through all sums at once: 1 MiB, what a cache holds
_EVEN = 0.99  # ESS / K from which k-hat, that of a tail of next to nothing, does not make a value unreliable


@dataclass(frozen=True, eq=False)
class WeightSummary:
    """What K particles say about log p(x), per datum; all ``(N,)``, float64, in nats where not stated.

    Attributes:
        value: log p-hat, the raw log mean weight. Biased low.
        stderr: Standard error of ``value`` (delta method); 0 for zero variance.
        bias: Estimated bias of ``value``, -stderr^2 / 2; it does not average out over data.
        elbo: Mean log-weight, -inf if one weight is zero.
        elbo_stderr: Standard error of ``elbo``; 0 for zero variance, NaN for one particle.
        ess: Effective sample size, a number of particles; K for zero variance, NaN where every weight is zero.
        khat: Pareto tail index; NaN where there is no tail to fit.
        spread: Largest less smallest log-weight; NaN where every weight is zero.
        noise: Rounding error of a log-weight; a spread of no more is called zero.
        status: Codes, indices into :data:`~pyro_lvm.ops.STATUSES` (int64).
        num_particles: Number of particles K (one int).
    """

    value: torch.Tensor
    stderr: torch.Tensor
    bias: torch.Tensor
    elbo: torch.Tensor
    elbo_stderr: torch.Tensor
    ess: torch.Tensor
    khat: torch.Tensor
    spread: torch.Tensor
    noise: torch.Tensor
    status: torch.Tensor
    num_particles: int


class WeightAccumulator:
    """Collects the log-weights of N data over chunks of particles.

    Args:
        num_data: Number of data N.
        num_particles: Number of particles K over all chunks; it fixes how many of the largest weights are kept.
        device: Where the chunks come from and the sums are kept.

    Raises:
        DataTypeError: a count is not an integer.
        ShapeError: a count is less than 1.

    Example:
        >>> accumulator = WeightAccumulator(num_data=1, num_particles=3)
        >>> accumulator.update(torch.tensor([[1.0], [3.0]]).log(), noise_scale=torch.ones(1))
        >>> accumulator.update(torch.tensor([[8.0]]).log(), noise_scale=torch.ones(1))
        >>> accumulator.summary().value.exp()
        tensor([4.0000], dtype=torch.float64)
    """

    def __init__(self, num_data: int, num_particles: int, device: torch.device | str = "cpu") -> None:
        self.num_data = check_positive_int("num_data", num_data)
        self.num_particles = check_positive_int("num_particles", num_particles)
        zeros = torch.zeros(self.num_data, dtype=torch.float64, device=device)  # (N,)
        empty = torch.full_like(zeros, -math.inf)
        self._moments = WeightMoments(0, empty, zeros, zeros)
        self._smallest = torch.full_like(zeros, math.inf)  # (N,)
        self._log_sum = zeros  # (N,) sum of the log-weights
        self._log_squares = zeros  # (N,) sum of squared deviations of the log-weights from their mean
        self._noise = zeros  # (N,)
        self._largest = zeros.new_empty(0, self.num_data)  # (up to M+1, N) descending
        self._table_size = tail_size(self.num_particles) + 1
        rows = min(self.num_particles, max(1, _MAX_WAITING // self.num_data))
        self._waiting = zeros.new_empty(rows, self.num_data)
        self._num_waiting = 0

    def update(self, log_weights: torch.Tensor, noise_scale: torch.Tensor) -> None:
        """Take in one chunk of k particles; the graph is dropped and the device is not waited for.

        Args:
            log_weights: Log-weights in nats, ``(k, N)``, of any floating dtype.
            noise_scale: Size in nats of the terms that were added up to a log-weight, ``(N,)``, e.g. the largest sum of
                their absolute values. Rounding in the dtype of ``log_weights`` is proportional to it, whatever
                the terms cancel to.

        Raises:
            DataTypeError: ``log_weights`` is not a floating tensor.
            ShapeError: not ``(k, N)`` and ``(N,)``.
        """
        table = check_table(log_weights).detach()  # (k, N)
        if table.shape[1] != self.num_data:
            cure = "Feed every chunk with the same data."
            raise ShapeError(refuse("log_weights", f"shape (k, {self.num_data})", tuple(table.shape), cure))
        if noise_scale.shape != (self.num_data,):
            cure = "Give one size of the summed terms per datum."
            raise ShapeError(refuse("noise_scale", f"shape ({self.num_data},)", tuple(noise_scale.shape), cure))
        noise = _NOISE_FACTOR * torch.finfo(table.dtype).eps * noise_scale.detach().double()  # (N,)
        self._noise = torch.maximum(self._noise, noise)
        while len(table):
            start, free = self._num_waiting, len(self._waiting) - self._num_waiting
            now, table = table[:free], table[free:]
            self._waiting[start : start + len(now)] = now
            self._num_waiting += len(now)
            if self._num_waiting == len(self._waiting):
                self._take_in()

    def _take_in(self) -> None:
        """Add what waits to the sums and to the largest."""
        waiting, self._num_waiting = self._waiting[: self._num_waiting], 0  # (k, N)
        for table in waiting.split(max(64, _MAX_ELEMENTS // self.num_data)):
            self._add_logs(table)
            self._moments = merge_moments(self._moments, weight_moments(table))
        pool = torch.cat([self._largest, waiting]) if len(self._largest) else waiting  # (at most M+1+k, N)
        self._largest = largest(pool, min(self._table_size, len(pool)))

    def _add_logs(self, table: torch.Tensor) -> None:
        """Merge sum, least and squared deviations of k more log-weights (Chan, Golub & LeVeque 1983)."""
        seen, new = self._moments.count, len(table)
        total = table.sum(dim=0)  # (N,)
        mean = total / new
        between = (mean - self._log_sum / seen).square() * (seen * new / (seen + new)) if seen else 0.0
        self._log_squares = self._log_squares + (table - mean).square_().sum(dim=0) + between
        self._log_sum = self._log_sum + total
        self._smallest = torch.minimum(self._smallest, table.amin(dim=0))

    def summary(self) -> WeightSummary:
        """The numbers of all particles taken in.

        Returns:
            A record of ``(N,)`` tensors.

        Raises:
            ShapeError: the number of particles taken in is not ``num_particles``.
        """
        seen = self._moments.count + self._num_waiting
        if seen != self.num_particles:
            cure = "Every particle counts once: call update until the chunks add up."
            raise ShapeError(refuse("num_particles", f"{self.num_particles} particles", seen, cure))
        if self._num_waiting:
            self._take_in()
        value = self._moments.log_mean  # (N,)
        spread = self._moments.shift - self._smallest
        khat = khat_from_tail(self._largest, self._noise)
        tail = self._largest[0] - self._largest[-1]  # (N,) NaN where every weight is zero
        flat = (tail <= self._noise) & (self._table_size > MIN_TAIL)
        ess = self._moments.effective_sample_size
        status = classify(value, spread, self._noise, khat, flat, ess >= _EVEN * seen, seen)
        equal = status == STATUSES.index("zero_variance")
        variance = self._moments.relative_variance.masked_fill(equal, 0.0)
        elbo_variance = self._log_squares / (seen * (seen - 1)) if seen > 1 else torch.full_like(value, math.nan)
        return WeightSummary(
            value=value,
            stderr=variance.sqrt(),
            bias=-0.5 * variance,
            elbo=self._log_sum / seen,
            elbo_stderr=elbo_variance.sqrt().masked_fill(equal, 0.0),
            ess=ess.masked_fill(equal, float(seen)),
            khat=khat,
            spread=spread,
            noise=self._noise,
            status=status,
            num_particles=seen,
        )
