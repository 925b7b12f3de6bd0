r"""Self-normalised importance sampling, from chunks of particles.

.. math::
    \hat f = \frac{\sum_k w_k f_k}{\sum_k w_k}, \qquad
    \mathrm{se}^2 = \frac{K}{K - 1} \frac{\sum_k w_k^2 (f_k - \hat f)^2}{(\sum_k w_k)^2}

is the mean of f under the distribution whose density is proportional to q w, and its standard error by the delta
method. Weights are scaled by the largest of a datum so far, values centred at their first mean, all in float64.
"""

from dataclasses import dataclass

import torch

from pyro_lvm._checks import refuse
from pyro_lvm.errors import ShapeError
from pyro_lvm.ops.log_space import check_table

__all__ = ["RatioAccumulator", "RatioSummary"]


@dataclass(frozen=True, eq=False)
class RatioSummary:
    """Means of f and their standard errors, per datum; all ``(N, ...)``, float64, in the units of f.

    Attributes:
        value: weighted mean, NaN where every weight is zero. Its bias is of the order of 1/K.
        stderr: its standard error; NaN for one particle. Optimistic under a heavy tail of the weights.
        unweighted: plain mean, that under q.
        unweighted_stderr: its standard error; NaN for one particle.
    """

    value: torch.Tensor
    stderr: torch.Tensor
    unweighted: torch.Tensor
    unweighted_stderr: torch.Tensor


class RatioAccumulator:
    """Collects weights and values of N data over chunks of particles.

    Example:
        >>> ratio = RatioAccumulator()
        >>> ratio.update(torch.tensor([[1.0], [3.0]]).log(), torch.tensor([[10.0], [20.0]]))
        >>> ratio.update(torch.tensor([[4.0]]).log(), torch.tensor([[30.0]]))
        >>> summary = ratio.summary()
        >>> summary.value, summary.unweighted  # (1 x 10 + 3 x 20 + 4 x 30) / 8
        (tensor([23.7500], dtype=torch.float64), tensor([20.], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self._centre = self._shift = torch.empty(0)
        self._sums: list[torch.Tensor] = []
        self._plain: list[torch.Tensor] = []

    def update(self, log_weights: torch.Tensor, values: torch.Tensor) -> None:
        """Take in one chunk of k particles.

        Args:
            log_weights: in nats, ``(k, N)``.
            values: of f, ``(k, N, ...)``.

        Raises:
            ShapeError: ``values`` has other first dimensions than ``log_weights``.
        """
        table = check_table(log_weights).detach().double()  # (k, N)
        if values.shape[:2] != table.shape:
            cure = "One value for each weight, further dimensions to the right."
            raise ShapeError(refuse("values", f"shape {tuple(table.shape)} or (*, ...)", tuple(values.shape), cure))
        values = values.detach().double()
        if not self.count:
            self._start(table, values)
        table = table.reshape(*table.shape, *(1,) * (values.dim() - 2))  # (k, N, 1...)
        shift = torch.maximum(self._shift, table.amax(0))  # (N, 1...)
        finite = torch.where(shift.isfinite(), shift, 0.0)
        old, weights = (self._shift - finite).exp(), (table - finite).exp()
        centred = values - self._centre
        moved = torch.where(weights == 0, 0.0, weights * centred)  # a value without weight may be infinite
        sums = (weights, moved, weights.square(), weights * moved, moved.square())
        scales = (old, old, old.square(), old.square(), old.square())
        self._sums = [kept * scale + new.sum(0) for kept, scale, new in zip(self._sums, scales, sums, strict=True)]
        self._plain = [self._plain[0] + centred.sum(0), self._plain[1] + centred.square().sum(0)]
        self._shift, self.count = shift, self.count + len(values)

    def _start(self, table: torch.Tensor, values: torch.Tensor) -> None:
        """Nothing yet, of the shape of the first chunk."""
        mean = values.mean(0)  # (N, ...)
        self._centre = torch.where(mean.isfinite(), mean, 0.0)
        zeros = torch.zeros_like(self._centre)
        self._shift = torch.full_like(zeros.reshape(zeros.shape[0], -1)[:, :1], -torch.inf)
        self._shift = self._shift.reshape(-1, *(1,) * (values.dim() - 2))  # (N, 1...)
        self._sums, self._plain = [zeros] * 5, [zeros] * 2

    def summary(self) -> RatioSummary:
        """The means of all particles taken in."""
        total, first, squares, cross, second = self._sums
        correction = self.count / (self.count - 1) if self.count > 1 else torch.nan
        step = first / total  # (N, ...)
        scatter = (second - 2 * step * cross + step.square() * squares).clamp(min=0)
        mean = self._plain[0] / self.count
        variance = (self._plain[1] / self.count - mean.square()).clamp(min=0) * correction
        return RatioSummary(
            value=self._centre + step,
            stderr=(correction * scatter).sqrt() / total,
            unweighted=self._centre + mean,
            unweighted_stderr=(variance / self.count).sqrt(),
        )
