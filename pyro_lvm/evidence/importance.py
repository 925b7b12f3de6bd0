"""Importance sampling with the guide as proposal, streamed over data and particles."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from tqdm.auto import tqdm

from pyro_lvm._checks import check_positive_int, shown, warn_caller
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Model, Vectorize
from pyro_lvm._version import __version__
from pyro_lvm.errors import UnreliableEstimateWarning
from pyro_lvm.evidence.closed_form import closed_form
from pyro_lvm.evidence.data import data_provenance, data_source, device_of
from pyro_lvm.evidence.record import LogMarginal
from pyro_lvm.ops import DOUBTFUL, WeightAccumulator, WeightSummary, status_names
from pyro_lvm.tracing.batch import DataArgs, Rows
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.probe import Plan, empty_guide, probe_pair
from pyro_lvm.tracing.weights import Proposal, check_data, evaluation, weight_table

__all__ = ["importance"]


def importance(
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
) -> LogMarginal:
    r"""log p(x) of every datum by importance sampling from the guide.

    .. math:: \log \hat p(x_n) = \log \frac1K \sum_{k=1}^K \frac{p(x_n, z_{kn})}{q(z_{kn} \mid x_n)},
              \qquad z_{kn} \sim q(z \mid x_n)

    Args:
        model: generative program p(x, z), any callable.
        guide: variational program q(z | x), any callable; None for a model with an exact ``log_prob``, or whose
            latents, if any, are discrete and few: these are summed out.
        x: data ``(N, ...)`` as a tensor or NumPy array, or a map-style ``Dataset`` or ``DataLoader``, read in order.
        *args: further arguments of both programs; tensors with N rows go with x.
        num_particles: K.
        data_plate: the plate that holds the data, ``"auto"`` to find it, None for one joint result of shape ``(1,)``.
        data_args: positions among ``args`` of those with one row per datum; ``"auto"`` is all with N rows.
        vectorize: ``False`` runs one particle at a time, for models whose Python control flow looks at latents.
        chunks: (data, particles) computed at once; None chooses from a memory budget. Draws depend on it,
            expectations do not.
        seed: forks the global random state, so that guides can be compared on common random numbers.
        device: where to compute; None stays on the device of x.
        progress: show a bar; None shows it in a terminal.

    Returns:
        `LogMarginal`, results ``(N,)`` in nats. Biased low, by about half the variance of the value. Interrupted with
        Ctrl-C it holds the data that are finished.

    Raises:
        PlateError, SiteError, SupportError, ParameterError, ShapeError, DataTypeError: what was expected, what came and
            the cure.

    Warns:
        UnreliableEstimateWarning: some data have no trustworthy value.
        UntrainedParameterWarning: a parameter was created here, with its initial value.

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders, eq. 8.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior: all weights are equal
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> result = importance(model, guide, torch.zeros(1), num_particles=100, seed=0)
        >>> print(f"{result.mean:.4f}", result.status[0])
        -1.2655 zero_variance
    """
    if guide is None and callable(getattr(model, "log_prob", None)):
        return closed_form(model, x, *args, data_plate=data_plate, data_args=data_args, device=device)
    num_particles = check_positive_int("num_particles", num_particles)
    if chunks is not None:
        chunks = (check_positive_int("chunks[0]", chunks[0]), check_positive_int("chunks[1]", chunks[1]))
    source = data_source(x, args, data_args, device)
    guide = guide or empty_guide
    devices = [device_of(source)]
    with evaluation(model, guide), torch.no_grad():
        with evaluation_rng(0, devices):
            plan = probe_pair(model, guide, source, data_plate, vectorize)
        num_particles = 1 if plan.exact else num_particles
        sizes = chunks or plan.chunk_sizes(len(source), num_particles, devices[0])
        job = _Job(plan, model, guide, source, num_particles, sizes)
        with evaluation_rng(seed, devices), validation(False):
            summaries = job.run(progress)
    record = _record(job, summaries, {"data": data_provenance(x), "seed": seed, "device": str(devices[0])})
    _warn(record)
    return record


@dataclass
class _Job:
    """One estimate under way: the data in chunks, and for each the particles in chunks."""

    plan: Plan
    model: Model
    guide: Guide
    source: Rows
    num_particles: int
    chunks: tuple[int, int]
    dtype: torch.dtype | None = None

    def run(self, progress: bool | None) -> list[WeightSummary]:
        """Summaries of the chunks of data, of those that are finished when Ctrl-C comes."""
        num_data = len(self.source)
        summaries: list[WeightSummary] = []
        done = 0
        with tqdm(
            total=num_data * self.num_particles, unit=" weights", unit_scale=True, disable=not shown(progress)
        ) as bar:
            try:
                while done < num_data:
                    rows = num_data if self.plan.tied else min(self.chunks[0], num_data - done)
                    try:
                        summaries.append(self._chunk(slice(done, done + rows), bar))
                    except (RuntimeError, MemoryError) as error:
                        self._shrink(error)
                        continue
                    done += rows
            except KeyboardInterrupt:
                if not summaries:
                    raise
        return summaries

    def _chunk(self, rows: slice, bar: Any) -> WeightSummary:
        """All particles of some data."""
        batch = self.source.rows(rows)
        check_data(self.plan, self.model, self.guide, batch, rows.start)
        proposal = Proposal(self.plan, self.guide, batch)
        weights = WeightAccumulator(self.plan.model_layout.num_data(batch), self.num_particles, batch.args[0].device)
        left = self.num_particles
        while left:
            now = min(self.chunks[1], left)
            table = weight_table(self.plan, self.model, proposal, now)
            weights.update(table.total, table.magnitude)
            self.dtype = table.total.dtype
            left -= now
            bar.update(now * len(batch))
        return weights.summary()

    def _shrink(self, error: Exception) -> None:
        """Halve what is computed at once after running out of memory; any other error passes."""
        words = ("out of memory", "can't allocate memory", "not enough memory")
        data, particles = self.chunks
        if not (isinstance(error, MemoryError) or any(word in str(error) for word in words)) or data * particles == 1:
            raise error
        self.chunks = (data, particles // 2) if particles > 1 else (data // 2, 1)


def _record(job: _Job, summaries: list[WeightSummary], provenance: dict[str, Any]) -> LogMarginal:
    plan = job.plan

    def column(name: str) -> torch.Tensor:
        return torch.cat([getattr(summary, name) for summary in summaries])

    value, status, method = column("value"), np.array(status_names(column("status"))), "importance sampling"
    stderr, bias, elbo_stderr = column("stderr"), column("bias"), column("elbo_stderr")
    if plan.exact:
        method = "enumeration" if plan.match.enumerated else "exact density"
        status = np.where(status == "unreliable", "exact", status)  # K = 1 says nothing of a sum that has no noise
        stderr = bias = elbo_stderr = torch.zeros_like(value)
    expected = 1 if plan.model_layout.plate is None else len(job.source)
    provenance |= {
        "model": _name(job.model),
        "guide": _name(job.guide),
        "num_data": len(job.source),
        "finished": len(value) == expected,
        "dtype": str(job.dtype),
        "data_plate": plan.model_layout.plate,
        "chunks": job.chunks,
        "particles": {"model": plan.model_mode, "guide": plan.guide_mode},
        "streamed": "particles" if plan.tied else "data and particles",
        "enumerated": plan.match.enumerated,
        "versions": {"pyro_lvm": __version__, "pyro": pyro.__version__, "torch": torch.__version__},
    }
    return LogMarginal(
        value=value,
        stderr=stderr,
        bias=bias,
        elbo=column("elbo"),
        elbo_stderr=elbo_stderr,
        ess=column("ess"),
        khat=column("khat"),
        status=status,
        num_particles=job.num_particles,
        method=method,
        provenance=provenance,
    )


def _name(program: Any) -> str:
    return str(getattr(program, "__qualname__", type(program).__name__))


def _warn(record: LogMarginal) -> None:
    counts = {word: int((record.status == word).sum()) for word in DOUBTFUL}
    if any(counts.values()):
        words = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        message = f"of {len(record)} data: {words}. See LogMarginal.status and .khat; {record.verdict}"
        warn_caller(message, UnreliableEstimateWarning)
