"""Pictures of single records: a training run, the weights behind log p(x), and probabilities of classes."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_lvm._checks import data_tensor, refuse
from pyro_lvm._typing import TensorLike
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.ops import STATUSES, elbo, khat_threshold, log_evidence, log_weight_table
from pyro_lvm.plots._drawing import (
    BLUE,
    COLOURS,
    GREY,
    STATUS_COLOURS,
    STATUS_MARKERS,
    VERMILLION,
    axes,
    check_fields,
    legend_below,
    nats,
    probabilities,
)
from pyro_lvm.training import FitResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ess", "history", "khat", "log_weights", "reliability"]

#: Parts of the names under which callbacks record something in nats per datum.
_SCORES = ("score", "elbo", "bound", "log_p", "log p", "valid", "test")


def history(result: FitResult, ax: "Axes | None" = None) -> "Axes":
    """The bound over training: that of the training batches, and whatever callbacks recorded of it.

    The training bound is minus the loss, averaged over the steps of each epoch that had a finite one. Further lines are
    the columns of the history with ``score`` (`EarlyStopping`), ``elbo``, ``bound``, ``log_p``, ``valid`` or ``test``
    in their names.

    Args:
        result: what `fit` returned.
        ax: where to draw; None makes a figure.

    Returns:
        The axes; nats per datum, higher is better.

    Raises:
        DataTypeError: not a `FitResult`, or ``ax`` is no axes.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> model = lvm.models.LinearGaussian(1, 2)
        >>> fitted = lvm.fit(model, model.posterior_guide, torch.ones(5, 2), num_epochs=3, seed=0)
        >>> [line.get_label() for line in history(fitted).lines]
        ['training: \u2212loss, mean of each epoch']
    """
    if not isinstance(result, FitResult):
        raise DataTypeError(refuse("result", "a FitResult", type(result).__name__, "Pass what `fit` returned."))
    ax = axes(ax)
    epochs = np.array([row["epoch"] for row in result.history])
    bound = -result.losses.numpy()
    finite = np.isfinite(bound)
    shown = np.unique(epochs[finite])
    means = [bound[finite & (epochs == epoch)].mean() for epoch in shown]
    ax.plot(shown, means, _style(len(shown)), color=BLUE, label="training: \u2212loss, mean of each epoch")
    names = dict.fromkeys(name for row in result.history for name in row)
    scores = [name for name in names if any(part in name.lower() for part in _SCORES)]
    for name, colour in zip(scores, COLOURS[1:] * len(scores), strict=False):
        found = [(row["epoch"], row[name]) for row in result.history if _is_number(row.get(name))]
        if found:
            ax.plot(*zip(*found, strict=True), _style(len(found)), color=colour, label=name)
    ax.set(xlabel="epoch", ylabel="bound, nats per datum", title="training")
    legend_below(ax)
    return ax


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _style(count: int) -> str:
    """A line; with dots where there are few."""
    return "o-" if count <= 20 else "-"


def khat(record: Any, ax: "Axes | None" = None) -> "Axes":
    """The Pareto tail index of the weights of every datum, sorted, with the thresholds of the verdict.

    Below 0.5 the weights have a variance; up to min(1 - 1 / log10 K, 0.7) the value is usable.

    Args:
        record: a `LogMarginal` or an `Expectation`.
        ax: where to draw; None makes a figure.

    Returns:
        The axes; the legend counts the data of each status, and those without a tail to fit, which are not drawn.

    Raises:
        DataTypeError: not such a record, or ``ax`` is no axes.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> model, x = lvm.models.LinearGaussian(1, 2), torch.ones(5, 2)
        >>> record = lvm.log_marginal(model, lvm.guides.DiagonalNormal(1, shared=True), x, seed=0)
        >>> khat(record).get_ylabel()
        'Pareto k-hat'
    """
    _check_diagnosed(record)
    ax = axes(ax)
    values = record.khat.cpu().numpy()  # (N,)
    threshold = khat_threshold(int(_particles(record).min()))
    lines = {0.5: "variance up to 0.5"}
    if threshold > 0:
        lines[threshold] = f"usable up to {threshold:.2g}"
    for (height, words), style in zip(sorted(lines.items()), (":", "--"), strict=False):
        ax.axhline(height, color="0.4", linestyle=style, linewidth=1, label=words)
    missing = _by_status(ax, values, record.status)
    if missing:
        ax.plot([], [], " ", label=f"no k-hat: {missing}")
    ax.set(xlabel="data, sorted", ylabel="Pareto k-hat", title="tail of the weights")
    legend_below(ax)
    return ax


def ess(record: Any, ax: "Axes | None" = None) -> "Axes":
    """The effective sample size of every datum as a share of K, sorted, with the least there is, 1 / K.

    Args:
        record: a `LogMarginal` or an `Expectation`.
        ax: where to draw; None makes a figure.

    Returns:
        The axes, with a logarithmic scale; the legend counts the data of each status.

    Raises:
        DataTypeError: not such a record, or ``ax`` is no axes.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> model, x = lvm.models.LinearGaussian(1, 2), torch.ones(5, 2)
        >>> record = lvm.log_marginal(model, lvm.guides.DiagonalNormal(1, shared=True), x, seed=0)
        >>> ess(record).get_title()
        'effective sample size, K = 1000'
    """
    _check_diagnosed(record)
    ax = axes(ax)
    ax.axhline(1 / record.num_particles, color="0.4", linestyle="--", linewidth=1, label="1 / K: one draw")
    missing = _by_status(ax, record.ess.cpu().numpy() / _particles(record), record.status)
    if missing:
        ax.plot([], [], " ", label=f"no weight: {missing}")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, place: f"{value:g}")  # 0.01 instead of a power
    ax.set(xlabel="data, sorted", ylabel="ESS / K", ylim=(0.7 / record.num_particles, 1.3))
    ax.set_title(f"effective sample size, K = {getattr(record, 'particles_in_words', record.num_particles)}")
    legend_below(ax)
    return ax


def _check_diagnosed(record: Any) -> None:
    cure = "Pass what `log_marginal` or `expectation` returned."
    fields = ("khat", "ess", "status", "num_particles")
    check_fields("record", record, "a LogMarginal or an Expectation", fields, cure)


def _particles(record: Any) -> np.ndarray:
    """K of each datum; an `Expectation` has one for all."""
    own = getattr(record, "particles", None)
    return np.array([record.num_particles]) if own is None else own.cpu().numpy()


def _by_status(ax: "Axes", values: np.ndarray, status: np.ndarray) -> int:
    """Points in the order of their values, with the colour of each status; returns how many have no value."""
    order = np.argsort(values)  # NaN last
    for word in STATUSES:
        own = status[order] == word
        where = np.flatnonzero(own & ~np.isnan(values[order]))
        if own.any():
            style: dict[str, Any] = {"marker": STATUS_MARKERS[word], "s": 18, "linewidths": 0.4, "edgecolors": "0.2"}
            label = f"{word.replace('_', ' ')}: {own.sum()}"
            ax.scatter(where, values[order][where], color=STATUS_COLOURS[word], label=label, **style)
    return int(np.isnan(values).sum())


def log_weights(table: TensorLike, ax: "Axes | None" = None) -> "Axes":
    """The log-weights of one datum as a histogram, with their mean (the ELBO) and the log of their mean (log p-hat).

    Args:
        table: log p(x, z) - log q(z | x) of K draws in nats, ``(K,)`` or ``(K, 1)``, see `log_weights`.
        ax: where to draw; None makes a figure.

    Returns:
        The axes. Weights of zero have no place there, and are counted in the legend; the ELBO is then minus infinity.

    Raises:
        DataTypeError: no tensor or array of floating numbers, or ``ax`` is no axes.
        ShapeError: another shape, NaN or plus infinity, or nothing but zero weights.

    Example:
        >>> import torch
        >>> ax = log_weights(torch.tensor([1.0, 3.0]).log())  # log p-hat is log 2, the ELBO log(3) / 2
        >>> [line.get_label() for line in ax.lines]
        ['ELBO 0.55 nats', 'log p-hat 0.69 nats']
    """
    weights = data_tensor("table", table).detach().cpu()
    if weights.dim() not in (1, 2) or weights.numel() != len(weights):
        cure = "The weights of one datum: pass table[:, n]."
        raise ShapeError(refuse("table", "shape (K,) or (K, 1)", tuple(weights.shape), cure))
    weights = log_weight_table(weights.reshape(-1, 1), "table")  # (K, 1)
    finite = weights[weights.isfinite()].numpy()
    if bool((weights.isnan() | weights.isposinf()).any()) or not len(finite):
        got = "NaN, plus infinity, or no weight above zero"
        raise ShapeError(refuse("table", "finite log-weights", got, "Look at the densities of model and guide."))
    ax = axes(ax)
    zeros = len(weights) - len(finite)
    ax.hist(finite, bins=_bins(finite), color="#56B4E9", label=f"{len(finite)} draws")
    bound, value = float(elbo(weights)), float(log_evidence(weights))
    if not zeros:
        ax.axvline(bound, color=BLUE, linestyle="--", label=f"ELBO {nats(bound)} nats")
    ax.axvline(value, color=VERMILLION, label=f"log p-hat {nats(value)} nats")
    if zeros:
        ax.plot([], [], " ", label=f"{zeros} of weight zero: ELBO \u2212\u221e")
    ax.set(xlabel="log-weight, nats", ylabel="draws", title="weights of one datum")
    legend_below(ax)
    return ax


def _bins(values: np.ndarray) -> int | list[float]:
    """Edges of a histogram; equal weights, up to rounding, are one bar."""
    middle, spread = float(values.mean()), float(np.ptp(values))
    if spread <= 1e-9 * max(1.0, abs(middle)):
        return [middle - 0.05, middle + 0.05]
    return min(60, max(10, int(len(values) ** 0.5)))


def reliability(probs: TensorLike, labels: TensorLike, ax: "Axes | None" = None) -> "Axes":
    """Share of right answers by confidence: probabilities that can be believed lie on the diagonal.

    Confidence is the largest probability of a datum. Data are put into ten bins of it, between 1 / C and 1; a point is
    the mean confidence and the share of right answers in a bin, with one standard error, and its area goes with the
    number of data.

    Args:
        probs: p(y = k | x), ``(N, C)``; rows sum to one.
        labels: the right classes, integers from 0 to C - 1, ``(N,)``.
        ax: where to draw; None makes a figure.

    Returns:
        The axes; the legend has the expected calibration error, the mean distance of the points from the diagonal.

    Raises:
        DataTypeError: no tensors or arrays, or ``ax`` is no axes.
        ShapeError: other shapes, rows that are no probabilities, or labels that are no classes.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6]])  # right once in two at 0.8, always at 0.6
        >>> ax = reliability(probs, torch.tensor([0, 1, 1]))
        >>> ax.get_legend().get_texts()[1].get_text()
        '3 data: 66.7% right, calibration error 0.333'
    """
    p, y = _classified(probs, labels)
    ax = axes(ax, (4.2, 4.2))
    confidence, right = p.max(1), p.argmax(1) == y  # (N,)
    edges = np.linspace(1 / p.shape[1], 1, 11)[1:-1]
    bins = np.digitize(confidence, edges)
    parts = [bins == k for k in np.unique(bins)]
    sizes = np.array([part.sum() for part in parts])
    where, share = (np.array([values[part].mean() for part in parts]) for values in (confidence, right))
    # A bin of right answers only has an error too: one answer more or less in it.
    errors = np.sqrt(np.maximum(share * (1 - share), 1 / (sizes + 1)) / sizes)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="as believed")
    ax.errorbar(where, share, errors, fmt="none", ecolor=BLUE, capsize=3)
    error = float((sizes * np.abs(where - share)).sum() / len(y))
    words = f"{len(y)} data: {right.mean():.1%} right, calibration error {error:.3f}"
    ax.scatter(where, share, 20 + 200 * sizes / sizes.max(), color=BLUE, alpha=0.7, label=words)
    low = 1 / p.shape[1]
    ax.set(xlabel="confidence, max p(y | x)", ylabel="share of right answers", title="reliability")
    ax.set(xlim=(low - 0.03 * (1 - low), 1 + 0.03 * (1 - low)), ylim=(-0.03, 1.03))
    legend_below(ax, markerscale=0.5)
    return ax


def _classified(probs: TensorLike, labels: TensorLike) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``(N, C)`` and classes ``(N,)``."""
    p, y = probabilities("probs", probs), data_tensor("labels", labels).detach().cpu().numpy()
    if y.shape != p.shape[:1] or (y % 1).any() or y.min() < 0 or y.max() >= p.shape[1]:
        got = f"shape {y.shape}, values from {y.min()} to {y.max()}"
        cure = "Pass the class of each row; leave data without a label out."
        raise ShapeError(refuse("labels", f"{len(p)} classes from 0 to {p.shape[1] - 1}", got, cure))
    return p, y.astype(int)
