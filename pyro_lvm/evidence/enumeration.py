"""The sum over every value of finite latents: exact, and the judge of every other estimator."""

import math
import time
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_lvm._checks import check_chunks, check_positive_int, shown
from pyro_lvm._interrupts import kept_if
from pyro_lvm._typing import Chunks, Data, DataPlate, Model
from pyro_lvm.errors import SupportError
from pyro_lvm.evidence.data import data_provenance, data_source, device_of
from pyro_lvm.evidence.record import LogMarginal, exact_record
from pyro_lvm.tracing.batch import Batch, DataArgs
from pyro_lvm.tracing.digest import DataDigest, parameter_digest
from pyro_lvm.tracing.grid import Grid, finite_grid
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.probe import PROBE_ROWS, Plan, probe_pair
from pyro_lvm.tracing.proposals import uniform_guide
from pyro_lvm.tracing.sites import check_free
from pyro_lvm.tracing.weights import check_data, evaluation

__all__ = ["enumeration"]


def enumeration(
    model: Model,
    x: Data,
    *args: Any,
    max_terms: int = 2**20,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    chunks: Chunks = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LogMarginal:
    r"""log p(x) of every datum by summing over all values of its latents; exact.

    .. math:: \log p(x_n) = \log \sum_{z \in Z} p(x_n, z)

    Scalar latents are summed out by variable elimination, each plate on its own. A vector latent (declared with
    ``to_event``) of d elements with C values has C^d terms; they are streamed, and shared by all data.

    Args:
        model: generative program p(x, z) with Bernoulli or categorical latents.
        x: data ``(N, ...)``, or a ``Dataset`` or ``DataLoader``.
        *args: further arguments of the model; tensors with N rows go with x.
        max_terms: refuse more terms than these.
        data_plate: the plate that holds the data, ``"auto"`` to find it, None for one joint result.
        data_args: positions among ``args`` of those with one row per datum.
        chunks: (data, terms) computed at once; None chooses from a memory budget.
        device: where to compute; None stays on the device of x.
        progress: show a bar; None shows it in a terminal.

    Returns:
        `LogMarginal` in nats with status ``exact``; ``num_particles`` is the number of terms. Interrupted with
        Ctrl-C it holds the data that are finished.

    Raises:
        SupportError: a latent has no finite support, or there are more than ``max_terms`` terms; the message says how
            many and how long they would take.
        SiteError: something depends on a missing value (``obs_mask``), which the model draws itself.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)
        >>> result = enumeration(model, torch.zeros(1))
        >>> result.num_particles, f"{result.mean:.4f}"
        (8, '-1.8238')
    """
    max_terms, chunks = check_positive_int("max_terms", max_terms), check_chunks(chunks)
    source = data_source(x, args, data_args, device)
    guide = uniform_guide(model, lambda fn: not fn.has_enumerate_support)
    values: list[torch.Tensor] = []
    digest = DataDigest()
    with evaluation(model, guide), torch.no_grad(), evaluation_rng(0):
        plan = probe_pair(model, guide, source, data_plate)
        with validation(False):
            few = source.rows(slice(0, len(source) if plan.tied else min(len(source), PROBE_ROWS)))
            check_free(model, few.args, plan.match)
            parameters = parameter_digest(model, guide, few)
            grid = finite_grid(plan, model, guide, few)
            sizes = chunks or plan.chunk_sizes(len(source), grid.size, device_of(source))
            step = len(source) if plan.tied else sizes[0]
            _check_terms(plan, model, grid, source.rows(slice(0, step)), max_terms, len(source), sizes[1])
            bar = tqdm(total=grid.size * len(source), unit=" terms", unit_scale=True, disable=not shown(progress))
            with bar, kept_if(lambda: values):
                for start in range(0, len(source), step):
                    batch = source.rows(slice(start, min(start + step, len(source))))
                    check_data(plan, model, guide, batch, start)
                    found = _sum(plan, model, grid, batch, sizes[1], bar)
                    digest.add(batch)
                    values.append(found)
    value = torch.cat(values)
    provenance = {
        "data": data_provenance(x),
        "num_data": len(source),
        "finished": len(value) == plan.model_layout.num_data(source),
        "sha256": {"parameters": parameters, "data": digest.hexdigest()},
        "data_plate": plan.model_layout.plate,
        "chunks": sizes,
        "terms": grid.size,
    }
    return exact_record(value, "enumeration", grid.size, provenance)


def _sum(plan: Plan, model: Model, grid: Grid, batch: Batch, terms: int, bar: Any) -> torch.Tensor:
    """log of the sum over the grid of p(x, z), ``(N,)`` float64."""
    shape, device = (plan.model_layout.num_data(batch),), batch.args[0].device
    total = torch.full(shape, -math.inf, dtype=torch.float64, device=device)
    for start in range(0, grid.size, terms):
        stop = min(start + terms, grid.size)
        table = grid.log_joint(plan, model, batch, start, stop).double()  # (k, N)
        total = torch.logaddexp(total, table.logsumexp(0))
        bar.update((stop - start) * len(batch))
    return total


def _check_terms(plan: Plan, model: Model, grid: Grid, batch: Batch, max_terms: int, num_data: int, terms: int) -> None:
    if grid.size <= max_terms:
        return
    trial = min(terms, 256)
    grid.log_joint(plan, model, batch, 0, trial)  # the first run pays for what is done once
    began = time.perf_counter()
    grid.log_joint(plan, model, batch, 0, trial)
    seconds = (time.perf_counter() - began) * (grid.size / trial) * (num_data / len(batch))
    raise SupportError(
        f"latent sites {list(plan.match.sampled)}: expected at most max_terms={max_terms:,} joint values, got "
        f"{grid.size:,}, which would take about {seconds:,.0f} s. Pass max_terms={grid.size} to sum them all, or "
        "estimate log p(x) with a guide."
    )
