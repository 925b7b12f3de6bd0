"""The continuous latents of a pair as one vector of unconstrained coordinates for each datum, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyro_lvm._checks import refuse
from pyro_lvm._typing import Guide, Model
from pyro_lvm.errors import PlateError, SiteError, SupportError
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.intercept import Site, Trace, bijection, is_latent, run, support, vectorised_frames
from pyro_lvm.tracing.isolation import validation
from pyro_lvm.tracing.particles import Draws, Latent, Layout
from pyro_lvm.tracing.probe import Plan
from pyro_lvm.tracing.sites import check_free, is_delta, mask_of
from pyro_lvm.tracing.unconstrained import Way, determined, ways_back
from pyro_lvm.tracing.weights import Proposal, check_scores

__all__ = ["Axis", "Coordinates", "check_fixed", "check_prior", "make_axis", "pair_coordinates"]


@dataclass(frozen=True, eq=False)
class Axis:
    """One latent site.

    Attributes:
        name: of the site.
        transform: from unconstrained coordinates to values.
        batch_shape: of the site's plates, with as many dimensions as the pair's plates use.
        shape: of the coordinates of one element of the plates.
        rank: number of batch dimensions that the site's own plates use.
        moves: which coordinates have a density, ``(*batch_shape, *shape)``; masked ones have none.
    """

    name: str
    transform: Any
    batch_shape: torch.Size
    shape: torch.Size
    rank: int
    moves: torch.Tensor


class Coordinates:
    """u ``(K, N, D)`` of all axes; with one joint result N = 1 and D is everything.

    Attributes:
        axes: the sites.
        ways: auxiliary sites of a guide that draws coordinates themselves, and the way back to these.
        num_data: N.
        dim: D.
        moves: which coordinates have a density, ``(N, D)``.
    """

    def __init__(self, layout: Layout, batch: Batch, axes: list[Axis], ways: Mapping[str, Way] | None = None) -> None:
        if layout.plate is not None and layout.dim is None:
            cure = f'Write `with pyro.plate("{layout.plate}", len(x)):`, or ask for one result with data_plate=None.'
            raise PlateError(refuse(f"plate {layout.plate!r}", "a plate with a dimension", "a Python loop", cure))
        self.layout, self.axes, self.ways, self.num_data = layout, axes, ways or {}, layout.num_data(batch)
        self.sizes = [axis.moves.numel() // self.num_data for axis in axes]
        self.dim = sum(self.sizes)
        nothing = torch.empty(self.num_data, 0, dtype=torch.bool, device=batch.args[0].device)
        self.moves = torch.cat([nothing, *(self._rows(axis.moves[None])[0] for axis in axes)], -1)  # (N, D)

    def latents(self, u: torch.Tensor) -> tuple[dict[str, Latent], torch.Tensor]:
        """Values of the sites, and log |dz/du| in nats, ``(K, N)``."""
        draws, jacobian = {}, u.new_zeros(u.shape[:2])
        for axis, own in self._split(u):
            z = axis.transform(own)
            slope = axis.transform.log_abs_det_jacobian(own, z).reshape(len(u), *axis.batch_shape, -1).sum(-1)
            jacobian = jacobian + self._rows(slope).sum(-1)
            draws[axis.name] = Latent(z, axis.rank)
        return draws, jacobian

    def guide_draws(self, u: torch.Tensor, draws: Draws) -> Draws:
        """What the guide is to be handed to score them: the coordinates themselves where it draws these."""
        own = {axis.name: Latent(part, axis.rank) for axis, part in self._split(u)}
        made = {name: way.join([own[latent] for latent in way.inverses]) for name, way in self.ways.items()}
        return made | {name: draws[name] for name in own.keys() - determined(self.ways)}

    def vector(self, draws: Mapping[str, Latent]) -> torch.Tensor:
        """u of given values, ``(K, N, D)``."""
        shapes = {axis.name: axis.batch_shape + axis.shape for axis in self.axes}
        known: dict[str, torch.Tensor] = {}
        for name, way in self.ways.items():
            known |= way.split(draws[name], shapes) if name in draws else {}
        parts = []
        for axis in self.axes:
            own = known[axis.name] if axis.name in known else axis.transform.inv(draws[axis.name].value)
            parts.append(self._rows(own.expand((len(own), *shapes[axis.name]))))
        return torch.cat(parts, -1)

    def there_and_back(self, draws: Draws) -> Draws:
        """What a guide has drawn, by way of u, as it is handed to it again."""
        u = self.vector(draws)
        return self.guide_draws(u, self.latents(u)[0])

    def _split(self, u: torch.Tensor) -> list[tuple[Axis, torch.Tensor]]:
        """The coordinates of each site, ``(K, *batch, *shape)``."""
        parts = zip(self.axes, u.split(self.sizes, -1), strict=True)
        return [(axis, self._unrows(part, axis)) for axis, part in parts]

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        """``(K, *batch, ...)`` with the data next to the particles and all else in one dimension, ``(K, N, d)``."""
        return self.layout.data_second(values).reshape(len(values), self.num_data, -1)

    def _unrows(self, part: torch.Tensor, axis: Axis) -> torch.Tensor:
        if self.layout.dim is None:
            return part.reshape(len(part), *axis.batch_shape, *axis.shape)
        data = self.layout.nesting + self.layout.dim
        others = axis.batch_shape[:data] + axis.batch_shape[data + 1 :]
        return part.reshape(len(part), self.num_data, *others, *axis.shape).movedim(1, 1 + data)


def make_axis(name: str, site: Site, transform: Any, layout: Layout) -> Axis:
    """The axis of a site of a plain run, whose values ``transform`` makes from coordinates."""
    value, event_dim = site["value"], site["fn"].event_dim
    own = value.shape[: value.dim() - event_dim]
    batch_shape = torch.Size((1,) * (layout.nesting - len(own)) + tuple(own))
    shape = transform.inverse_shape(value.shape)[len(own) :]
    mask = mask_of(site).to(value.device)
    moves = mask.reshape((*mask.shape, *(1,) * len(shape))).expand((*batch_shape, *shape))
    rank = max((-frame.dim for frame in vectorised_frames(site)), default=0)
    return Axis(name, transform, batch_shape, shape, rank, moves)


def pair_coordinates(plan: Plan, model: Model, guide: Guide, batch: Batch) -> Coordinates:
    """The latents that the guide draws, in unconstrained coordinates.

    Raises:
        SupportError: a latent is discrete, has no bijection to the real numbers, or its support moves with the draws of
            other latents; or the guide draws none.
        SiteError: the guide cannot score given draws, or draws a latent elsewhere; or something depends on missing
            values, which only the model draws.
        PlateError: the data plate is a Python loop.
    """
    layout = plan.guide_layout
    if not plan.match.sampled:
        cure = "Nothing is left to anneal: log_marginal is exact for this pair."
        raise SupportError(refuse("guide", "a continuous latent", "none", cure))
    check_free(model, batch.args, plan.match)
    guide_trace, again = run(guide, batch.args), run(guide, batch.args)
    values = {name: site["value"] for name, site in guide_trace.items() if is_latent(site)}
    model_trace = run(model, batch.args, values=values)
    ways = ways_back(guide_trace, model_trace, layout)
    axes = [_axis(name, guide_trace, model_trace, layout, ways) for name in plan.match.sampled]
    others = [_axis(name, again, model_trace, layout, ways) for name in plan.match.sampled]
    check_fixed(axes, others, guide_trace)
    coordinates = Coordinates(layout, batch, axes, ways)
    check_scores(Proposal(plan, guide, batch), coordinates.there_and_back)
    return coordinates


def check_prior(model: Model, prior: Guide, batch: Batch) -> None:
    """No latent that a prior draws depends on one that it leaves to be summed out, and so draws in secret.

    Raises:
        SupportError: one does; its density under the prior is a sum that the prior does not know.
    """
    with validation(False):
        first = run(prior, batch.args)
        values = {name: site["value"] for name, site in first.items() if is_latent(site)}
        hidden = [name for name, site in run(model, batch.args).items() if is_latent(site) and name not in values]
        for _ in range(16 if hidden else 0):  # a single class would often be drawn alike by two
            again = run(prior, batch.args, values=values)
            for name in values:
                before, after = (trace[name]["fn"].log_prob(values[name]) for trace in (first, again))
                if not torch.allclose(before, after, equal_nan=True):
                    cure = "Pass guides in the place of the prior, as [guide, wider], or a guide that draws these, too."
                    got = f"one that depends on {hidden}, of which it is to be summed"
                    raise SupportError(refuse(f"latent site {name!r}", "a prior density", got, cure))


def _axis(name: str, guide: Trace, model: Trace, layout: Layout, ways: Mapping[str, Way]) -> Axis:
    site = guide[name]
    if not is_delta(site):
        return make_axis(name, site, _transform(name, support(site["fn"])), layout)
    if name not in determined(ways):
        cure = "Sample it from a distribution with a log_prob, or draw its unconstrained coordinates as AutoGuides do."
        raise SiteError(refuse(f"guide site {name!r}", "a density", "a Delta, made of draws from elsewhere", cure))
    return make_axis(name, site, _transform(name, support(model[name]["fn"])), layout)


def _transform(name: str, constraint: Any) -> Any:
    """From real numbers to the support of a latent."""
    if constraint is None or constraint.is_discrete:
        cure = "Annealing needs gradients: leave it out of the guide, and it is summed out if it has few values."
        raise SupportError(refuse(f"latent site {name!r}", "a continuous latent", "a discrete one", cure))
    transform = bijection(constraint)
    if transform is None:
        cure = "Write the latent with another support, or use log_marginal."
        expected = "a support with a bijection to the real numbers"
        raise SupportError(refuse(f"latent site {name!r}", expected, constraint, cure))
    return transform


def check_fixed(axes: Sequence[Axis], others: Sequence[Axis], trace: Trace) -> None:
    """The supports of two runs, of which ``trace`` is one, are the same whatever other latents are drawn.

    Raises:
        SupportError: one is not.
    """
    for axis, other in zip(axes, others, strict=True):
        like = trace[axis.name]["value"]
        u = torch.linspace(-1, 1, axis.moves.numel(), dtype=like.dtype, device=like.device)
        u = u.reshape(1, *axis.batch_shape, *axis.shape)
        same = axis.shape == other.shape and torch.allclose(axis.transform(u), other.transform(u), equal_nan=True)
        if not same:
            cure = "Write the model with a latent of fixed support and scale it afterwards."
            got = "one that moves with the draws of other latents"
            raise SupportError(refuse(f"latent site {axis.name!r}", "a support that depends on x alone", got, cure))
