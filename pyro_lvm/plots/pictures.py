"""Pictures of images, and of latents as points of the plane."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_lvm._checks import check_positive_int, data_tensor, refuse
from pyro_lvm._typing import TensorLike
from pyro_lvm.errors import ShapeError
from pyro_lvm.plots._drawing import BLUE, COLOURS, MARKERS, axes, legend_below, points_2d

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["images", "latents"]


def images(
    images: TensorLike, ax: "Axes | None" = None, columns: int = 8, shape: tuple[int, ...] | None = None
) -> "Axes":
    """Images in rows, from the top left.

    Grey values from 0 to 1 are drawn as they are; if any lies outside, all are stretched from the least to the largest.

    Args:
        images: ``(M, H, W)``, ``(M, 1, H, W)`` or, in colour, ``(M, 3, H, W)``; or rows of pixels, ``(M, D)``.
        ax: where to draw; None makes a figure.
        columns: images in a row.
        shape: of one image, (H, W) or (channels, H, W), for rows of pixels; None takes a square of grey ones.

    Returns:
        The axes, without ticks.

    Raises:
        DataTypeError: no tensor or array, or ``ax`` is no axes.
        ShapeError: another shape.

    Example:
        >>> import torch
        >>> ax = images(torch.rand(10, 64), columns=5)  # 8 x 8 pixels, and one between images
        >>> ax.get_images()[0].get_array().shape
        (17, 44, 3)
    """
    from torchvision.utils import make_grid

    pixels = _pixels(data_tensor("images", images).detach().cpu(), shape)
    columns = min(check_positive_int("columns", columns), len(pixels))
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        pixels = (pixels - low) / max(high - low, 1e-12)
    rows = math.ceil(len(pixels) / columns)
    height, width = pixels.shape[2:]
    ax = axes(ax, (0.7 * columns, 0.7 * rows * height / width))
    grid = make_grid(pixels, nrow=columns, padding=1, pad_value=1.0)  # (3, ...)
    # torchvision puts a margin around the grid, too, but none around a single image.
    framed = grid[:, 1:-1, 1:-1] if len(pixels) > 1 else grid
    ax.imshow(framed.permute(1, 2, 0).numpy(), interpolation="nearest", vmin=0, vmax=1)
    ax.set_axis_off()
    return ax


def _pixels(images: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    """``(M, 1, H, W)`` or ``(M, 3, H, W)``."""
    if shape is None and images.dim() == 2:
        side = math.isqrt(images.shape[1])
        shape = (side, side)
    if shape is not None:
        if images[0].numel() != math.prod(shape):
            cure = "Pass shape=(H, W) or shape=(channels, H, W) with as many pixels."
            raise ShapeError(refuse("images", f"{math.prod(shape)} pixels, of {shape}", images[0].numel(), cure))
        images = images.reshape(len(images), *shape)
    found = images[:, None] if images.dim() == 3 else images
    if found.dim() != 4 or found.shape[1] not in (1, 3):
        cure = "Colours come before height and width: images.movedim(-1, 1)."
        expected = "(M, H, W), (M, 1, H, W), (M, 3, H, W) or (M, D)"
        raise ShapeError(refuse("images", expected, tuple(images.shape), cure))
    return found.float()


def latents(z: TensorLike, labels: TensorLike | None = None, ax: "Axes | None" = None) -> "Axes":
    """Points in two latent dimensions, coloured by label.

    Args:
        z: ``(N, 2)``, such as the means that `latent.encode` gives.
        labels: of any kind, ``(N,)``; each different one is a class. None draws all alike.
        ax: where to draw; None makes a figure.

    Returns:
        The axes; the legend has the classes.

    Raises:
        DataTypeError: no tensors or arrays, or ``ax`` is no axes.
        ShapeError: not two dimensions, or another number of labels.

    Example:
        >>> import torch
        >>> ax = latents(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['0', '1']
    """
    points = points_2d("z", z, "Pass two dimensions, such as z[:, :2].")
    ax = axes(ax, (4.6, 4.6))
    style: dict[str, Any] = {"s": 16, "linewidths": 0.3, "edgecolors": "0.3"}
    if labels is None:
        ax.scatter(*points.T, color=BLUE, **style)
    else:
        words = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
        if words.shape != points.shape[:1]:
            raise ShapeError(refuse("labels", f"one for each of {len(points)} points", words.shape, "Pass (N,)."))
        for k, word in enumerate(np.unique(words)):
            colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k // len(COLOURS) % len(MARKERS)]
            ax.scatter(*points[words == word].T, color=colour, marker=marker, label=str(word), **style)
        legend_below(ax, markerscale=1.5)
    ax.set(xlabel="first latent dimension", ylabel="second latent dimension")
    return ax
