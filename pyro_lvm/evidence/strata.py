"""The weights of some data under a mixture of guides, of which each in turn has drawn as many: the strata."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from pyro_lvm.ops import WeightAccumulator, WeightSummary, disagreement
from pyro_lvm.tracing.mixture import Mixture
from pyro_lvm.tracing.particles import Draws
from pyro_lvm.tracing.tables import Table
from pyro_lvm.tracing.weights import weigh

__all__ = ["Strata", "Take"]

#: Looks at the draws of a guide, by its number, and their log-weights ``(k, N)``.
Take = Callable[[int, torch.Tensor, Draws], None]

# Of so many own draws a guide expects at most this many where it proposes "next to nothing"; none come with 5 %.
_EXPECTED = 3.0


class Strata:
    """The draws of all guides for some data, K of the first one, then K of the next.

    Args:
        mixture: of J guides on these data.
        num_particles: K.
        num_data: N.
        device: of the data.
    """

    def __init__(self, mixture: Mixture, num_particles: int, num_data: int, device: torch.device) -> None:
        self.mixture, self.num_particles, self.num_data, self.device = mixture, num_particles, num_data, device
        self.drawn = 0
        self.pooled: list[WeightSummary] = []  # of the mixture's weights, at the draws of each guide
        self.own: list[WeightSummary] = []  # of each guide's own
        shape = (len(mixture.members), num_data)
        self.missed = torch.full(shape, -math.inf, dtype=torch.float64, device=device)  # (J, N) log of sums of weights

    def draw(self, num_particles: int, take: Take) -> Table:
        """The next log-weights of the mixture, ``(k, N)``; ``take`` sees those of each guide with the draws."""
        tables = []
        while num_particles:
            index, done = divmod(self.drawn, self.num_particles)
            if not done:
                self.sums = [WeightAccumulator(self.num_data, self.num_particles, self.device) for _ in range(2)]
            size = min(num_particles, self.num_particles - done)
            tables.append(self._draw(index, size, take))
            self.drawn, num_particles = self.drawn + size, num_particles - size
            if done + size == self.num_particles:
                for summaries, sums in zip((self.pooled, self.own), self.sums, strict=True):
                    summaries.append(sums.summary())
        magnitude = torch.stack([table.magnitude for table in tables]).amax(0)
        return Table(torch.cat([table.total for table in tables]), magnitude)

    def _draw(self, index: int, size: int, take: Take) -> Table:
        """Draws of one guide."""
        log_joint, log_qs, draws = self.mixture.draw(index, size)
        totals = torch.stack([q.total.expand(size, self.num_data) for q in log_qs])  # (J, k, N)
        totals = totals.to(log_joint.total.device)
        both = totals.logsumexp(0)  # (k, N)
        # At its own draws a guide has a density of about the size of the mixture's, whatever the others have there.
        log_mix = Table(both - math.log(len(log_qs)), log_qs[index].magnitude)
        tables = [self._supported(log_joint, log_q, size) for log_q in (log_mix, log_qs[index])]
        for sums, table in zip(self.sums, tables, strict=True):
            sums.update(table.total, table.magnitude)
        rare = math.log(_EXPECTED / (len(log_qs) * self.num_particles))
        unseen = totals - both < rare  # (J, k, N)
        weights = tables[0].total.double().expand_as(totals).masked_fill(~unseen, -math.inf)
        self.missed = torch.logaddexp(self.missed, weights.logsumexp(1))
        take(index, tables[0].total, draws)
        return tables[0]

    def _supported(self, log_joint: Table, log_q: Table, size: int) -> Table:
        """The log-weights; where the model has no mass they are -inf, also where a guide has no density at all."""
        table = weigh(log_joint, log_q, size)
        return Table(table.total.masked_fill(log_joint.total.isneginf(), -math.inf), table.magnitude)

    def summary(self, whole: WeightSummary) -> tuple[WeightSummary, torch.Tensor, torch.Tensor]:
        """That of all weights, with the errors of a stratified sample and status ``disagreement``.

        Returns:
            The summary; each guide's own log p-hat, ``(J, N)``; and where it lacks mass that others propose.
        """
        values, errors, elbo_errors = (
            torch.stack([getattr(part, name) for part in self.pooled]) for name in ("value", "stderr", "elbo_stderr")
        )  # (J, N)
        shares = (values - whole.value).exp() / len(values)  # of p-hat, from the draws of each guide
        variance = (shares * errors).square().masked_fill(values.isneginf(), 0.0).sum(0)
        stderr = torch.where(variance.isfinite(), variance.sqrt(), whole.stderr)  # one draw has no variance
        elbo_stderr = elbo_errors.square().sum(0).sqrt() / len(values)
        own, own_errors = (torch.stack([getattr(part, name) for part in self.own]) for name in ("value", "stderr"))
        log_total = whole.value + math.log(whole.num_particles)
        missed = (self.missed - log_total).exp().nan_to_num(0.0)  # (J, N) share of the posterior
        missed[[member.is_prior for member in self.mixture.members]] = 0.0  # that the prior lacks some is no news
        status, lacking = disagreement(whole.status, whole.value, stderr, own, own_errors, missed)
        bias = -0.5 * stderr.square()
        return replace(whole, stderr=stderr, bias=bias, elbo_stderr=elbo_stderr, status=status), own, lacking
