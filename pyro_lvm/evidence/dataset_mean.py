"""The mean of log p(x) over a data set, without bias, with the error of the draws and that of the data apart."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_lvm._checks import check_chunks, check_positive_int, refuse, shown, warn_caller
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Model, Vectorize
from pyro_lvm.errors import PlateError, ShapeError, UnreliableEstimateWarning
from pyro_lvm.evidence.columns import Columns
from pyro_lvm.evidence.data import data_provenance, data_source, device_of
from pyro_lvm.evidence.job import Job, look
from pyro_lvm.evidence.mean_record import LARGE_SHARE, DatasetMean
from pyro_lvm.evidence.verdict import doubt, status_shares
from pyro_lvm.ops import STATUSES, WeightAccumulator
from pyro_lvm.ops.memory import keep_freed_memory
from pyro_lvm.ops.multilevel import HalfSums, draw_levels, jackknife, level_probability
from pyro_lvm.tracing.batch import Batch, DataArgs
from pyro_lvm.tracing.captured_weights import Tables
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.probe import Plan, empty_guide
from pyro_lvm.tracing.weights import check_data, evaluation

__all__ = ["dataset_mean"]

_KEPT = 2**22  # base log-weights that are kept together for the jackknife: 32 MiB


def dataset_mean(
    model: Model,
    guide: Guide | None,
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
) -> DatasetMean:
    r"""The mean of log p(x) over a data set without bias, by randomised multilevel Monte Carlo.

    The bias of log p-hat has one sign, so that it stays in a mean over data whose standard error shrinks with N. Each
    datum therefore adds to its log p-hat a term that stands for all doublings of K which are still to come:

    .. math:: \log p(x_n) = E\Big[ \log \hat p_{K/2}(x_n) + \frac{\Delta_L(x_n)}{P(L)} \Big], \qquad
              P(L = l) \propto 2^{-3l/2}, \; l \ge 1

    with :math:`\Delta_l = \log \hat p - \frac12 (\log \hat p' + \log \hat p'')` of :math:`2^l K / 2` fresh particles
    and of their two halves. The value is the mean of two independent replicates of this, whose difference is its error.

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x); None for a model whose latents are discrete and few.
        x: data ``(N, ...)``, or a ``Dataset`` or ``DataLoader``, read chunk by chunk.
        *args: further arguments of both programs; tensors with N rows go with x.
        num_particles: K, even: half of it is the base of each replicate. All in all a datum takes 5.4 K on average;
            one in 250 takes 64 K and more, so times vary.
        data_plate: the plate that holds the data, ``"auto"`` to find it.
        data_args: positions among ``args`` of those with one row per datum; ``"auto"`` is all with N rows.
        vectorize: ``False`` runs one particle at a time.
        chunks: (data, particles) computed at once; None chooses from a memory budget.
        seed: forks the global random state.
        device: where to compute; None stays on the device of x.
        progress: show a bar; None shows it in a terminal.

    Returns:
        `DatasetMean`. ``value`` has no bias as long as the weights are positive and have a moment above the first; its
        variance is finite for tails of index k < 0.4. From k = 0.5 on no estimator of this kind has both a finite
        variance and a finite mean cost: the verdict tells by k-hat, and by how much of the variance one datum has.

    Raises:
        PlateError: the pair has one joint result, or runs on all of its data only.
        ShapeError: ``num_particles`` is odd.
        SiteError, SupportError, ParameterError, DataTypeError: as in `log_marginal`.

    Warns:
        UnreliableEstimateWarning: there is no finite mean, its error rests on one datum, or data are unreliable.

    References:
        Goda, Ishikawa (2019), Multilevel Monte Carlo estimation of log marginal likelihood. Shi, Cornish (2021), On
        multilevel Monte Carlo unbiased gradient estimation for deep latent variable models. Rhee, Glynn (2015),
        Unbiased estimation with square root convergence for SDE models. Nowozin (2018), Debiasing evidence
        approximations, for the jackknife.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 2.0))
        >>> found = dataset_mean(model, guide, torch.zeros(5000), num_particles=100, seed=1)
        >>> print(f"{found.value:.4f} +- {found.stderr:.4f}, plain {found.plain:.4f}")  # log N(0; 0, 2) = -1.2655
        -1.2656 +- 0.0015, plain -1.2711
    """
    size = check_positive_int("num_particles", num_particles, 2)
    if size % 2:
        cure = "Half of them are the base of each of two replicates: pass one more."
        raise ShapeError(refuse("num_particles", "an even number", num_particles, cure))
    chunks = check_chunks(chunks)
    source = data_source(x, args, data_args, device)
    guide = guide or empty_guide
    device = device_of(source)
    with evaluation(model, guide), torch.no_grad():
        plan, pair = look(model, guide, source, data_plate, vectorize)
        _check_parts(plan)
        rows, at_once = chunks or plan.chunk_sizes(len(source), size, device)
        sizes = (min(rows, max(1, _KEPT // size)), at_once)
        columns = Columns(len(source), device)
        job = _MeanJob(plan, pair, Tables(plan, model, guide), source, size, sizes, columns)
        with evaluation_rng(seed), validation(False):
            job.run(progress)
    provenance = {"data": data_provenance(x), "seed": seed, "device": str(device)}
    record = job.record(provenance | job.provenance())
    if not math.isfinite(record.value) or record.largest_share > LARGE_SHARE or doubt(job.columns.status):
        warn_caller(f"dataset_mean: {record.verdict}", UnreliableEstimateWarning)
    return record


def _check_parts(plan: Plan) -> None:
    """The pair has a result for each datum, and runs on some of them.

    Raises:
        PlateError: it has not, or does not.
    """
    if plan.model_layout.plate is None:
        cure = "One joint result has no mean over data: estimate it with log_marginal."
        raise PlateError(refuse("data_plate", "a plate of independent data", "None", cure))
    if plan.tied:
        cure = (
            "Levels differ from datum to datum: use a guide with an encoder, or log_marginal and its mean_corrected, "
            "which lacks the leading bias."
        )
        got = "local parameters or a plate of fixed size, which take all data at once"
        raise PlateError(refuse("model and guide", "a pair that runs on parts of the data", got, cure))


class _Kept:
    """The base weights of some data: all of them, and what `WeightAccumulator` makes of them."""

    def __init__(self, num_data: int, num_particles: int, device: torch.device) -> None:
        self.weights = WeightAccumulator(num_data, num_particles, device)
        self.table = torch.empty(num_particles, num_data, dtype=torch.float64, device=device)
        self.seen = 0

    def update(self, log_weights: torch.Tensor, noise_scale: torch.Tensor) -> None:
        self.weights.update(log_weights, noise_scale)
        self.table[self.seen : self.seen + len(log_weights)] = log_weights
        self.seen += len(log_weights)


@dataclass
class _MeanJob(Job):
    """A `Job` that gives each datum two levels, too."""

    def run(self, progress: bool | None) -> None:
        """Go through all data."""
        keep_freed_memory()
        num_data = len(self.source)
        device = self.columns["value"].device
        self.levels = draw_levels(2, num_data).to(device)
        self.estimates, self.jackknives = (torch.empty(2, num_data, dtype=torch.float64, device=device) for _ in "ab")
        self.particles = num_data * self.num_particles + self.num_particles // 2 * int((2**self.levels).sum())
        shows = {"unit": " weights", "unit_scale": True, "disable": not shown(progress)}
        with tqdm(total=self.particles, **shows) as bar:
            for start, batch in self.slabs():
                check_data(self.plan, self.tables.model, self.tables.guide, batch, start)
                self._base(start, batch, bar)
                self._terms(start, batch, bar)
                self.digest.add(batch)

    def _base(self, start: int, batch: Batch, bar: Any) -> None:
        """K weights of each datum: the base of both replicates, and all that is biased."""
        rows = torch.arange(len(batch), device=self.levels.device)
        collector = partial(_Kept, num_particles=self.num_particles, device=rows.device)
        for at, kept in self.pieces(batch, rows, self.num_particles, collector, bar):
            self.keep(kept.weights.summary())  # pieces come in the order of the data
            halves = kept.table.unflatten(0, (2, -1)).logsumexp(1) - math.log(self.num_particles // 2)
            self.estimates[:, start + at] = halves  # (2, n)
            self.jackknives[:, start + at] = torch.stack(jackknife(kept.table))

    def _terms(self, start: int, batch: Batch, bar: Any) -> None:
        """Add the term of its level to each replicate of each datum: those of one level together."""
        size = len(batch)
        levels = self.levels[:, start : start + size].flatten()  # (2 n,)
        for level in levels.unique().tolist():
            which = (levels == level).nonzero()[:, 0]
            particles = self.num_particles // 2 * 2**level
            collector = partial(HalfSums, num_particles=particles, device=which.device)
            done = 0
            for at, halves in self.pieces(batch, which % size, particles, collector, bar):
                now = which[done : done + len(at)]
                self.estimates[now // size, start + at] += halves.difference() / level_probability(level)
                done += len(at)

    def record(self, provenance: dict[str, Any]) -> DatasetMean:
        """All of it in one record."""
        value, stderr, columns = self.columns["value"], self.columns["stderr"], self.columns
        num_data = len(value)
        estimate = self.estimates.mean(0)  # (N,)
        variances = (self.estimates[0] - self.estimates[1]).square() / 4  # (N,) of the mean of two, one degree each
        variances = variances.masked_fill(columns["status"] == STATUSES.index("zero_variance"), 0.0)  # else rounding
        # What the replicates have in common is the datum, and no noise of draws.
        first, second = self.estimates - self.estimates.mean(1, keepdim=True)
        between = (first * second).sum() / (num_data - 1) if num_data > 1 else torch.tensor(math.nan)
        plain = float(value.mean())
        return DatasetMean(
            value=float(estimate.mean()),
            stderr=float(variances.sum().sqrt() / num_data),
            data_stderr=float((between.clamp(min=0) / num_data).sqrt()),
            plain=plain,
            plain_stderr=float(stderr.square().sum().sqrt() / num_data),
            delta=plain - float(columns["bias"].mean()),
            jackknife=float(self.jackknives[0].mean()),
            jackknife_stderr=float(self.jackknives[1].square().sum().sqrt() / num_data),
            num_data=num_data,
            num_particles=self.num_particles,
            particles=self.particles,
            levels=tuple(self.levels.flatten().bincount()[1:].tolist()),
            status_shares=status_shares(self.columns.status),
            infinite_variance=float((columns["khat"] > 0.5).double().mean()),
            largest_share=float(variances.max() / variances.sum()) if bool(variances.sum() > 0) else 0.0,
            provenance=provenance,
        )
