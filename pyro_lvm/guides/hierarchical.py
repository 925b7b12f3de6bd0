"""Guides of models with several stochastic layers: q draws the layers from the data upwards, or from the top down.

Sites are ``z`` (nearest to the data), ``z2``, ``z3`` and so on. Every conditional is a diagonal Gaussian whose mean and
scale a neural network gives, as in ``normal.py``; the networks belong to the guide, none is shared with the model.
"""

from collections.abc import Sequence
from itertools import pairwise

import pyro
import torch
from torch import nn

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import ShapeError
from pyro_lvm.guides.base import VariationalParameters
from pyro_lvm.guides.normal import diagonal_normal, diagonal_size
from pyro_lvm.nn import MLP

__all__ = ["BottomUp", "TopDown"]


class BottomUp(nn.Module):
    r"""Guide that draws each layer from the one below it.

    .. math:: q(z \mid x) \, q(z_2 \mid z) \, q(z_3 \mid z_2) \cdots

    The posterior of a model whose layers form a chain factorises like this, so that only the Gaussian form is a
    restriction; x acts on the upper layers through the draws of z alone.

    Args:
        latent_dims: L_1, ..., L_M, from the data upwards.
        encoder: maps x to ``(N, 2 L_1)``: the means of z, then the raw scales.
        hidden_dims: hidden layers of the network between two latents; empty for a linear map.

    Raises:
        DataTypeError: a dimension is not an integer, or there is no encoder.
        ShapeError: there are fewer than two layers, or (when used) the encoder's output has another size.

    Source: the inference model of Rezende, Mohamed and Wierstra (2014) and of Burda et al. (2016), which Sonderby et
    al. (2016) call bottom-up.

    Example:
        >>> guide = BottomUp([4, 2], MLP(64, [32], 8))
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 4])
    """

    def __init__(self, latent_dims: Sequence[int], encoder: nn.Module, hidden_dims: Sequence[int] = (64,)) -> None:
        super().__init__()
        self.latent_dims = _checked_dims(latent_dims)
        self.phi = VariationalParameters(diagonal_size(self.latent_dims[0]), encoder, None)
        self.between = nn.ModuleList(
            MLP(below, hidden_dims, diagonal_size(here)) for below, here in pairwise(self.latent_dims)
        )  # of z2, z3, ... given the layer below

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro guide; returns z, ``(N, L_1)``."""
        pyro.module("BottomUp", self)
        with pyro.plate("data", len(x)):
            first = z = pyro.sample("z", diagonal_normal(self.phi(x)))  # (N, L_1)
            for layer, network in enumerate(self.between, start=2):
                z = pyro.sample(f"z{layer}", diagonal_normal(network(z)))  # (N, L_m)
        return first


class TopDown(nn.Module):
    r"""Guide that draws the layers in the order of the model, each given the layer above it and features of x.

    .. math:: q(z_M \mid h) \, q(z_{M-1} \mid z_M, h) \cdots q(z \mid z_2, h), \qquad h = h(x)

    The posterior of a chain factorises in this order too. All layers share the features h, computed once; then each has
    a network of its own that reads h beside the latent above. Unlike in the Ladder of Sonderby et al. (2016), nothing
    is shared with the model: q(z_m | z_{m+1}, h) is not merged with p(z_m | z_{m+1}) by their precisions.

    Args:
        latent_dims: L_1, ..., L_M, from the data upwards.
        encoder: maps x to features h ``(N, H)``.
        feature_dim: H.
        hidden_dims: hidden layers of the network of each layer; empty for a linear map.

    Raises:
        DataTypeError: a dimension is not an integer, or there is no encoder.
        ShapeError: there are fewer than two layers, or (when used) the encoder's output has another size.

    Source: Sonderby et al. (2016), Ladder Variational Autoencoders; Kingma et al. (2016), Improved Variational
    Inference with Inverse Autoregressive Flow, on bidirectional inference.

    Example:
        >>> guide = TopDown([4, 2], MLP(64, [32], 16), feature_dim=16)
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self, latent_dims: Sequence[int], encoder: nn.Module, feature_dim: int, hidden_dims: Sequence[int] = (64,)
    ) -> None:
        super().__init__()
        self.latent_dims = _checked_dims(latent_dims)
        self.features = VariationalParameters(check_positive_int("feature_dim", feature_dim), encoder, None)
        above = (*self.latent_dims[1:], 0)  # nothing is above the topmost layer
        self.networks = nn.ModuleList(
            MLP(feature_dim + size, hidden_dims, diagonal_size(here))
            for here, size in zip(self.latent_dims, above, strict=True)
        )  # of z, z2, ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro guide; returns z, ``(N, L_1)``."""
        pyro.module("TopDown", self)
        h = inputs = self.features(x)  # (N, H)
        with pyro.plate("data", len(x)):
            for layer in range(len(self.networks), 0, -1):
                q = diagonal_normal(self.networks[layer - 1](inputs))
                z = pyro.sample("z" if layer == 1 else f"z{layer}", q)  # (N, L_m), or (K, N, L_m) for K particles
                inputs = torch.cat([z, h.expand(*z.shape[:-1], -1)], dim=-1)
        return z


def _checked_dims(latent_dims: Sequence[int]) -> tuple[int, ...]:
    dims = tuple(check_positive_int("latent_dims", size) for size in latent_dims)
    if len(dims) < 2:
        raise ShapeError(refuse("latent_dims", "two layers or more", list(dims), "For one use DiagonalNormal."))
    return dims
