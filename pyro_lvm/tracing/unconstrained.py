"""Guides that draw latents in unconstrained coordinates, as Pyro's AutoGuides do, and the way back to these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyro_lvm.tracing.intercept import Trace, bijection, is_latent, support
from pyro_lvm.tracing.particles import Draws, Latent, Layout
from pyro_lvm.tracing.sites import is_delta

__all__ = ["Way", "determined", "scored", "ways_back"]

_NEAR = 1e-3  # relative: what a way through float32 bijections and back may change, and no other density is within


@dataclass(frozen=True)
class Way:
    """The way back to an auxiliary draw from the latents that it determines.

    Attributes:
        inverses: latent -> from its values to coordinates, in the order in which the draw holds them.
        row: canonical shape of one draw that has them all side by side, as that of an ``AutoMultivariateNormal``; None
            where it has the shape of its one latent, as that of an ``AutoNormal``.
    """

    inverses: Mapping[str, Any]
    row: tuple[int, ...] | None

    def back(self, draws: Draws) -> Latent:
        """The draw that makes these values."""
        parts = [Latent(inverse(draws[name].value), draws[name].rank) for name, inverse in self.inverses.items()]
        return self.join(parts)

    def join(self, parts: Sequence[Latent]) -> Latent:
        """The draw of which these are the coordinates of each latent."""
        if self.row is None:
            return parts[0]
        flat = torch.cat([part.value.flatten(1) for part in parts], 1)
        return Latent(flat.reshape(-1, *self.row), 0)

    def split(self, draw: Latent, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        """The coordinates of each latent in a draw; ``shapes`` are those of one draw of them."""
        if self.row is None:
            return {name: draw.value for name in self.inverses}
        flat = draw.value.flatten(1).split([shapes[name].numel() for name in self.inverses], 1)
        return {name: part.reshape(-1, *shapes[name]) for name, part in zip(self.inverses, flat, strict=True)}


def ways_back(guide: Trace, model: Trace, layout: Layout) -> dict[str, Way]:
    """Auxiliary site -> the way back to it, as far as its latents are the usual bijections of it.

    Args:
        guide: a plain run of the guide.
        model: one of the model, with the latents of the guide.
        layout: of the guide.
    """
    sites = [name for name, site in guide.items() if is_latent(site)]
    ways, coordinates = {}, {}
    for name in sites:
        way = _inverse(model[name]["fn"]) if name in model and is_delta(guide[name]) else None
        if way is not None:
            ways[name], coordinates[name] = way, way(guide[name]["value"])
    found = {}
    for i, auxiliary in enumerate(sites):
        if not guide[auxiliary]["infer"].get("is_auxiliary"):
            continue
        value, batch_shape = guide[auxiliary]["value"], guide[auxiliary]["fn"].batch_shape
        alike = [name for name in coordinates if guide[name]["fn"].batch_shape == batch_shape]
        alone = next((name for name in alike if _near(coordinates[name], value)), None)
        follow = [name for name in sites[i + 1 :] if name in coordinates]
        if alone is not None:
            found[auxiliary] = Way({alone: ways[alone]}, None)
        elif count := _count(value, [coordinates[name] for name in follow]):
            padding = (1,) * (layout.nesting - len(batch_shape))
            found[auxiliary] = Way({name: ways[name] for name in follow[:count]}, (*padding, *value.shape))
    return found


def determined(ways: Mapping[str, Way]) -> set[str]:
    """Latents that follow from auxiliary draws."""
    return {name for way in ways.values() for name in way.inverses}


def scored(ways: Mapping[str, Way], names: Sequence[str], draws: Draws) -> dict[str, Latent]:
    """Latents ``names``, whoever has drawn them, in the form in which their guide scores them."""
    follow = determined(ways)  # to the last bit, from the auxiliary draws
    back = {auxiliary: way.back(draws) for auxiliary, way in ways.items()}
    return back | {name: draws[name] for name in names if name not in follow}


def _inverse(fn: Any) -> Any:
    """From the support of a continuous latent to the real numbers."""
    constraint = support(fn)
    if constraint is None or constraint.is_discrete:
        return None
    way = bijection(constraint)
    return None if way is None else way.inv


def _count(draw: torch.Tensor, parts: Sequence[torch.Tensor]) -> int:
    """How many of these, side by side and from the first, are the draw; 0 where none are."""
    for count in range(1, len(parts) + 1):
        flat = torch.cat([part.reshape(-1) for part in parts[:count]])
        if flat.numel() >= draw.numel():
            return count if _near(flat, draw.reshape(-1)) else 0
    return 0


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(((one - other).abs() <= _NEAR * other.abs().clamp(min=1.0)).all())
