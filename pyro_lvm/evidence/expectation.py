"""E[fn(z) | x]: means over the posterior, by weighted draws of one guide or of several."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from pyro_lvm._checks import check_chunks, check_positive_int, refuse
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Guides, Model, Vectorize
from pyro_lvm.errors import DataTypeError, ShapeError, SiteError
from pyro_lvm.evidence.columns import Columns
from pyro_lvm.evidence.data import data_source, device_of
from pyro_lvm.evidence.several import proposing
from pyro_lvm.evidence.verdict import data_in_words, quoted, status_shares, verdict
from pyro_lvm.evidence.weighted import WeightedJob
from pyro_lvm.ops import RatioAccumulator, RatioSummary, WeightSummary
from pyro_lvm.tracing.batch import Batch, DataArgs, Rows
from pyro_lvm.tracing.captured_weights import Tables
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.particles import Draws
from pyro_lvm.tracing.probe import Plan, empty_guide

__all__ = ["Expectation", "MeansJob", "Values", "estimate", "expectation", "per_result"]

#: Values of f ``(k, N, ...)`` at k draws of some data.
Values = Callable[[Batch, int, Draws], torch.Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Expectation:
    r"""Means of f(z) for every datum; tensors are float64, with N first, in the units of f.

    With K weights :math:`w_k = p(x, z_k) / q(z_k \mid x)` the value is :math:`\sum_k w_k f(z_k) / \sum_k w_k`, whose
    bias is of the order of 1/K, while its standard error is of the order of :math:`1/\sqrt K`.

    Attributes:
        value: estimate of E[f(z) | x], ``(N, ...)``.
        stderr: its standard error (delta method). Optimistic under a heavy tail of the weights.
        under_guide: mean of f under q(z | x), of the same draws, ``(N, ...)``; under the mixture of several guides.
        under_guide_stderr: its standard error.
        ess: effective sample size in [1, K], ``(N,)``.
        khat: Pareto tail index of the weights, ``(N,)``.
        status: of the weights, as in `LogMarginal`, ``(N,)``; an f that is not bounded may have a heavier tail. Of
            E[z^2] of a normal posterior by K = 1000 draws of a normal of .8, .7 and .6 of its width, .1 %, 2 % and 23 %
            of the data with ``no_fault_found`` are off by more than five standard errors, and none of E[z]; of .9 of
            its width, one posterior standard deviation beside it, 9 % and .4 %.
        num_particles: K, of all guides together.
        provenance: seed, dtype, device, versions, chunk sizes; ``sha256`` of data and parameters. Of several guides
            also what `evidence.pooled` says of each.
    """

    value: torch.Tensor
    stderr: torch.Tensor
    under_guide: torch.Tensor
    under_guide_stderr: torch.Tensor
    ess: torch.Tensor
    khat: torch.Tensor
    status: np.ndarray
    num_particles: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.value)

    def status_shares(self) -> dict[str, float]:
        """Share of the data in each status that occurs, from the best to the worst."""
        return status_shares(self.status)

    @property
    def verdict(self) -> str:
        """What may be said with these numbers, in a plain sentence."""
        return verdict(self.status, "means over p(z | x)")

    def __repr__(self) -> str:
        shares = ", ".join(f"{word} {share:.1%}" for word, share in self.status_shares().items())
        moved = (self.value - self.under_guide).abs().flatten()
        num_data = data_in_words(len(self), self.provenance)
        return "\n".join(
            [
                f"Expectation: {num_data}, values {tuple(self.value.shape[1:])}, K = {self.num_particles}",
                f"  stderr    median {self.stderr.flatten().median():.2g}, at most {self.stderr.max():.2g}",
                f"  weights   move the guide's means by {moved.median():.2g} (median), at most {moved.max():.2g}",
                f"  status    {shares}",
                f"  verdict   {self.verdict}",
            ]
        )


def expectation(
    model: Model,
    guide: Guide | Guides,
    x: Data,
    fn: Callable[..., torch.Tensor],
    *args: Any,
    num_particles: int = 1000,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Expectation:
    r"""E[fn(z) | x] of every datum, by self-normalised importance sampling from the guide, or from several.

    .. math:: E[f(z) \mid x_n] \approx \frac{\sum_k w_{kn} f(z_{kn})}{\sum_k w_{kn}},
              \qquad w_{kn} = \frac{p(x_n, z_{kn})}{q(z_{kn} \mid x_n)}, \quad z_{kn} \sim q(z \mid x_n)

    What the guide does not propose is not in the mean, and its weights cannot say so. ``[guide, None]`` draws from the
    prior as well, and weighs with the density of both, as `evidence.pooled` does.

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x); several, over the same latent sites, in a sequence or a dictionary
            name -> guide, where None is the prior of the model.
        x: data ``(N, ...)``, read chunk by chunk; as in `log_marginal`.
        fn: its parameters are names of latent sites, as in ``lambda z: z**2``, whose draws it gets as
            ``(K, N, *other plates, *event)`` tensors; ``**latents`` takes all. It returns ``(K, N, ...)``. With
            ``data_plate=None`` draws are ``(K, *plates, *event)``, and it returns ``(K, ...)``. What is
            ``pyro.deterministic`` it computes from latents.
        *args: further arguments of both programs; tensors with N rows go with x.
        num_particles: K, drawn from each guide.
        data_plate: the plate that holds the data, ``"auto"`` to find it, None for one joint result.
        data_args: positions among ``args`` of those with one row per datum.
        vectorize: ``False`` runs one particle at a time.
        chunks: (data, particles) computed at once; None chooses from a memory budget.
        seed: forks the global random state; None draws from it.
        device: where to compute; None stays on the device of x.
        progress: show a bar; None shows it in a terminal.

    Returns:
        `Expectation`. Its bias is of the order of 1/K.

    Raises:
        SiteError: fn asks for what is no latent site that the guide draws. Of one that is summed out,
            `latent.attribute` has the probabilities.
        ShapeError: fn does not return ``(K, N, ...)``.
        DataTypeError: fn cannot be called with sites, or returns no real tensor.
        PlateError, SupportError, ParameterError: the pair has no weights.

    Warns:
        UnreliableEstimateWarning: some data have no trustworthy value.

    References:
        Owen (2013), Monte Carlo theory, methods and examples, eq. 9.8 for the standard error.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the prior: the weights have all to do
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> found = expectation(model, guide, torch.ones(1), lambda z: z, num_particles=10_000, seed=0)
        >>> print(f"{found.value.item():.2f} {found.under_guide.item():.2f}")  # E[z | x] = x / 2, E_q[z] = 0
        0.50 0.01
    """
    if not callable(fn):
        cure = "It comes before further arguments of the programs."
        raise DataTypeError(refuse("fn", "a function with named parameters", type(fn).__name__, cure))

    def values(tables: Tables, _: Rows) -> Values:
        wanted = _wanted(fn, tables.plan)
        return lambda batch, k, draws: _called(fn, wanted, tables.plan, batch, k, draws)

    return estimate(
        model, guide, x, args, values, num_particles, data_plate, data_args, vectorize, chunks, seed, device, progress
    )


def estimate(
    model: Model,
    guide: Guide | Guides | None,
    x: Data,
    args: Sequence[Any],
    values: Callable[[Tables, Rows], Values],
    num_particles: int,
    data_plate: DataPlate,
    data_args: DataArgs,
    vectorize: Vectorize,
    chunks: Chunks,
    seed: int | None,
    device: torch.device | str | None,
    progress: bool | None,
) -> Expectation:
    """Means over the posterior of what ``values`` makes of draws, once it knows how the pair runs."""
    num_particles = check_positive_int("num_particles", num_particles)
    chunks = check_chunks(chunks)
    source = data_source(x, tuple(args), data_args, device)
    device = device_of(source)
    program = empty_guide if guide is None else guide
    with proposing(model, program, source, data_plate, vectorize) as start:
        plan, members = start.tables.plan, start.members
        with evaluation_rng(0):
            of = values(start.tables, source)
        total = 1 if plan.exact else num_particles * max(1, len(members))
        columns = Columns(plan.model_layout.num_data(source), device)
        sizes = chunks or plan.chunk_sizes(len(source), total, device)
        job = MeansJob(plan, start.pair, start.tables, source, total, sizes, columns, members=members, values=of)
        with evaluation_rng(seed), validation(False):
            job.run(progress)
    return quoted(job.record({"seed": seed, "device": str(device)} | job.provenance()), x)


@dataclass
class MeansJob(WeightedJob):
    """A `Job` that takes the means of values, too."""

    values: Values = field(kw_only=True)
    means: list[RatioSummary] = field(default_factory=list)

    def begin(self) -> None:
        """Draws of other data are to come."""
        self.ratio = RatioAccumulator()

    def take(self, batch: Batch, index: int, log_weights: torch.Tensor, draws: Draws) -> None:
        """Take in the values of draws."""
        self.ratio.update(log_weights, self.values(batch, len(log_weights), draws), stratum=index)

    def keep(self, summary: WeightSummary) -> None:
        """Take the results of a chunk that is finished."""
        super().keep(summary)
        self.means.append(self.ratio.summary())

    def record(self, provenance: dict[str, Any]) -> Expectation:
        """All chunks in one."""
        means = {f.name: torch.cat([getattr(part, f.name) for part in self.means]) for f in fields(RatioSummary)}
        status = self.columns.status
        if self.plan.exact:  # nothing is drawn: one particle says all
            status = np.where(status == "unreliable", "exact", status)
            means["stderr"] = means["unweighted_stderr"] = torch.zeros_like(means["value"])
        return Expectation(
            value=means["value"],
            stderr=means["stderr"],
            under_guide=means["unweighted"],
            under_guide_stderr=means["unweighted_stderr"],
            ess=self.columns["ess"],
            khat=self.columns["khat"],
            status=status,
            num_particles=self.num_particles,
            provenance=provenance,
        )


def _wanted(fn: Callable[..., torch.Tensor], plan: Plan) -> list[str]:
    """The sites that fn asks for by the names of its parameters."""
    cure = "Pass a function whose parameters are names of latent sites, e.g. `lambda z: z**2`."
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError) as error:
        raise DataTypeError(refuse("fn", "a function with named parameters", repr(fn), cure)) from error
    there = [*plan.match.sampled, *plan.match.determined]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return there
    wanted = [p.name for p in parameters if p.name in there or p.default is p.empty]
    unknown = [name for name in wanted if name not in there]
    if unknown or not wanted:
        cure += " What is pyro.deterministic follows from these: compute it in the function."
        summed_out = [name for name in unknown if name in plan.match.enumerated]
        if summed_out:
            cure = f"{summed_out[0]!r} is summed out: latent.attribute(model, guide, x) has its probabilities."
        raise SiteError(refuse("fn", f"parameters among the latent sites {there}", unknown or "none", cure))
    return wanted


def _called(
    fn: Callable[..., torch.Tensor], wanted: Sequence[str], plan: Plan, batch: Batch, size: int, draws: Draws
) -> torch.Tensor:
    """The values of fn, ``(k, N, ...)``."""
    layout = plan.model_layout
    latents: Mapping[str, torch.Tensor] = {name: draws[name].per_datum(layout) for name in wanted}
    found = fn(**latents)
    if not isinstance(found, torch.Tensor) or found.is_complex():
        got = found.dtype if isinstance(found, torch.Tensor) else type(found).__name__
        raise DataTypeError(refuse("fn", "a function that returns a real tensor", got, "Return (K, N, ...) values."))
    expected = (size,) if layout.plate is None else (size, len(batch))
    if tuple(found.shape[: len(expected)]) != expected:
        cure = "Return one value, of any shape, for each draw of each datum."
        raise ShapeError(refuse("fn", f"values of shape {expected} or (*, ...)", tuple(found.shape), cure))
    return per_result(found, plan)


def per_result(values: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Values at k draws with a dimension for the results, ``(k, N, ...)``: of a joint result it is new, and one."""
    return values.unsqueeze(1) if plan.model_layout.plate is None else values
