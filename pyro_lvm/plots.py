"""Pictures of records, with matplotlib; no global style is touched."""

from typing import TYPE_CHECKING, Any

from pyro_lvm.ops import STATUSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["comparison", "inference_gap"]

# From Okabe and Ito's palette, told apart by every kind of colour vision; good to bad.
_STATUS_COLOURS = dict(
    zip(STATUSES, ("#000000", "#0072B2", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#999999"), strict=True)
)


def comparison(result: Any) -> "Figure":
    """Three panels of a `Comparison`, one line a row: ELBO and log p-hat, paired differences, shares of each status.

    Args:
        result: what `compare` returns.

    Returns:
        The figure; ``savefig`` writes it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = [row.name for row in result.rows]
    heights = range(len(names))
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(names)), layout="constrained")
    bounds, paired, shares = figure.subplots(1, 3, sharey=True, gridspec_kw={"width_ratios": (1.1, 1.0, 1.0)})

    elbos, values = [row.elbo for row in result.rows], [row.log_marginal for row in result.rows]
    bounds.hlines(heights, elbos, values, color="0.75", linewidth=3)
    bounds.plot(elbos, heights, "o", color="#0072B2", label="ELBO")
    bounds.errorbar(
        values, heights, xerr=[row.stderr for row in result.rows], fmt="D", color="#D55E00", label="log p-hat"
    )
    bounds.set(xlabel="nats per datum", yticks=list(heights), yticklabels=names, title="bound and evidence")
    bounds.xaxis.set_major_locator(MaxNLocator(4))
    bounds.invert_yaxis()
    bounds.legend(frameon=False, fontsize="small", loc="best")

    differences = [result.difference(name) for name in names]
    paired.axvline(0.0, color="0.75")
    paired.errorbar(
        [d for d, _ in differences], heights, xerr=[2 * e for _, e in differences], fmt="o", color="#0072B2", capsize=3
    )
    score = "ELBO" if result.ranked_by == "elbo" else "log p-hat"
    paired.xaxis.set_major_locator(MaxNLocator(4))
    paired.set(xlabel="nats per datum, paired", title=f"{score} \u2212 best, \u00b12 errors")

    left = [0.0] * len(names)
    for word in STATUSES:
        width = [row.status_shares().get(word, 0.0) for row in result.rows]
        if any(width):
            shares.barh(heights, width, left=left, color=_STATUS_COLOURS[word], label=word.replace("_", " "))
            left = [a + b for a, b in zip(left, width, strict=True)]
    shares.set(xlabel="share of the data", xlim=(0, 1), title="status of log p-hat")
    shares.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def inference_gap(result: Any) -> "Figure":
    """Two panels of an `InferenceGap`: the mean of both parts with the errors over data, and the parts of every datum.

    Args:
        result: what `inference_gap` returns.

    Returns:
        The figure; ``savefig`` writes it.
    """
    from matplotlib.figure import Figure

    names = {"approximation": "the family", "amortization": "the encoder"}
    colours = {"approximation": "#0072B2", "amortization": "#E69F00"}
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    means, each = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.0, 1.6)})

    parts = {part: getattr(result, part).cpu().numpy() for part in names}  # (N,)
    for height, (part, values) in enumerate(parts.items()):
        error = values.std() / len(values) ** 0.5
        means.barh(height, values.mean(), xerr=2 * error, color=colours[part], capsize=3)
    means.axvline(0.0, color="0.75")
    means.set(yticks=[0, 1], yticklabels=[f"{part}:\n{whose}" for part, whose in names.items()])
    means.set(xlabel="nats a datum, \u00b12 errors", title="mean parts of the gap")
    means.invert_yaxis()

    order = (parts["approximation"] + parts["amortization"]).argsort()[::-1]
    each.bar(range(len(order)), parts["approximation"][order], 1.0, color=colours["approximation"], label="family")
    bottom = parts["approximation"][order]
    each.bar(
        range(len(order)), parts["amortization"][order], 1.0, bottom, color=colours["amortization"], label="encoder"
    )
    unfinished = (~result.converged.cpu().numpy()[order]).nonzero()[0]
    if len(unfinished):
        each.plot(unfinished, [0.0] * len(unfinished), "k|", label="not converged")
    each.set(xlabel="data, by their gap", ylabel="log p(x) \u2212 ELBO, nats", title="datum by datum")
    each.legend(frameon=False, fontsize="small")
    return figure
