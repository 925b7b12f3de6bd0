"""From data to latents: means of z and probabilities of y under the posterior, by weighted draws of the guide."""

from typing import Any

import torch

from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Guides, Model, Vectorize
from pyro_lvm.evidence import Expectation
from pyro_lvm.evidence.expectation import Values, estimate, per_result
from pyro_lvm.tracing.batch import Batch, DataArgs, Rows
from pyro_lvm.tracing.captured_weights import Tables
from pyro_lvm.tracing.classes import class_table, classes
from pyro_lvm.tracing.forward import one_of
from pyro_lvm.tracing.intercept import run
from pyro_lvm.tracing.particles import Draws
from pyro_lvm.tracing.probe import Plan

__all__ = ["attribute", "encode"]


def encode(
    model: Model,
    guide: Guide | Guides,
    x: Data,
    *args: Any,
    site: str | None = None,
    num_particles: int = 1000,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Expectation:
    """E[z | x] of a latent site: `expectation` of z itself.

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x); several, as in `expectation`.
        x: data ``(N, ...)``.
        *args: further arguments of both programs; tensors with N rows go with x.
        site: the latent; None for the only one that the guide draws.
        num_particles: K; ``value`` weighs them to p(z | x), ``under_guide`` is the plain mean of q(z | x).
        data_plate: as in `expectation`, like all that follow.
        data_args: positions among ``args`` of those with one row per datum.
        vectorize: ``False`` runs one particle at a time.
        chunks: (data, particles) computed at once.
        seed: forks the global random state.
        device: where to compute.
        progress: show a bar.

    Returns:
        `Expectation` with values ``(N, *event)``; with ``data_plate=None`` ``(1, *plates, *event)``.

    Raises:
        SiteError: ``site`` is none that the guide draws, or None and there are several.

    Example:
        >>> from pyro_lvm.models import LinearGaussian
        >>> model, x = LinearGaussian(2, 5), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        >>> found = encode(model, model.posterior_guide, x, seed=0)
        >>> (found.value - model.posterior(x).mean).abs().max() < 5 * found.stderr.max()
        tensor(True)
    """

    def values(tables: Tables, _: Rows) -> Values:
        plan = tables.plan
        name = one_of(site, plan.match.sampled, "latent sites that the guide draws")
        return lambda batch, k, draws: per_result(draws[name].per_datum(plan.model_layout), plan)

    return estimate(
        model, guide, x, args, values, num_particles, data_plate, data_args, vectorize, chunks, seed, device, progress
    )


def attribute(
    model: Model,
    guide: Guide | Guides | None,
    x: Data,
    *args: Any,
    site: str | None = None,
    num_particles: int = 1000,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Expectation:
    r"""p(y = k | x) of a discrete latent y with one value a datum.

    .. math:: p(y = k \mid x) = E_{p(z \mid x)}\, p(y = k \mid x, z)
              \approx \frac{\sum_j w_j\, p(y = k \mid x, z_j)}{\sum_j w_j}

    where the guide leaves y to be summed out, at the cost of one run of the model for each of its values; where the
    guide draws y, the weighted share of the draws with y = k.

    Args:
        model: generative program p(x, y, z).
        guide: variational program, q(z | x) or q(y, z | x); several, as in `expectation`; None where y is the only
            latent.
        x: data ``(N, ...)``.
        *args: further arguments of both programs; tensors with N rows go with x.
        site: the discrete latent; None for the only one that is summed out, or else drawn.
        num_particles: K; ``value`` weighs them to p(z | x), ``under_guide`` is the mean over q(z | x).
        data_plate: as in `expectation`, like all that follow.
        data_args: positions among ``args`` of those with one row per datum.
        vectorize: ``False`` runs one particle at a time.
        chunks: (data, particles) computed at once.
        seed: forks the global random state.
        device: where to compute.
        progress: show a bar.

    Returns:
        `Expectation` with values ``(N, C)``, of the C values in the order of the distribution's support; ``(1, C)``
        with ``data_plate=None``, of a latent that all data share.

    Raises:
        SiteError: ``site`` is no latent, or None and there are several.
        SupportError: the latent is not discrete, or has several values for each datum (in all, with
            ``data_plate=None``).

    Example:
        >>> from pyro_lvm.models import GaussianMixture
        >>> mixture, x = GaussianMixture(3, 2), torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
        >>> found = attribute(mixture, None, x)
        >>> (found.value - mixture.responsibilities(x)).abs().max() < 1e-6
        tensor(True)
    """

    def values(tables: Tables, source: Rows) -> Values:
        plan, match = tables.plan, tables.plan.match
        there = match.enumerated or match.sampled if site is None else (*match.enumerated, *match.sampled)
        name = one_of(site, there, "latent sites")
        few = source.rows(slice(0, len(source) if plan.tied else 1))
        support = classes(run(tables.model, few.args)[name], plan.model_layout.plate is None)  # (C, *event)
        return _class_probs(tables, name, support) if name in match.enumerated else _shares(plan, name, support)

    return estimate(
        model, guide, x, args, values, num_particles, data_plate, data_args, vectorize, chunks, seed, device, progress
    )


def _class_probs(tables: Tables, name: str, support: torch.Tensor) -> Values:
    """p(y = k | x, z) at draws of z, ``(K, N, C)``."""

    def values(batch: Batch, size: int, draws: Draws) -> torch.Tensor:
        given = {n: draws[n] for n in tables.plan.match.sampled}
        totals = [class_table(tables.plan, tables.model, batch, given, name, each, size).total for each in support]
        return torch.stack([total.expand(size, -1) for total in totals], -1).double().softmax(-1)

    return values


def _shares(plan: Plan, name: str, support: torch.Tensor) -> Values:
    """1 where a draw of y is the k-th value, else 0: ``(K, N, C)``."""

    def values(batch: Batch, size: int, draws: Draws) -> torch.Tensor:
        drawn = per_result(draws[name].per_datum(plan.model_layout), plan)  # (K, N, *event)
        same = drawn.unsqueeze(2) == support.to(drawn.device)  # (K, N, C, *event)
        return same.reshape(*same.shape[:3], -1).all(-1)

    return values
