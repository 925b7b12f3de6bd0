"""Two proposals that need no guide: the prior, and the uniform distribution. The lecture's first try at log p(x)."""

from dataclasses import replace
from typing import Any

import torch

from pyro_lvm._typing import Chunks, Data, DataPlate, Model, Vectorize
from pyro_lvm.evidence.importance import importance
from pyro_lvm.evidence.record import LogMarginal
from pyro_lvm.tracing.batch import DataArgs
from pyro_lvm.tracing.proposals import prior_guide, uniform_guide

__all__ = ["prior", "uniform"]


def prior(
    model: Model,
    x: Data,
    *args: Any,
    num_particles: int = 1000,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LogMarginal:
    r"""log p(x) of every datum by sampling from the prior.

    .. math:: \log \hat p(x_n) = \log \frac1K \sum_k p(x_n \mid z_{kn}), \qquad z_{kn} \sim p(z)

    Most draws explain the datum badly, so the variance grows exponentially with the information that x has on z.

    Args and errors are those of `log_marginal`, without a guide.

    Returns:
        `LogMarginal`, biased low.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> prior(model, torch.zeros(1), seed=0).method
        'prior sampling'
    """
    record = importance(
        model,
        prior_guide(model),
        x,
        *args,
        num_particles=num_particles,
        data_plate=data_plate,
        data_args=data_args,
        vectorize=vectorize,
        chunks=chunks,
        seed=seed,
        device=device,
        progress=progress,
    )
    return replace(record, method="prior sampling")


def uniform(
    model: Model,
    x: Data,
    *args: Any,
    num_particles: int = 1000,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LogMarginal:
    r"""log p(x) of every datum by naive Monte Carlo over a finite set of latent values.

    .. math:: \log \hat p(x_n) = \log \frac{|Z|}{K} \sum_k p(x_n, z_{kn}), \qquad z_{kn} \sim U(Z)

    Almost all values have a tiny p(x, z), so that the few that matter are hardly ever drawn.

    Args and errors are those of `log_marginal`, without a guide; latents must be Bernoulli or categorical.

    Returns:
        `LogMarginal`, biased low.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)
        >>> uniform(model, torch.ones(1), seed=0).method
        'uniform sampling'
    """
    record = importance(
        model,
        uniform_guide(model),
        x,
        *args,
        num_particles=num_particles,
        data_plate=data_plate,
        data_args=data_args,
        vectorize=vectorize,
        chunks=chunks,
        seed=seed,
        device=device,
        progress=progress,
    )
    return replace(record, method="uniform sampling")
