"""`Comparison`: several pairs measured on the same data, as a table, a page, a picture or numbers."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pyro_lvm._files import read_json, write_json
from pyro_lvm.evidence import LogMarginal
from pyro_lvm.evidence.record import to_arviz
from pyro_lvm.table import TextTable

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.figure import Figure

__all__ = ["Comparison", "ComparisonRow"]


@dataclass(frozen=True, eq=False)
class ComparisonRow:
    """One pair, or one kind of pair trained several times; all numbers in nats per datum, or of one joint result.

    Attributes:
        name: of the row.
        runs: one `LogMarginal` for each training run.
        num_parameters: of model and guide together, 0 where it is not known.
        seconds: time of the estimates, without training.
        peak_memory: bytes that the estimates took on a CUDA device at most, beside what was there; else None.
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
        """Monte Carlo standard error of `log_marginal`: that of one run, for all runs have the same seed."""
        return sum(run.mean_stderr for run in self.runs) / len(self.runs)

    @property
    def bias(self) -> float:
        """Estimated bias of `log_marginal`."""
        return sum(run.mean_bias for run in self.runs) / len(self.runs)

    @property
    def quoted(self) -> str:
        """`log_marginal` as it may be written: with its error, with its bias where a +- would hide that, or alone."""
        if self.stderr == 0:
            return f"{self.log_marginal:.3f}"
        hidden = not abs(self.bias) <= 0.25 * self.stderr
        return f"{self.log_marginal:.3f} " + (f"(bias {self.bias:.1g})" if hidden else f"+- {self.stderr:.1g}")

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
        reference: shared log p(x) that gaps are measured from: given, of an exact row, or of all guides pooled; else
            None.
        notes: what the numbers cover and what they do not.
    """

    rows: tuple[ComparisonRow, ...]
    ranked_by: str
    reference: LogMarginal | None
    notes: tuple[str, ...]

    def difference(self, name: str) -> tuple[float, float]:
        """Score of row ``name`` less that of the first row, paired over data, with its standard error over data.

        The error of one datum or one joint result is that over the draws, as if those of the two rows were
        independent; NaN where the score is an ELBO of one draw.
        """
        row = next(row for row in self.rows if row.name == name)
        paired = row.mean_over_runs(self.ranked_by) - self.rows[0].mean_over_runs(self.ranked_by)  # (N,)
        if len(paired) > 1:
            return float(paired.mean()), float(paired.std()) / math.sqrt(len(paired))
        column = {"elbo": "elbo_stderr", "value": "stderr"}[self.ranked_by]
        errors = [float(each.mean_over_runs(column)) for each in (row, self.rows[0])]
        return float(paired), 0.0 if row is self.rows[0] else math.hypot(*errors)

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
        header = [
            "pair",
            "ELBO",
            "log p-hat",
            f"{score} - best",
            "gap",
            "K",
            "ESS/K",
            "status",
            "parameters",
            "seconds",
        ]
        header += ["runs", "sd of log p-hat"] * seeds + ["peak MB"] * memory
        return TextTable(tuple(header), tuple(self._cells(row, seeds, memory) for row in self.rows), self.notes)

    def _cells(self, row: ComparisonRow, seeds: bool, memory: bool) -> tuple[str, ...]:
        difference, error = self.difference(row.name)
        ess = torch.cat([run.efficiency for run in row.runs]).median()
        drawn = set(row.status_shares()) != {"exact"}
        particles = sorted({run.particles_in_words for run in row.runs}, key=lambda k: (len(k), k))
        cells = [
            row.name,
            f"{row.elbo:.3f}",
            row.quoted,
            "" if row is self.rows[0] else f"{difference:.3f}" + (f" +- {error:.2g}" if error > 0 else ""),
            f"{round(self.gap(row.name), 3) + 0.0:.3f}",  # no minus zero
            "/".join(particles) if drawn else "-",
            f"{float(ess):.2f}" if drawn else "-",
            ", ".join(f"{word} {share:.0%}" for word, share in row.status_shares().items()),
            f"{row.num_parameters:,}" if row.num_parameters else "",
            f"{row.seconds:.1f}",
        ]
        cells += [str(len(row.runs)), "" if math.isnan(row.spread) else f"{row.spread:.2g}"] * seeds
        return tuple(cells + [f"{(row.peak_memory or 0) / 2**20:.0f}"] * memory)

    def __str__(self) -> str:
        return str(self.table)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table.to_html()

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return self.table.to_markdown()

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page with what may be quoted, the table, the pictures, and where each number comes from.

        The page is one file without script or links to a network; over what was there, whole or not at all.

        Args:
            path: of the file.

        Raises:
            DataTypeError: ``path`` is no path.
            CheckpointError: no file can be written there, e.g. for there is no such folder.

        Example:
            >>> import pathlib, tempfile, torch, pyro_lvm as lvm
            >>> result = lvm.compare({"exact": (lvm.models.LinearGaussian(1, 2), None)}, torch.ones(5, 2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     result.to_html(f"{folder}/page.html")
            ...     pathlib.Path(folder, "page.html").read_text(encoding="utf-8").count("<svg")
            4
        """
        from pyro_lvm.report import write_page

        write_page(path, self)

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the comparison with the records of all runs as a JSON file, over what was there."""
        rows = [vars(row) | {"runs": [run.to_dict() for run in row.runs]} for row in self.rows]
        reference = None if self.reference is None else self.reference.to_dict()
        content = {"rows": rows, "ranked_by": self.ranked_by, "reference": reference, "notes": self.notes}
        write_json(path, "Comparison", content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Comparison":
        """Read what `save` wrote; tensors are on the CPU.

        Raises:
            CheckpointError: there is no such file, it is damaged, of another kind, or of a newer format.
        """
        return read_json(path, "Comparison", cls._from_dict)

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any]) -> "Comparison":
        runs = [tuple(map(LogMarginal.from_dict, row["runs"])) for row in content["rows"]]
        rows = tuple(ComparisonRow(**row | {"runs": own}) for row, own in zip(content["rows"], runs, strict=True))
        reference = content["reference"] and LogMarginal.from_dict(content["reference"])
        return cls(rows, content["ranked_by"], reference, tuple(content["notes"]))

    def to_datatree(self) -> "xarray.DataTree":
        """One group a row, each a `LogMarginal` (of its first training run) as `LogMarginal.to_datatree` gives it."""
        import xarray as xr

        groups = {f"/{row.name}": row.runs[0].to_datatree()["importance"].to_dataset() for row in self.rows}
        return xr.DataTree.from_dict(groups)

    def to_arviz(self) -> Any:
        """The same in ArviZ's own container."""
        return to_arviz(self.to_datatree())

    def plot(self) -> "Figure":
        """All panels of `plots.comparison`: bounds, paired differences, gaps, and the shares of each status."""
        from pyro_lvm.plots import comparison

        return comparison(self)
