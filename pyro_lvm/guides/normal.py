r"""Gaussian guides q(z|x) = N(m, Sigma), with m and Sigma from an encoder, free for each datum, or the same for all.

At parameters of zero every family here is N(0, I): scales are softplus(raw + log(e - 1)), which is 1 at raw = 0.
"""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import softplus

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import ShapeError
from pyro_lvm.guides.base import VariationalParameters, sample_latent

__all__ = [
    "DiagonalNormal",
    "FullRankNormal",
    "LowRankNormal",
    "diagonal_normal",
    "diagonal_size",
    "full_rank_normal",
    "full_rank_size",
    "low_rank_normal",
    "low_rank_size",
    "positive",
]

_SOFTPLUS_OF_THIS_IS_ONE = math.log(math.e - 1)


class DiagonalNormal(nn.Module):
    r"""Mean-field Gaussian guide.

    .. math:: q(z \mid x) = \prod_l N(z_l; m_l, s_l^2)

    Args:
        latent_dim: L.
        encoder: maps x to ``(N, 2 L)``: the means, then the raw scales.
        num_data: N, for local parameters, in the place of ``encoder``.
        shared: one phi for every datum, in the place of ``encoder``.
        site: the latent's name in the model.

    Raises:
        DataTypeError: not exactly one of ``encoder``, ``num_data`` and ``shared`` is given.
        ShapeError: (when used) the encoder's output has another size, or x has not ``num_data`` rows.

    Source: Kingma and Welling (2014), Eq. (9).

    Example:
        >>> from pyro_lvm.nn import MLP
        >>> guide = DiagonalNormal(2, encoder=MLP(64, [32], 4))
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
        site: str = "z",
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.phi = VariationalParameters(diagonal_size(latent_dim), encoder, num_data, shared)
        self.site = site

    def distribution(self, x: torch.Tensor) -> dist.Independent:
        """q(z|x): batch shape ``(N,)``, event shape ``(L,)``."""
        return diagonal_normal(self.phi(x))

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N, L)``."""
        pyro.module("DiagonalNormal", self)
        return sample_latent(self.distribution(x), x, self.site)


class FullRankNormal(nn.Module):
    r"""Gaussian guide with a full covariance; it contains :class:`DiagonalNormal`.

    .. math:: q(z \mid x) = N(z; m, S S^T), \qquad S \text{ lower triangular with a positive diagonal}

    Args:
        latent_dim: L.
        encoder: maps x to ``(N, L + L (L + 1) / 2)``: the means, the raw diagonal of S, then L times what is below it,
            by rows.
        num_data: N, for local parameters, in the place of ``encoder``.
        shared: one phi for every datum, in the place of ``encoder``.
        site: the latent's name in the model.

    Raises:
        DataTypeError: not exactly one of ``encoder``, ``num_data`` and ``shared`` is given.
        ShapeError: (when used) the encoder's output has another size, or x has not ``num_data`` rows.

    Source: Kingma and Welling (2019), An Introduction to Variational Autoencoders, Section 2.5.1.

    Example:
        >>> guide = FullRankNormal(2, num_data=5)
        >>> guide.distribution(torch.zeros(5, 64)).scale_tril[0]
        tensor([[1., 0.],
                [0., 1.]], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        latent_dim: int,
        encoder: nn.Module | None = None,
        *,
        num_data: int | None = None,
        shared: bool = False,
        site: str = "z",
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.phi = VariationalParameters(full_rank_size(latent_dim), encoder, num_data, shared)
        self.site = site

    def distribution(self, x: torch.Tensor) -> dist.MultivariateNormal:
        """q(z|x): batch shape ``(N,)``, event shape ``(L,)``."""
        return full_rank_normal(self.phi(x), self.latent_dim)

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N, L)``."""
        pyro.module("FullRankNormal", self)
        return sample_latent(self.distribution(x), x, self.site)


class LowRankNormal(nn.Module):
    r"""Gaussian guide with a diagonal plus low-rank covariance; it contains :class:`DiagonalNormal`.

    .. math:: q(z \mid x) = N(z; m, \text{diag}(d) + V V^T), \qquad V \in R^{L \times R}

    Its cost grows with L R^2, where that of :class:`FullRankNormal` grows with L^2.

    The density depends on V through V V^T, whose derivative is zero at V = 0: a start there would be a saddle, which
    only noise leaves. So half of the variance of the first R coordinates starts in V,

    .. math:: V = \sqrt{1/2} \, E + \frac{1}{\sqrt L} B, \qquad d_l = (1 - \tfrac12 1[l \le R]) \, s_l^2

    with the first R columns E of the identity, and B and s from the parameters. At parameters of zero this is N(0, I),
    and the gradient of B holds all covariances with these R coordinates.

    Args:
        latent_dim: L.
        rank: R, at most L.
        encoder: maps x to ``(N, 2 L + L R)``: the means, the raw scales, then B by rows.
        num_data: N, for local parameters, in the place of ``encoder``.
        shared: one phi for every datum, in the place of ``encoder``.
        site: the latent's name in the model.

    Raises:
        DataTypeError: not exactly one of ``encoder``, ``num_data`` and ``shared`` is given.
        ShapeError: the rank exceeds L, or (when used) the encoder's output has another size, or x has not ``num_data``
            rows.

    Source: Ong, Nott and Smith (2018), Gaussian Variational Approximation with a Factor Covariance Structure.

    Example:
        >>> guide = LowRankNormal(3, 1, num_data=5)
        >>> torch.allclose(guide.distribution(torch.zeros(5, 64)).covariance_matrix, torch.eye(3))
        True
    """

    def __init__(
        self,
        latent_dim: int,
        rank: int,
        encoder: nn.Module | None = None,
        *,
        num_data: int | None = None,
        shared: bool = False,
        site: str = "z",
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.rank = check_positive_int("rank", rank)
        if rank > latent_dim:
            cure = "A larger rank adds nothing: take FullRankNormal."
            raise ShapeError(refuse("rank", f"at most latent_dim={latent_dim}", rank, cure))
        self.phi = VariationalParameters(low_rank_size(latent_dim, rank), encoder, num_data, shared)
        self.site = site

    def distribution(self, x: torch.Tensor) -> dist.LowRankMultivariateNormal:
        """q(z|x): batch shape ``(N,)``, event shape ``(L,)``."""
        return low_rank_normal(self.phi(x), self.latent_dim, self.rank)

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N, L)``."""
        pyro.module("LowRankNormal", self)
        return sample_latent(self.distribution(x), x, self.site)


def diagonal_size(latent_dim: int) -> int:
    """Parameters of one diagonal Gaussian: L means and L scales."""
    return 2 * latent_dim


def full_rank_size(latent_dim: int) -> int:
    """Parameters of one full Gaussian: L means and L (L + 1) / 2 entries of a triangle."""
    return latent_dim + latent_dim * (latent_dim + 1) // 2


def low_rank_size(latent_dim: int, rank: int) -> int:
    """Parameters of one Gaussian of low rank: L means, L scales and L R factor loadings."""
    return (2 + rank) * latent_dim


def diagonal_normal(phi: torch.Tensor) -> dist.Independent:
    """The Gaussian with parameters phi ``(N, 2 L)``."""
    loc, raw = phi.chunk(2, dim=-1)  # (N, L) each
    return dist.Normal(loc, positive(raw)).to_event(1)


def full_rank_normal(phi: torch.Tensor, latent_dim: int) -> dist.MultivariateNormal:
    """The Gaussian with parameters phi ``(N, L + L (L + 1) / 2)``."""
    loc, raw, below = phi.split([latent_dim, latent_dim, phi.shape[-1] - 2 * latent_dim], dim=-1)
    rows, columns = torch.tril_indices(latent_dim, latent_dim, offset=-1, device=phi.device)
    scale_tril = positive(raw).diag_embed()  # (N, L, L)
    # Divided by L, so that a random encoder starts near a diagonal S whatever L is.
    scale_tril[..., rows, columns] = below / latent_dim
    return dist.MultivariateNormal(loc, scale_tril=scale_tril)


def low_rank_normal(phi: torch.Tensor, latent_dim: int, rank: int) -> dist.LowRankMultivariateNormal:
    """The Gaussian with parameters phi ``(N, (2 + R) L)``."""
    loc, raw, loadings = phi.split([latent_dim, latent_dim, latent_dim * rank], dim=-1)
    start = torch.eye(latent_dim, rank, dtype=phi.dtype, device=phi.device)  # (L, R)
    # Divided by sqrt(L), so that a random encoder starts with eigenvalues of order one whatever L is.
    factor = 0.5**0.5 * start + loadings.unflatten(-1, (latent_dim, rank)) / latent_dim**0.5  # (N, L, R)
    diagonal = (1 - 0.5 * start.sum(-1)) * positive(raw).square()  # (N, L)
    return dist.LowRankMultivariateNormal(loc, factor, diagonal)


def positive(raw: torch.Tensor) -> torch.Tensor:
    """A scale, 1 where ``raw`` is zero."""
    return softplus(raw + _SOFTPLUS_OF_THIS_IS_ONE)
