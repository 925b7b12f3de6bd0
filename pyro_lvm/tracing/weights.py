"""The log-weights of a pair, log p(x, z) - log q(z | x): the one definition of them in the package."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pyro_lvm._checks import check_positive_int, data_tensor, refuse
from pyro_lvm._typing import DataPlate, Guide, Model, TensorLike, Vectorize
from pyro_lvm.errors import SiteError
from pyro_lvm.tracing.batch import Batch, DataArgs, make_batch
from pyro_lvm.tracing.intercept import Values, is_latent, run
from pyro_lvm.tracing.isolation import eval_mode, evaluation_rng, validation
from pyro_lvm.tracing.params import evaluation_store
from pyro_lvm.tracing.particles import Draws, Latent, Runner, draw_from
from pyro_lvm.tracing.probe import Plan, empty_guide, probe_pair, run_pair
from pyro_lvm.tracing.sites import guide_sites
from pyro_lvm.tracing.supports import outside_data, outside_error, support_moves
from pyro_lvm.tracing.tables import Table

__all__ = [
    "Proposal",
    "check_data",
    "check_scores",
    "elbo",
    "evaluation",
    "joint_table",
    "log_weights",
    "weigh",
    "weight_table",
    "weighted_draws",
]


_AGAIN = 3  # draws that are handed back to the guide that made them


class Proposal:
    """The guide on some data. It runs once for all draws where its sites do not depend on one another."""

    def __init__(self, plan: Plan, guide: Guide, batch: Batch, values: Values | None = None) -> None:
        self.plan, self.guide, self.batch = plan, guide, batch
        self.trace = run(guide, batch.args, values=values) if plan.guide_mode == "once" else {}

    @property
    def values(self) -> Values:
        """What the guide drew in that one run: nothing depends on it, and given it again no number is drawn."""
        return {name: site["value"] for name, site in self.trace.items() if is_latent(site)}

    def draw(self, num_particles: int) -> tuple[Table, Draws]:
        """log q(z | x), ``(K, N)``, and the draws z."""
        layout, mode = self.plan.guide_layout, self.plan.guide_mode
        if mode == "once":
            return draw_from(self.trace, num_particles, layout, self.batch)
        return Runner(self.guide, layout, guide_sites).run(self.batch, mode, num_particles)

    def score(self, draws: Draws, num_particles: int) -> Table:
        """log q(z | x) of K given draws, ``(K, N)``."""
        layout, mode = self.plan.guide_layout, self.plan.guide_mode
        if mode == "once":
            return draw_from(self.trace, num_particles, layout, self.batch, draws)[0]
        return Runner(self.guide, layout, guide_sites).run(self.batch, mode, num_particles, draws)[0]


def weight_table(plan: Plan, model: Model, proposal: Proposal, num_particles: int) -> Table:
    """log p(x, z) - log q(z | x) of fresh draws z ~ q, shape ``(K, N)``, in nats.

    Masks count, scales (subsampling, annealing) do not. Enumerated sites are summed out.
    """
    return weighted_draws(plan, model, proposal, num_particles)[0]


def weighted_draws(plan: Plan, model: Model, proposal: Proposal, num_particles: int) -> tuple[Table, Draws]:
    """`weight_table`, and the draws that it weighs: every latent of the model that is not summed out."""
    log_q, draws = proposal.draw(num_particles)
    log_joint, latents = joint_table(plan, model, proposal.batch, num_particles, draws)
    return weigh(log_joint, log_q, num_particles), latents


def joint_table(
    plan: Plan, model: Model, batch: Batch, num_particles: int, draws: Draws
) -> tuple[Table, dict[str, Latent]]:
    """log p(x, z) of draws, and every latent of the model that is not summed out."""
    log_joint, latents = plan.model_runner(model).run(batch, plan.model_mode, num_particles, draws)
    unproposed = latents.keys() - draws.keys() - {*plan.match.free, *plan.match.determined}
    if unproposed:
        raise SiteError(
            f"guide: expected every latent site of the model, got none for {sorted(unproposed)}, which the model has "
            "for some latents or data only. Sample them in the guide whenever the model does."
        )
    return log_joint, latents


def weigh(log_joint: Table, log_q: Table, num_particles: int) -> Table:
    """log p(x, z) - log q(z | x), ``(K, N)``, of draws from q, whatever that is."""
    weights = log_joint - log_q
    return Table(weights.total.expand(num_particles, -1), weights.magnitude)


def check_scores(proposal: Proposal, given: Callable[[Draws], Draws]) -> None:
    """The guide has a density at draws that it has not just made, the same as when it made them.

    Raises:
        SiteError: it has not, or another one.
    """
    log_q, draws = proposal.draw(_AGAIN)
    proposal.draw(_AGAIN)  # a flow without an inverse has the last draws in mind, and no others
    copies = {name: Latent(latent.value.clone(), latent.rank) for name, latent in draws.items()}
    cause = None
    try:
        drawn, again = torch.broadcast_tensors(log_q.total, proposal.score(given(copies), _AGAIN).total)
        # What a way through coordinates loses in float32; NaN comes from data, and is found by the weights.
        if torch.allclose(drawn, again, rtol=1e-3, atol=1e-2, equal_nan=True):
            return
    except (KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        cause = error
    got = "another one at its own draws given again" if cause is None else repr(cause)
    cure = (
        "Sample latents by pyro.sample from distributions with a log_prob; a flow needs an inverse. Of AutoGuides use "
        "those that draw unconstrained coordinates, such as AutoNormal and AutoMultivariateNormal."
    )
    raise SiteError(refuse("guide", "a density log q(z | x) at any draws", got, cure)) from cause


def check_data(plan: Plan, model: Model, guide: Guide, batch: Batch, first_row: int = 0) -> None:
    """Every datum lies in the support of its likelihood.

    Raises:
        SupportError: names the site and the rows; a density at such a datum is not a density.
    """
    if not plan.bounded_data:
        return
    with evaluation_rng(0):
        trace = run_pair(model, guide, batch).model
        found = outside_data(trace)
        other = run_pair(model, guide, batch).model if found else trace
    for name, outside in found.items():
        site, dim = trace[name], plan.model_layout.dim
        if support_moves(site, other[name]):  # such draws weigh nothing
            continue
        where = ""
        if dim is not None and outside.dim() >= -dim:
            rows = outside.nonzero()[:, dim].unique()
            where = f" ({len(rows)} of {len(batch)} data, the first of them row {first_row + int(rows[0])})"
        raise outside_error(site, where)


@contextmanager
def evaluation(model: Model, guide: Guide | None) -> Iterator[None]:
    """The pair with its learned parameters, in eval mode; nothing outside changes."""
    with evaluation_store(model, guide), eval_mode(model, guide):
        yield


def log_weights(
    model: Model,
    guide: Guide | None,
    x: TensorLike,
    *args: Any,
    num_particles: int = 1,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    r"""Log importance weights of a pair, all at once and differentiable.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x); None for a model without latents.
        x: data ``(N, ...)``.
        *args: further arguments of both; tensors with N rows go with x.
        num_particles: K.
        data_plate: the plate that holds the data, ``"auto"`` to find it, None for one joint weight.
        data_args: positions among ``args`` of those with one row per datum.
        vectorize: ``False`` runs one particle at a time, for models whose Python control flow looks at latents.
        seed: forks the global random state; None draws from it.
        device: where to compute; None leaves tensors where they are.

    Returns:
        Nats, shape ``(K, N)``, ``(K, 1)`` with ``data_plate=None``. Memory grows with K x N: `log_marginal` streams.

    Raises:
        PlateError, SiteError, SupportError, ParameterError: the pair has no log-weights; the message says why.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> log_weights(model, guide, torch.zeros(2), num_particles=3, seed=0).shape
        torch.Size([3, 2])
    """
    num_particles = check_positive_int("num_particles", num_particles)
    batch = make_batch(data_tensor("x", x), args, data_args).to(device)
    guide = guide or empty_guide
    with evaluation(model, guide):
        with evaluation_rng(0):
            plan = probe_pair(model, guide, batch, data_plate, vectorize)
            with torch.no_grad(), validation(False):
                check_data(plan, model, guide, batch)
        with evaluation_rng(seed), validation(False):
            return weight_table(plan, model, Proposal(plan, guide, batch), num_particles).total


def elbo(
    model: Model,
    guide: Guide | None,
    x: TensorLike,
    *args: Any,
    num_particles: int = 1,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    r"""Evidence lower bound of each datum, by the mean of K log-weights; differentiable.

    .. math:: \mathcal L(x_n) = E_{q(z \mid x_n)}[\log p(x_n, z) - \log q(z \mid x_n)]
              = \log p(x_n) - KL(q(z \mid x_n) \,\|\, p(z \mid x_n))

    Args and errors are those of `log_weights`.

    Returns:
        Nats, shape ``(N,)``. Unbiased for the ELBO, which is at most log p(x). Where discrete latents are enumerated it
        is the tighter bound with these summed out.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> elbo(model, guide, torch.zeros(2), seed=0)
        tensor([-1.2655, -1.2655])
    """
    table = log_weights(
        model,
        guide,
        x,
        *args,
        num_particles=num_particles,
        data_plate=data_plate,
        data_args=data_args,
        vectorize=vectorize,
        seed=seed,
        device=device,
    )
    return table.mean(0)
