r"""Six ways to draw from a guide, so that autograd of the mean of M bounds gives six estimators of its gradient.

.. math:: \hat L_m = \log \frac1K \sum_{k=1}^K w_{mk}, \qquad
          \bar w_{mk} = \frac{w_{mk}}{\sum_j w_{mj}} = \frac{\partial \hat L_m}{\partial \log w_{mk}}

A proposal hands out draws z and a table log q(z | x) of the same values as ever, and decides what of the gradient gets
through them. What it adds besides has the value zero: only its gradient counts.
"""

import math

import torch

from pyro_lvm._checks import refuse
from pyro_lvm._typing import Guide
from pyro_lvm.errors import PlateError, SiteError
from pyro_lvm.ops.log_space import log_mean_exp
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.particles import Draws, Latent
from pyro_lvm.tracing.probe import Plan
from pyro_lvm.tracing.tables import Table
from pyro_lvm.tracing.weights import Proposal

__all__ = [
    "ESTIMATORS",
    "DoublyReparameterized",
    "Reinforce",
    "ReweightedWakeSleep",
    "Scored",
    "Standard",
    "StickingTheLanding",
    "Vimco",
]


class Standard(Proposal):
    """The guide as it is.

    Args:
        plan: how the pair is run.
        guide: q(z | x).
        batch: its arguments.
        check: make sure that the guide gives its own draws the density that they were drawn with.
    """

    needs_rsample = True

    def __init__(self, plan: Plan, guide: Guide, batch: Batch, *, check: bool = False) -> None:
        super().__init__(plan, guide, batch)
        self.check = check

    def bound(self, log_weights: torch.Tensor) -> torch.Tensor:
        """The bound of each datum, ``(N,)``, from log-weights ``(M, K, N)``."""
        return log_mean_exp(log_weights, 1).mean(0)

    def detached(self, log_q: Table, draws: Draws, num_particles: int) -> tuple[Table, Draws]:
        """log q(z | x) at draws that carry no gradient: that of the table is the score."""
        still = {name: Latent(latent.value.detach(), latent.rank) for name, latent in draws.items()}
        try:
            table = self.score(still, num_particles)
        except (KeyError, NotImplementedError) as error:  # a flow that only knows the density of its last draw
            raise SiteError(_no_density(f"{type(error).__name__}: {error}")) from error
        if self.check and not torch.allclose(table.total, log_q.total, rtol=1e-3, atol=1e-3, equal_nan=True):
            gap = float((table.total - log_q.total).detach().abs().max())
            raise SiteError(_no_density(f"one that differs by {gap:.3g} nats from run to run"))
        return table, still


class StickingTheLanding(Standard):
    """The score, the gradient of log q(z | x) at fixed z, is taken out; the path through z is left."""

    def draw(self, num_particles: int) -> tuple[Table, Draws]:
        """log q(z | x), one row a particle, and z."""
        log_q, draws = super().draw(num_particles)
        score = self.detached(log_q, draws, num_particles)[0].total
        return Table(log_q.total - (score - score.detach()), log_q.magnitude), draws


class DoublyReparameterized(StickingTheLanding):
    r"""Besides, what flows back through z is multiplied by :math:`\bar w_{mk}` once more.

    The model sees copies of z, and the draws of the guide that depend on one another do not see these: a factor is
    applied once, whatever the path from z to the parameters.
    """

    def __init__(self, plan: Plan, guide: Guide, batch: Batch, *, check: bool = False) -> None:
        if plan.model_layout.plate is not None and plan.model_layout.dim is None:
            cure = "Write `with pyro.plate(...)`, not `for ... in pyro.plate(...)`, or use another gradient."
            plate = f"data plate {plan.model_layout.plate!r}"
            raise PlateError(refuse(plate, "a tensor dimension", "a sequential plate", cure))
        super().__init__(plan, guide, batch, check=check)
        self.weights: list[torch.Tensor] = []  # (M * K, N), once known; not in the graph, so that it can be freed

    def draw(self, num_particles: int) -> tuple[Table, Draws]:
        """log q(z | x), one row a particle, and z."""
        log_q, draws = super().draw(num_particles)
        layout = self.plan.guide_layout
        data = 1 + layout.nesting + (layout.dim or 0)  # position of the data in a latent
        copies = {n: Latent(self._weighted(latent.value, data), latent.rank) for n, latent in draws.items()}
        return Table(self._weighted(log_q.total, 1), log_q.magnitude), copies

    def bound(self, log_weights: torch.Tensor) -> torch.Tensor:
        """The bound of each datum, ``(N,)``, from log-weights ``(M, K, N)``."""
        self.weights.append(log_weights.detach().softmax(1).flatten(0, 1))
        return super().bound(log_weights)

    def _weighted(self, tensor: torch.Tensor, data: int) -> torch.Tensor:
        """A copy that multiplies its gradient by the weight of each particle and datum."""
        if not tensor.requires_grad:
            return tensor
        copy, weights = tensor.view_as(tensor), self.weights
        ones, per_datum = [1] * (tensor.dim() - 1), self.plan.guide_layout.plate is not None

        def multiply(gradient: torch.Tensor) -> torch.Tensor:
            num_particles, num_data = weights[0].shape
            shape = [num_particles, *ones]
            if per_datum:
                shape[data] = num_data
            return gradient * weights[0].reshape(shape)

        copy.register_hook(multiply)
        return copy


class Scored(Standard):
    """Draws without gradient, discrete ones too; of the guide's gradient, what `factors` multiplies the scores by."""

    needs_rsample = False

    def draw(self, num_particles: int) -> tuple[Table, Draws]:
        """log q(z | x), one row a particle, and z."""
        log_q, draws = super().draw(num_particles)
        table, still = self.detached(log_q, draws, num_particles)
        self.log_q = table.total
        return Table(table.total.detach(), table.magnitude), still

    def factors(self, log_weights: torch.Tensor) -> torch.Tensor:
        """What multiplies the score of each particle, ``(M, K, N)``, from log-weights without gradient."""
        raise NotImplementedError

    def bound(self, log_weights: torch.Tensor) -> torch.Tensor:
        """The bound of each datum, ``(N,)``, from log-weights ``(M, K, N)``."""
        log_q = self.log_q.expand(log_weights.shape[0] * log_weights.shape[1], -1).reshape(log_weights.shape)
        surrogate = (self.factors(log_weights.detach()) * log_q).sum(1).mean(0)  # (N,)
        return super().bound(log_weights) + surrogate - surrogate.detach()


class Vimco(Scored):
    r"""The score of each draw is multiplied by what its draw adds to the bound.

    .. math:: \nabla_\phi \approx \frac1M \sum_{mk} (\hat L_m - \hat L_{m,-k} - \bar w_{mk}) \nabla_\phi \log q(z_{mk})

    where :math:`\hat L_{m,-k}` has, in the place of :math:`w_{mk}`, the geometric mean of the other weights. Where
    these are all zero it is minus infinity, and the factor is log K in its place, whatever the draw is.
    """

    def factors(self, log_weights: torch.Tensor) -> torch.Tensor:
        """What each particle adds to the bound, less its weight, ``(M, K, N)``."""
        num_particles = log_weights.shape[1]
        own = torch.eye(num_particles, dtype=torch.bool, device=log_weights.device)[..., None]  # (K, K, 1)
        each = log_weights[:, None]  # (M, 1, K, N)
        others = each.masked_fill(own, 0.0).sum(2) / (num_particles - 1)  # (M, K, N), means of the rest
        without = log_mean_exp(torch.where(own, others[:, :, None], each), 2)  # (M, K, N), each with one replaced
        factors = log_mean_exp(log_weights, 1)[:, None] - without - log_weights.softmax(1)
        return factors.masked_fill(without.isneginf(), math.log(num_particles))


class ReweightedWakeSleep(Scored):
    r"""The guide climbs :math:`E_{p(z|x)}[\log q]`, by self-normalised importance sampling.

    .. math:: \nabla_\phi \approx \frac1M \sum_{mk} \bar w_{mk} \nabla_\phi \log q(z_{mk})
    """

    def factors(self, log_weights: torch.Tensor) -> torch.Tensor:
        """The normalised weights, ``(M, K, N)``."""
        return log_weights.softmax(1)


class Reinforce(Scored):
    r"""The score of each draw is multiplied by how far its bound is above what was to be expected.

    .. math:: \nabla_\phi \approx \frac1M \sum_{mk} (\hat L_m - b_m - \bar w_{mk} + \tfrac1K) \nabla_\phi \log q(z_{mk})

    b_m is `level`, which learns by its squared error; with M > 1 the mean of the other bounds; else 0. Neither
    depends on the draws of bound m, so that the mean stays; nor does 1 / K, the mean of the weights.

    Attributes:
        level: b(x), ``(N,)``, what a baseline takes the bound of each datum to be; None to leave it out.
    """

    level: torch.Tensor | None = None

    def factors(self, log_weights: torch.Tensor) -> torch.Tensor:
        """How far the bound is above its level, less the weight of each particle, ``(M, K, N)``."""
        num_bounds, num_particles, _ = log_weights.shape
        bounds = log_mean_exp(log_weights, 1)  # (M, N)
        if self.level is not None:
            bounds = bounds - self.level.detach()
        elif num_bounds > 1:
            bounds = bounds - (bounds.sum(0) - bounds) / (num_bounds - 1)
        return bounds[:, None] - log_weights.softmax(1) + 1 / num_particles

    def bound(self, log_weights: torch.Tensor) -> torch.Tensor:
        """The bound of each datum, ``(N,)``, from log-weights ``(M, K, N)``."""
        bound = super().bound(log_weights)
        if self.level is None:
            return bound
        error = (bound.detach() - self.level).square()  # (N,)
        return bound - error + error.detach()


def _no_density(got: str) -> str:
    cure = (
        'The score at given draws is what this estimator needs: use gradient="standard", a flow with an inverse, no '
        "dropout between the latents of a guide, and no draws outside of `pyro.sample`."
    )
    return refuse("guide", "one density of the draws that it made", got, cure)


ESTIMATORS: dict[str, type[Standard]] = {
    "standard": Standard,
    "sticking_the_landing": StickingTheLanding,
    "doubly_reparameterized": DoublyReparameterized,
    "vimco": Vimco,
    "reweighted_wake_sleep": ReweightedWakeSleep,
    "reinforce": Reinforce,
}
