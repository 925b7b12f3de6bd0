"""A normalizing flow as a guide: Gaussian draws, bent by networks that see x through a context."""

from typing import Any, Literal, cast

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import DataTypeError
from pyro_lvm.guides.base import VariationalParameters, sample_latent
from pyro_lvm.guides.normal import diagonal_normal, diagonal_size, full_rank_normal, full_rank_size
from pyro_lvm.transforms import (
    AffineCoupling,
    AutoregressiveNetwork,
    AutoregressiveStep,
    CouplingNetwork,
    LocationScale,
    SplineCoupling,
    Step,
)

__all__ = ["Flow"]

#: Pieces of a spline.
_NUM_BINS = 8


class Flow(nn.Module):
    r"""Normalizing flow q(z|x), conditioned on x in its location and scale and in every step.

    .. math:: z = T_x(u), \qquad \log q(z \mid x) = \log N(u; 0, I) - \log |\det T_x'(u)|

    ``"autoregressive"`` moves each coordinate by those before it, in turn from either end, after the change to location
    m and scale S. A draw and its density cost one pass of each network, the density of any other z L passes.
    ``"coupling"`` and ``"spline"`` move odd and even coordinates in turn, by a factor and a shift or by a spline of
    8 pieces, before the change to m + S u; any density costs one pass. Their steps start as the identity, those of
    ``"autoregressive"`` near it.

    Splines tear a Gaussian in two most easily, for one step bends a coordinate where it likes; a factor and a shift
    keep each conditional Gaussian given the others. A guide that has one of two equal modes, far apart, loses log 2.

    With ``base="full"`` the family contains ``FullRankNormal``, with ``"diagonal"`` ``DiagonalNormal``.

    Args:
        latent_dim: L.
        encoder: maps x to ``(N, P + context_dim)``: the P parameters of location and scale (2 L, or L + L (L + 1) / 2),
            then the context of the steps.
        num_data: N, for local location, scale and context, in the place of ``encoder``; the networks belong to all.
        shared: one location, scale and context for every datum, in the place of ``encoder``.
        transform: kind of the steps, of ``pyro_lvm.transforms``.
        base: S, ``"diagonal"`` or ``"full"``, a lower triangle.
        num_steps: number of steps, each with a network; couplings need two to move every coordinate if L > 1.
        hidden_dim: width of the hidden layer of each network.
        context_dim: size of what the networks see of x.
        site: the latent's name in the model.

    Raises:
        DataTypeError: ``transform`` or ``base`` is none of its names, or not exactly one of ``encoder``, ``num_data``
            and ``shared`` is given.
        ShapeError: (when used) the encoder's output has another size, or x has not ``num_data`` rows.

    Source: Kingma et al. (2016), Improved Variational Inference with Inverse Autoregressive Flow, Algorithm 1; Dinh,
    Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP; Durkan et al. (2019), Neural Spline Flows.

    Example:
        >>> from pyro_lvm.nn import MLP
        >>> guide = Flow(2, encoder=MLP(64, [32], 4 + 32))
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        latent_dim: int,
        encoder: nn.Module | None = None,
        *,
        num_data: int | None = None,
        shared: bool = False,
        transform: Literal["autoregressive", "coupling", "spline"] = "autoregressive",
        base: Literal["diagonal", "full"] = "diagonal",
        num_steps: int = 2,
        hidden_dim: int = 64,
        context_dim: int = 32,
        site: str = "z",
    ) -> None:
        super().__init__()
        if transform not in ("autoregressive", "coupling", "spline"):
            expected = "'autoregressive', 'coupling' or 'spline'"
            raise DataTypeError(refuse("transform", expected, repr(transform), "Pass one of the three."))
        if base not in ("diagonal", "full"):
            raise DataTypeError(refuse("base", "'diagonal' or 'full'", repr(base), "Pass one of the two."))
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.transform = transform
        self.base = base
        self.base_size = diagonal_size(latent_dim) if base == "diagonal" else full_rank_size(latent_dim)
        check_positive_int("context_dim", context_dim)
        check_positive_int("hidden_dim", hidden_dim)
        self.phi = VariationalParameters(self.base_size + context_dim, encoder, num_data, shared)
        self.steps = nn.ModuleList(
            _network(transform, latent_dim, hidden_dim, context_dim, step % 2)
            for step in range(check_positive_int("num_steps", num_steps))
        )
        self.site = site

    def distribution(self, x: torch.Tensor) -> dist.TransformedDistribution:
        """q(z|x): batch shape ``(N,)``, event shape ``(L,)``."""
        phi = self.phi(x)
        raw, context = phi[..., : self.base_size], phi[..., self.base_size :]  # (N, P), (N, C)
        base = diagonal_normal(raw) if self.base == "diagonal" else full_rank_normal(raw, self.latent_dim)
        steps = [self._step(network, context) for network in self.steps]
        if self.transform == "autoregressive":
            return dist.TransformedDistribution(base, steps)
        # A spline bends where a standard normal is, and networks learn best from what has unit scale.
        noise = dist.Normal(torch.zeros_like(base.mean), 1.0).to_event(1)
        scale = base.stddev if isinstance(base, dist.Independent) else base.scale_tril  # (N, L) or (N, L, L)
        return dist.TransformedDistribution(noise, [*steps, LocationScale(base.mean, scale)])

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N, L)``."""
        pyro.module("Flow", self)
        return sample_latent(self.distribution(x), x, self.site)

    def _step(self, network: nn.Module, context: torch.Tensor) -> Step:
        if self.transform == "autoregressive":
            return AutoregressiveStep(cast(AutoregressiveNetwork, network), context)
        coupling = AffineCoupling if self.transform == "coupling" else SplineCoupling
        return coupling(cast(CouplingNetwork, network), context)


def _network(transform: str, latent_dim: int, hidden_dim: int, context_dim: int, turn: int) -> nn.Module:
    """The network of a step; ``turn`` is 0 or 1."""
    if transform == "autoregressive":
        return AutoregressiveNetwork(latent_dim, hidden_dim, context_dim, reverse=turn == 1)
    outputs = 2 if transform == "coupling" else 3 * _NUM_BINS - 1
    return CouplingNetwork(latent_dim, [hidden_dim], outputs, turn, context_dim)
