"""Importance sampling to a wanted standard error: each datum gets the particles that it needs, as a pilot says."""

import math
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_lvm._checks import refuse, shown, warn_caller
from pyro_lvm._interrupts import kept_if
from pyro_lvm.errors import BudgetError, DataTypeError, ShapeError, UnreliableEstimateWarning
from pyro_lvm.evidence.job import Job
from pyro_lvm.ops import WeightAccumulator, WeightSummary
from pyro_lvm.ops.allocation import PowerSums, on_grid, particles_needed
from pyro_lvm.ops.memory import keep_freed_memory
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.weights import check_data

__all__ = ["TargetedJob", "check_target"]

_FIRST = 128  # particles of a datum in the shortest pilot
_LEAST = 256  # and in the final estimate: from about there on k-hat of light tails stays below its threshold
_SHARE = 0.25  # of the particles that it asks for, a pilot has seen itself


def check_target(target: Any, resume: Any) -> float | None:
    """A wanted standard error in nats, or None.

    Raises:
        DataTypeError: it is no positive number, or comes with a directory to resume from.
    """
    if target is None:
        return None
    number = isinstance(target, int | float) and not isinstance(target, bool)
    if not number or not 0 < target < math.inf:
        cure = "Pass the standard error of log p-hat that you want, in nats, e.g. target_stderr=0.05."
        raise DataTypeError(refuse("target_stderr", "a positive number or None", repr(target), cure))
    if resume is not None:
        cure = "Leave one of them out: what the pilot has found is not kept."
        raise DataTypeError(refuse("resume", "None together with target_stderr", repr(resume), cure))
    return float(target)


@dataclass
class TargetedJob(Job):
    """A `Job` whose ``num_particles`` is the most that one datum may take.

    Attributes:
        target: wanted standard error in nats.
        needed: particles that each datum would take for it, ``(N,)``, of which it gets at most ``num_particles``.
        particles: what it got, ``(N,)``.
        spent: weights drawn by the pilot.

    Raises:
        ShapeError: one particle, whose weight has no variance.
    """

    target: float = field(kw_only=True)
    needed: torch.Tensor = field(init=False)
    particles: torch.Tensor = field(init=False)
    spent: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.num_particles < 2:
            cure = "One weight has no variance: pass e.g. num_particles=1000, or leave target_stderr out."
            raise ShapeError(refuse("num_particles", "2 or more together with target_stderr", self.num_particles, cure))

    def run(self, progress: bool | None) -> None:
        """A pilot of all data, then all data anew; of these, what is finished when Ctrl-C comes stays."""
        keep_freed_memory()
        with tqdm(unit=" weights", unit_scale=True, disable=not shown(progress)) as bar:
            self.needed = torch.cat([self._pilot(start, batch, bar) for start, batch in self.slabs()])
            self._check()
            # A pair that is tied to its data draws as many for each of them.
            needed = self.needed.amax().expand_as(self.needed) if self.plan.tied else self.needed
            self.particles = on_grid(needed, min(_LEAST, self.num_particles), self.num_particles)
            bar.total = self.spent + int(self.particles.sum())
            with kept_if(lambda: self.columns.done):
                for start, batch in self.slabs():
                    self.keep(self._final(start, batch, bar))
                    self.digest.add(batch)

    def _pilot(self, start: int, batch: Batch, bar: Any) -> torch.Tensor:
        """Particles that some data need, ``(N,)``: twice as many, until they are a fair share of what they ask for."""
        check_data(self.plan, self.tables.model, self.tables.guide, batch, start)
        seen = self._sums(self.plan.model_layout.num_data(batch))
        left, more, budget = torch.arange(len(seen.count), device=seen.count.device), _FIRST, self.num_particles
        needed = torch.zeros_like(seen.count)
        while len(left):
            more = min(more, budget)
            for at, sums in self.pieces(batch, left, more, self._sums, bar):
                seen.add(sums, at)
                self.spent += more * len(at)
            needed = particles_needed(seen, self.target)
            short = seen.count < _SHARE * needed.clamp(min(_LEAST, budget), budget)
            short |= short.any() & self.plan.tied  # all data or none
            more = int(seen.count.max())
            left = short.nonzero()[:, 0]
        return needed

    def _sums(self, num_data: int) -> PowerSums:
        return PowerSums(num_data, self.columns["value"].device)

    def _check(self) -> None:
        """Some datum can have the wanted error; say how many particles the others would take.

        Raises:
            BudgetError: none can.
        """
        over = self.needed > self.num_particles
        if not bool(over.any()):
            return
        finite = self.needed[over & self.needed.isfinite()]
        most = f"up to about {_rounded(finite.max())}" if len(finite) else "more than can be told"
        if bool(over.all()):
            median = _rounded(finite.median()) if len(finite) else "an unknown number"
            cure = (
                f"Pass num_particles of that size, a larger target, or a guide that fits better: {most} for one datum."
            )
            expected = f"a standard error that {self.num_particles} particles reach for some of the data"
            got = f"{self.target:g}, which takes about {median} (median)"
            raise BudgetError(refuse("target_stderr", expected, got, cure))
        message = (
            f"target_stderr={self.target:g}: {int(over.sum())} of {len(over)} data would take more than "
            f"num_particles={self.num_particles}, {most}. They get these, and a larger standard error."
        )
        warn_caller(message, UnreliableEstimateWarning)

    def _final(self, start: int, batch: Batch, bar: Any) -> WeightSummary:
        """The estimate of some data, those with one number of particles together."""
        size = self.plan.model_layout.num_data(batch)
        granted = self.particles[start : start + size]
        found: dict[str, torch.Tensor] = {}
        for particles in granted.unique().tolist():
            rows = (granted == particles).nonzero()[:, 0]
            collector = partial(WeightAccumulator, num_particles=particles, device=granted.device)
            for at, weights in self.pieces(batch, rows, particles, collector, bar):
                for name, column in _columns(weights.summary()).items():
                    found.setdefault(name, column.new_empty(size))[at] = column
        return WeightSummary(**found, num_particles=self.num_particles)

    @property
    def granted(self) -> torch.Tensor:
        """As in `Job`: those that it got."""
        return self.particles[: self.columns.done].double()

    def provenance(self) -> dict[str, Any]:
        """As in `Job`, and what the target took."""
        done = self.granted
        spent = {"target": self.target, "pilot": self.spent, "final": int(done.sum())}
        spent |= {"over_budget": int((self.needed > self.num_particles).sum())}
        return super().provenance() | {"target_stderr": spent}


def _columns(summary: WeightSummary) -> dict[str, torch.Tensor]:
    return {f.name: getattr(summary, f.name) for f in fields(summary) if f.name != "num_particles"}


def _rounded(number: torch.Tensor) -> str:
    """Two figures of a number of particles."""
    return f"{float(f'{float(number):.2g}'):.0f}"
