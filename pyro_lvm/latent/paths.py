"""Points to decode: between two latents, along their dimensions, and in the direction of an attribute."""

from collections.abc import Sequence
from typing import Literal

import torch

from pyro_lvm._checks import check_positive_int, data_tensor, refuse
from pyro_lvm._typing import TensorLike
from pyro_lvm.errors import ParameterError, ShapeError

__all__ = ["attribute_vector", "interpolate", "traverse"]


def interpolate(
    start: torch.Tensor, stop: torch.Tensor, num_steps: int = 8, path: Literal["linear", "spherical"] = "linear"
) -> torch.Tensor:
    r"""Points between two latents, both ends included: ``(num_steps, *shape)``.

    .. math:: z_\lambda = (1 - \lambda) z_0 + \lambda z_1, \qquad \lambda = 0, \dots, 1

    ``"spherical"`` turns from one direction to the other at an even rate, while the length changes evenly. In many
    dimensions draws of N(0, I) have nearly one length, and the middle of a straight line is shorter than all of them.

    Args:
        start: z_0, ``(..., L)``.
        stop: z_1, of the same shape.
        num_steps: how many points, 2 or more.
        path: ``"linear"`` or ``"spherical"``.

    Raises:
        ShapeError: the ends differ in shape, or there are fewer than two points.
        ParameterError: no such path; or a spherical one from zero, to zero, or between opposite directions.

    Source: Shoemake (1985), Animating rotation with quaternion curves, for the spherical path.

    Example:
        >>> interpolate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 3, "spherical")
        tensor([[1.0000, 0.0000],
                [0.7071, 0.7071],
                [0.0000, 1.0000]])
    """
    start, stop = data_tensor("start", start), data_tensor("stop", stop)
    if start.shape != stop.shape:
        raise ShapeError(refuse("stop", f"shape {tuple(start.shape)}, that of start", tuple(stop.shape), "Match them."))
    if path not in ("linear", "spherical"):
        raise ParameterError(refuse("path", '"linear" or "spherical"', repr(path), "Take one of them."))
    steps = torch.linspace(0, 1, check_positive_int("num_steps", num_steps, 2), dtype=start.dtype, device=start.device)
    steps = steps.reshape(-1, *(1,) * start.dim())  # (num_steps, 1...)
    straight = (1 - steps) * start + steps * stop
    if path == "linear":
        return straight
    lengths = start.norm(dim=-1, keepdim=True), stop.norm(dim=-1, keepdim=True)
    first, last = start / lengths[0], stop / lengths[1]
    angle = (first * last).sum(-1, keepdim=True).clamp(-1, 1).acos()  # (..., 1)
    if not bool(angle.isfinite().all()) or bool((angle > torch.pi - 1e-3).any()):
        cure = 'Take path="linear", or other ends.'
        raise ParameterError(refuse("start, stop", "directions with one way between them", "zero or opposite", cure))
    near = angle < 1e-3  # where both ways are the same to rounding
    safe = torch.where(near, 1.0, angle)
    turned = (((1 - steps) * safe).sin() * first + (steps * safe).sin() * last) / safe.sin()
    return torch.where(near, straight, ((1 - steps) * lengths[0] + steps * lengths[1]) * turned)


def traverse(
    z: torch.Tensor, dims: Sequence[int] | None = None, values: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3)
) -> torch.Tensor:
    """One latent with one of its dimensions at a time set to each of some values: ``(len(dims), len(values), L)``.

    Args:
        z: where to start, ``(L,)``.
        dims: dimensions to change; None for all.
        values: what to set them to; the default goes through N(0, 1).

    Raises:
        ShapeError: z is not ``(L,)``, or has no such dimension.

    Example:
        >>> traverse(torch.zeros(2), values=[-1.0, 1.0])
        tensor([[[-1.,  0.],
                 [ 1.,  0.]],
        <BLANKLINE>
                [[ 0., -1.],
                 [ 0.,  1.]]])
    """
    z = data_tensor("z", z)
    if z.dim() != 1:
        raise ShapeError(refuse("z", "shape (L,)", tuple(z.shape), "Pass one latent, e.g. z[0]."))
    chosen = list(range(len(z))) if dims is None else list(dims)
    if not chosen or not all(isinstance(dim, int) and 0 <= dim < len(z) for dim in chosen):
        raise ShapeError(refuse("dims", f"dimensions from 0 to {len(z) - 1}", chosen, "Leave it out for all."))
    grid = z.repeat(len(chosen), len(values), 1)
    for row, dim in enumerate(chosen):
        grid[row, :, dim] = torch.as_tensor(values, dtype=z.dtype, device=z.device)
    return grid


def attribute_vector(z: torch.Tensor, has: TensorLike) -> torch.Tensor:
    """The direction of an attribute: mean latent of the data that have it, less that of those that have not.

    Args:
        z: latents, e.g. ``encode(...).value``, ``(N, L)``.
        has: which data have the attribute, ``(N,)`` bool.

    Returns:
        ``(L,)``: to add to the latent of a datum.

    Raises:
        ShapeError: ``has`` is not ``(N,)``.
        ParameterError: all data have the attribute, or none.

    Example:
        >>> attribute_vector(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([False, True]))
        tensor([2., 0.])
    """
    z, chosen = data_tensor("z", z), data_tensor("has", has).bool()
    if chosen.shape != z.shape[:1]:
        raise ShapeError(refuse("has", f"shape ({len(z)},)", tuple(chosen.shape), "One entry for each latent."))
    if bool(chosen.all()) or not bool(chosen.any()):
        cure = "Pass data of which some have the attribute and some have not."
        raise ParameterError(refuse("has", "both kinds of data", "one", cure))
    return z[chosen].mean(0) - z[~chosen].mean(0)
