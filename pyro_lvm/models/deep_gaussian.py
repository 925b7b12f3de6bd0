"""The generative half of a variational autoencoder: z ~ N(0, I), x | z through a neural network."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import nn

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.models.likelihoods import Likelihood, as_likelihood, observe
from pyro_lvm.models.priors import StandardNormal, VampPrior

__all__ = ["DeepGaussian"]

#: p(z), or what makes it anew at each use, from parameters that are trained.
Prior: TypeAlias = torch.distributions.Distribution | Callable[[], torch.distributions.Distribution]


class DeepGaussian(nn.Module):
    r"""Deep latent Gaussian model p(x, z) with decoder f.

    .. math:: z \sim N(0, I_L), \qquad x \mid z \sim p(x \mid f(z))

    Called with x it is a Pyro model with the latent ``z`` and the observed ``x`` in the plate ``data``. Every
    dimension of x but the first belongs to one datum.

    Args:
        decoder: maps z ``(..., L)`` to what the likelihood reads. The networks of ``pyro_lvm.nn`` take any leading
            dimensions.
        latent_dim: L.
        likelihood: ``"bernoulli"``, ``"normal"``, ``"categorical"``, ``"poisson"``, or an object of
            ``models.likelihoods``; the parameters of one that is a module are trained.
        prior: p(z) in the place of N(0, I). A module of ``models.priors``, whose parameters are trained, or another
            callable that returns a distribution with batch shape () and event shape ``(L,)``; or such a distribution,
            whose tensors stay as they are, on the device on which they were made.

    Raises:
        DataTypeError: ``likelihood`` is neither a known name nor callable, or ``prior`` is neither a distribution nor a
            callable, or (when used) returns none.
        ShapeError: ``prior`` has another shape, or (when used) the decoder's output does not fit x.

    Source: Kingma and Welling (2014), Section 3; Rezende, Mohamed and Wierstra (2014), Eqs. (1) to (4).

    Example:
        >>> from pyro_lvm.nn import MLP
        >>> model = DeepGaussian(MLP(8, [64], 64), latent_dim=8, likelihood="bernoulli")
        >>> model.sample(3).shape
        torch.Size([3, 64])
    """

    def __init__(
        self,
        decoder: nn.Module,
        latent_dim: int,
        likelihood: Literal["bernoulli", "normal", "categorical", "poisson"] | Likelihood = "bernoulli",
        prior: Prior | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.likelihood = as_likelihood(likelihood)
        if isinstance(prior, torch.distributions.Distribution):
            _checked_prior(prior, latent_dim)
        elif not (prior is None or callable(prior)) or isinstance(prior, type):
            cure = "Pass e.g. priors.MixtureOfNormals(10, L), or dist.StudentT(4.0, torch.zeros(L), 1.0).to_event(1)."
            raise DataTypeError(refuse("prior", "a distribution or what makes one", type(prior).__name__, cure))
        self.prior_fn: Prior = StandardNormal(latent_dim) if prior is None else prior

    @property
    def prior(self) -> dist.TorchDistribution:
        """p(z): batch shape (), event shape ``(L,)``."""
        given = self.prior_fn
        made = given if isinstance(given, torch.distributions.Distribution) else given()
        return _checked_prior(made, self.latent_dim)

    def decode(self, z: torch.Tensor) -> dist.TorchDistribution:
        """p(x|z) for z ``(..., L)``: batch shape ``(...)``, event shape that of one datum."""
        return self.likelihood(self.decoder(z), z.dim() - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro model; returns z, ``(N, L)``."""
        pyro.module("DeepGaussian", self)
        if isinstance(self.prior_fn, VampPrior):
            self.prior_fn.register()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)  # (N, L)
            observe(self.decode(z), x)
        return z

    @torch.no_grad()
    def sample(self, num_samples: int) -> torch.Tensor:
        """Draws x ~ p(x), ``(num_samples, D)`` or ``(num_samples, C, H, W)``."""
        z = self.prior.sample((check_positive_int("num_samples", num_samples),))  # (num_samples, L)
        return self.decode(z).sample()


def _checked_prior(prior: torch.distributions.Distribution, latent_dim: int) -> dist.TorchDistribution:
    if not isinstance(prior, torch.distributions.Distribution):
        cure = "Return a distribution with event shape (L,), e.g. dist.Normal(loc, scale).to_event(1)."
        raise DataTypeError(refuse("prior()", "a distribution", type(prior).__name__, cure))
    if prior.batch_shape != () or prior.event_shape != (latent_dim,):
        got = f"batch shape {tuple(prior.batch_shape)}, event shape {tuple(prior.event_shape)}"
        cure = "Declare the dimensions of z as event with .to_event(1)."
        raise ShapeError(refuse("prior", f"batch shape (), event shape ({latent_dim},)", got, cure))
    # pyro.sample calls its distribution, which one of plain torch does not allow.
    return prior if isinstance(prior, TorchDistributionMixin) else dist.TransformedDistribution(prior, [])
