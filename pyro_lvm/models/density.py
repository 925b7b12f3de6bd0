"""An exact density as the distribution of a Pyro site: what models without a latent observe x with."""

import math
from typing import Any, Protocol, TypeAlias

import pyro.distributions as dist
import torch
from torch.distributions import constraints

__all__ = ["ExactDensity", "ExactDistribution"]

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
