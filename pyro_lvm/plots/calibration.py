"""The picture of a calibration: histograms of ranks against what chance allows."""

from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_lvm._checks import check_positive_int
from pyro_lvm.plots._drawing import COLOURS, axes, check_fields, legend_below

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["calibration"]

_CHANCE = 0.99  # that all bars of one uniform marginal are in the band, or more
_FIELDS = ("pit", "names", "status", "worst")


def calibration(record: Any, ax: "Axes | None" = None, num_marginals: int = 3) -> "Axes":
    """Ranks of the truth among the draws of a guide, as a histogram for each of the worst marginals.

    Flat is calibrated. Higher at both ends: the guide is too narrow; in the middle: too wide; at the right end: its
    draws lie below the truth. The band is what all bars of a uniform marginal are in with a probability of 99 %
    (binomial, by Bonferroni).

    Args:
        record: what `calibration` returned, or its ``weighted``.
        ax: where to draw; None makes a figure.
        num_marginals: how many marginals to draw, those with the smallest p-values.

    Returns:
        The axes; 1 is the height of a uniform distribution.

    Raises:
        DataTypeError: not such a record, or ``ax`` is no axes.
        ShapeError: ``num_marginals`` is less than 1.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> model = lvm.models.LinearGaussian(1, 5)
        >>> found = lvm.calibration(model, model.posterior_guide, torch.zeros(1, 5), num_data=200, num_draws=99, seed=0)
        >>> calibration(found).get_xlabel()
        'share of the draws below the truth'
    """
    from matplotlib.ticker import PercentFormatter
    from scipy.stats import binom

    check_fields("record", record, "a Calibration", _FIELDS, "Pass what `calibration` returned.")
    chosen = record.worst[: check_positive_int("num_marginals", num_marginals)]
    ax = axes(ax)
    count = len(record.pit)
    bars = max(2, min(20, count // 20))
    beyond = (1 - _CHANCE) / 2 / bars
    low, high = (binom.ppf(share, count, 1 / bars) * bars / count for share in (beyond, 1 - beyond))
    ax.axhspan(low, high, color="0.88", label=f"chance, {_CHANCE:.0%}")
    ax.axhline(1.0, color="0.4", linestyle=":", linewidth=1)
    edges = np.linspace(0, 1, bars + 1)
    for i, colour in zip(chosen, COLOURS * len(chosen), strict=False):
        heights = np.histogram(record.pit[:, i].cpu().numpy(), edges)[0] * bars / count
        label = f"{record.names[i]}: {record.status[i].replace('_', ' ')}"
        ax.stairs(heights, edges, baseline=None, color=colour, linewidth=1.6, label=label)
    ax.set(xlim=(0, 1), xlabel="share of the draws below the truth", ylabel="simulated data, against uniform")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    more = len(record.names) - len(chosen)
    ax.set_title("calibration" + (f", {len(chosen)} worst of {len(record.names)} marginals" if more else ""))
    legend_below(ax)
    return ax
