r"""A normalizing flow over x: an exact density without a latent.

Layers of affine couplings, ``transforms.AffineCoupling``, bend a standard normal u into x. Both directions and the
determinant cost one pass of each network.
"""

import math
from collections.abc import Sequence
from typing import cast

import pyro
import torch
from torch import nn
from torch.distributions import constraints

from pyro_lvm._checks import check_positive_int, data_tensor, refuse
from pyro_lvm.errors import ParameterError, ShapeError
from pyro_lvm.models.density import ExactDistribution
from pyro_lvm.transforms import AffineCoupling, CouplingNetwork

__all__ = ["NormalizingFlow"]


class NormalizingFlow(nn.Module):
    r"""Real-valued flow p(x), the density of :math:`x = \mu + \sigma \odot T(u)`, :math:`u \sim N(0, I_D)`.

    .. math::
        \log p(x) = \log N(u; 0, I) - \log |\det T'(u)| - \sum_d \log \sigma_d, \qquad u = T^{-1}((x - \mu) / \sigma)

    T is a sequence of affine couplings; even and odd coordinates take turns. It starts at the identity, `initialize`
    sets mu and sigma from data. Called with x the model is a Pyro model that observes ``x`` in the plate ``data``; it
    has no latent, so train it with ``fit(model, None, x)``.

    Args:
        data_dim: D, two or more.
        num_layers: number of couplings.
        hidden_dims: widths of the hidden layers of each coupling's network.

    Attributes:
        loc: mu, ``(D,)``.
        log_scale: log sigma, ``(D,)``.

    Raises:
        DataTypeError: a size is not an integer.
        ShapeError: a size is too small, or (when used) x is not ``(N, D)``.

    Source: Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP, Eqs. (4) to (8).

    Example:
        >>> model = NormalizingFlow(2)
        >>> print(f"{model.log_prob(torch.zeros(1, 2)).item():.4f}")  # log N(0; 0, I), where it starts
        -1.8379
    """

    def __init__(self, data_dim: int, num_layers: int = 6, hidden_dims: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.data_dim = check_positive_int("data_dim", data_dim, minimum=2)
        check_positive_int("num_layers", num_layers)
        self.couplings = nn.ModuleList(CouplingNetwork(data_dim, hidden_dims, 2, i % 2) for i in range(num_layers))
        self.loc = nn.Parameter(torch.zeros(data_dim))  # (D,)
        self.log_scale = nn.Parameter(torch.zeros(data_dim))  # (D,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro model; returns x, ``(N, D)``."""
        self._check(x, batch_dims=1)
        pyro.module("NormalizingFlow", self)
        with pyro.plate("data", len(x)):
            return pyro.sample("x", ExactDistribution(self, constraints.real_vector), obs=x)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log p(x) in nats, ``(...)``, of x ``(..., D)``."""
        u, log_det = self.to_base(x)
        return log_det - 0.5 * (u.square().sum(-1) + self.data_dim * math.log(2 * math.pi))

    def to_base(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u of x, both ``(..., D)``, and ``log |det du/dx|``, ``(...)``."""
        self._check(x)
        u = (x - self.loc) * (-self.log_scale).exp()
        log_det = -self.log_scale.sum().expand(u.shape[:-1])
        for network in reversed(self.couplings):
            u, change = AffineCoupling(cast(CouplingNetwork, network)).backwards(u)
            log_det = log_det - change
        return u, log_det

    def from_base(self, u: torch.Tensor) -> torch.Tensor:
        """x of u, both ``(..., D)``: the inverse of `to_base`."""
        for network in self.couplings:
            u, _ = AffineCoupling(cast(CouplingNetwork, network)).forwards(u)
        return self.loc + u * self.log_scale.exp()

    @torch.no_grad()
    def sample(self, num_samples: int) -> torch.Tensor:
        """Draws x ~ p(x), ``(num_samples, D)``."""
        shape = (check_positive_int("num_samples", num_samples), self.data_dim)
        return self.from_base(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))

    @torch.no_grad()
    def initialize(self, x: torch.Tensor) -> "NormalizingFlow":
        """Set mu and sigma to the means and standard deviations of x ``(N, D)``, and return the model.

        Raises:
            ParameterError: a dimension is constant or not finite.
        """
        x = data_tensor("x", x).double()
        self._check(x, batch_dims=1)
        scale = x.std(0, unbiased=False)  # (D,)
        bad = (~((scale > 0) & scale.isfinite())).nonzero().flatten().tolist()
        if bad:
            cure = "Drop these columns, or add noise to them: a density has no maximum there."
            raise ParameterError(refuse("x", "finite columns that vary", f"others, {bad[:10]}", cure))
        self.loc.copy_(x.mean(0))
        self.log_scale.copy_(scale.log())
        return self

    def _check(self, x: torch.Tensor, batch_dims: int | None = None) -> None:
        if x.dim() == 0 or x.shape[-1] != self.data_dim or batch_dims not in (None, x.dim() - 1):
            cure = "Flatten each datum, x.flatten(1), or make the model with the data's dimension."
            raise ShapeError(refuse("x", f"shape (N, {self.data_dim})", tuple(x.shape), cure))
