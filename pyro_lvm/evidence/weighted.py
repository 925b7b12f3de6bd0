"""A streamed estimate that looks at the draws themselves, from one guide or from several in turn."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pyro_lvm.evidence.job import Job
from pyro_lvm.evidence.strata import Strata
from pyro_lvm.ops import WeightSummary
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.mixture import Member, Mixture
from pyro_lvm.tracing.particles import Draws
from pyro_lvm.tracing.tables import Table
from pyro_lvm.tracing.weights import Proposal, weighted_draws

__all__ = ["WeightedJob"]


@dataclass
class WeightedJob(Job):
    """A `Job` whose first K draws are those of the first guide, the next K those of the next one.

    Attributes:
        members: several guides; none where there is one, that of the tables.
        own: log p-hat of each guide alone, ``(J, N)``, of the data that are finished.
        lacking: where a guide lacks mass that others propose, likewise.
    """

    members: tuple[Member, ...] = ()
    own: list[torch.Tensor] = field(default_factory=list)
    lacking: list[torch.Tensor] = field(default_factory=list)

    @property
    def each(self) -> int:
        """The number of particles of each guide."""
        return self.num_particles // max(1, len(self.members))

    def begin(self) -> None:
        """Draws of other data are to come."""

    def take(self, batch: Batch, index: int, log_weights: torch.Tensor, draws: Draws) -> None:
        """Look at draws of guide ``index``, and their log-weights ``(k, N)``."""

    def drawing(self, batch: Batch, num_weights: int) -> Callable[[int], Table]:
        """As in `Job`; what is drawn is looked at on the way."""
        self.begin()
        if self.members:
            num_data = self.plan.model_layout.num_data(batch)
            self.strata = Strata(Mixture(self.members, batch), self.each, num_data, batch.args[0].device)
            return lambda num_particles: self.strata.draw(
                num_particles, lambda index, log_weights, draws: self.take(batch, index, log_weights, draws)
            )
        proposal = Proposal(self.plan, self.tables.guide, batch)

        def draw(num_particles: int) -> Table:
            table, draws = weighted_draws(self.plan, self.tables.model, proposal, num_particles)
            self.take(batch, 0, table.total, draws)
            return table

        return draw

    def keep(self, summary: WeightSummary) -> None:
        """Take the results of a chunk that is finished."""
        if self.members:
            summary, own, lacking = self.strata.summary(summary)
            self.own.append(own)
            self.lacking.append(lacking)
        super().keep(summary)

    def provenance(self) -> dict[str, Any]:
        """As in `Job`, and what each of several guides says."""
        if not self.members:
            return super().provenance()
        own, lacking = torch.cat(self.own, 1), torch.cat(self.lacking, 1)  # (J, N)
        guides = {
            member.name: {"mean": float(own[j].mean()), "disagreement": float(lacking[j].double().mean())}
            for j, member in enumerate(self.members)
        }
        return super().provenance() | {"particles_of_each_guide": self.each, "guides": guides}
