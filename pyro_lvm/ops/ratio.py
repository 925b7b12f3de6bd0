r"""Self-normalised importance sampling, from chunks of particles, in one stratum or in several.

.. math::
    \hat f = \frac{\sum_k w_k f_k}{\sum_k w_k}, \qquad
    \mathrm{se}^2 = \sum_j \frac{K_j}{K_j - 1} \frac{\sum_{k \in j} (w_k (f_k - \hat f) - m_j)^2}{(\sum_k w_k)^2}

is the mean of f under the distribution whose density is proportional to q w, and its standard error by the delta
method; :math:`m_j` is the mean of :math:`w_k (f_k - \hat f)` over the K_j draws of stratum j, and zero if there is one.
Weights are scaled by the largest of a datum so far, values centred at their first mean, all in float64.
"""

from dataclasses import dataclass, fields

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


@dataclass(frozen=True, eq=False)
class _Sums:
    """Over the draws of one stratum; with weights w and centred values f, ``(N, ...)``."""

    count: int
    weights: torch.Tensor  # w, (N, 1...)
    moved: torch.Tensor  # w f
    squares: torch.Tensor  # w^2, (N, 1...)
    cross: torch.Tensor  # w^2 f
    second: torch.Tensor  # w^2 f^2
    plain: torch.Tensor  # f
    plain_second: torch.Tensor  # f^2

    @classmethod
    def of(cls, weights: torch.Tensor, values: torch.Tensor) -> "_Sums":
        """Of one chunk ``(k, N, ...)``."""
        moved = torch.where(weights == 0, 0.0, weights * values)  # a value without weight may be infinite
        terms = (weights, moved, weights.square(), weights * moved, moved.square(), values, values.square())
        return cls(len(values), *(term.sum(0) for term in terms))

    def scaled(self, factor: torch.Tensor) -> "_Sums":
        """With other weights, by a factor ``(N, 1...)``."""
        square = factor.square()
        return _Sums(
            self.count,
            self.weights * factor,
            self.moved * factor,
            self.squares * square,
            self.cross * square,
            self.second * square,
            self.plain,
            self.plain_second,
        )

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def scatter(self, step: torch.Tensor) -> torch.Tensor:
        """Variance of the sum of w (f - step)."""
        squares = self.second - 2 * step * self.cross + step.square() * self.squares
        return _variance_of_sum(squares, (self.moved - step * self.weights) / self.count, self.count)

    def plain_scatter(self) -> torch.Tensor:
        """Variance of the sum of f."""
        return _variance_of_sum(self.plain_second, self.plain / self.count, self.count)


def _variance_of_sum(squares: torch.Tensor, mean: torch.Tensor, count: int) -> torch.Tensor:
    """Of ``count`` terms, from the sum of their squares and their mean; NaN of a single one."""
    correction = count / (count - 1) if count > 1 else torch.nan
    return correction * (squares - count * mean**2).clamp(min=0)


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
        self._centre = self._shift = torch.empty(0)
        self._strata: dict[int, _Sums] = {}

    def update(self, log_weights: torch.Tensor, values: torch.Tensor, stratum: int = 0) -> None:
        """Take in one chunk of k particles.

        Args:
            log_weights: in nats, ``(k, N)``.
            values: of f, ``(k, N, ...)``.
            stratum: where they were drawn. Draws of one stratum come from one distribution.

        Raises:
            ShapeError: ``values`` has other first dimensions than ``log_weights``.
        """
        table = check_table(log_weights).detach().double()  # (k, N)
        if values.shape[:2] != table.shape:
            cure = "One value for each weight, further dimensions to the right."
            raise ShapeError(refuse("values", f"shape {tuple(table.shape)} or (*, ...)", tuple(values.shape), cure))
        values = values.detach().double()
        table = table.reshape(*table.shape, *(1,) * (values.dim() - 2))  # (k, N, 1...)
        if not self._strata:
            mean = values.mean(0)  # (N, ...)
            self._centre = torch.where(mean.isfinite(), mean, 0.0)
            self._shift = torch.full_like(table[0], -torch.inf)
        shift = torch.maximum(self._shift, table.amax(0))  # (N, 1...)
        finite = torch.where(shift.isfinite(), shift, 0.0)
        old, weights = (self._shift - finite).exp(), (table - finite).exp()
        self._strata = {index: sums.scaled(old) for index, sums in self._strata.items()}
        before = self._strata.get(stratum)
        now = _Sums.of(weights, values - self._centre)
        self._strata[stratum] = before + now if before else now
        self._shift = shift

    def summary(self) -> RatioSummary:
        """The means of all particles taken in."""
        strata = list(self._strata.values())
        whole = sum(strata[1:], strata[0])
        step = whole.moved / whole.weights  # (N, ...)
        scatter = torch.stack([sums.scatter(step) for sums in strata]).sum(0)
        plain_scatter = torch.stack([sums.plain_scatter() for sums in strata]).sum(0)
        return RatioSummary(
            value=self._centre + step,
            stderr=scatter.sqrt() / whole.weights,
            unweighted=self._centre + whole.plain / whole.count,
            unweighted_stderr=plain_scatter.sqrt() / whole.count,
        )
