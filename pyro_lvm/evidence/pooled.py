"""Several guides as one proposal: the mixture of them, and where they disagree on where the posterior is."""

from collections.abc import Mapping
from typing import Any

import torch

from pyro_lvm._checks import check_chunks, check_positive_int
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Guides, Model, Vectorize
from pyro_lvm.evidence.columns import Columns
from pyro_lvm.evidence.data import data_source, device_of
from pyro_lvm.evidence.record import LogMarginal
from pyro_lvm.evidence.several import joined, named
from pyro_lvm.evidence.verdict import quoted
from pyro_lvm.evidence.weighted import WeightedJob
from pyro_lvm.tracing.batch import DataArgs, Rows
from pyro_lvm.tracing.isolation import evaluation_rng

__all__ = ["pool", "pooled"]


def pooled(
    model: Model,
    guides: Guides,
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
    r"""log p(x) of every datum by importance sampling from several guides at once, as one mixture.

    .. math:: \log \hat p(x_n) = \log \frac1{JK} \sum_{j=1}^J \sum_{k=1}^K
              \frac{p(x_n, z_{jkn})}{\frac1J \sum_i q_i(z_{jkn} \mid x_n)}, \qquad z_{jkn} \sim q_j(z \mid x_n)

    (the balance heuristic). A draw is weighed by the density of all guides together, so that no weight is larger than
    J times the one that it had from its own guide alone, and a mode that any one of the guides covers is in the value.

    Args:
        model: generative program p(x, z).
        guides: at least two, in a sequence or a dictionary name -> guide, over the same latent sites; None is the
            prior of the model, for modes that no guide is on.
        x: data ``(N, ...)``, read chunk by chunk; as in `log_marginal`.
        *args: further arguments of all programs; tensors with N rows go with x.
        num_particles: K, drawn from *each* guide: J K in all, each of which every guide scores.
        data_plate: the plate that holds the data, ``"auto"`` to find it, None for one joint result of shape ``(1,)``.
        data_args: positions among ``args`` of those with one row per datum.
        vectorize: ``False`` runs one particle at a time.
        chunks: (data, particles) computed at once; None chooses from a memory budget.
        seed: forks the global random state; None draws from it.
        device: where to compute; None stays on the device of x.
        progress: show a bar; None shows it in a terminal.

    Returns:
        `LogMarginal`, results ``(N,)`` in nats, with ``num_particles`` = J K. Biased low. ``stderr``, ``bias`` and
        ``elbo_stderr`` are those of a stratified sample, which K draws of each guide are; ``elbo`` is that of the
        mixture as one guide; ``ess`` and ``khat`` are of all weights together. Status ``disagreement``: one guide's own
        estimate lacks posterior mass that another guide proposes; the value holds the mass of all of them. The prior
        is not asked, for it mostly lacks some. Mass that none proposes shows nowhere. ``provenance["guides"]`` has for
        each guide the mean of its own log p-hat and the share of the data where it lacks mass, those with a worse
        status included.

    Raises:
        SiteError: guides draw or enumerate different sites, or one has no density at the draws of another.
        PlateError: the data plate of a guide is not that of the model.
        ParameterError: they were trained with different values of the model's parameters.
        ShapeError: fewer than two guides.
        DataTypeError, SupportError: what was expected, what came and the cure.

    Warns:
        UnreliableEstimateWarning: some data have no trustworthy value.

    References:
        Veach & Guibas (1995), Optimally combining sampling techniques, eq. 5 (balance heuristic); Owen & Zhou (2000),
        Safe and effective importance sampling, sec. 3; Elvira, Martino, Luengo & Bugallo (2019), Generalized multiple
        importance sampling, whose deterministic mixture it is.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):  # x is z^2 with noise: two modes
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 2.0))
        ...         pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)
        >>> def on(mode):
        ...     def guide(x):
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("z", dist.Normal(mode, 0.2))
        ...     return guide
        >>> result = pooled(model, {"left": on(-1.97), "right": on(1.97)}, torch.tensor([4.0]), seed=0)
        >>> own = result.provenance["guides"]["left"]["mean"]
        >>> print(f"{result.mean - own:.1f}", result.status[0])
        0.7 disagreement
    """
    pairs = {name: (model, guide) for name, guide in named(guides).items()}
    source = data_source(x, args, data_args, device)
    return quoted(pool(pairs, source, num_particles, data_plate, vectorize, chunks, seed, progress), x)


def pool(
    pairs: Mapping[str, tuple[Model, Guide | None]],
    source: Rows,
    num_particles: int,
    data_plate: DataPlate,
    vectorize: Vectorize,
    chunks: Chunks,
    seed: int | None,
    progress: bool | None,
) -> LogMarginal:
    """`pooled` of pairs whose models are one, each with the parameters that it learned."""
    num_particles, chunks = check_positive_int("num_particles", num_particles), check_chunks(chunks)
    device = device_of(source)
    with joined(pairs, source, data_plate, vectorize) as start:
        total, plan = len(pairs) * num_particles, start.tables.plan
        sizes = chunks or plan.chunk_sizes(len(source), total, device)
        columns = Columns(plan.model_layout.num_data(source), device)
        job = WeightedJob(plan, start.pair, start.tables, source, total, sizes, columns, members=start.members)
        with evaluation_rng(seed):
            job.run(progress)
    return LogMarginal(
        **columns.numbers,
        status=columns.status,
        num_particles=total,
        method=f"mixture of {len(pairs)} guides",
        provenance={"seed": seed, "device": str(device)} | job.provenance(),
    )
