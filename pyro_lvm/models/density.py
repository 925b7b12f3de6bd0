"""Distributions that neither torch nor Pyro has: a model's own density, a logistic in levels, Poisson by log-rate."""

import math
from typing import Any, Protocol, TypeAlias

import pyro.distributions as dist
import torch
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

__all__ = ["ExactDensity", "ExactDistribution", "LogPoisson", "LogisticLevels"]

Shape: TypeAlias = torch.Size | list[int] | tuple[int, ...]


class ExactDensity(Protocol):
    """A model that knows log p(x) of each datum and draws from it."""

    data_dim: int

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Nats, ``(...)``, of x ``(..., D)``."""

    def sample(self, num_samples: int) -> torch.Tensor:
        """Draws, ``(num_samples, D)``."""


class ExactDistribution(dist.TorchDistribution):
    """p(x) of a model as a distribution over ``(D,)``, the same in every element of the batch."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, model: ExactDensity, support: constraints.Constraint, batch_shape: Shape = ()) -> None:
        self.model = model
        self._support = support
        super().__init__(torch.Size(batch_shape), torch.Size([model.data_dim]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Where the density is not zero."""
        return self._support

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "ExactDistribution":
        """The same density in another batch."""
        return ExactDistribution(self.model, self._support, batch_shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """log p(x) in nats."""
        return self.model.log_prob(value)

    def sample(self, sample_shape: Shape = ()) -> torch.Tensor:
        """Independent draws for every element of the batch."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.model.sample(math.prod(shape[:-1])).reshape(shape)


class LogisticLevels(dist.TorchDistribution):
    r"""A logistic variable rounded to the levels {0, ..., n-1}; both end bins are open.

    .. math:: P(x) = \sigma(b) - \sigma(a), \qquad b = (x + 1/2 - \mu) / s, \quad a = (x - 1/2 - \mu) / s

    with :math:`a = -\infty` for x = 0 and :math:`b = \infty` for x = n-1.

    Args:
        loc: mu, in levels.
        scale: s, in levels.
        num_levels: n.
        validate_args: whether to check parameters and values; None is the global setting.

    Example:
        >>> p = LogisticLevels(torch.tensor(1.2), torch.tensor(0.5), num_levels=4)
        >>> p.log_prob(torch.arange(4.0)).exp()
        tensor([0.1978, 0.4478, 0.2852, 0.0691])
    """

    arg_constraints: dict[str, Any] = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(
        self, loc: torch.Tensor, scale: torch.Tensor, num_levels: int, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.num_levels = num_levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The levels."""
        return constraints.integer_interval(0, self.num_levels - 1)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "LogisticLevels":
        """The same distribution in another batch."""
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        expanded = LogisticLevels(loc, scale, self.num_levels, validate_args=False)
        expanded._validate_args = self._validate_args
        return expanded

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """log P(x) in nats, exact also where P(x) is below the smallest float."""
        if self._validate_args:
            self._validate_sample(value)
        below = logsigmoid((value + 0.5 - self.loc) / self.scale)  # log sigma(b)
        above = logsigmoid((self.loc - value + 0.5) / self.scale)  # log(1 - sigma(a))
        # sigma(b) - sigma(a) = sigma(b) (1 - sigma(a)) (1 - e^(a - b)), a product: nothing cancels.
        inside = below + above + torch.log(-torch.expm1(-1 / self.scale))
        return torch.where(value <= 0, below, torch.where(value >= self.num_levels - 1, above, inside))

    def sample(self, sample_shape: Shape = ()) -> torch.Tensor:
        """Independent draws for every element of the batch."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            # An exact zero of the generator is a draw that far out that it is level 0.
            y = self.loc + self.scale * (uniform.log() - torch.log1p(-uniform))
            return y.round().clamp(0, self.num_levels - 1)


class LogPoisson(dist.TorchDistribution):
    r"""Poisson counts with a given log-rate, which no rate that rounds to zero or infinity stands between.

    .. math:: \log P(x) = x r - e^r - \log x!

    Args:
        log_rate: r.
        validate_args: whether to check parameters and values; None is the global setting.

    Example:
        >>> LogPoisson(torch.tensor(-110.0)).log_prob(torch.tensor(2.0))  # -220 - log 2
        tensor(-220.6931)
    """

    arg_constraints: dict[str, Any] = {"log_rate": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, log_rate: torch.Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.shape, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "LogPoisson":
        """The same distribution in another batch."""
        expanded = LogPoisson(self.log_rate.expand(batch_shape), validate_args=False)
        expanded._validate_args = self._validate_args
        return expanded

    @property
    def mean(self) -> torch.Tensor:
        """The rate."""
        return self.log_rate.exp()

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """log P(x) in nats."""
        if self._validate_args:
            self._validate_sample(value)
        return value * self.log_rate - self.log_rate.exp() - torch.lgamma(value + 1)

    def sample(self, sample_shape: Shape = ()) -> torch.Tensor:
        """Independent draws for every element of the batch."""
        with torch.no_grad():
            return torch.poisson(self.mean.expand(self._extended_shape(torch.Size(sample_shape))))
