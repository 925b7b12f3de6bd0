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
from pyro_lvm.models.likelihoods import Bernoulli, Categorical, Normal

__all__ = ["DeepGaussian"]

#: (decoder output, number of batch dimensions) -> p(x|z).
Likelihood: TypeAlias = Callable[[torch.Tensor, int], dist.TorchDistribution]

_LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "bernoulli": Bernoulli,
    "normal": Normal,
    "categorical": Categorical,
}


class DeepGaussian(nn.Module):
    r"""Deep latent Gaussian model p(x, z) with decoder f.

    .. math:: z \sim N(0, I_L), \qquad x \mid z \sim p(x \mid f(z))

    Called with x it is a Pyro model with the latent ``z`` and the observed ``x`` in the plate ``data``. Every
    dimension of x but the first belongs to one datum.

    Args:
        decoder: maps z ``(..., L)`` to what the likelihood reads. An ``MLP`` takes any leading dimensions.
        latent_dim: L.
        likelihood: ``"bernoulli"``, ``"normal"``, ``"categorical"``, or an object of ``models.likelihoods``.
        prior: a distribution with batch shape () and event shape ``(L,)`` in the place of N(0, I). Its tensors
            stay on the device on which they were made.

    Raises:
        DataTypeError: ``likelihood`` is neither a known name nor callable, or ``prior`` is not a distribution.
        ShapeError: ``prior`` has another shape, or (when used) the decoder's output does not fit x.

    Source: Kingma and Welling (2014), Section 3; Rezende, Mohamed and Wierstra (2014), Eqs. (1) to (4).

    Example:
        >>> from pyro_lvm.nn import MLP
        >>> model = DeepGaussian(MLP(8, [64], 64), latent_dim=8, likelihood="bernoulli")
        >>> model.sample(3).shape
        torch.Size([3, 64])
    """

    prior_loc: torch.Tensor

    def __init__(
        self,
        decoder: nn.Module,
        latent_dim: int,
        likelihood: Literal["bernoulli", "normal", "categorical"] | Likelihood = "bernoulli",
        prior: torch.distributions.Distribution | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.likelihood = _as_likelihood(likelihood)
        self._given_prior = None if prior is None else _checked_prior(prior, latent_dim)
        # A buffer, so that the prior follows the module's device and dtype.
        self.register_buffer("prior_loc", torch.zeros(latent_dim), persistent=False)

    @property
    def prior(self) -> dist.TorchDistribution:
        """p(z): batch shape (), event shape ``(L,)``."""
        if self._given_prior is not None:
            return self._given_prior
        return dist.Normal(self.prior_loc, 1.0).to_event(1)

    def decode(self, z: torch.Tensor) -> dist.TorchDistribution:
        """p(x|z) for z ``(..., L)``: batch shape ``(...)``, event shape that of one datum."""
        return self.likelihood(self.decoder(z), z.dim() - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro model; returns z, ``(N, L)``."""
        pyro.module("DeepGaussian", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)  # (N, L)
            likelihood = self.decode(z)
            if likelihood.event_shape != x.shape[1:]:
                got, wanted = tuple(likelihood.event_shape), tuple(x.shape[1:])
                cure = "Change the decoder's last layer, or reshape x or the output (nn.Unflatten)."
                raise ShapeError(refuse("decoder", f"p(x|z) over data of shape {wanted}", got, cure))
            pyro.sample("x", likelihood, obs=x)
        return z

    @torch.no_grad()
    def sample(self, num_samples: int) -> torch.Tensor:
        """Draws x ~ p(x), ``(num_samples, D)`` or ``(num_samples, C, H, W)``."""
        z = self.prior.sample((check_positive_int("num_samples", num_samples),))  # (num_samples, L)
        return self.decode(z).sample()


def _as_likelihood(likelihood: str | Likelihood) -> Likelihood:
    if callable(likelihood):
        return likelihood
    if not isinstance(likelihood, str) or likelihood not in _LIKELIHOODS:
        expected = f"one of {tuple(_LIKELIHOODS)} or a callable"
        raise DataTypeError(refuse("likelihood", expected, repr(likelihood), "See pyro_lvm.models.likelihoods."))
    return _LIKELIHOODS[likelihood]()


def _checked_prior(prior: torch.distributions.Distribution, latent_dim: int) -> dist.TorchDistribution:
    if not isinstance(prior, torch.distributions.Distribution):
        cure = "Pass e.g. dist.StudentT(4.0, torch.zeros(L), 1.0).to_event(1)."
        raise DataTypeError(refuse("prior", "a distribution", type(prior).__name__, cure))
    if prior.batch_shape != () or prior.event_shape != (latent_dim,):
        got = f"batch shape {tuple(prior.batch_shape)}, event shape {tuple(prior.event_shape)}"
        cure = "Declare the dimensions of z as event with .to_event(1)."
        raise ShapeError(refuse("prior", f"batch shape (), event shape ({latent_dim},)", got, cure))
    # pyro.sample calls its distribution, which one of plain torch does not allow.
    return prior if isinstance(prior, TorchDistributionMixin) else dist.TransformedDistribution(prior, [])
