"""What cannot be in a comparison: bounds above log p(x), and values of log p(x) of one model that differ."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from pyro_lvm.comparison import Comparison, ComparisonRow
from pyro_lvm.evidence import LogMarginal
from pyro_lvm.ops import DOUBTFUL

__all__ = ["contradictions"]

_FLOOR = 0.01  # nats: below, nobody would quote another number


def contradictions(result: Comparison, about: str, shared: bool | None) -> Iterable[str]:
    """A note at most a row on what cannot be, unless the words ``about`` the reference have it already."""
    rows, reference = result.rows, result.reference
    why = "it is too low" if about else "the reference is of other data or another model"
    apart = _against_each_other(rows, reference, why) if shared else {}
    if reference is None:
        return apart.values()
    guides = reference.provenance["guides"] if about and "guides" in reference.provenance else {}
    said = {name for name, found in guides.items() if found["disagreement"]}
    kept = {name: note for name, note in apart.items() if name not in said}
    return (kept | _above(rows, reference, why)).values()


def _above(rows: Iterable[ComparisonRow], reference: LogMarginal, why: str) -> dict[str, str]:
    """A note on each row whose ELBO is above the reference by more than the errors of the two and rounding allow."""
    notes = {}
    for row in rows:
        gap = reference.value - row.mean_over_runs("elbo")
        own = float(gap.std()) / math.sqrt(len(gap)) if len(gap) > 1 else float(row.mean_over_runs("elbo_stderr"))
        error = math.hypot(own, reference.mean_stderr)
        if float(gap.mean()) < -3 * error - abs(reference.mean_bias) - _rounding(reference.value):
            notes[row.name] = f"{row.name}: an ELBO above the reference: {why}."
    return notes


def _rounding(log_p: torch.Tensor) -> float:
    """Nats that rounding moves log-densities by, in float32."""
    return 1e-6 * max(1.0, float(log_p.abs().mean()))


def _against_each_other(rows: Sequence[ComparisonRow], reference: LogMarginal | None, why: str) -> dict[str, str]:
    """A note on each row of one model whose log p-hat is not that of the reference; without one, below another row."""
    notes = {}
    for row in rows:
        others = {f"that of {each.name!r}": each for each in rows if each is not row}
        if reference is not None:
            others = {"the reference": ComparisonRow("", (reference,), 0, 0.0, None)}
        apart, words = min((_apart(row, *other) for other in others.items()), default=(0.0, ""))
        if apart < 0:
            wrong = "other value" if reference is None else "reference"
            notes[row.name] = f"log p-hat of {row.name!r} {words}: its guide misses mass, or the {wrong} is wrong."
        elif apart > 0 and reference is not None:
            notes[row.name] = f"log p-hat of {row.name!r} {words}: {why}."
    return notes


def _apart(row: ComparisonRow, name: str, other: ComparisonRow) -> tuple[float, str]:
    """Log p-hat of a row less that of another of the same model, also in words; 0 where it may be error or bias.

    Where tails are heavy, values are too low by more than the bias says, on all data alike: what more data do not
    average out is taken to be up to the error of a datum.
    """
    runs = (*row.runs, *other.runs)
    quotable = torch.from_numpy(~np.isin([run.status for run in runs], DOUBTFUL).any(0))  # (N,)
    share = float(quotable.double().mean())
    if not share >= 0.5:  # of none, or the notes say what is wrong with them
        return 0.0, ""
    value, stderr, bias = (
        torch.stack([each.mean_over_runs(column).cpu()[quotable] for each in (row, other)])  # (2, n)
        for column in ("value", "stderr", "bias")
    )
    variance = stderr.square().sum(0)
    apart, error = float((value[0] - value[1]).mean()), float(variance.sum().sqrt()) / len(variance)
    moved = sum((run.provenance.get("model_dtype") or {}).get("rms_log_p", 0.0) for run in (row.runs[0], other.runs[0]))
    systematic = float(variance.mean().sqrt() + bias.mean(1).abs().sum()) + moved + _rounding(value)
    allowed = 5 * error + systematic + _FLOOR
    if not abs(apart) > allowed:
        return 0.0, ""
    errors = f" +- {error:.1g}" if error > _rounding(value) else ""
    where = f" on {share:.1%} of the data" if share < 1 else ""
    return apart, f"lies {abs(apart):.3f}{errors} {'below' if apart < 0 else 'above'} {name}{where}"
