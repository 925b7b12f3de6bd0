"""Annealed importance sampling, from the guide or from the prior, streamed over data and chains."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pyro_lvm._checks import check_chunks, check_positive_int
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Guides, Model, Vectorize
from pyro_lvm.evidence.annealing import Course, Path, anneal
from pyro_lvm.evidence.columns import Columns
from pyro_lvm.evidence.data import data_source, device_of
from pyro_lvm.evidence.job import Job
from pyro_lvm.evidence.pilot import PILOT_CHAINS, enough_steps, most_rows, tune
from pyro_lvm.evidence.record import LogMarginal
from pyro_lvm.evidence.resume import Checkpoint, fingerprint
from pyro_lvm.evidence.several import prior_of_the_rest, proposing
from pyro_lvm.evidence.verdict import quoted
from pyro_lvm.ops import WeightSummary
from pyro_lvm.tracing.batch import Batch, DataArgs, Rows
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.mixture import Member
from pyro_lvm.tracing.probe import Plan
from pyro_lvm.tracing.tables import Table

__all__ = ["AnnealingJob", "annealed", "annealing_chunks"]


def annealed(
    model: Model,
    guide: Guide | Guides | None,
    x: Data,
    *args: Any,
    num_particles: int = 100,
    num_steps: int | None = None,
    num_leapfrog: int = 3,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    resume: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LogMarginal:
    r"""log p(x) of every datum by annealed importance sampling from the guide, or from the prior.

    .. math:: \log \hat p(x_n) = \log \frac1K \sum_{k=1}^K w_{kn}, \qquad
              \log w_{kn} = \sum_{t=0}^{T-1} (b_{t+1} - b_t) \log \frac{p(x_n, z_{tkn})}{q(z_{tkn} \mid x_n)}

    Each of K chains starts at a draw of the guide and moves, by Hamiltonian Monte Carlo with Metropolis correction,
    under :math:`q(z \mid x)^{1-b} p(x, z)^b` with b from 0 to 1. So the guide need not cover the posterior as a
    proposal has to, only find it. Where it is on one of several modes that are far apart the chains stay there too:
    ``[guide, None]`` starts at both guide and prior, with the mean of their densities for q, to see them. Latents are
    moved in unconstrained coordinates.

    For each datum two pilots of 32 chains choose temperatures, steps and metrics, which are then frozen: the mean
    weight is unbiased for p(x), whatever they have chosen.

    Args:
        model: generative program p(x, z) with a gradient by z. Discrete latents that the guide lacks are summed out.
        guide: variational program q(z | x) with continuous latents, and a density at any z; None starts at the prior;
            several, as in `pooled`, at all of them in equal parts.
        x: data ``(N, ...)``, read chunk by chunk; as in `log_marginal`.
        *args: further arguments of both programs; tensors with N rows go with x.
        num_particles: K, the number of chains.
        num_steps: T, the number of temperatures. None takes, for each chunk of data, as many as the pilot says will
            bring the standard deviation of the log-weights to about 0.8, between 200 and 2000.
        num_leapfrog: steps of one move; the cost is K T times this many gradients.
        data_plate: the plate that holds the data, ``"auto"`` to find it, None for one joint result of shape ``(1,)``.
        data_args: positions among ``args`` of those with one row per datum; ``"auto"`` is all with N rows.
        vectorize: ``False`` runs one chain at a time, for models whose Python control flow looks at latents.
        chunks: (data, chains) computed at once; None chooses from a memory budget.
        resume: a directory that keeps finished chunks of data, from which the same call goes on; as in `log_marginal`.
        seed: forks the global random state; None draws from it.
        device: where to compute; None stays on the device of x.
        progress: show a bar; None shows it in a terminal.

    Returns:
        `LogMarginal`, results ``(N,)`` in nats. Biased low, by about half the variance of the value. ``elbo`` is the
        mean log-weight of the chains: the lower bound of annealing, which is above that of the guide. The provenance
        has the acceptance rates of the moves under ``annealing``. Interrupted with Ctrl-C it holds the data that are
        finished.

    Raises:
        SupportError: the guide draws a discrete latent, none at all, or one whose support moves with other latents or
            has no bijection to the real numbers.
        SiteError: the guide knows the density of its own draws only.
        PlateError, ParameterError, ShapeError, DataTypeError: what was expected, what came and the cure.
        CheckpointError: ``resume`` belongs to another call (the message lists what differs), or its files are damaged.

    Warns:
        UnreliableEstimateWarning: some data have no trustworthy value.

    References:
        Neal (2001), Annealed importance sampling, eqs. 3 to 8; Wu, Burda, Salakhutdinov, Grosse (2017), On the
        quantitative analysis of decoder-based generative models, section 3.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # too narrow for a proposal: the posterior has a scale of 0.7
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.1))
        >>> result = annealed(model, guide, torch.zeros(1), seed=0)
        >>> print(f"{result.mean:.1f}")  # log N(0; 0, 2) = -1.27
        -1.3
    """
    source = data_source(x, args, data_args, device)
    options = (num_particles, num_steps, num_leapfrog, data_plate, vectorize, chunks, seed, progress, resume)
    return quoted(run_annealed(model, guide, source, *options), x)


def run_annealed(
    model: Model,
    guide: Guide | Guides | None,
    source: Rows,
    num_particles: int,
    num_steps: int | None,
    num_leapfrog: int,
    data_plate: DataPlate,
    vectorize: Vectorize,
    chunks: Chunks,
    seed: int | None,
    progress: bool | None,
    resume: str | os.PathLike[str] | None = None,
) -> LogMarginal:
    """`annealed` of data that are ready to be read."""
    num_particles = check_positive_int("num_particles", num_particles)
    if num_steps is not None:
        num_steps = check_positive_int("num_steps", num_steps)
    num_leapfrog = check_positive_int("num_leapfrog", num_leapfrog)
    chunks = check_chunks(chunks)
    device = device_of(source)
    program = prior_of_the_rest(model, source, data_plate) if guide is None else guide
    with proposing(model, program, source, data_plate, vectorize) as start:
        tables, plan = start.tables, start.tables.plan
        with evaluation_rng(0), validation(False):
            sizes = chunks or annealing_chunks(plan, tables.model, tables.guide, source, num_particles)
        columns = Columns(plan.model_layout.num_data(source), device)
        checkpoint = None
        if resume is not None:
            options = {"num_particles": num_particles, "num_steps": num_steps, "num_leapfrog": num_leapfrog}
            options |= start.pair | {"start": start.names, "chunks": chunks, "seed": seed, "device": device}
            known = fingerprint(plan, tables.model, tables.guide, source, options)
            checkpoint = Checkpoint(resume, known, columns, device)
        job = AnnealingJob(
            plan,
            start.pair,
            tables,
            source,
            num_particles,
            sizes,
            columns,
            checkpoint,
            num_steps=num_steps,
            num_leapfrog=num_leapfrog,
            others=start.members[1:],
        )
        with evaluation_rng(seed), validation(False):
            job.run(progress)
    name = ", ".join(start.names) or ("prior" if guide is None else "guide")
    about = {"seed": seed, "device": str(device)} | job.provenance()
    about |= {"resumed_at": checkpoint.resumed_at} if checkpoint else {}
    return LogMarginal(
        **columns.numbers,
        status=columns.status,
        num_particles=num_particles,
        method="annealed importance sampling",
        provenance=about | {"annealing": {"start": name} | job.annealing()},
    )


def annealing_chunks(plan: Plan, model: Model, guide: Guide, source: Rows, num_particles: int) -> tuple[int, int]:
    """(data, chains) to run at once: as `Plan.chunk_sizes`, with room for what the pilot keeps."""
    few = source.rows(slice(0, len(source) if plan.tied else 1))
    path = Path(plan, model, guide, few)
    rows, particles = plan.chunk_sizes(len(source), max(num_particles, PILOT_CHAINS), few.args[0].device)
    return (rows if plan.tied else min(rows, most_rows(path.dim))), particles


@dataclass
class AnnealingJob(Job):
    """A `Job` whose weights are those of chains.

    Attributes:
        num_steps: T, or None.
        num_leapfrog: steps of a move.
        others: guides at whose draws chains begin, besides that of the pair.
        acceptance: rates of the data that are finished.
        steps: the number of steps of each of their chunks.
    """

    num_steps: int | None = field(kw_only=True)
    num_leapfrog: int = field(kw_only=True)
    others: tuple[Member, ...] = ()
    acceptance: list[torch.Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def tuned(self, batch: Batch) -> tuple[Path, Course]:
        """The path of some data and how chains are to follow it."""
        path = Path(self.plan, self.tables.model, self.tables.guide, batch, self.others)
        course = tune(path, self.num_leapfrog)
        course = course.at(self.num_steps or enough_steps(course))
        self.now, self.rates = len(course.betas) - 1, torch.zeros_like(course.betas[0])
        return path, course

    def drawing(self, batch: Batch, num_weights: int) -> Callable[[int], Table]:
        """As in `Job`; chains of their own are tuned first."""
        path, course = self.tuned(batch)

        def draw(num_particles: int) -> Table:
            table, rates = anneal(path, course, path.draw(num_particles), self.num_leapfrog)
            self.rates += rates * (num_particles / self.num_particles)
            return table

        return draw

    def keep(self, summary: WeightSummary) -> None:
        """Take the results of a chunk that is finished."""
        super().keep(summary)
        self.acceptance.append(self.rates)
        self.steps.append(self.now)

    def more(self) -> dict[str, Any]:
        """How the chains of the data that are finished went."""
        return {"acceptance": torch.cat(self.acceptance), "steps": self.steps.copy()}

    def tell(self, more: dict[str, Any]) -> None:
        """Go on with that."""
        self.acceptance, self.steps = [more["acceptance"].to(self.columns["value"].device)], list(more["steps"])

    def annealing(self) -> dict[str, Any]:
        """How chains went."""
        rates = torch.cat(self.acceptance)
        least, most = min(self.steps), max(self.steps)
        return {
            "num_steps": most if least == most else [least, most],
            "num_leapfrog": self.num_leapfrog,
            "pilot_chains": PILOT_CHAINS,
            "acceptance": {"mean": float(rates.mean()), "worst": float(rates.min())},
        }
