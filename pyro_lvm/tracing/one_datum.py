"""log p(x, z) and log q(z | x) of any pair at one datum, as functions of its continuous latents."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributions import biject_to

from pyro_lvm._checks import check_program, data_tensor, refuse
from pyro_lvm._typing import Guide, Model, TensorLike
from pyro_lvm.errors import ShapeError, SiteError, SupportError
from pyro_lvm.tracing.batch import Batch, make_batch
from pyro_lvm.tracing.intercept import Trace, is_latent, run, support
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.particles import Latent, Mode, Runner
from pyro_lvm.tracing.probe import Plan, probe_pair
from pyro_lvm.tracing.sites import guide_sites, is_delta
from pyro_lvm.tracing.unconstrained import determined, scored, ways_back
from pyro_lvm.tracing.weights import Proposal, check_data, evaluation

__all__ = ["PairAtDatum", "pair_at"]


@contextmanager
def pair_at(model: Model, guide: Guide, x: TensorLike, *args: Any) -> Iterator["PairAtDatum"]:
    """A pair at the one row of x, with its learned parameters and in eval mode; nothing outside changes.

    Raises:
        ShapeError: x has more than one row.
        SiteError: the guide has no density at given latents.
        SupportError: a latent that the guide samples is discrete, or lies on a surface.
        PlateError, ParameterError, DataTypeError: as in `log_marginal`.
    """
    check_program("guide", guide)
    batch = make_batch(data_tensor("x", x), args)
    if len(batch) != 1:
        cure = "Each datum has a posterior of its own: pass one row, x[i:i+1], and the same row of other arguments."
        raise ShapeError(refuse("x", "one datum, shape (1, ...)", tuple(batch.args[0].shape), cure))
    with evaluation(model, guide), torch.no_grad(), evaluation_rng(0):
        plan = probe_pair(model, guide, batch)
        with validation(False):
            check_data(plan, model, guide, batch)
            yield PairAtDatum(plan, model, guide, batch)


class PairAtDatum:
    """Both densities of a pair at one datum, as functions of points ``(G, d)``: all its latents in one row.

    Attributes:
        names: of the coordinates: the site, with an index where it has more than one.
        dim: d.
    """

    def __init__(self, plan: Plan, model: Model, guide: Guide, batch: Batch) -> None:
        self.plan, self.model, self.guide, self.batch = plan, model, guide, batch
        guide_trace = run(guide, batch.args)
        values = {name: site["value"] for name, site in guide_trace.items() if is_latent(site)}
        self._prior = run(model, batch.args, values=values)
        _, drawn = Proposal(plan, guide, batch).draw(1)
        self._like = {name: drawn[name] for name in plan.match.sampled}
        sizes = {name: latent.value[0].numel() for name, latent in self._like.items()}
        self.dim = sum(sizes.values())
        self.names = [n if size == 1 else f"{n}[{i}]" for n, size in sizes.items() for i in range(size)]
        for name in self._like:
            _check_continuous(name, self._prior)
        self._ways = ways_back(guide_trace, self._prior, plan.guide_layout)
        made = determined(self._ways)
        if elsewhere := [name for name in self._like if is_delta(guide_trace[name]) and name not in made]:
            raise SiteError(_no_density(elsewhere, "a Delta, made of draws from elsewhere"))

    def guide_draws(self, num_draws: int) -> torch.Tensor:
        """Latents drawn from q(z | x), ``(num_draws, d)``."""
        return self._flat(Proposal(self.plan, self.guide, self.batch).draw(num_draws)[1])

    def prior_draws(self, num_draws: int) -> torch.Tensor:
        """Latents drawn from p(z), ``(num_draws, d)``."""
        traces = [run(self.model, self.batch.args) for _ in range(num_draws)]
        return torch.stack([torch.cat([t[n]["value"].reshape(-1).double() for n in self._like]) for t in traces])

    def log_joint(self, points: torch.Tensor) -> torch.Tensor:
        """log p(x, z) in nats, ``(G,)``; -inf outside of the support of z."""
        plan = self.plan
        runner = replace(plan.model_runner(self.model), check_support=frozenset(self._like))
        return self._in_chunks(points, lambda part: self._total(runner, plan.model_mode, self._draws(part)))

    def log_guide(self, points: torch.Tensor) -> torch.Tensor:
        """log q(z | x) in nats, ``(G,)``; -inf outside of the support.

        Raises:
            SiteError: the guide knows the density of its own draws only.
        """
        mode = "vectorised" if self.plan.guide_mode == "once" else self.plan.guide_mode
        runner = Runner(self.guide, self.plan.guide_layout, guide_sites, check_support=frozenset(self._like))
        try:
            if self._ways:
                return self._in_chunks(points, lambda part: self._log_transformed(runner, mode, part))
            return self._in_chunks(points, lambda part: self._total(runner, mode, self._draws(part)))
        except (KeyError, NotImplementedError) as error:
            raise SiteError(_no_density(list(self._like), f"{type(error).__name__}: {error}")) from error

    def _draws(self, points: torch.Tensor) -> dict[str, Latent]:
        """The points as values of the sites."""
        latents, start = {}, 0
        for name, like in self._like.items():
            shape = like.value.shape[1:]
            own = points[:, start : start + shape.numel()].to(like.value)
            latents[name] = Latent(own.reshape(len(points), *shape), like.rank)
            start += shape.numel()
        return latents

    def _flat(self, draws: Any) -> torch.Tensor:
        return torch.cat([draws[name].value.flatten(1).double() for name in self._like], 1)

    def _in_chunks(self, points: torch.Tensor, density: Any) -> torch.Tensor:
        _, size = self.plan.chunk_sizes(1, len(points), points.device)
        return torch.cat([density(part) for part in points.split(size)])

    def _total(self, runner: Runner, mode: Mode, draws: dict[str, Latent]) -> torch.Tensor:
        num_points = len(next(iter(draws.values())).value)
        total = runner.run(self.batch, mode, num_points, draws)[0].total.expand(num_points, -1)[:, 0].double()
        if bool(total.isnan().any()):  # what depends on a latent outside of its support may be anything
            for name in self._like:
                alone = replace(runner, names=partial(_only, name))
                outside = alone.run(self.batch, mode, num_points, draws)[0].total.expand(num_points, -1)[:, 0]
                total = total.masked_fill(outside.isneginf(), -torch.inf)
        return total

    def _log_transformed(self, runner: Runner, mode: Mode, points: torch.Tensor) -> torch.Tensor:
        """log q(z | x) of a guide that draws each site in unconstrained coordinates, as AutoGuides do."""
        wanted = self._draws(points)
        inside = torch.ones(len(points), dtype=torch.bool, device=self.batch.args[0].device)
        for name, latent in wanted.items():
            constraint = support(self._prior[name]["fn"])
            inside &= constraint.check(latent.value).reshape(len(points), -1).all(1)
        given = scored(self._ways, list(wanted), wanted)
        table, got = runner.run(self.batch, mode, len(points), given)
        same = [torch.isclose(got[n].value, latent.value, 1e-3, 1e-5) for n, latent in wanted.items()]
        if not all(bool(each.reshape(len(points), -1).all(1)[inside].all()) for each in same):
            raise SiteError(_no_density(list(self._like), "another change of variables than that of their support"))
        total = table.total.expand(len(points), -1)[:, 0].double()
        return total.masked_fill(~inside, -torch.inf)


def _only(name: str, trace: Trace) -> list[str]:
    return [name]


def _check_continuous(name: str, prior: Trace) -> None:
    constraint, shape = support(prior[name]["fn"]), prior[name]["value"].shape
    if constraint.is_discrete:
        got, cure = "a discrete one", "Leave it out of the guide, and it is summed out."
    elif _is_surface(constraint, shape):
        got, cure = f"one on a surface, {constraint}", "Write the model with one coordinate less."
    else:
        return
    raise SupportError(refuse(f"latent site {name!r}", "a continuous latent with a density in its space", got, cure))


def _is_surface(constraint: Any, shape: torch.Size) -> bool:
    """Whether fewer numbers than its coordinates give a point of it, as on a simplex."""
    try:
        return biject_to(constraint).inverse_shape(shape) != shape
    except NotImplementedError:  # torch cannot unfold the support of a mixture, which is none
        return False


def _no_density(names: list[str], got: str) -> str:
    expected = "a guide that has log q(z | x) at any z"
    return refuse(f"guide sites {names}", expected, got, "Sample them from a distribution with a log_prob.")
