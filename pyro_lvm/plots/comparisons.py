"""Pictures of several pairs side by side, one line a pair, and of the gap of one."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_lvm.errors import DataTypeError
from pyro_lvm.evidence.verdict import is_joint
from pyro_lvm.ops import STATUSES
from pyro_lvm.plots._drawing import (
    BLUE,
    ORANGE,
    STATUS_COLOURS,
    VERMILLION,
    axes,
    check_fields,
    legend_below,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bounds", "comparison", "differences", "gaps", "inference_gap", "statuses"]

_LABEL_WIDTH = 18  # characters of a name in a line


def bounds(comparison: Any, ax: "Axes | None" = None) -> "Axes":
    """ELBO and log p-hat of every pair, in nats per datum; the bar between them is the gap that the pair itself sees.

    The error bars of log p-hat are its Monte Carlo standard errors; a reference is a dashed line.

    Args:
        comparison: what `compare` returned.
        ax: where to draw; None makes a figure.

    Returns:
        The axes, the best pair on top.

    Raises:
        DataTypeError: not a `Comparison`, or ``ax`` is no axes.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> exact = lvm.models.LinearGaussian(1, 2)
        >>> result = lvm.compare({"prior": (exact, lvm.guides.DiagonalNormal(1, shared=True))}, torch.ones(5, 2))
        >>> bounds(result).get_xlabel()
        'nats per datum'
    """
    ax, rows, heights = _lines(comparison, ax)
    elbos, values, errors = np.array([(row.elbo, row.log_marginal, row.stderr) for row in rows]).T
    ax.hlines(heights, elbos, values, color="0.75", linewidth=3)
    ax.plot(elbos, heights, "o", color=BLUE, label="ELBO")
    ax.errorbar(values, heights, xerr=errors, fmt="D", color=VERMILLION, label="log p-hat")
    if comparison.reference is not None:
        ax.axvline(comparison.reference.mean, color="0.4", linestyle="--", label="reference")
    _finish(ax, "bound and evidence", _nats(rows[0].runs[0]))
    return ax


def differences(comparison: Any, ax: "Axes | None" = None) -> "Axes":
    """The score of every pair less that of the best, paired over data, in nats per datum.

    The score is what the pairs are ranked by: the ELBO where they share one model, else log p-hat. Bars are two
    standard errors, over data and draws, long to each side.

    Args:
        comparison: what `compare` returned.
        ax: where to draw; None makes a figure.

    Returns:
        The axes, the best pair on top.

    Raises:
        DataTypeError: not a `Comparison`, or ``ax`` is no axes.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> exact = lvm.models.LinearGaussian(1, 2)
        >>> result = lvm.compare({"prior": (exact, lvm.guides.DiagonalNormal(1, shared=True))}, torch.ones(5, 2))
        >>> differences(result).get_title()
        'ELBO \u2212 best, \u00b12 errors'
    """
    ax, rows, heights = _lines(comparison, ax)
    values, errors = np.array([comparison.difference(row.name) for row in rows]).T
    ax.axvline(0.0, color="0.75")
    ax.errorbar(values, heights, xerr=2 * errors, fmt="o", color=BLUE, capsize=3)
    score = "ELBO" if comparison.ranked_by == "elbo" else "log p-hat"
    nats, joint = _nats(rows[0].runs[0]), len(rows[0].runs[0]) == 1
    _finish(ax, f"{score} \u2212 best, \u00b12 errors", nats if joint else f"{nats}, paired")
    return ax


def statuses(comparison: Any, ax: "Axes | None" = None) -> "Axes":
    """The share of the data in each status of log p-hat, one bar a pair, from the best status to the worst.

    Args:
        comparison: what `compare` returned.
        ax: where to draw; None makes a figure.

    Returns:
        The axes, the best pair on top.

    Raises:
        DataTypeError: not a `Comparison`, or ``ax`` is no axes.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> result = lvm.compare({"exact": (lvm.models.LinearGaussian(1, 2), None)}, torch.ones(5, 2))
        >>> [text.get_text() for text in statuses(result).get_legend().get_texts()]
        ['exact']
    """
    ax, rows, heights = _lines(comparison, ax)
    left = np.zeros(len(rows))
    for word in STATUSES:
        width = np.array([row.status_shares().get(word, 0.0) for row in rows])
        if width.any():
            ax.barh(heights, width, left=left, color=STATUS_COLOURS[word], label=word.replace("_", " "))
            left += width
    ax.set_xlim(0, 1)
    _finish(ax, "status of log p-hat", "share of the data")
    return ax


def gaps(comparison: Any, ax: "Axes | None" = None) -> "Axes":
    """What lies between the ELBO and log p(x), stacked, in nats per datum: zero is the ELBO of each pair.

    Of a `Comparison`: log p-hat - ELBO, which the pair's own draws find, then reference - log p-hat, which they miss;
    without a reference the first alone. Of an `InferenceGap`: the part of the encoder (amortization), then that of the
    family (approximation), each with two standard errors over the data.

    Args:
        comparison: what `compare` or `inference_gap` returned, or a dictionary name -> `InferenceGap`.
        ax: where to draw; None makes a figure.

    Returns:
        The axes; the whole gap is written at the end of each bar.

    Raises:
        DataTypeError: something else, or ``ax`` is no axes.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> exact = lvm.models.LinearGaussian(1, 2)
        >>> rows = {"prior": (exact, lvm.guides.DiagonalNormal(1, shared=True))}
        >>> x = torch.ones(5, 2)
        >>> result = lvm.compare(rows, x, reference=lvm.evidence.closed_form(exact, x))
        >>> gaps(result).texts[0].get_text() == f"{result.gap('prior'):.2f}"
        True
    """
    if hasattr(comparison, "rows"):
        ax, rows, _ = _lines(comparison, ax)
        nats = _nats(rows[0].runs[0])
        parts = {"log p-hat \u2212 ELBO": (BLUE, [(row.log_marginal - row.elbo, 0.0) for row in rows])}
        if comparison.reference is not None:
            missed = [(comparison.reference.mean - row.log_marginal, 0.0) for row in rows]
            parts["reference \u2212 log p-hat"] = ORANGE, missed
    else:
        found = comparison if isinstance(comparison, Mapping) else {"": comparison}
        ax = _inference_lines(found, ax)
        nats = _nats(next(iter(found.values())))
        parts = {
            "the encoder: amortization": (ORANGE, [_mean(gap.amortization) for gap in found.values()]),
            "the family: approximation": (BLUE, [_mean(gap.approximation) for gap in found.values()]),
        }
    for height, (end, reach) in enumerate(_stack(ax, parts)):
        place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
        ax.annotate(f"{round(end, 2) + 0.0:.2f}", (max(reach, 0.0), height), **place)
    ax.axvline(0.0, color="0.75")
    ax.margins(x=0.18)  # room for the numbers
    _finish(ax, "from the ELBO to log p(x)", f"{nats} above the ELBO")
    return ax


def _nats(record: Any) -> str:
    """The unit of the results of a record, or of an `InferenceGap`."""
    return "nats" if is_joint(record.provenance) else "nats per datum"


def comparison(result: Any) -> "Figure":
    """All panels of a `Comparison`, one line a pair: `bounds`, `differences`, `gaps` and `statuses`.

    Args:
        result: what `compare` returns.

    Returns:
        The figure; ``savefig`` writes it.

    Raises:
        DataTypeError: not a `Comparison`.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> result = lvm.compare({"exact": (lvm.models.LinearGaussian(1, 2), None)}, torch.ones(5, 2))
        >>> [axes.get_title() for axes in comparison(result).axes][0]
        'bound and evidence'
    """
    from matplotlib.figure import Figure

    _check_comparison(result)
    figure = Figure(figsize=(10, 2 * _height(len(result.rows))), layout="constrained")
    for panel, ax in zip((bounds, differences, gaps, statuses), figure.subplots(2, 2).flat, strict=True):
        panel(result, ax=ax)
    for ax in figure.axes[1::2]:
        ax.tick_params(labelleft=False)  # the names stand at the left of the line
    return figure


def inference_gap(result: Any) -> "Figure":
    """Two panels of an `InferenceGap`: the mean of both parts (`gaps`), and the parts of every datum.

    Args:
        result: what `inference_gap` returns.

    Returns:
        The figure; ``savefig`` writes it.

    Raises:
        DataTypeError: not an `InferenceGap`.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> model, x = lvm.models.LinearGaussian(1, 2), torch.ones(5, 2)
        >>> guide = lvm.guides.DiagonalNormal(1, shared=True)
        >>> result = lvm.inference_gap(model, guide, x, num_steps=50, seed=0)
        >>> [axes.get_title() for axes in inference_gap(result).axes]
        ['from the ELBO to log p(x)', 'datum by datum']
    """
    from matplotlib.figure import Figure

    _check_gap(result)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    means, each = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.0, 1.4)})
    gaps(result, ax=means)
    _datum_by_datum(result, each)
    return figure


def _datum_by_datum(result: Any, ax: "Axes") -> None:
    """Both parts of the gap of each datum, stacked, those with the largest gap first."""
    encoder, family = (getattr(result, part).cpu().numpy() for part in ("amortization", "approximation"))  # (N,)
    order = (encoder + family).argsort()[::-1]
    places = range(len(order))
    ax.bar(places, encoder[order], 1.0, color=ORANGE, label="the encoder")
    ax.bar(places, family[order], 1.0, encoder[order], color=BLUE, label="the family")
    unfinished = (~result.converged.cpu().numpy()[order]).nonzero()[0]
    if len(unfinished):
        ax.plot(unfinished, [0.0] * len(unfinished), "k|", label="not converged")
    ax.set(xlabel="data, by their gap", ylabel="log p(x) \u2212 ELBO, nats", title="datum by datum")
    legend_below(ax)


# ----------------------------------------------------------------------------------------------------------------------
# Lines of a picture, one a pair.


def _check_comparison(value: Any) -> None:
    cure = "Pass what `compare` returned."
    check_fields("comparison", value, "a Comparison", ("rows", "ranked_by", "reference", "difference"), cure)


def _check_gap(value: Any) -> None:
    cure = "Pass what `inference_gap` returned."
    check_fields("result", value, "an InferenceGap", ("approximation", "amortization", "converged"), cure)


def _height(num_lines: int) -> float:
    """Inches of a panel."""
    return 1.5 + 0.36 * num_lines


def _lines(value: Any, ax: "Axes | None") -> tuple["Axes", Sequence[Any], range]:
    """Axes with the names of the pairs, the rows, and the heights at which they stand."""
    _check_comparison(value)
    ax = axes(ax, (5.0, _height(len(value.rows))))
    _name_lines(ax, [row.name for row in value.rows])
    return ax, value.rows, range(len(value.rows))


def _inference_lines(found: Mapping[str, Any], ax: "Axes | None") -> "Axes":
    if not found:
        raise DataTypeError("comparison: expected at least one InferenceGap, got none. Pass {name: result}.")
    for gap in found.values():
        _check_gap(gap)
    ax = axes(ax, (5.0, _height(len(found))))
    _name_lines(ax, list(found))
    return ax


def _name_lines(ax: "Axes", names: Sequence[str]) -> None:
    labels = ["\n".join(textwrap.wrap(name, _LABEL_WIDTH)) for name in names]
    places = range(len(names)) if any(names) else ()
    ax.set_yticks(places, labels[: len(places)], parse_math=False)  # a name may hold a dollar
    margin = 0.5 if len(names) > 1 else 1.0
    ax.set_ylim(len(names) - 1 + margin, -margin)  # the first on top


def _mean(values: Any) -> tuple[float, float]:
    """The mean over data, and two standard errors of it."""
    error = 2 * float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(values.mean()), error


def _stack(ax: "Axes", parts: Mapping[str, tuple[str, Iterable[tuple[float, float]]]]) -> Iterable[tuple[float, float]]:
    """Bars of ``name -> (colour, (width, error) of each line)``, one after the other.

    Returns for each line where the bars end, and how far they and their error bars reach.
    """
    ends = reach = np.zeros(1)
    for name, (colour, found) in parts.items():
        widths, errors = np.array(list(found)).T
        heights, left = np.arange(len(widths)), np.zeros(len(widths)) + ends
        ax.barh(heights, widths, 0.6, left=left, color=colour, label=name)
        ends = left + widths
        reach = np.maximum(reach, ends + errors)
        shown = errors > 0
        if shown.any():
            ax.errorbar(ends[shown], heights[shown], xerr=errors[shown], fmt="none", ecolor="black", capsize=3)
    return zip(ends, reach, strict=True)


def _finish(ax: "Axes", title: str, xlabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set(title=title, xlabel=xlabel)
    if ax.get_legend_handles_labels()[0]:
        legend_below(ax)
