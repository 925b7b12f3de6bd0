"""Probabilistic PCA and factor analysis: the continuous model whose log p(x) and posterior are exact.

z ~ N(0, I), x | z ~ N(W z + mu, Psi), so that x ~ N(mu, W W^T + Psi) (Bishop, PRML, Eqs. 12.31 to 12.36).
The formulas themselves are in ``pyro_lvm.ops.gaussian``.
"""

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError
from pyro_lvm.ops.gaussian import linear_gaussian_log_marginal, linear_gaussian_posterior

__all__ = ["LinearGaussian"]


class LinearGaussian(nn.Module):
    r"""Linear-Gaussian model p(x, z): probabilistic PCA, or factor analysis with ``noise="diagonal"``.

    .. math:: z \sim N(0, I_L), \qquad x \mid z \sim N(W z + \mu, \Psi), \qquad \Psi = \sigma^2 I \text{ or } diag(\psi)

    Called with x it is a Pyro model with the latent ``z`` and the observed ``x`` in the plate ``data``.

    Args:
        latent_dim: L.
        data_dim: D.
        noise: ``"isotropic"``, one variance (Tipping and Bishop 1999), or ``"diagonal"``, one a dimension.

    Raises:
        DataTypeError: ``noise`` is neither name.
        ShapeError: a dimension is less than 1, or (when used) x is not ``(N, D)``.

    Example:
        >>> from pyro_lvm.datasets import digits
        >>> x = digits("counts").train
        >>> model = LinearGaussian(latent_dim=10, data_dim=64).fit_closed_form(x)
        >>> print(f"{model.log_prob(x).mean():.1f} nats, {model.posterior(x).event_shape}")
        -159.7 nats, torch.Size([10])
    """

    def __init__(self, latent_dim: int, data_dim: int, noise: Literal["isotropic", "diagonal"] = "isotropic") -> None:
        super().__init__()
        if noise not in ("isotropic", "diagonal"):
            raise DataTypeError(refuse("noise", "'isotropic' or 'diagonal'", repr(noise), "Pass one of the two."))
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.data_dim = check_positive_int("data_dim", data_dim)
        self.noise = noise
        self.weight = nn.Parameter(torch.randn(data_dim, latent_dim) / latent_dim**0.5)  # (D, L): prior var(x) about 2
        self.mean = nn.Parameter(torch.zeros(data_dim))  # (D,)
        self.log_variance = nn.Parameter(torch.zeros(1 if noise == "isotropic" else data_dim))  # (1,) or (D,)

    @property
    def variance(self) -> torch.Tensor:
        """The diagonal of Psi, ``(D,)``, for either kind of noise."""
        return self.log_variance.exp().expand(self.data_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro model; returns z, ``(N, L)``."""
        self._check(x)
        pyro.module("LinearGaussian", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self._prior())  # (N, L)
            pyro.sample("x", self._likelihood(z), obs=x)
        return z

    def posterior_guide(self, x: torch.Tensor) -> torch.Tensor:
        """A guide for this model that samples ``z`` from p(z|x) itself: every log-weight is log p(x)."""
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(x))  # (N, L)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log p(x) in nats, ``(N,)``, of x ``(N, D)`` (Eq. 12.35)."""
        return linear_gaussian_log_marginal(x, self.weight, self.mean, self.variance)

    def posterior(self, x: torch.Tensor) -> dist.MultivariateNormal:
        """Exact p(z|x), batch ``(N,)`` and event ``(L,)``, given x ``(N, D)`` (Eq. 12.42, for any Psi 12.66)."""
        loc, scale_tril = linear_gaussian_posterior(x, self.weight, self.mean, self.variance)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)

    @torch.no_grad()
    def sample(self, num_samples: int) -> torch.Tensor:
        """Draws x ~ p(x), ``(num_samples, D)``."""
        z = self._prior().sample((check_positive_int("num_samples", num_samples),))  # (num_samples, L)
        return self._likelihood(z).sample()

    @torch.no_grad()
    def fit_closed_form(self, x: torch.Tensor) -> "LinearGaussian":
        r"""Set the parameters to the maximum likelihood of x ``(N, D)``, for isotropic noise, and return the model.

        .. math:: \sigma^2 = \frac{1}{D - L} \sum_{i > L} \lambda_i, \qquad W = U_L (\Lambda_L - \sigma^2 I)^{1/2}

        with the eigenvalues in falling order, U_L the first eigenvectors, of the covariance of x divided by N. All
        D - L left-out eigenvalues count, also those that are zero because there are fewer data than dimensions.

        Source: Tipping and Bishop (1999), Eqs. (7) and (8); Bishop, PRML, Eqs. (12.45) and (12.46), with R = I.

        Raises:
            DataTypeError: the noise is diagonal, for which no closed form exists.
            ShapeError: L is not less than D.
            ParameterError: x lies in a subspace of L dimensions, so that the likelihood has no maximum.
        """
        self._check(x)
        if self.noise == "diagonal":
            raise DataTypeError(refuse("noise", "'isotropic'", "'diagonal'", "Train factor analysis with fit."))
        if self.latent_dim >= self.data_dim:
            cure = "With as many factors nothing is left over for the noise: take fewer."
            raise ShapeError(refuse("latent_dim", f"less than data_dim={self.data_dim}", self.latent_dim, cure))
        centred = x.double() - x.double().mean(0)  # (N, D)
        eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / len(x))  # rising: (D,), (D, D)
        top = eigenvalues[-self.latent_dim :].flip(0)  # (L,)
        variance = eigenvalues[: -self.latent_dim].mean()
        if not variance > torch.finfo(torch.float32).eps * top[0]:
            cure = "Take a smaller latent_dim or more data."
            raise ParameterError(refuse("x", f"data of rank above latent_dim={self.latent_dim}", "no more", cure))
        weight = vectors[:, -self.latent_dim :].flip(1) * (top - variance).clamp(min=0).sqrt()  # (D, L)
        self.weight.copy_(weight)
        self.mean.copy_(x.double().mean(0))
        self.log_variance.fill_(variance.log())
        return self

    def _prior(self) -> dist.Independent:
        return dist.Normal(self.mean.new_zeros(self.latent_dim), 1.0).to_event(1)

    def _likelihood(self, z: torch.Tensor) -> dist.Independent:
        return dist.Normal(z @ self.weight.T + self.mean, self.variance.sqrt()).to_event(1)

    def _check(self, x: torch.Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.data_dim:
            cure = "Flatten each datum, x.flatten(1), or make the model with the data's dimension."
            raise ShapeError(refuse("x", f"shape (N, {self.data_dim})", tuple(x.shape), cure))
