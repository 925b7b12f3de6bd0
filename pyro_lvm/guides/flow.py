r"""Inverse autoregressive flow: a Gaussian draw, bent by masked networks that see x through a context.

One step maps u to z. In an order of the coordinates, m_l and g_l see only those of u before l:

.. math::
    z_l = \sigma(g_l) u_l + (1 - \sigma(g_l)) m_l, \qquad
    \log |\det \partial z / \partial u| = \sum_l \log \sigma(g_l)

Sampling and the density of a draw cost one pass of each network; the density of any other z costs L passes.
"""

from typing import Any, Literal, cast

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import Transform, constraints
from torch.nn.functional import elu, linear, logsigmoid

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import DataTypeError
from pyro_lvm.guides.base import VariationalParameters, sample_latent
from pyro_lvm.guides.normal import diagonal_normal, diagonal_size, full_rank_normal, full_rank_size

__all__ = ["Flow"]

#: A gate of sigmoid(2) = 0.88: the steps start close to the identity (Kingma et al. 2016, Section 4).
_GATE_BIAS = 2.0


class Flow(nn.Module):
    r"""Inverse autoregressive flow q(z|x), conditioned on x in its base and in every step.

    .. math:: u \sim N(m, S S^T), \qquad z = T_x(u), \qquad \log q(z \mid x) = \log N(u; m, S S^T) - \log |\det T_x'(u)|

    The order of the coordinates is reversed from step to step. With ``base="full"`` the family contains
    ``FullRankNormal``, with ``"diagonal"`` ``DiagonalNormal``: all gates equal, all shifts constant.

    Args:
        latent_dim: L.
        encoder: maps x to ``(N, P + context_dim)``: the P parameters of the base (2 L, or L + L (L + 1) / 2), then
            the context of the steps.
        num_data: N, for local base and context, in the place of ``encoder``; the steps belong to all data.
        shared: one base and context for every datum, in the place of ``encoder``.
        base: covariance of the base, ``"diagonal"`` or ``"full"``.
        num_steps: number of masked networks.
        hidden_dim: width of their hidden layer.
        context_dim: size of what they see of x.
        site: the latent's name in the model.

    Raises:
        DataTypeError: ``base`` is neither name, or not exactly one of ``encoder``, ``num_data``, ``shared`` is given.
        ShapeError: (when used) the encoder's output has another size, or x has not ``num_data`` rows.

    Source: Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow, Algorithm 1.

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
        base: Literal["diagonal", "full"] = "diagonal",
        num_steps: int = 2,
        hidden_dim: int = 64,
        context_dim: int = 32,
        site: str = "z",
    ) -> None:
        super().__init__()
        if base not in ("diagonal", "full"):
            raise DataTypeError(refuse("base", "'diagonal' or 'full'", repr(base), "Pass one of the two."))
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.base = base
        self.base_size = diagonal_size(latent_dim) if base == "diagonal" else full_rank_size(latent_dim)
        check_positive_int("context_dim", context_dim)
        self.phi = VariationalParameters(self.base_size + context_dim, encoder, num_data, shared)
        self.steps = nn.ModuleList(
            _MaskedNetwork(latent_dim, context_dim, hidden_dim, reverse=step % 2 == 1)
            for step in range(check_positive_int("num_steps", num_steps))
        )
        self.site = site

    def distribution(self, x: torch.Tensor) -> dist.TransformedDistribution:
        """q(z|x): batch shape ``(N,)``, event shape ``(L,)``."""
        phi = self.phi(x)
        raw, context = phi[..., : self.base_size], phi[..., self.base_size :]  # (N, P), (N, C)
        base = diagonal_normal(raw) if self.base == "diagonal" else full_rank_normal(raw, self.latent_dim)
        return dist.TransformedDistribution(
            base, [_Step(cast(_MaskedNetwork, network), context) for network in self.steps]
        )

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N, L)``."""
        pyro.module("Flow", self)
        return sample_latent(self.distribution(x), x, self.site)


class _MaskedNetwork(nn.Module):
    """(u, context) to (m, g), where m_l and g_l depend on the context and on the coordinates before l only.

    Every coordinate has a degree, its place in the order, from 1 to L; hidden units have degrees 0 to L - 1. A hidden
    unit sees the coordinates up to its degree, an output the hidden units below its own (Germain et al. 2015, MADE).
    """

    input_mask: torch.Tensor
    output_mask: torch.Tensor

    def __init__(self, latent_dim: int, context_dim: int, hidden_dim: int, reverse: bool) -> None:
        super().__init__()
        check_positive_int("hidden_dim", hidden_dim)
        self.input = nn.Linear(latent_dim, hidden_dim)
        self.context = nn.Linear(context_dim, hidden_dim, bias=False)
        self.output = nn.Linear(hidden_dim, 2 * latent_dim)
        degree = torch.arange(1, latent_dim + 1)  # (L,)
        self.order = range(latent_dim)[::-1] if reverse else range(latent_dim)
        degree = degree.flip(0) if reverse else degree
        hidden = torch.arange(hidden_dim) % latent_dim  # (H,)
        self.register_buffer("input_mask", hidden[:, None] >= degree, persistent=False)  # (H, L)
        self.register_buffer("output_mask", degree.repeat(2)[:, None] > hidden, persistent=False)  # (2 L, H)

    def forward(self, u: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The shift (1 - sigma(g)) m and the log-scale log sigma(g), both shaped as u ``(..., N, L)``."""
        # The context (N, C) is multiplied before it meets the particles of u.
        hidden = elu(linear(u, self.input.weight * self.input_mask, self.input.bias) + self.context(context))
        shift, gate = linear(hidden, self.output.weight * self.output_mask, self.output.bias).chunk(2, dim=-1)
        return torch.sigmoid(-gate - _GATE_BIAS) * shift, logsigmoid(gate + _GATE_BIAS)


class _Step(Transform):
    """One step for one batch of x.

    It remembers its last pass, so that a draw is scored without inversion, but not across a change from ``no_grad`` to
    gradients (Transform's own cache would then drop them silently). The memory goes when the distribution goes.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, network: _MaskedNetwork, context: torch.Tensor) -> None:
        super().__init__()
        self.network = network
        self.context = context
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool] | None = None  # u, z, log-scale, gradients

    @property
    def inv(self) -> Transform:
        """The inverse, not kept: torch keeps it, and that cycle would hold every draw until garbage collection."""
        inverse = super().inv
        self._inv = None
        return inverse

    def _call(self, u: torch.Tensor) -> torch.Tensor:
        shift, log_scale = self.network(u, self.context)
        z = shift + log_scale.exp() * u
        self._last = u, z, log_scale, torch.is_grad_enabled()
        return z

    def _inverse(self, z: torch.Tensor) -> torch.Tensor:
        if self._remembers(1, z) and self._last:
            return self._last[0]
        columns = list(torch.zeros_like(z).unbind(-1))
        for l in self.network.order:
            # Right in column l and in all before it; after the last pass the log-scale is right everywhere.
            shift, log_scale = self.network(torch.stack(columns, -1), self.context)
            columns[l] = (z[..., l] - shift[..., l]) * (-log_scale[..., l]).exp()
        u = torch.stack(columns, -1)
        self._last = u, z, log_scale, torch.is_grad_enabled()
        return u

    def log_abs_det_jacobian(self, u: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Sum of the log-scales at u, ``(..., N)``."""
        if self._remembers(0, u) and self._last:
            return self._last[2].sum(-1)
        return self.network(u, self.context)[1].sum(-1)

    def _remembers(self, place: int, value: torch.Tensor) -> bool:
        return self._last is not None and value is self._last[place] and (self._last[3] or not torch.is_grad_enabled())
