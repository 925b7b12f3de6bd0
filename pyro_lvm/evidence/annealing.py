r"""Annealed importance sampling between the guide and the posterior: the path, and the weights of chains along it.

In unconstrained coordinates u the path is

.. math:: \log \pi_b(u) = (1 - b) \log q(z \mid x) + b \log p(x, z) + \log |dz / du|, \qquad z = z(u)

and the weight of a chain is the product of :math:`(p(x, z_t) / q(z_t \mid x))^{b_{t+1} - b_t}`, in which the Jacobian
cancels. What chains of their own have chosen before (`evidence.pilot`) is frozen, so that the weights are unbiased for
p(x) whatever that is.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyro_lvm._typing import Guide, Model
from pyro_lvm.ops.hmc import PathState, hmc_transition
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.coordinates import pair_coordinates
from pyro_lvm.tracing.mixture import Member
from pyro_lvm.tracing.particles import Draws
from pyro_lvm.tracing.probe import Plan
from pyro_lvm.tracing.tables import Table
from pyro_lvm.tracing.weights import Proposal

__all__ = ["Course", "Path", "anneal", "jittered"]

_JITTER = (0.2, 1.25)  # of the step of each chain at each move: no orbit is periodic for all, and some moves are short
_SHARE = 0.1  # of the steps that is spread evenly over the nodes of the pilot, whatever it has seen


class Path:
    """The densities between guide and posterior for some data.

    Attributes:
        coordinates: of the latents.
        num_data: N.
        dim: D.
    """

    def __init__(self, plan: Plan, model: Model, guide: Guide, batch: Batch, others: Sequence[Member] = ()) -> None:
        self.plan, self.batch, self.others = plan, batch, others
        self.coordinates = pair_coordinates(plan, model, guide, batch)
        self.proposal, self.runner = Proposal(plan, guide, batch), plan.model_runner(model)
        self.proposals = [self.proposal, *(Proposal(other.plan, other.guide, batch) for other in others)]
        self.num_data, self.dim = self.coordinates.num_data, self.coordinates.dim

    def draw(self, num_particles: int) -> torch.Tensor:
        """Coordinates of draws from the guides in equal parts, ``(K, N, D)``."""
        count = len(self.proposals)
        if count == 1:
            return self.coordinates.vector(self.proposal.draw(num_particles)[1])
        whole, rest = divmod(num_particles, count)
        sizes = whole + (torch.randperm(count) < rest)  # who draws one more is left to chance, so that none counts more
        parts = [proposal.draw(size)[1] for proposal, size in zip(self.proposals, sizes.tolist(), strict=True) if size]
        return torch.cat([self.coordinates.vector(draws) for draws in parts])

    def tables(self, u: torch.Tensor) -> tuple[Table, Table, torch.Tensor]:
        """log q(z | x), log p(x, z), and log |dz/du|, ``(K, N)``."""
        draws, jacobian = self.coordinates.latents(u)
        log_p, _ = self.runner.run(self.batch, self.plan.model_mode, len(u), draws)
        return self._start(u, draws), log_p, jacobian

    def _start(self, u: torch.Tensor, draws: Draws) -> Table:
        """log of the mean density of the guides."""
        log_q = self.proposal.score(self.coordinates.guide_draws(u, draws), len(u))
        if not self.others:
            return log_q
        rest = zip(self.others, self.proposals[1:], strict=True)
        log_qs = [log_q, *(proposal.score(other.given(draws), len(u)) for other, proposal in rest)]
        totals = torch.stack([each.total.expand(len(u), self.num_data) for each in log_qs])  # (J, K, N)
        magnitude = torch.stack([each.magnitude for each in log_qs]).amax(0)
        return Table(totals.logsumexp(0) - math.log(len(log_qs)), magnitude)

    def state(self, u: torch.Tensor) -> PathState:
        """What `hmc_transition` asks for."""
        with torch.enable_grad(), warnings.catch_warnings():
            # Control flow that looks at latents sees numbers that have a gradient.
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad", UserWarning)
            u = u.detach().requires_grad_()
            log_q, log_p, jacobian = self.tables(u)
            base = log_q.total + jacobian
            delta = (log_p.total - log_q.total).expand_as(base)
            gradients = [_gradient(total, u) for total in (base, delta)]
        return PathState(u.detach(), base.detach(), delta.detach(), *gradients)

    def magnitude(self, u: torch.Tensor) -> torch.Tensor:
        """Size of the terms of the two densities, ``(N,)``."""
        log_q, log_p, _ = self.tables(u)
        return torch.maximum(log_q.magnitude, log_p.magnitude).double()


def _gradient(total: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    if not total.requires_grad:
        return torch.zeros_like(u)
    (found,) = torch.autograd.grad(total.sum(), u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(u) if found is None else found.nan_to_num(0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Course:
    """How chains go from one end of the path to the other, for each datum; a function of the pilot alone.

    Attributes:
        betas: b at each of the nodes, ``(G, N)``, from 0 to 1; float64, as are the others.
        log_steps: log of the sizes of the leapfrog steps, ``(G, N)``.
        log_scales: log of the standard deviations of the coordinates, ``(G, N, D)``; -inf where one does not move.
        factors: of their correlation matrices, ``(W, N, D, D)``; None where D is large.
        place: where a node lies among these, ``(G, N)``.
        lengths: standard deviation of what the log-weight gains from each node to the next, ``(G - 1, N)`` nats; more
            where moves leave chains near where they were.
    """

    betas: torch.Tensor
    log_steps: torch.Tensor
    log_scales: torch.Tensor
    factors: torch.Tensor | None
    place: torch.Tensor
    lengths: torch.Tensor

    def metric(self, t: int, dtype: torch.dtype) -> torch.Tensor:
        """What `hmc_transition` calls scale."""
        scale = self.log_scales[t].exp()  # (N, D)
        if self.factors is None:
            return scale.to(dtype)
        here = self.place[t].long().clamp(max=len(self.factors) - 1)  # (N,)
        return (scale[..., None] * self.factors[here, torch.arange(len(here), device=here.device)]).to(dtype)

    def at(self, num_steps: int) -> "Course":
        """The course at ``num_steps + 1`` nodes that are equally hard to go between."""
        tiny = torch.finfo(torch.float64).tiny
        reached = self._reached()  # (G, N)
        wanted = torch.linspace(0, 1, num_steps + 1, dtype=reached.dtype, device=reached.device)
        rows, targets = reached.T.contiguous(), wanted.expand(reached.shape[1], -1).contiguous()  # (N, G), (N, T + 1)
        left = (torch.searchsorted(rows, targets, right=True) - 1).clamp(0, len(reached) - 2)
        low, high = rows.gather(1, left), rows.gather(1, left + 1)
        part = ((targets - low) / (high - low).clamp(min=tiny)).clamp(0, 1).T  # (T + 1, N)
        steps, scales, place, betas = (
            _between(values, left.T, part) for values in (self.log_steps, self.log_scales, self.place, self.betas)
        )
        betas[0], betas[-1] = 0.0, 1.0
        return Course(betas, steps, scales, self.factors, place, self.lengths)

    def _reached(self) -> torch.Tensor:
        """Which share of the way each node is at, ``(G, N)``."""
        even = (self.betas.diff(dim=0) > 0).double()
        even = even / even.sum(0)
        total = self.lengths.sum(0)
        share = (1 - _SHARE) * self.lengths / total.clamp(min=torch.finfo(torch.float64).tiny) + _SHARE * even
        share = torch.where(total > 0, share, even)
        return torch.cat([torch.zeros_like(share[:1]), share.cumsum(0)])


def _between(values: torch.Tensor, left: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Linear interpolation of ``(G, N, ...)`` between nodes ``left`` and ``left + 1``, both ``(T + 1, N)``."""
    index, weight = (t[..., *[None] * (values.dim() - 2)] for t in (left, part))
    index = index.expand(*left.shape, *values.shape[2:])
    first, second = values.gather(0, index), values.gather(0, index + 1)
    return torch.where(first.isfinite(), first + weight * (second - first), first)


def anneal(
    path: Path, course: Course, u: torch.Tensor, num_leapfrog: int, backwards: bool = False
) -> tuple[Table, torch.Tensor]:
    """Log-weights of chains that start at u, as a table ``(K, N)``, and their acceptance rates ``(N,)``.

    ``backwards`` starts at the posterior, and gives the log-weights of the same chains seen from the other end: the
    mean of 1/w is unbiased for 1/p(x), where that of w is for p(x).
    """
    num_steps = len(course.betas) - 1
    state, start = path.state(u), path.magnitude(u)
    log_weight = torch.zeros_like(state.delta, dtype=torch.float64)
    rates = torch.zeros_like(course.betas[0])
    for t in range(num_steps, 0, -1) if backwards else range(num_steps):
        if backwards or t:  # at b = 0 a draw of the guide has nothing to move for, and the weight no use for it
            step = jittered(course.log_steps[t], len(u))
            metric = course.metric(t, u.dtype)
            state, acceptance = hmc_transition(path.state, state, course.betas[t], step, metric, num_leapfrog)
            rates = rates + acceptance.double().mean(0)
        width = course.betas[t] - course.betas[t - 1] if backwards else course.betas[t + 1] - course.betas[t]
        log_weight = log_weight + torch.where(width > 0, width * state.delta.double(), 0.0)
    ends = (path.magnitude(state.u), start) if backwards else (start, path.magnitude(state.u))
    first = course.betas[1]  # what is rounded at the guide's draws counts by this much
    rates = rates / max(1, num_steps if backwards else num_steps - 1)
    coarser = torch.finfo(state.delta.dtype).eps / torch.finfo(log_weight.dtype).eps  # than the sums are the densities
    return Table(log_weight, coarser * (first * ends[0] + (1 - first) * ends[1])), rates


def jittered(log_step: torch.Tensor, num_chains: int) -> torch.Tensor:
    """A step for each chain, ``(K, N)``, whatever its state."""
    low, high = _JITTER
    return log_step.exp() * torch.rand(num_chains, len(log_step), device=log_step.device).mul(high - low).add(low)
