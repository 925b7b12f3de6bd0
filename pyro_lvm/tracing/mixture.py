"""Several guides of one model as one proposal: each draws, and all of them score what each has drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pyro_lvm._typing import Guide, Model
from pyro_lvm.errors import ParameterError, SiteError
from pyro_lvm.tracing.batch import Batch, Rows
from pyro_lvm.tracing.particles import Draws
from pyro_lvm.tracing.probe import PROBE_ROWS, Plan, run_pair
from pyro_lvm.tracing.tables import Table, agree
from pyro_lvm.tracing.unconstrained import Way, scored, ways_back
from pyro_lvm.tracing.weights import Proposal, check_scores, joint_table

__all__ = ["Member", "Mixture", "fit_together"]

_PARTICLES = 3
_SCORE_BYTES = 40  # of one density of one draw, in the tables that are made of it


@dataclass(frozen=True)
class Member:
    """A guide of the mixture with its model; both find their own parameters.

    Attributes:
        name: of the guide.
        model: p(x, z).
        guide: q(z | x).
        plan: how they run.
        ways: auxiliary site -> the way back. An AutoGuide draws in unconstrained coordinates, and has a density at the
            draws of others once these are known there.
        is_prior: whether it is the model's own prior, which nobody takes for the posterior.
    """

    name: str
    model: Model
    guide: Guide
    plan: Plan
    ways: Mapping[str, Way]
    is_prior: bool

    def given(self, draws: Draws) -> Draws:
        """Latents that any guide has drawn, in the form in which this one scores them."""
        return scored(self.ways, self.plan.match.sampled, draws)


class Mixture:
    """The guides on some data."""

    def __init__(self, members: Sequence[Member], batch: Batch) -> None:
        self.members, self.batch = members, batch
        self.proposals = [Proposal(member.plan, member.guide, batch) for member in members]

    def draw(self, index: int, num_particles: int) -> tuple[Table, list[Table], Draws]:
        """log p(x, z), ``(K, N)``, of draws from one guide, log q(z | x) under each of them, and the draws."""
        member = self.members[index]
        log_q, draws = self.proposals[index].draw(num_particles)
        log_joint, latents = joint_table(member.plan, member.model, self.batch, num_particles, draws)
        pairs = enumerate(zip(self.members, self.proposals, strict=True))
        log_qs = [log_q if i == index else q.score(m.given(draws), num_particles) for i, (m, q) in pairs]
        return log_joint, log_qs, latents


def fit_together(members: Sequence[Member], data: Rows) -> tuple[Member, ...]:
    """The members with what makes their draws exchangeable, once it is sure that they are.

    Raises:
        SiteError: guides draw or enumerate different sites, or one has no density at given draws.
        ParameterError: their models have different values.
    """
    _check_sites(members)
    nesting = max(member.plan.model_layout.nesting for member in members)
    tied = any(member.plan.tied for member in members)
    largest = max(member.plan.bytes_per_particle for member in members) + _SCORE_BYTES * len(members)
    batch = data.rows(slice(0, len(data) if tied else PROBE_ROWS))
    joined = []
    for member in members:
        plan = replace(_nested(member.plan, nesting), tied=tied, bytes_per_particle=largest)
        pair = run_pair(member.model, member.guide, batch)
        joined.append(replace(member, plan=plan, ways=ways_back(pair.guide, pair.model, plan.guide_layout)))
        try:
            check_scores(Proposal(plan, member.guide, batch), joined[-1].given)
        except SiteError as error:
            error.add_note(f"of guide {member.name!r}")
            raise
    _check_one_model(joined, batch)
    return tuple(joined)


def _check_sites(members: Sequence[Member]) -> None:
    sites = {member.name: sorted(member.plan.match.sampled) for member in members}
    if len(set(map(tuple, sites.values()))) > 1:
        summed = {member.name: sorted(member.plan.match.enumerated) for member in members}
        also = f", and leave {summed} to be summed out" if any(summed.values()) else ""
        raise SiteError(
            f"guides: expected guides that draw the same latent sites, got {sites}{also}. A density of some sites says "
            "nothing of others: pool guides of the same ones."
        )
    if not members[0].plan.match.sampled:
        raise SiteError(
            "guides: expected guides that draw a latent site, got none: every latent is summed out. "
            "log_marginal(model, None, x) is exact."
        )


def _nested(plan: Plan, nesting: int) -> Plan:
    """The plan with room for more plates, of which its fast ways of running particles were not looked at."""
    if plan.model_layout.nesting == nesting:
        return plan
    layouts = [replace(layout, nesting=nesting) for layout in (plan.model_layout, plan.guide_layout)]
    guide_mode = plan.guide_mode if plan.guide_mode == "once" else "looped"
    return replace(plan, model_layout=layouts[0], guide_layout=layouts[1], model_mode="looped", guide_mode=guide_mode)


def _check_one_model(members: Sequence[Member], batch: Batch) -> None:
    """log p(x, z) is the same in all pairs, whatever their models learned with other guides."""
    first = members[0]
    _, draws = Proposal(first.plan, first.guide, batch).draw(_PARTICLES)
    expected, _ = joint_table(first.plan, first.model, batch, _PARTICLES, draws)
    for member in members[1:]:
        got, _ = joint_table(member.plan, member.model, batch, _PARTICLES, draws)
        if not agree(expected, got):
            raise ParameterError(
                f"model: expected one log p(x, z) for all guides, got other values with {member.name!r} than with "
                f"{first.name!r}: they were trained with models of their own. Pass the `FitResult.model` of one fit, "
                "and guides that were trained with it frozen (update='guide')."
            )
