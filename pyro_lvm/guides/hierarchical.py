"""Guides of models with several stochastic layers: q draws the layers from the data upwards, or from the top down.

Sites are ``z`` (nearest to the data), ``z2``, ``z3`` and so on. Every conditional is a diagonal Gaussian, as in
``normal.py``; the networks of `BottomUp` and `TopDown` belong to the guide, `Ladder` shares those of the model.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.params import param_with_module_name
from torch import nn

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.guides.base import VariationalParameters
from pyro_lvm.guides.normal import diagonal_normal, diagonal_size
from pyro_lvm.nn import MLP

__all__ = ["BottomUp", "Ladder", "TopDown"]


class BottomUp(nn.Module):
    r"""Guide that draws each layer from the one below it.

    .. math:: q(z \mid x) \, q(z_2 \mid z) \, q(z_3 \mid z_2) \cdots

    The posterior of a model whose layers form a chain factorises like this, so that only the Gaussian form is a
    restriction; x acts on the upper layers through the draws of z alone.

    Args:
        latent_dims: L_1, ..., L_M, from the data upwards.
        encoder: maps x to ``(N, 2 L_1)``: the means of z, then the raw scales.
        num_data: N, for local means and scales of z, in the place of ``encoder``; the networks belong to all data.
        shared: one q(z) for every datum, in the place of ``encoder``.
        hidden_dims: hidden layers of the network between two latents; empty for a linear map.

    Raises:
        DataTypeError: ``latent_dims`` is no list of integers, or not exactly one of ``encoder``, ``num_data`` and
            ``shared`` is given.
        ShapeError: there are fewer than two layers, or (when used) the encoder's output has another size, or x has not
            ``num_data`` rows.

    Source: the inference model of Rezende, Mohamed and Wierstra (2014) and of Burda et al. (2016), which Sonderby et
    al. (2016) call bottom-up.

    Example:
        >>> guide = BottomUp([4, 2], MLP(64, [32], 8))
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        latent_dims: Sequence[int],
        encoder: nn.Module | None = None,
        *,
        num_data: int | None = None,
        shared: bool = False,
        hidden_dims: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        self.latent_dims = _checked_dims(latent_dims)
        self.phi = VariationalParameters(diagonal_size(self.latent_dims[0]), encoder, num_data, shared)
        self.between = nn.ModuleList(
            MLP(below, hidden_dims, diagonal_size(here)) for below, here in pairwise(self.latent_dims)
        )  # of z2, z3, ... given the layer below

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N, L_1)``."""
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
    a network of its own that reads h beside the latent above. Nothing is shared with the model; `Ladder` does that.

    Args:
        latent_dims: L_1, ..., L_M, from the data upwards.
        encoder: maps x to features h ``(N, H)``.
        num_data: N, for local features, in the place of ``encoder``; the networks belong to all data.
        shared: the same features for every datum, in the place of ``encoder``.
        feature_dim: H.
        hidden_dims: hidden layers of the network of each layer; empty for a linear map.

    Raises:
        DataTypeError: ``latent_dims`` is no list of integers, or not exactly one of ``encoder``, ``num_data`` and
            ``shared`` is given.
        ShapeError: there are fewer than two layers, or (when used) the encoder's output has another size, or x has not
            ``num_data`` rows.

    Source: Kingma et al. (2016), Improved Variational Inference with Inverse Autoregressive Flow, on bidirectional
    inference.

    Example:
        >>> guide = TopDown([4, 2], MLP(64, [32], 16), feature_dim=16)
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        latent_dims: Sequence[int],
        encoder: nn.Module | None = None,
        *,
        num_data: int | None = None,
        shared: bool = False,
        feature_dim: int,
        hidden_dims: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        self.latent_dims = _checked_dims(latent_dims)
        check_positive_int("feature_dim", feature_dim)
        self.features = VariationalParameters(feature_dim, encoder, num_data, shared)
        above = (*self.latent_dims[1:], 0)  # nothing is above the topmost layer
        self.networks = nn.ModuleList(
            MLP(feature_dim + size, hidden_dims, diagonal_size(here))
            for here, size in zip(self.latent_dims, above, strict=True)
        )  # of z, z2, ...

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N, L_1)``."""
        pyro.module("TopDown", self)
        h = inputs = self.features(x)  # (N, H)
        with pyro.plate("data", len(x)):
            for layer in range(len(self.networks), 0, -1):
                q = diagonal_normal(self.networks[layer - 1](inputs))
                z = pyro.sample("z" if layer == 1 else f"z{layer}", q)  # (N, L_m), or (K, N, L_m) for K particles
                inputs = torch.cat([z, h.expand(*z.shape[:-1], -1)], dim=-1)
        return z


class LadderModel(Protocol):
    """What `Ladder` reads of a model."""

    latent_dims: tuple[int, ...]
    between: nn.Module

    def conditional(self, layer: int, above: torch.Tensor, /) -> dist.Independent:
        """p(z_m | z_{m+1}) for m = ``layer``, from 1."""


class Ladder(nn.Module):
    r"""Guide that goes down with the model: each p(z_m | z_{m+1}) is merged with a Gaussian message from the data.

    .. math::
        q(z_m \mid z_{m+1}, x) \propto p(z_m \mid z_{m+1}) \, N(z_m; \hat\mu_m(x), \text{diag}(\hat s_m(x))^2), \qquad
        q(z_M \mid x) = N(z_M; \hat\mu_M(x), \text{diag}(\hat s_M(x))^2)

    The precisions of the two add up, and the means are weighted by them:

    .. math:: \sigma_m^{-2} = \hat s_m^{-2} + s_m^{-2}, \qquad
              \mu_m = \sigma_m^2 (\hat\mu_m \hat s_m^{-2} + \mu_m(z_{m+1}) s_m^{-2})

    So only the messages must be learned; the rest of the posterior of a chain is the model's own p.

    The networks between the layers belong to the model and to the guide, under the model's names:
    ``fit(model, guide, x)`` trains them once, ``update="model"`` trains the decoder alone, and ``update="guide"`` the
    messages alone. The model is held but is no submodule: ``parameters()``, ``state_dict()`` and ``to()`` of the guide
    leave it out; save and move it beside the guide.

    Args:
        model: the ``models.HierarchicalGaussian`` that the guide is for, or a module with its ``latent_dims``, its
            ``conditional(layer, above)`` and the networks of that in ``between``, which registers itself under its
            class name.
        encoder: maps x to ``(N, 2 (L_1 + ... + L_M))``: the message to z, means then raw scales, then that to z2, and
            so on.
        num_data: N, for local messages, in the place of ``encoder``.
        shared: the same messages for every datum, in the place of ``encoder``.

    Raises:
        DataTypeError: the model is not like that, or not exactly one of ``encoder``, ``num_data`` and ``shared`` is
            given.
        ShapeError: (when used) the encoder's output has another size, or x has not ``num_data`` rows.

    Source: Sonderby, Raiko, Maaloe, Sonderby and Winther (2016), Ladder Variational Autoencoders, Eqs. (17) to (20).

    Example:
        >>> from pyro_lvm.models import HierarchicalGaussian
        >>> model = HierarchicalGaussian(MLP(4, [32], 64), latent_dims=[4, 2])
        >>> guide = Ladder(model, MLP(64, [32], 2 * (4 + 2)))
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        model: LadderModel,
        encoder: nn.Module | None = None,
        *,
        num_data: int | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        missing = [name for name in ("latent_dims", "conditional", "between") if not hasattr(model, name)]
        if missing:
            got = f"{type(model).__name__} without {', '.join(missing)}"
            cure = "Pass the model itself, e.g. models.HierarchicalGaussian."
            raise DataTypeError(refuse("model", "latent_dims, conditional and between", got, cure))
        self._held: tuple[LadderModel] = (model,)  # in a tuple, where torch does not take it for a submodule
        self.latent_dims = _checked_dims(model.latent_dims)
        self.sizes = [diagonal_size(size) for size in self.latent_dims]
        self.phi = VariationalParameters(sum(self.sizes), encoder, num_data, shared)

    @property
    def model(self) -> LadderModel:
        """The model whose networks between the layers are shared."""
        return self._held[0]

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N, L_1)``."""
        pyro.module("Ladder", self)
        self._register_shared()
        *messages, top = (diagonal_normal(phi) for phi in self.phi(x).split(self.sizes, dim=-1))
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{len(self.latent_dims)}", top)  # (N, L_M)
            for layer in range(len(messages), 0, -1):
                q = _merged(messages[layer - 1], self.model.conditional(layer, z))
                z = pyro.sample("z" if layer == 1 else f"z{layer}", q)  # (N, L_m), or (K, N, L_m) for K particles
        return z

    def _register_shared(self) -> None:
        """Tell Pyro that the guide uses the model's networks too, by the names that the model gives them."""
        for name, parameter in self.model.between.named_parameters(prefix="between"):
            if parameter.requires_grad:
                pyro.param(param_with_module_name(type(self.model).__name__, name), parameter)


def _merged(message: dist.Independent, prior: dist.Independent) -> dist.Independent:
    """The product of two diagonal Gaussians, normalised."""
    precisions = message.variance.reciprocal(), prior.variance.reciprocal()  # (..., N, L_m) each
    variance = (precisions[0] + precisions[1]).reciprocal()
    loc = variance * (precisions[0] * message.mean + precisions[1] * prior.mean)
    return dist.Normal(loc, variance.sqrt()).to_event(1)


def _checked_dims(latent_dims: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(latent_dims, Sequence):
        cure = "Pass the size of each layer, from the data upwards, e.g. [8, 4]."
        raise DataTypeError(refuse("latent_dims", "a list of integers", repr(latent_dims), cure))
    dims = tuple(check_positive_int("latent_dims", size) for size in latent_dims)
    if len(dims) < 2:
        raise ShapeError(refuse("latent_dims", "two layers or more", list(dims), "For one use DiagonalNormal."))
    return dims
