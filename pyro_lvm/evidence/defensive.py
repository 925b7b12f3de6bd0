"""The way to a log p(x) that can be quoted: guide and prior pooled, and what is in doubt annealed from both."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from pyro_lvm._checks import check_positive_int, check_program, refuse
from pyro_lvm._interrupts import kept_if
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Guides, Model, Vectorize
from pyro_lvm.errors import DataTypeError, PlateError, SiteError, SupportError
from pyro_lvm.evidence.annealed import run_annealed
from pyro_lvm.evidence.data import data_source, device_of
from pyro_lvm.evidence.pooled import pool
from pyro_lvm.evidence.record import LogMarginal
from pyro_lvm.evidence.several import named
from pyro_lvm.evidence.verdict import quoted
from pyro_lvm.ops import DOUBTFUL, STATUSES
from pyro_lvm.tracing.batch import DataArgs, Rows, Selected

__all__ = ["defensive"]

_IN_DOUBT = ("heavy_tail", *DOUBTFUL)  # of the former the value is usable, and the stated error too small


def defensive(
    model: Model,
    guide: Guide | Guides,
    x: Data,
    *args: Any,
    num_particles: int = 1000,
    num_chains: int = 100,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    resume: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LogMarginal:
    r"""log p(x) of every datum from guide and prior together, by annealing where importance sampling will not do.

    First `pooled` with the guide and the prior: the prior sees modes that the guide misses, as long as there are few
    dimensions, and bounds the weights. Then `annealed` from both for the data whose value or stated error is in doubt
    (``heavy_tail``, ``unreliable``, ``no_support``, ``nonfinite``), which costs some hundred times as much for each of
    them. The others are pooled anew: a datum looks well where no large weight was drawn, so that the values which led
    to this choice are too low in the mean of those that it keeps. What all of this is worth is measured: see the page
    on the proving ground.

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x); several, as in `pooled`, are taken as they are: put None among them for the
            prior.
        x: data ``(N, ...)``, read chunk by chunk; as in `log_marginal`.
        *args: further arguments of both programs; tensors with N rows go with x.
        num_particles: K of each guide and of the prior.
        num_chains: K of the annealing.
        data_plate: the plate that holds the data, ``"auto"`` to find it, None for one joint result of shape ``(1,)``.
        data_args: positions among ``args`` of those with one row per datum.
        vectorize: ``False`` runs one particle at a time.
        chunks: (data, particles) computed at once; None chooses from a memory budget.
        resume: a directory that keeps what is annealed, from which the same call goes on; as in `log_marginal`, with a
            seed, which draws anew what was pooled.
        seed: forks the global random state; None draws from it. The second pool takes the next one, annealing the one
            after that.
        device: where to compute; None stays on the device of x.
        progress: show bars; None shows them in a terminal.

    Returns:
        `LogMarginal`, results ``(N,)`` in nats. Biased low, by about half the variance of the value. ``particles`` is
        the number of chains where a datum was annealed, and that of all draws elsewhere. So is ``elbo`` the bound of
        the annealing there, and that of the mixture of guide and prior elsewhere. ``provenance["annealing"]``
        has ``num_data``, or says under ``refused`` why there was none, as with discrete latents that the guide draws.
        Interrupted with Ctrl-C it says so, and holds the data that were pooled first: of those that were not reached
        again, the doubtful are not annealed, and the mean of the others is a little low.

    Raises:
        SupportError, SiteError: the prior has no density at given draws: pass guides of your own in a list.
        PlateError, ParameterError, ShapeError, DataTypeError: as in `pooled`.
        CheckpointError: ``resume`` belongs to another call, or its files are damaged.

    Warns:
        UnreliableEstimateWarning: some data have no trustworthy value.

    References:
        Hesterberg (1995), Weighted average importance sampling and defensive mixture distributions; Owen & Zhou (2000),
        Safe and effective importance sampling, sec. 2.2; Neal (2001), Annealed importance sampling.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_lvm.evidence import importance, quadrature
        >>> def model(x):  # x is z^2 with noise: two modes
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 2.0))
        ...         pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)
        >>> def guide(x):  # on one of them
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(1.97, 0.2))
        >>> x = torch.tensor([4.0])
        >>> result = defensive(model, guide, x, num_particles=10_000, seed=0)
        >>> alone, exact = importance(model, guide, x, seed=0), quadrature(model, x)
        >>> print(f"{alone.mean - exact.mean:.1f}", abs(result.mean - exact.mean) < 3 * result.mean_stderr)
        -0.7 True
    """
    num_chains = check_positive_int("num_chains", num_chains)
    if resume is not None and seed is None:
        cure = "Pass e.g. seed=0: the same draws choose the same data."
        raise DataTypeError(refuse("seed", "an integer beside resume=", None, cure))
    if not isinstance(guide, Sequence | Mapping):
        check_program("guide", guide)
        guide = {"guide": guide, "prior": None}
    source, guides = data_source(x, args, data_args, device), named(guide)
    pairs = {name: (model, each) for name, each in guides.items()}
    settings: dict[str, Any] = {"data_plate": data_plate, "vectorize": vectorize, "chunks": chunks}
    settings |= {"progress": progress}
    record = pool(pairs, source, num_particles, seed=seed, **settings)
    record = replace(record, method=f"defensive {record.method}")
    if not record.provenance["finished"]:
        return quoted(record, x)
    doubtful, finished = np.isin(record.status, _IN_DOUBT), False
    tied = record.provenance["streamed"] == "particles"  # all data or none
    with kept_if(lambda: True):  # what was pooled first
        if doubtful.any():
            chosen = _Chosen(source, doubtful, tied)
            once = settings | {"resume": resume, "seed": _after(seed, 2)}
            record = _annealed(record, chosen, model, guides, num_chains, **once)
        finished = record.provenance["finished"]
        if finished and not doubtful.all():
            finished, chosen = False, _Chosen(source, ~doubtful, tied)
            again = pool(pairs, chosen.rows, num_particles, seed=_after(seed, 1), **settings)
            record, finished = chosen.put(record, again), again.provenance["finished"]
    return quoted(replace(record, provenance=record.provenance | {"finished": finished}), x)


def _annealed(
    record: LogMarginal, chosen: "_Chosen", model: Model, guides: Guides, num_chains: int, **settings: Any
) -> LogMarginal:
    """The record with some of its data annealed, or with the reason why they are not."""
    try:
        chains = run_annealed(model, guides, chosen.rows, num_chains, None, 3, **settings)
    except (PlateError, SiteError, SupportError) as error:  # as of discrete latents; what is there is not lost
        refused = {"annealing": {"num_data": 0, "refused": str(error)}}
        return replace(record, provenance=record.provenance | refused)
    done = min(len(chains), len(chosen.at))
    about = {"annealing": chains.provenance["annealing"] | {"num_data": done}}
    about["finished"] = chains.provenance["finished"]
    method = f"{record.method}, {done} data annealed"
    return replace(chosen.put(record, chains), method=method, provenance=record.provenance | about)


def _after(seed: int | None, steps: int) -> int | None:
    return None if seed is None else (seed + steps) % 2**32


class _Chosen:
    """Some of the data, or all where they cannot be had apart, whose results alone count."""

    def __init__(self, source: Rows, chosen: np.ndarray, tied: bool) -> None:
        self.at = torch.from_numpy(chosen.nonzero()[0]).to(device_of(source))
        self.rows, self.tied = source if tied else Selected(source, self.at), tied

    def put(self, record: LogMarginal, other: LogMarginal) -> LogMarginal:
        """The record with the results that another one has of these data, as far as it went."""
        at = self.at[: len(other)]
        rows = at if self.tied else torch.arange(len(at), device=at.device)
        columns: dict[str, Any] = {}
        for name in (f.name for f in fields(record) if f.type is torch.Tensor):
            columns[name] = getattr(record, name).clone()
            columns[name][at] = getattr(other, name)[rows]
        status = record.status.astype(f"<U{max(map(len, STATUSES))}")
        status[at.cpu().numpy()] = other.status[rows.cpu().numpy()]
        return replace(record, **columns, status=status)
