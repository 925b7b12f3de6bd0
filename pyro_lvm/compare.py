"""Several model/guide pairs side by side on the same data and the same random numbers."""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_lvm._checks import refuse
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Model, Vectorize
from pyro_lvm.errors import DataTypeError, ShapeError, UnreliableEstimateWarning
from pyro_lvm.evidence import LogMarginal, importance
from pyro_lvm.evidence.data import data_source
from pyro_lvm.evidence.record import to_arviz
from pyro_lvm.table import TextTable
from pyro_lvm.tracing.batch import DataArgs, Rows
from pyro_lvm.tracing.questions import count_parameters, same_model

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.figure import Figure

__all__ = ["Comparison", "ComparisonRow", "compare"]

Pair = tuple[Model, Guide | None]


@dataclass(frozen=True, eq=False)
class ComparisonRow:
    """One pair, or one kind of pair trained several times; all numbers in nats per datum.

    Attributes:
        name: of the row.
        runs: one `LogMarginal` for each training run.
        num_parameters: of model and guide together, 0 where it is not known.
        seconds: time of the estimates.
        peak_memory: bytes that the estimates took on a CUDA device, else None.
    """

    name: str
    runs: tuple[LogMarginal, ...]
    num_parameters: int
    seconds: float
    peak_memory: int | None

    def mean_over_runs(self, column: str) -> torch.Tensor:
        """A column of the record, averaged over training runs: ``(N,)``."""
        return torch.stack([getattr(run, column) for run in self.runs]).mean(0)

    @property
    def elbo(self) -> float:
        """Mean ELBO."""
        return float(self.mean_over_runs("elbo").mean())

    @property
    def log_marginal(self) -> float:
        """Mean of log p-hat(x)."""
        return float(self.mean_over_runs("value").mean())

    @property
    def stderr(self) -> float:
        """Monte Carlo standard error of `log_marginal`."""
        return math.sqrt(sum(run.mean_stderr**2 for run in self.runs)) / len(self.runs)

    @property
    def bias(self) -> float:
        """Estimated bias of `log_marginal`."""
        return sum(run.mean_bias for run in self.runs) / len(self.runs)

    @property
    def spread(self) -> float:
        """Standard deviation of `log_marginal` between training runs; NaN for one run."""
        means = torch.tensor([run.mean for run in self.runs])
        return float(means.std()) if len(means) > 1 else math.nan

    def status_shares(self) -> dict[str, float]:
        """Share of the data in each status, averaged over training runs."""
        total: dict[str, float] = {}
        for run in self.runs:
            for word, share in run.status_shares().items():
                total[word] = total.get(word, 0.0) + share / len(self.runs)
        return total


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Pairs from the best to the worst.

    Attributes:
        rows: `ComparisonRow` in their rank.
        ranked_by: ``"elbo"`` where all rows share one model, so that log p(x) cancels in every difference, which is
            then a difference of KL(q || p(z | x)); ``"value"`` (log p-hat) across models.
        reference: shared exact or better log p(x) that gaps are measured from, or None.
        notes: what the numbers cover and what they do not.
    """

    rows: tuple[ComparisonRow, ...]
    ranked_by: str
    reference: LogMarginal | None
    notes: tuple[str, ...]

    def difference(self, name: str) -> tuple[float, float]:
        """Score of row ``name`` less that of the first row, paired over data, with its standard error over data."""
        row = next(row for row in self.rows if row.name == name)
        paired = row.mean_over_runs(self.ranked_by) - self.rows[0].mean_over_runs(self.ranked_by)  # (N,)
        error = float(paired.std()) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
        return float(paired.mean()), error

    def gap(self, name: str) -> float:
        """Mean log p(x) - ELBO of row ``name``, from the reference if there is one, else from its own log p-hat."""
        row = next(row for row in self.rows if row.name == name)
        top = row.log_marginal if self.reference is None else self.reference.mean
        return top - row.elbo

    @property
    def table(self) -> TextTable:
        """The table as words."""
        seeds = any(len(row.runs) > 1 for row in self.rows)
        memory = any(row.peak_memory for row in self.rows)
        score = "ELBO" if self.ranked_by == "elbo" else "log p"
        header = ["pair", "ELBO", "log p-hat", f"{score} - best", "gap", "ESS/K", "status", "parameters", "seconds"]
        header += ["seeds", "between seeds"] * seeds + ["peak MB"] * memory
        return TextTable(tuple(header), tuple(self._cells(row, seeds, memory) for row in self.rows), self.notes)

    def _cells(self, row: ComparisonRow, seeds: bool, memory: bool) -> tuple[str, ...]:
        difference, error = self.difference(row.name)
        ess = torch.cat([run.ess / run.num_particles for run in row.runs]).median()
        exact = row.stderr == 0
        hidden = not exact and not abs(row.bias) <= 0.25 * row.stderr  # a +- would hide the bias
        quoted = "" if exact else f" (bias {row.bias:.1g})" if hidden else f" +- {row.stderr:.1g}"
        cells = [
            row.name,
            f"{row.elbo:.3f}",
            f"{row.log_marginal:.3f}{quoted}",
            "" if row is self.rows[0] else f"{difference:.3f} +- {error:.2g}",
            f"{round(self.gap(row.name), 3) + 0.0:.3f}",  # no minus zero
            f"{float(ess):.2f}",
            ", ".join(f"{word} {share:.0%}" for word, share in row.status_shares().items()),
            f"{row.num_parameters:,}" if row.num_parameters else "",
            f"{row.seconds:.1f}",
        ]
        cells += [str(len(row.runs)), f"{row.spread:.2g}"] * seeds
        return tuple(cells + [f"{(row.peak_memory or 0) / 2**20:.0f}"] * memory)

    def __str__(self) -> str:
        return str(self.table)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table.to_html()

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return self.table.to_markdown()

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page."""
        style = (
            "body{font-family:sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:right}"
            "td:first-child,th:first-child{text-align:left}"
        )
        page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title><style>{style}</style>'
        Path(path).write_text(f"{page}<body>{self.table.to_html()}</body></html>", encoding="utf-8")

    def to_pandas(self) -> "pandas.DataFrame":
        """Numbers, one row a pair, in their rank."""
        import pandas as pd

        records = []
        for row in self.rows:
            difference, error = self.difference(row.name)
            record = {"elbo": row.elbo, "log_marginal": row.log_marginal, "stderr": row.stderr, "bias": row.bias}
            record |= {"difference": difference, "difference_stderr": error, "gap": self.gap(row.name)}
            record |= {"num_runs": len(row.runs), "spread": row.spread, "num_parameters": row.num_parameters}
            record |= {"seconds": row.seconds, **{f"share_{w}": s for w, s in row.status_shares().items()}}
            records.append(record)
        frame = pd.DataFrame(records, index=pd.Index([row.name for row in self.rows], name="pair"))
        shares = [column for column in frame.columns if column.startswith("share_")]
        return frame.fillna(dict.fromkeys(shares, 0.0))

    def to_datatree(self) -> "xarray.DataTree":
        """One group a row, each a `LogMarginal` (of its first training run) as `LogMarginal.to_datatree` gives it."""
        import xarray as xr

        groups = {f"/{row.name}": row.runs[0].to_datatree()["importance"].to_dataset() for row in self.rows}
        return xr.DataTree.from_dict(groups)

    def to_arviz(self) -> Any:
        """The same in ArviZ's own container."""
        return to_arviz(self.to_datatree())

    def plot(self) -> "Figure":
        """ELBO and log p-hat of each row with the paired error of its score, beside the shares of each status."""
        from pyro_lvm.plots import comparison

        return comparison(self)


def compare(
    rows: Mapping[str, Pair | Sequence[Pair] | LogMarginal],
    x: Data,
    *args: Any,
    reference: LogMarginal | None = None,
    seed: int = 0,
    num_particles: int = 1000,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Measure several pairs on the same data with the same seed, and rank them.

    Args:
        rows: name -> ``(model, guide)``; ``(model, None)`` for a model with an exact ``log_prob``; a list of pairs for
            several training runs of one kind; or a `LogMarginal` that is already there.
        x: data ``(N, ...)``, or a ``Dataset`` or ``DataLoader``.
        *args: further arguments of all programs.
        reference: exact log p(x) of the shared model, that gaps are measured from.
        seed: common random numbers of all rows.
        num_particles: K of every row.
        data_plate: see `log_marginal`, as are the options below.
        data_args: positions of the arguments with one row per datum.
        vectorize: ``False`` for Python control flow on latents.
        chunks: (data, particles) at once.
        device: where to compute.
        progress: show a bar a row.

    Returns:
        `Comparison`; its ``str`` is the table. Differences are paired over data, so their errors cover the data and
        the draws, not the training: a claim about families of guides needs several training runs of each.

    Raises:
        DataTypeError: a row is none of the kinds above.
        ShapeError: no row, or rows and reference with different numbers of data.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def exact(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> def wide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> result = compare({"wide": (model, wide), "exact": (model, exact)}, torch.linspace(-1, 1, 20))
        >>> [row.name for row in result.rows], result.ranked_by
        (['exact', 'wide'], 'elbo')
    """
    if not rows:
        raise ShapeError(refuse("rows", "at least one pair", "none", 'Pass {"name": (model, guide)}.'))
    source = data_source(x, args, data_args, device)
    kinds = {name: _pairs(name, row) for name, row in rows.items()}
    options: dict[str, Any] = {"num_particles": num_particles, "data_plate": data_plate, "data_args": data_args}
    options |= {"vectorize": vectorize, "chunks": chunks, "seed": seed, "device": device, "progress": progress}
    measured = []
    for name, kind in kinds.items():
        try:
            measured.append(_measure(name, kind, source, x, args, options))
        except Exception as error:
            error.add_note(f"in row {name!r} of compare()")
            raise
    _check_lengths(measured, reference)
    pairs = [pair for kind in kinds.values() if not isinstance(kind, LogMarginal) for pair in kind]
    shared = len(pairs) == sum(len(row.runs) for row in measured) and all(
        same_model(pairs[0], pair, source) for pair in pairs[1:]
    )
    ranked_by = "elbo" if shared else "value"
    ranked = sorted(measured, key=lambda row: -float(row.mean_over_runs(ranked_by).mean()))
    return Comparison(tuple(ranked), ranked_by, reference, _notes(ranked, shared, reference))


def _pairs(name: str, row: Any) -> list[Pair] | LogMarginal:
    if isinstance(row, LogMarginal):
        return row
    pairs = [row] if isinstance(row, tuple) else row
    if isinstance(pairs, list) and pairs and all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        return pairs
    cure = "Pass (model, guide), a list of such pairs, (model, None) or a LogMarginal."
    raise DataTypeError(refuse(f"rows[{name!r}]", "a pair", repr(row), cure))


def _measure(
    name: str, kind: list[Pair] | LogMarginal, source: Rows, x: Data, args: tuple[Any, ...], options: dict[str, Any]
) -> ComparisonRow:
    if isinstance(kind, LogMarginal):
        return ComparisonRow(name, (kind,), 0, 0.0, None)
    cuda = source.rows(slice(0, 1)).args[0].device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # the table and its notes say it of every row
        runs = tuple(importance(model, guide, x, *args, **options) for model, guide in kind)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return ComparisonRow(name, runs, count_parameters(*kind[0], source), seconds, peak)


def _check_lengths(rows: Sequence[ComparisonRow], reference: LogMarginal | None) -> None:
    lengths = {row.name: len(run) for row in rows for run in row.runs}
    lengths |= {} if reference is None else {"reference": len(reference)}
    if len(set(lengths.values())) > 1:
        cure = "Estimate every row on the same x; differences are paired datum by datum."
        raise ShapeError(refuse("rows", "one number of data", lengths, cure))


def _notes(rows: Sequence[ComparisonRow], shared: bool, reference: LogMarginal | None) -> tuple[str, ...]:
    first = rows[0].runs[0]
    notes = [
        f"{len(first)} data, K = {first.num_particles}; nats per datum, higher is better. +- is one standard error: of "
        "log p-hat over the draws, of differences (paired) over data and draws.",
    ]
    if all(len(row.runs) == 1 for row in rows):
        notes.append(
            "The errors do not cover training: one run of each pair was measured, and another seed may rank jointly "
            "trained pairs otherwise."
        )
    if shared:
        notes.append("All rows share one model: a difference of ELBOs is minus the difference of KL(q || p(z|x)).")
    elif len(rows) > 1:
        notes.append("The rows do not share one model: they are ranked by log p-hat, and gaps are not comparable.")
    if reference is None:
        notes.append("gap = log p-hat - ELBO from each row's own log p-hat, which is too small where a guide is bad.")
    else:
        notes.append(f"gap = reference - ELBO; the reference is {reference.method}, mean {reference.mean:.3f}.")
    enumerated = {tuple(run.provenance.get("enumerated", ())) for row in rows for run in row.runs}
    if len(enumerated) > 1:
        notes.append(f"The rows enumerate different sites {sorted(enumerated)}: their ELBOs are different bounds.")
    for row in rows:
        doubt = {w: s for w, s in row.status_shares().items() if w in ("unreliable", "no_support", "nonfinite")}
        if doubt:
            words = ", ".join(f"{word} for {share:.1%}" for word, share in doubt.items())
            notes.append(f"{row.name}: log p-hat is {words} of the data; it is likely too low there.")
    return tuple(notes)
