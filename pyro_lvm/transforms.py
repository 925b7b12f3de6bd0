r"""Layers of normalizing flows, for guides, priors and models: bijections of R^L with exact determinant and inverse.

A flow bends draws u of a base into z = T(u), of density

.. math:: \log q(z) = \log p(u) - \log |\det T'(u)|, \qquad u = T^{-1}(z)

Each layer here is a torch ``Transform`` for one batch of data: a network that belongs to all of them, and a context
with a row for each datum. The networks, which hold the parameters, follow the layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import nn
from torch.distributions import Transform, constraints
from torch.nn.functional import logsigmoid

from pyro_lvm.nn import MLP, MaskedMLP
from pyro_lvm.ops.spline import rational_quadratic_spline

__all__ = [
    "AffineCoupling",
    "AutoregressiveNetwork",
    "AutoregressiveStep",
    "CouplingNetwork",
    "LocationScale",
    "SplineCoupling",
    "Step",
    "per_datum",
]

#: A gate of sigmoid(2) = 0.88: the steps start close to the identity (Kingma et al. 2016, Section 4).
_GATE_BIAS = 2.0
#: One coupling stretches by e^2 at most, so that layers can be inverted in float32.
_MAX_LOG_SCALE = 2.0
#: A spline bends [-3, 3]; further out is one in 370 draws of a standard normal, too few to learn from.
_BOUND = 3.0
#: Of the numbers of a spline, so that a change of location and scale learns first what it can say alone.
_GAIN = 1 / 8

Pass: TypeAlias = tuple[torch.Tensor, torch.Tensor]


class ShiftAndScale(Protocol):
    """What an autoregressive step reads: shift and log-scale of a coordinate depend on those before it only."""

    @property
    def order(self) -> Sequence[int]:
        """The coordinates, first the one that sees none."""

    def __call__(self, u: torch.Tensor, context: Any, /) -> Pass:
        """Shift and log-scale, both shaped as u ``(..., N, L)``."""


class Conditioner(Protocol):
    """What a coupling reads: P numbers for each coordinate that moves, from those that are kept."""

    kept: torch.Tensor

    def __call__(self, u: torch.Tensor, context: torch.Tensor | None, /) -> torch.Tensor:
        """``(..., N, P, L)``; where a coordinate is kept, zeros."""


class Step(Transform):
    """A bijection of R^L; its kinds say how to pass forwards and backwards.

    It remembers its last pass, so that a draw is scored without inversion, but not across a change from ``no_grad`` to
    gradients (the cache of ``Transform`` would then drop them silently). The memory goes when the distribution goes.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool] | None = None  # u, z, log det, gradients

    def forwards(self, u: torch.Tensor) -> Pass:
        """z ``(..., N, L)`` and ``log |det dz/du|``, ``(..., N)``."""
        raise NotImplementedError

    def backwards(self, z: torch.Tensor) -> Pass:
        """u ``(..., N, L)`` and ``log |det dz/du|``, ``(..., N)``."""
        raise NotImplementedError

    @property
    def inv(self) -> Transform:
        """The inverse, not kept: torch keeps it, and that cycle would hold every draw until garbage collection."""
        inverse = super().inv
        self._inv = None
        return inverse

    def log_abs_det_jacobian(self, u: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """``log |det dz/du|`` at u, ``(..., N)``."""
        last = self._remembered(0, u)
        return self.forwards(u)[1] if last is None else last[2]

    def _call(self, u: torch.Tensor) -> torch.Tensor:
        z, log_det = self.forwards(u)
        self._last = u, z, log_det, torch.is_grad_enabled()
        return z

    def _inverse(self, z: torch.Tensor) -> torch.Tensor:
        last = self._remembered(1, z)
        if last is not None:
            return last[0]
        u, log_det = self.backwards(z)
        self._last = u, z, log_det, torch.is_grad_enabled()
        return u

    def _remembered(self, place: int, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """u, z and log det of the last pass, if ``value`` is its u (place 0) or its z (place 1)."""
        if self._last is None or value is not self._last[place] or (torch.is_grad_enabled() and not self._last[3]):
            return None
        return self._last[:3]


class LocationScale(Step):
    r"""A change of location and scale.

    .. math:: z = m + S u, \qquad \log |\det \partial z / \partial u| = \sum_l \log S_{ll}

    Args:
        loc: m, ``(N, L)``.
        scale: S, lower triangular with a positive diagonal ``(N, L, L)``, or a diagonal ``(N, L)``.

    Example:
        >>> step = LocationScale(torch.ones(1, 2), 2 * torch.eye(2)[None])
        >>> step(torch.tensor([[0.0, 1.0]]))
        tensor([[1., 3.]])
    """

    def __init__(self, loc: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.loc = loc
        self.scale = scale

    def forwards(self, u: torch.Tensor) -> Pass:
        """z and the log-determinant."""
        z = self.loc + (self.scale * u if self._is_diagonal else per_datum(torch.matmul, self.scale, u))
        return z, self._log_det.expand(u.shape[:-1])

    def backwards(self, z: torch.Tensor) -> Pass:
        """u and the log-determinant of the way forwards."""
        away = z - self.loc
        if self._is_diagonal:
            u = away / self.scale
        else:
            u = per_datum(partial(torch.linalg.solve_triangular, upper=False), self.scale, away)
        return u, self._log_det.expand(z.shape[:-1])

    @property
    def _is_diagonal(self) -> bool:
        return self.scale.dim() == self.loc.dim()

    @property
    def _log_det(self) -> torch.Tensor:
        diagonal = self.scale if self._is_diagonal else self.scale.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1)  # (N,)


class AutoregressiveStep(Step):
    r"""One step of an inverse autoregressive flow: each coordinate is moved by those before it.

    .. math:: z_l = t_l(u_{<l}, c) + e^{s_l(u_{<l}, c)} u_l, \qquad
              \log |\det \partial z / \partial u| = \sum_l s_l(u_{<l}, c)

    Forwards it costs one pass of the network, backwards L passes.

    Args:
        network: maps u ``(..., N, L)`` and the context to shift t and log-scale s, shaped as u; its attribute ``order``
            lists the coordinates, each of which sees those before it only. An `AutoregressiveNetwork`, or any callable
            like it, with weights of its own for each datum if need be.
        context: c, with a row for each datum ``(N, C)``, or whatever else the network takes.

    Source: Kingma et al. (2016), Improved Variational Inference with Inverse Autoregressive Flow, Eq. (10).

    Example:
        >>> step = AutoregressiveStep(AutoregressiveNetwork(2, 8, context_dim=3), torch.zeros(5, 3))
        >>> u = torch.randn(5, 2)
        >>> torch.allclose(step.inv(step(u).clone()), u, atol=1e-5)
        True
    """

    def __init__(self, network: ShiftAndScale, context: Any) -> None:
        super().__init__()
        self.network = network
        self.context = context

    def forwards(self, u: torch.Tensor) -> Pass:
        """z and the log-determinant, by one pass."""
        shift, log_scale = self.network(u, self.context)
        return shift + log_scale.exp() * u, log_scale.sum(-1)

    def backwards(self, z: torch.Tensor) -> Pass:
        """u and the log-determinant of the way forwards, by a pass for each coordinate."""
        columns = list(torch.zeros_like(z).unbind(-1))
        for l in self.network.order:
            # Right in column l and in all before it; after the last pass the log-scale is right everywhere.
            shift, log_scale = self.network(torch.stack(columns, -1), self.context)
            columns[l] = (z[..., l] - shift[..., l]) * (-log_scale[..., l]).exp()
        return torch.stack(columns, -1), log_scale.sum(-1)


class AffineCoupling(Step):
    r"""Affine coupling: some coordinates, A, are kept and move the others, B.

    .. math:: z_A = u_A, \qquad z_B = u_B e^{s(u_A, c)} + t(u_A, c), \qquad
              \log |\det \partial z / \partial u| = \sum_B s(u_A, c), \qquad s = 2 \tanh(r / 2)

    Both directions cost one pass of the network.

    Args:
        network: a `CouplingNetwork` with two numbers a coordinate, r and t.
        context: c, with a row for each datum ``(N, C)``; None for a network without.

    Source: Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP, Eqs. (4) to (8).

    Example:
        >>> network = CouplingNetwork(3, [8], 2)
        >>> AffineCoupling(network)(torch.tensor([[1.0, 2.0, 3.0]]))  # the identity to start with
        tensor([[1., 2., 3.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, network: Conditioner, context: torch.Tensor | None = None) -> None:
        super().__init__()
        self.network = network
        self.context = context

    def forwards(self, u: torch.Tensor) -> Pass:
        """z and the log-determinant."""
        log_scale, shift = self._move(u)
        return u * log_scale.exp() + shift, log_scale.sum(-1)

    def backwards(self, z: torch.Tensor) -> Pass:
        """u and the log-determinant of the way forwards."""
        log_scale, shift = self._move(z)
        return (z - shift) * (-log_scale).exp(), log_scale.sum(-1)

    def _move(self, u: torch.Tensor) -> Pass:
        """s and t, from what is kept, which is the same in u and z."""
        raw, shift = self.network(u, self.context).unbind(-2)
        return _MAX_LOG_SCALE * torch.tanh(raw / _MAX_LOG_SCALE), shift


class SplineCoupling(Step):
    r"""Monotone spline as a coupling: some coordinates, A, are kept and bend the others, B, in [-3, 3].

    .. math:: z_A = u_A, \qquad z_B = g(u_B; r(u_A, c)), \qquad
              \log |\det \partial z / \partial u| = \sum_B \log g'(u_B; r(u_A, c))

    with the rational-quadratic spline g of ``ops.spline``, which is the identity outside of the interval.
    Both directions cost one pass of the network. Numbers of zero are the identity.

    Args:
        network: a `CouplingNetwork` with 3 K - 1 numbers a coordinate, of which an eighth counts: the raw widths of the
            pieces, their raw heights, then the raw slopes at the inner knots.
        context: c, with a row for each datum ``(N, C)``; None for a network without.

    Source: Durkan, Bekasov, Murray and Papamakarios (2019), Neural Spline Flows, Eqs. (4) to (8).

    Example:
        >>> network = CouplingNetwork(3, [8], 3 * 8 - 1)
        >>> z = SplineCoupling(network)(torch.tensor([[1.0, 2.0, 9.0]]))  # the identity to start with
        >>> torch.allclose(z, torch.tensor([[1.0, 2.0, 9.0]]))
        True
    """

    def __init__(self, network: Conditioner, context: torch.Tensor | None = None) -> None:
        super().__init__()
        self.network = network
        self.context = context

    def forwards(self, u: torch.Tensor) -> Pass:
        """z and the log-determinant."""
        return self._bend(u, inverse=False)

    def backwards(self, z: torch.Tensor) -> Pass:
        """u and the log-determinant of the way forwards."""
        return self._bend(z, inverse=True)

    def _bend(self, value: torch.Tensor, inverse: bool) -> Pass:
        raw = _GAIN * self.network(value, self.context)  # (..., N, 3 K - 1, L)
        bent, log_slope = rational_quadratic_spline(raw.mT, value, _BOUND, inverse=inverse)  # (..., N, L) each
        kept = self.network.kept
        return torch.where(kept, value, bent), log_slope.masked_fill(kept, 0.0).sum(-1)


def per_datum(
    operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], matrices: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """A product or a solution with matrices ``(*batch, P, Q)`` of vectors ``(..., *batch, Q)``: ``(..., *batch, P)``.

    The matrices are not copied for each of many vectors, as broadcasting would.
    """
    many = vectors.dim() - matrices.dim() + 1
    if many <= 0:
        return operation(matrices, vectors[..., None])[..., 0]
    columns = vectors.flatten(0, many - 1).movedim(0, -1)  # (*batch, Q, K)
    return operation(matrices, columns).movedim(-1, 0).reshape(*vectors.shape[:-1], -1)


class AutoregressiveNetwork(nn.Module):
    r"""Masked network of an `AutoregressiveStep`, gated so that the step starts near the identity.

    .. math:: e^{s_l} = \sigma(g_l + 2), \qquad t_l = (1 - \sigma(g_l + 2)) m_l

    Args:
        dim: L.
        hidden_dim: width of the hidden layer.
        context_dim: C.
        reverse: whether the order of the coordinates is from the last to the first.

    Source: Kingma et al. (2016), Algorithm 1 and Section 4.

    Example:
        >>> shift, log_scale = AutoregressiveNetwork(2, 8, context_dim=3)(torch.zeros(5, 2), torch.zeros(5, 3))
        >>> shift.shape, log_scale.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(self, dim: int, hidden_dim: int, context_dim: int, reverse: bool = False) -> None:
        super().__init__()
        self.masked = MaskedMLP(dim, [hidden_dim], 2, context_dim=context_dim, reverse=reverse)
        self.order = self.masked.order

    def forward(self, u: torch.Tensor, context: torch.Tensor) -> Pass:
        """The shift (1 - sigma(g + 2)) m and the log-scale log sigma(g + 2), both shaped as u ``(..., N, L)``."""
        shift, gate = self.masked(u, context).chunk(2, dim=-1)
        return torch.sigmoid(-gate - _GATE_BIAS) * shift, logsigmoid(gate + _GATE_BIAS)


class CouplingNetwork(nn.Module):
    """Network of a coupling: it reads every other coordinate and a context, and starts at zero.

    Args:
        dim: L.
        hidden_dims: widths of the hidden layers.
        outputs_per_coordinate: P.
        parity: 0 to keep the coordinates 0, 2, 4, ..., 1 to keep 1, 3, 5, ...; layers take turns. A single
            coordinate is never kept: it moves by the context alone.
        context_dim: C; 0 for none.

    Attributes:
        kept: which coordinates are read, and stay as they are, ``(L,)``.

    Example:
        >>> CouplingNetwork(3, [8], 2, context_dim=4)(torch.zeros(5, 3), torch.zeros(5, 4)).shape
        torch.Size([5, 2, 3])
    """

    kept: torch.Tensor

    def __init__(
        self, dim: int, hidden_dims: Sequence[int], outputs_per_coordinate: int, parity: int = 0, context_dim: int = 0
    ) -> None:
        super().__init__()
        self.net = MLP(dim + context_dim, hidden_dims, outputs_per_coordinate * dim)
        nn.init.zeros_(cast(nn.Linear, self.net.layers[-1]).weight)  # the identity to start with
        kept = (torch.arange(dim) % 2 == parity) & (dim > 1)  # (L,)
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, u: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Numbers ``(..., P, L)`` of u ``(..., L)`` and context ``(N, C)``; zeros where a coordinate is kept."""
        seen = u * self.kept
        if context is not None:
            seen = torch.cat([seen, context.expand(*u.shape[:-1], -1)], dim=-1)
        return self.net(seen).unflatten(-1, (-1, u.shape[-1])) * ~self.kept
