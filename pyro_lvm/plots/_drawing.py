"""What all pictures share: colours, axes, a legend out of the way, and what is said of what cannot be drawn."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_lvm._checks import data_tensor, refuse
from pyro_lvm._typing import TensorLike
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.ops import STATUSES

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

__all__ = [
    "BLUE",
    "COLOURS",
    "GREY",
    "MARKERS",
    "ORANGE",
    "STATUS_COLOURS",
    "STATUS_MARKERS",
    "VERMILLION",
    "axes",
    "check_fields",
    "legend_below",
    "nats",
    "points_2d",
    "probabilities",
]

# From Okabe and Ito's palette, told apart by every kind of colour vision.
BLUE, ORANGE, VERMILLION, GREY = "#0072B2", "#E69F00", "#D55E00", "#999999"
#: Of classes and components, in their order.
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", VERMILLION, "#000000", "#F0E442")
#: Of further classes: those after the last colour begin with the first colour and another marker.
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
_GOOD_TO_BAD = ("#000000", BLUE, "#009E73", "#F0E442", "#56B4E9", VERMILLION, "#CC79A7", GREY)
STATUS_COLOURS = dict(zip(STATUSES, _GOOD_TO_BAD, strict=True))
STATUS_MARKERS = dict(zip(STATUSES, ("s", "D", "o", "^", "*", "v", "X", "P"), strict=True))


def axes(ax: "Axes | None", figsize: tuple[float, float] = (5.0, 3.6)) -> "Axes":
    """``ax``, or the axes of a new figure of ``figsize`` inches.

    Raises:
        DataTypeError: ``ax`` is something else.
    """
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    if ax is None:
        return Figure(figsize=figsize, layout="constrained").subplots()
    if not isinstance(ax, Axes):
        cure = "Pass one of the axes of figure.subplots(), or nothing to have them made."
        raise DataTypeError(refuse("ax", "matplotlib axes", type(ax).__name__, cure))
    return ax


def legend_below(ax: "Axes", handles: "Sequence[Artist] | None" = None, **options: Any) -> None:
    """A legend under the label of the x-axis, where there are no data, in as many columns as there is room for."""
    from matplotlib.transforms import ScaledTranslation

    shown = ax.get_legend_handles_labels()[0] if handles is None else handles
    longest = max(len(str(handle.get_label())) for handle in shown)
    width = ax.get_window_extent().width / ax.figure.dpi  # inches
    columns = min(5, max(1, int(width / (0.072 * longest + 0.5))))  # of letters of 8 points
    below = ScaledTranslation(0, -38 / 72, ax.figure.dpi_scale_trans)  # under ticks and label, of 10 points each
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": ax.transAxes + below}
    place |= {"borderaxespad": 0, "frameon": False, "fontsize": "small", "handlelength": 1.5}
    ax.legend(handles=shown, ncols=columns, **place, **options)


def check_fields(argument: str, value: Any, kind: str, fields: Collection[str], cure: str) -> None:
    """A record of a layer above, which cannot be imported here, has what is drawn of it."""
    if not all(hasattr(value, name) for name in fields):
        raise DataTypeError(refuse(argument, kind, type(value).__name__, cure))


def points_2d(argument: str, value: TensorLike, cure: str) -> np.ndarray:
    """Points of the plane, ``(N, 2)``."""
    points = data_tensor(argument, value).detach().cpu()
    if points.dim() != 2 or points.shape[1] != 2:
        raise ShapeError(refuse(argument, "shape (N, 2)", tuple(points.shape), cure))
    return points.double().numpy()


def probabilities(argument: str, value: TensorLike) -> np.ndarray:
    """Rows of probabilities, ``(N, C)``."""
    p = data_tensor(argument, value).detach().cpu().double()
    if p.dim() != 2 or bool((p < -1e-6).any()) or not torch.allclose(p.sum(1), p.new_ones(len(p)), atol=1e-3):
        sums = p.flatten(1).sum(1) if p.dim() > 1 else p
        got = f"shape {tuple(p.shape)} with sums from {float(sums.min()):.3g} to {float(sums.max()):.3g}"
        raise ShapeError(refuse(argument, "probabilities (N, C) whose rows sum to one", got, "Pass p(k | x)."))
    return p.numpy()


def nats(value: float, error: float = 0.0) -> str:
    """A number of nats, with its error where that is not below the last digit."""
    digits = f"{round(value, 2) + 0.0:.2f}".replace("-", "\u2212")  # no minus zero
    return f"{digits} \u00b1 {error:.1g}" if error >= 0.005 else digits
