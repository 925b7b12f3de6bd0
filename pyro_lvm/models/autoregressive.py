r"""A masked autoencoder over binary x: an exact density without a latent.

.. math:: \log p(x) = \sum_d \log p(x_d \mid x_1, \dots, x_{d-1})

One network gives all conditionals at once. Masks cut every path from x_d to the output of a dimension up to d.
"""

from collections.abc import Sequence
from typing import cast

import pyro
import torch
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import ShapeError
from pyro_lvm.models.binary import check_binary
from pyro_lvm.models.density import ExactDistribution
from pyro_lvm.nn import MaskedMLP

__all__ = ["Autoregressive"]


class Autoregressive(nn.Module):
    r"""Autoregressive model p(x) of binary data, in the order of the columns.

    .. math:: x_d \mid x_{<d} \sim \text{Bernoulli}(\sigma(f_d(x_{<d})))

    Called with x it is a Pyro model that observes ``x`` in the plate ``data``; it has no latent, so train it with
    ``fit(model, None, x)``. A density costs one pass of the network, a draw D passes.

    Args:
        data_dim: D.
        hidden_dims: widths of the hidden layers of the ``nn.MaskedMLP``. In one with fewer than D units, the
            conditionals of the last dimensions see less than all before them.

    Attributes:
        network: the ``nn.MaskedMLP``, from x to the logits of all conditionals.

    Raises:
        DataTypeError: a size is not an integer.
        ShapeError: a size is less than 1, or (when used) x is not ``(N, D)``.
        SupportError: (when used) x holds other values than 0 and 1.

    Source: Germain, Gregor, Murray and Larochelle (2015), MADE: Masked Autoencoder for Distribution Estimation,
    Sections 3 and 4.

    Example:
        >>> model = Autoregressive(2, [8])
        >>> everything = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> print(f"{model.log_prob(everything).exp().sum():.5f}")
        1.00000
    """

    def __init__(self, data_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.data_dim = check_positive_int("data_dim", data_dim)
        self.network = MaskedMLP(data_dim, hidden_dims)
        for layer in self.network.layers:
            nn.init.xavier_uniform_(cast(nn.Linear, layer).weight)
            nn.init.zeros_(cast(nn.Linear, layer).bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro model; returns x, ``(N, D)``."""
        self._check(x, batch_dims=1)
        pyro.module("Autoregressive", self)
        with pyro.plate("data", len(x)):
            support = constraints.independent(constraints.boolean, 1)
            return pyro.sample("x", ExactDistribution(self, support), obs=x)

    def conditional_logits(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of p(x_d = 1 | x before d), for all d: ``(..., D)`` of x ``(..., D)``."""
        return self.network(x)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log p(x) in nats, ``(...)``, of x ``(..., D)``."""
        self._check(x)
        check_binary("x", x)
        x = x.to(next(self.parameters()).dtype)
        logits = self.conditional_logits(x)  # (..., D)
        return logsigmoid((2 * x - 1) * logits).sum(-1)

    @torch.no_grad()
    def sample(self, num_samples: int) -> torch.Tensor:
        """Draws x ~ p(x), ``(num_samples, D)``."""
        x = next(self.parameters()).new_zeros(check_positive_int("num_samples", num_samples), self.data_dim)
        for d in range(self.data_dim):
            x[:, d] = self.conditional_logits(x)[:, d].sigmoid().bernoulli()
        return x

    def _check(self, x: torch.Tensor, batch_dims: int | None = None) -> None:
        if x.dim() == 0 or x.shape[-1] != self.data_dim or batch_dims not in (None, x.dim() - 1):
            cure = "Flatten each datum, x.flatten(1), or make the model with the data's dimension."
            raise ShapeError(refuse("x", f"shape (N, {self.data_dim})", tuple(x.shape), cure))
