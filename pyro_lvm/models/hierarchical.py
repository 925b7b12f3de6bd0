"""A deep latent Gaussian model with several stochastic layers: z3 -> z2 -> z -> x, each step a neural network."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.models.likelihoods import Likelihood, Normal, as_likelihood, observe
from pyro_lvm.nn import MLP

__all__ = ["HierarchicalGaussian"]


class HierarchicalGaussian(nn.Module):
    r"""Hierarchical latent Gaussian model p(x, z, z_2, ..., z_M) with decoder f.

    .. math:: z_M \sim N(0, I), \qquad z_m \mid z_{m+1} \sim N(\mu_m(z_{m+1}), diag(s_m(z_{m+1}))^2),
              \qquad x \mid z \sim p(x \mid f(z))

    Called with x it is a Pyro model with the latents ``z`` (nearest to the data), ``z2``, ``z3`` and so on, and the
    observed ``x``, all in the plate ``data``. Every dimension of x but the first belongs to one datum. Its guides are
    ``guides.BottomUp`` and ``guides.TopDown``.

    Args:
        decoder: maps z ``(..., L_1)`` to what the likelihood reads. An ``MLP`` takes any leading dimensions.
        latent_dims: L_1, ..., L_M, from the data upwards.
        likelihood: ``"bernoulli"``, ``"normal"``, ``"categorical"``, ``"poisson"``, or an object of
            ``models.likelihoods``.
        hidden_dims: hidden layers of the network between two latents; empty for a linear map.

    Attributes:
        between: the networks, of which number m maps z_{m+2} to the mean and then the raw scale of z_{m+1}, as
            ``likelihoods.Normal`` reads them.

    Raises:
        DataTypeError: ``likelihood`` is neither a known name nor callable, or ``latent_dims`` is no list of integers.
        ShapeError: there are fewer than two layers, or (when used) the decoder's output does not fit x.

    Source: Rezende, Mohamed and Wierstra (2014), Eqs. (1) to (4); Sonderby et al. (2016), Ladder Variational
    Autoencoders, for this form.

    Example:
        >>> model = HierarchicalGaussian(MLP(8, [64], 64), latent_dims=[8, 4])
        >>> model.sample(3).shape
        torch.Size([3, 64])
    """

    prior_loc: torch.Tensor

    def __init__(
        self,
        decoder: nn.Module,
        latent_dims: Sequence[int],
        likelihood: Literal["bernoulli", "normal", "categorical", "poisson"] | Likelihood = "bernoulli",
        hidden_dims: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        if not isinstance(latent_dims, Sequence):
            cure = "Pass the size of each layer, from the data upwards, e.g. [8, 4]."
            raise DataTypeError(refuse("latent_dims", "a list of integers", repr(latent_dims), cure))
        self.latent_dims = tuple(check_positive_int("latent_dims", size) for size in latent_dims)
        if len(self.latent_dims) < 2:
            raise ShapeError(
                refuse("latent_dims", "two layers or more", list(latent_dims), "For one use DeepGaussian.")
            )
        self.decoder = decoder
        self.likelihood = as_likelihood(likelihood)
        self.between = nn.ModuleList(
            MLP(above, hidden_dims, 2 * here) for here, above in pairwise(self.latent_dims)
        )  # of z, z2, ... given the layer above
        # A buffer, so that the prior follows the module's device and dtype.
        self.register_buffer("prior_loc", torch.zeros(self.latent_dims[-1]), persistent=False)

    @property
    def prior(self) -> dist.Independent:
        """p(z_M) of the topmost layer: batch shape (), event shape ``(L_M,)``."""
        return dist.Normal(self.prior_loc, 1.0).to_event(1)

    def conditional(self, layer: int, above: torch.Tensor) -> dist.Independent:
        """p(z_m | z_{m+1}) for m = ``layer``, from 1, and z_{m+1} ``(..., L_{m+1})``: event shape ``(L_m,)``."""
        return Normal()(self.between[layer - 1](above), above.dim() - 1)

    def decode(self, z: torch.Tensor) -> dist.TorchDistribution:
        """p(x|z) for z ``(..., L_1)``: batch shape ``(...)``, event shape that of one datum."""
        return self.likelihood(self.decoder(z), z.dim() - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro model; returns z, ``(N, L_1)``."""
        pyro.module("HierarchicalGaussian", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{len(self.latent_dims)}", self.prior)  # (N, L_M)
            for layer in range(len(self.between), 0, -1):
                z = pyro.sample("z" if layer == 1 else f"z{layer}", self.conditional(layer, z))  # (N, L_m)
            observe(self.decode(z), x)
        return z

    @torch.no_grad()
    def sample(self, num_samples: int) -> torch.Tensor:
        """Draws x ~ p(x), ``(num_samples, D)`` or ``(num_samples, C, H, W)``."""
        z = self.prior.sample((check_positive_int("num_samples", num_samples),))  # (num_samples, L_M)
        for layer in range(len(self.between), 0, -1):
            z = self.conditional(layer, z).sample()  # (num_samples, L_m)
        return self.decode(z).sample()
