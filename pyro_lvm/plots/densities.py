"""Pictures of densities: p(z | x) against q(z | x) of any pair, p(x) in the plane, and responsibilities."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_lvm._checks import check_positive_int, check_program, refuse, warn_caller
from pyro_lvm._typing import Guide, Model, TensorLike
from pyro_lvm.errors import ShapeError, SupportError, UnreliableEstimateWarning
from pyro_lvm.evidence import quadrature
from pyro_lvm.plots._drawing import COLOURS, MARKERS, VERMILLION, axes, legend_below, nats, points_2d, probabilities
from pyro_lvm.plots._grid import Grid, Mass, find_mass, grid_over
from pyro_lvm.tracing.one_datum import PairAtDatum, pair_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["density", "posterior", "responsibilities"]

Limits = tuple[float, float] | tuple[tuple[float, float], tuple[float, float]]

_DRAWS, _PRIOR_DRAWS = 500, 100  # points from which the limits are sought
_SHARES = (0.99, 0.9, 0.5)  # of the mass, inside of each contour
_FILL = "#B9CFE0"  # pale blue, behind a line
_FILLS = ("#D9E6F0", "#9DC1DC", "#4F93C0")


def posterior(
    model: Model,
    guide: Guide,
    x: TensorLike,
    *args: Any,
    ax: "Axes | None" = None,
    limits: Limits | None = None,
    num_points: int | None = None,
) -> "Axes":
    r"""p(z | x) of one datum against q(z | x), for any pair with one or two continuous latent dimensions.

    .. math:: \log p(z \mid x) = \log p(x, z) - \log p(x)

    Both log p(x, z) and log q(z | x) are evaluated on a grid of z. log p(x) is that of `evidence.quadrature`, or the
    sum over a grid that holds the posterior, whichever has the smaller error: the posterior is normalised over all z,
    not over what is shown. The ELBO is a sum over a grid that holds q, and KL(q || p(z | x)) the difference of the two;
    an error stands behind a number where it is 0.005 nats or more.

    In one dimension p(z | x) is filled, and q a line. In two they are contours that hold 50, 90 and 99 % of the mass,
    filled those of p(z | x), lines those of q.

    Args:
        model: generative program p(x, z). Discrete latents that the guide lacks are summed out.
        guide: variational program q(z | x) with a density at any z: not one that makes z of draws from elsewhere, but
            an `AutoNormal` of one datum is fine.
        x: one datum, ``(1, ...)``.
        *args: further arguments of both.
        ax: where to draw; None makes a figure.
        limits: (low, high) of z, in two dimensions a pair of these. None looks for what holds all but a thousandth of
            both masses at each end, from draws of q and of p(z); what is far from all of these, and narrow, is missed.
        num_points: grid points a dimension; None is 801 in one and 121 in two. Where p or q is narrow there are more.

    Returns:
        The axes; the legend has log p(x), the ELBO and KL in nats.

    Raises:
        ShapeError: x has more than one row, the latents not one or two dimensions, or ``limits`` another shape.
        SupportError: a latent is not continuous.
        SiteError: the guide has no density at given latents.
        PlateError, ParameterError, DataTypeError: as in `log_marginal`.

    Warns:
        UnreliableEstimateWarning: grid and quadrature disagree on log p(x), or q does not sum to one: a narrow part has
            been missed.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the posterior, N(x / 2, 1 / 2)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> ax = posterior(model, guide, torch.zeros(1))
        >>> print(*[text.get_text() for text in ax.get_legend().get_texts()], sep="\n")
        p(z | x): log p(x) = −1.27 nats
        q(z | x): ELBO = −1.27, KL = 0.00 nats
    """
    with pair_at(model, guide, x, *args) as pair:
        if pair.dim not in (1, 2):
            cure = "For more, look at ess and k-hat of `log_marginal`, or at two of them with `plots.latents`."
            raise ShapeError(refuse(f"latents {pair.names}", "one or two dimensions", pair.dim, cure))
        box = None if limits is None else _box(limits, pair.dim)
        default = 801 if pair.dim == 1 else 121
        num_points = check_positive_int("num_points", default if num_points is None else num_points, 9)
        both = _on_grid(pair, _quadrature(model, x, *args), box, num_points)
    _check_mass(both)
    (log_p, error), (bound, noise) = both.log_px, both.elbo
    kl = f"KL = {nats(log_p - bound, math.hypot(error, noise))} nats"
    words = f"p(z | x): log p(x) = {nats(log_p, error)} nats", f"q(z | x): ELBO = {nats(bound, noise)}, {kl}"
    ax = axes(ax, (5.0, 3.6) if pair.dim == 1 else (4.8, 5.2))
    (_draw_1d if pair.dim == 1 else _draw_2d)(ax, both, words)
    ax.set(xlabel=pair.names[0], ylabel=pair.names[1] if pair.dim == 2 else f"density, per unit of {pair.names[0]}")
    return ax


def _box(limits: Any, dim: int) -> np.ndarray:
    """Limits as (low, high) of each dimension, ``(2, d)``."""
    expected = "(low, high)" if dim == 1 else "((low, high), (low, high))"
    try:
        box = np.asarray(limits, dtype=float).reshape(-1, 2).T
    except (TypeError, ValueError):
        box = np.empty((2, 0))
    if box.shape != (2, dim) or not np.isfinite(box).all() or not (box[0] < box[1]).all():
        raise ShapeError(refuse("limits", f"{expected} with low < high", repr(limits), "Pass numbers, lowest first."))
    return box


@dataclass(frozen=True)
class _Both:
    """Posterior and guide at one datum.

    Attributes:
        log_px: log p(x) and its error, by quadrature or by the sum over the grid, whichever has the smaller error.
        found: both of them.
        grid: of what is shown.
        p: the posterior on this grid.
        q: the guide on this grid.
        mass_p: p(x, z) wherever it is not negligible.
        mass_q: the guide wherever it is not negligible.
        elbo: the mean of log p(x, z) - log q(z | x) under q, and its error.
    """

    log_px: tuple[float, float]
    found: list[tuple[float, float]]
    grid: Grid
    p: np.ndarray
    q: np.ndarray
    mass_p: Mass
    mass_q: Mass
    elbo: tuple[float, float]


def _quadrature(model: Model, x: TensorLike, *args: Any) -> list[tuple[float, float]]:
    """log p(x) and its error, if quadrature can be had."""
    try:
        record = quadrature(model, x, *args, progress=False)
    except (SupportError, NotImplementedError):  # a plate of its own, or a support that torch cannot unfold
        return []
    return [(record.mean, float(record.stderr))]


def _on_grid(pair: PairAtDatum, found: list[tuple[float, float]], box: np.ndarray | None, num_points: int) -> _Both:
    """Look for both masses, and evaluate both densities on a grid that shows and resolves them, or over ``box``."""
    draws = pair.guide_draws(_DRAWS)
    starts = torch.cat([draws, pair.prior_draws(_PRIOR_DRAWS).to(draws)])
    mass_p, mass_q = find_mass(pair.log_joint, starts), find_mass(pair.log_guide, draws)
    if box is None:
        low, high = np.minimum(mass_p.box, mass_q.box)[0], np.maximum(mass_p.box, mass_q.box)[1]
        pad = 0.08 * (high - low)
        box = np.stack([low - pad, high + pad])
    grid = grid_over(box, num_points, [mass_p.box, mass_q.box])
    found = [*found, mass_p.total]
    log_px = min(found, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])
    p, q = _density(grid.values(pair.log_joint) - log_px[0]), _density(grid.values(pair.log_guide))
    with np.errstate(invalid="ignore"):  # where both are -inf, q has no mass
        log_weights = mass_q.grid.values(pair.log_joint) - mass_q.log_density
    return _Both(log_px, found, grid, p, q, mass_p, mass_q, mass_q.mean(log_weights))


def _density(log_density: np.ndarray) -> np.ndarray:
    """Per unit of z; a pole is left out."""
    return np.where(np.isposinf(log_density), np.nan, np.exp(np.minimum(log_density, 700.0)))


def _check_mass(both: _Both) -> None:
    """Quadrature and the grid have found the same posterior, up to their errors, and q is a density."""
    (least, _), (most, _) = min(both.found), max(both.found)
    known = {"p(x)": (most - least, sum(error for _, error in both.found)), "q(z | x)": both.mass_q.total}
    for words, (off, error) in known.items():
        if abs(off) > 0.1 + error:
            warn_caller(
                f"Two sums of {words} over z differ by {abs(off):.2g} nats: narrow parts were missed, or are not "
                "resolved. Do not quote log p(x), ELBO and KL of this picture.",
                UnreliableEstimateWarning,
            )


def _draw_1d(ax: "Axes", both: _Both, words: tuple[str, str]) -> None:
    (line,) = both.grid.lines
    ax.fill_between(line, both.p, color=_FILL, label=words[0])
    ax.plot(line, both.q, color=VERMILLION, label=words[1])
    ax.set(xlim=(line[0], line[-1]))
    ax.set_ylim(bottom=0)
    legend_below(ax)


def _draw_2d(ax: "Axes", both: _Both, words: tuple[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    horizontal, vertical = both.grid.lines
    levels_p = _rising([level - both.log_px[0] for level in both.mass_p.levels(_SHARES)])
    top = max(float(np.nanmax(both.p)), levels_p[-1]) * 1.01
    ax.contourf(horizontal, vertical, both.p.T, levels=[*levels_p, top], colors=_FILLS)
    levels_q = _rising(both.mass_q.levels(_SHARES))
    if np.nanmax(both.q) > levels_q[0]:  # else the limits are elsewhere, of which some versions of matplotlib warn
        ax.contour(horizontal, vertical, both.q.T, levels=levels_q, colors=VERMILLION, linewidths=1.2)
    handles = [Patch(color=_FILLS[1], label=words[0]), Line2D([], [], color=VERMILLION, label=words[1])]
    title = {"title": "contours hold 50, 90 and 99 % of the mass", "title_fontsize": "small", "alignment": "left"}
    legend_below(ax, handles=handles, **title)


def _rising(log_levels: list[float]) -> list[float]:
    """Levels as contours need them, from the lowest: those of a flat density are one, and a little apart."""
    found: list[float] = []
    for level in np.exp(log_levels)[::-1]:
        found.append(min(float(level), found[-1]) * (1 - 1e-6) if found else float(level))
    return found[::-1]


def density(
    log_density: Callable[[torch.Tensor], torch.Tensor],
    limits: tuple[tuple[float, float], tuple[float, float]],
    ax: "Axes | None" = None,
    num_points: int = 101,
) -> "Axes":
    """A density of two dimensions as filled contours, with its scale.

    Args:
        log_density: log p in nats, ``(G,)``, of points ``(G, 2)`` of the default dtype; the ``log_prob`` of a model, or
            ``lambda x: evidence.quadrature(model, x).value``.
        limits: ((low, high), (low, high)) of the two dimensions.
        ax: where to draw; None makes a figure.
        num_points: grid points a dimension.

    Returns:
        The axes; what the density integrates to within the limits is its title.

    Raises:
        DataTypeError: ``log_density`` cannot be called, or ``ax`` is no axes.
        ShapeError: ``limits`` of another shape, or ``log_density`` returns something else than ``(G,)``.
        SupportError: the density is zero, or not finite, everywhere.

    Example:
        >>> standard = torch.distributions.Normal(0.0, 1.0)
        >>> density(lambda x: standard.log_prob(x).sum(-1), ((-5, 5), (-5, 5))).get_title()
        '100% of the mass'
    """
    check_program("log_density", log_density)
    box = _box(limits, 2)
    num_points = check_positive_int("num_points", num_points, 9)
    grid = grid_over(box, num_points, [])
    with torch.no_grad():
        values = log_density(grid.points.to(torch.get_default_dtype()))
    if not isinstance(values, torch.Tensor) or values.shape != (num_points**2,):
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        cure = "Return one log-density for each point."
        raise ShapeError(refuse("log_density", f"shape ({num_points**2},)", got, cure))
    p = values.detach().double().cpu().exp().numpy().reshape(grid.shape)
    if not np.isfinite(p).all() or not p.any():
        cure = "Move the limits to where there are data, or look for NaN in the parameters."
        raise SupportError(refuse("log_density", "a finite density within the limits", "zero, NaN or infinity", cure))
    ax = axes(ax, (5.2, 4.2))
    filled = ax.contourf(*grid.lines, p.T, levels=12, cmap="Blues")
    ax.figure.colorbar(filled, ax=ax, label="p(x), per unit area")
    ax.set(title=f"{float((p * grid.cells).sum()):.0%} of the mass", xlabel="x1", ylabel="x2")
    return ax


def responsibilities(x: TensorLike, probs: TensorLike, ax: "Axes | None" = None) -> "Axes":
    """Data of two dimensions, each in the mixture of the components' colours by p(z = k | x).

    Args:
        x: ``(N, 2)``.
        probs: p(z = k | x), ``(N, C)``; rows sum to one.
        ax: where to draw; None makes a figure.

    Returns:
        The axes; the legend has the share of each component, the mean of its column.

    Raises:
        DataTypeError: no tensors or arrays, or ``ax`` is no axes.
        ShapeError: other shapes, or rows that are no probabilities.

    Example:
        >>> x, probs = torch.randn(2, 2), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
        >>> ax = responsibilities(x, probs)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['k = 0: 75%', 'k = 1: 25%']
    """
    from matplotlib.colors import to_rgb

    points, p = (
        points_2d("x", x, "Pass the two dimensions to be drawn, such as x[:, :2]."),
        probabilities("probs", probs),
    )
    if len(p) != len(points):
        raise ShapeError(refuse("probs", f"one row for each of {len(points)} data", len(p), "Pass both of the same x."))
    ax = axes(ax, (4.6, 4.6))
    colours = np.array([to_rgb(COLOURS[k % len(COLOURS)]) for k in range(p.shape[1])])  # (C, 3)
    best = p.argmax(1)
    for k, colour in enumerate(colours):
        marker = MARKERS[k // len(COLOURS) % len(MARKERS)]
        own = best == k
        first, second = points[own].T
        ax.scatter(first, second, c=(p[own] @ colours).clip(0, 1), marker=marker, s=14, linewidths=0)
        ax.scatter([], [], color=colour, marker=marker, s=30, label=f"k = {k}: {p[:, k].mean():.0%}")
    ax.set(xlabel="x1", ylabel="x2", title="p(z = k | x) by colour")
    legend_below(ax)
    return ax
