"""Hamiltonian Monte Carlo on a path of densities, for many chains of many data at once.

A density of the path is log pi_b(u) = base(u) + b delta(u), so that one evaluation serves every b. Positions are
``(K, N, D)``: chains, data, coordinates; data have steps and metrics of their own, and are accepted on their own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Evaluate", "PathState", "hmc_transition"]


@dataclass(frozen=True, eq=False)
class PathState:
    """Positions of chains, and what is known of the path there.

    Attributes:
        u: positions, ``(K, N, D)``.
        base: log-density at b = 0 in nats, ``(K, N)``.
        delta: what is added per unit of b in nats, ``(K, N)``; -inf where the end of the path has no mass.
        base_gradient: of ``base`` by u, ``(K, N, D)``; zero where it is not finite.
        delta_gradient: of ``delta``, likewise.
    """

    u: torch.Tensor
    base: torch.Tensor
    delta: torch.Tensor
    base_gradient: torch.Tensor
    delta_gradient: torch.Tensor

    def log_density(self, beta: torch.Tensor) -> torch.Tensor:
        """log pi_b, ``(K, N)``, for b ``(N,)``; at b = 0 also where ``delta`` is infinite."""
        return self.base + torch.where(beta > 0, beta * self.delta, 0.0)

    def gradient(self, beta: torch.Tensor) -> torch.Tensor:
        """Its gradient by u, ``(K, N, D)``."""
        return self.base_gradient + beta[:, None] * self.delta_gradient

    def chosen(self, accepted: torch.Tensor, other: "PathState") -> "PathState":
        """``other`` where ``accepted (K, N)``, else this one."""
        wide = accepted[..., None]
        return PathState(
            torch.where(wide, other.u, self.u),
            torch.where(accepted, other.base, self.base),
            torch.where(accepted, other.delta, self.delta),
            torch.where(wide, other.base_gradient, self.base_gradient),
            torch.where(wide, other.delta_gradient, self.delta_gradient),
        )

    def gathered(self, index: torch.Tensor) -> "PathState":
        """Chains ``index (K, N)`` of each datum."""
        wide = index[..., None].expand(*index.shape, self.u.shape[-1])
        flat = (t.gather(0, index) for t in (self.base, self.delta))
        long = (t.gather(0, wide) for t in (self.base_gradient, self.delta_gradient))
        return PathState(self.u.gather(0, wide), *flat, *long)


#: What there is to know of the path at positions ``(K, N, D)``.
Evaluate = Callable[[torch.Tensor], PathState]


def hmc_transition(
    evaluate: Evaluate,
    state: PathState,
    beta: torch.Tensor,
    step: torch.Tensor,
    scale: torch.Tensor,
    num_leapfrog: int,
) -> tuple[PathState, torch.Tensor]:
    r"""One Metropolis-corrected Hamiltonian move, which is reversible and leaves pi_b invariant.

    .. math:: H(u, r) = -\log \pi_b(u) + \tfrac12 r^\top r, \qquad \dot u = s r, \qquad
              \dot r = s^\top \nabla \log \pi_b(u)

    in steps of size ``step``, with the metric :math:`(s s^\top)^{-1}`. A coordinate whose s is zero stays where it is.

    Args:
        evaluate: what there is to know of the path at given positions.
        state: where the chains are.
        beta: b, ``(N,)``.
        step: sizes of the leapfrog steps, ``(K, N)``, chosen without a look at the chains that are moved.
        scale: s, likewise: ``(N, D)`` where it is diagonal, or ``(N, D, D)``.
        num_leapfrog: steps of a move.

    Returns:
        Where the chains are then, and the probabilities of acceptance, ``(K, N)``; zero where a trajectory leaves the
        finite numbers.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics, eqs. 5.18 to 5.20 and section 5.3.2.1.

    Example:
        >>> def evaluate(u):  # a standard normal, for every b
        ...     log_prob = -u.square().sum(-1) / 2
        ...     return PathState(u, log_prob, torch.zeros_like(log_prob), -u, torch.zeros_like(u))
        >>> state, one = evaluate(torch.zeros(1, 1, 2)), torch.ones(1, 1)
        >>> moved, acceptance = hmc_transition(evaluate, state, one[0], 0.1 * one, torch.ones(1, 2), num_leapfrog=3)
        >>> acceptance > 0.99
        tensor([[True]])
    """
    stride = step[..., None].to(state.u.dtype)  # (K, N, 1)
    beta = beta.to(state.base.dtype)
    transposed = scale.mT if scale.dim() == 3 else scale
    momentum = torch.randn_like(state.u)
    energy = state.log_density(beta) - momentum.square().sum(-1) / 2  # (K, N)
    lost = torch.zeros_like(energy, dtype=torch.bool)
    new = state
    for _ in range(num_leapfrog):
        momentum = momentum + stride * _product(transposed, new.gradient(beta)) / 2
        u = new.u + stride * _product(scale, momentum)
        left = ~u.isfinite().all(-1)  # (K, N)
        lost |= left
        new = evaluate(torch.where(left[..., None], state.u, u))
        momentum = momentum + stride * _product(transposed, new.gradient(beta)) / 2
    gain = new.log_density(beta) - momentum.square().sum(-1) / 2 - energy
    acceptance = gain.clamp(max=0.0).exp().nan_to_num(nan=0.0).masked_fill(lost, 0.0)
    return state.chosen(torch.rand_like(acceptance) < acceptance, new), acceptance


def _product(scale: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """s times vectors ``(K, N, D)``."""
    if scale.dim() == 2:
        return scale * vectors
    return torch.bmm(scale, vectors.permute(1, 2, 0)).permute(2, 0, 1)
