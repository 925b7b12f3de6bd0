r"""Four ways to draw from a guide, so that autograd of :math:`\log \frac1K \sum_k w_k` gives four gradient estimators.

With :math:`\bar w_k = w_k / \sum_j w_j`, autograd multiplies what reaches log w_k by :math:`\bar w_k`. A proposal hands
out draws z and a table log q(z | x) of the same values as ever, and decides what of the gradient gets through them.
"""

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

__all__ = ["ESTIMATORS", "DoublyReparameterized", "Standard", "StickingTheLanding", "Vimco"]


class Standard(Proposal):
    """The guide as it is.

    Args:
        plan: how the pair is run.
        guide: q(z | x).
        batch: its arguments.
        check: make sure that the guide gives its own draws the density that they were drawn with.
    """

    def __init__(self, plan: Plan, guide: Guide, batch: Batch, *, check: bool = False) -> None:
        super().__init__(plan, guide, batch)
        self.check = check

    def bound(self, log_weights: torch.Tensor) -> torch.Tensor:
        """The bound of each datum, ``(N,)``, from log-weights ``(K, N)``."""
        return log_mean_exp(log_weights)

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
        """log q(z | x), ``(K, N)``, and z."""
        log_q, draws = super().draw(num_particles)
        score = self.detached(log_q, draws, num_particles)[0].total
        return Table(log_q.total - (score - score.detach()), log_q.magnitude), draws


class DoublyReparameterized(StickingTheLanding):
    r"""Besides, what flows back through z is multiplied by :math:`\bar w_k` once more.

    The model sees copies of z, and the draws of the guide that depend on one another do not see these: a factor is
    applied once, whatever the path from z to the parameters.
    """

    def __init__(self, plan: Plan, guide: Guide, batch: Batch, *, check: bool = False) -> None:
        if plan.model_layout.plate is not None and plan.model_layout.dim is None:
            cure = "Write `with pyro.plate(...)`, not `for ... in pyro.plate(...)`, or use another gradient."
            plate = f"data plate {plan.model_layout.plate!r}"
            raise PlateError(refuse(plate, "a tensor dimension", "a sequential plate", cure))
        super().__init__(plan, guide, batch, check=check)
        self.weights: list[torch.Tensor] = []  # (K, N), once they are known; not in the graph, so that it can be freed

    def draw(self, num_particles: int) -> tuple[Table, Draws]:
        """log q(z | x), ``(K, N)``, and z."""
        log_q, draws = super().draw(num_particles)
        layout = self.plan.guide_layout
        data = 1 + layout.nesting + (layout.dim or 0)  # position of the data in a latent
        copies = {n: Latent(self._weighted(latent.value, data), latent.rank) for n, latent in draws.items()}
        return Table(self._weighted(log_q.total, 1), log_q.magnitude), copies

    def bound(self, log_weights: torch.Tensor) -> torch.Tensor:
        """The bound of each datum, ``(N,)``, from log-weights ``(K, N)``."""
        self.weights.append(log_weights.detach().softmax(0))
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


class Vimco(Standard):
    r"""Draws without gradient; the score of each is multiplied by what its draw adds to the bound.

    .. math:: \nabla_\phi \approx \sum_k (\hat L - \hat L_{-k} - \bar w_k) \nabla_\phi \log q(z_k)

    where :math:`\hat L_{-k}` has, in the place of w_k, the geometric mean of the other weights.
    """

    def draw(self, num_particles: int) -> tuple[Table, Draws]:
        """log q(z | x), ``(K, N)``, and z."""
        log_q, draws = super().draw(num_particles)
        table, still = self.detached(log_q, draws, num_particles)
        self.log_q = table.total
        return table, still

    def bound(self, log_weights: torch.Tensor) -> torch.Tensor:
        """The bound of each datum, ``(N,)``, from log-weights ``(K, N)``."""
        surrogate = (_learning_signal(log_weights.detach()) * self.log_q).sum(0)  # (N,)
        return super().bound(log_weights) + surrogate - surrogate.detach()


def _learning_signal(log_weights: torch.Tensor) -> torch.Tensor:
    """What each particle adds to the bound, ``(K, N)``."""
    num_particles = len(log_weights)
    others = (log_weights.sum(0) - log_weights) / (num_particles - 1)  # (K, N), mean of the other log-weights
    own = torch.eye(num_particles, dtype=torch.bool, device=log_weights.device)[..., None]
    without = torch.where(own, others, log_weights[:, None])  # (K, K, N): the second particle of each replaced
    return log_mean_exp(log_weights) - log_mean_exp(without)


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
}
