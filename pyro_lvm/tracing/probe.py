"""Two small runs of a pair that decide how it is evaluated, and refuse what cannot be evaluated.

The pair runs on a few data, at two sizes, so that a plate is known to follow the data rather than to have their size by
chance. How particles are run is then decided by `find_modes`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pyro_lvm._checks import check_program
from pyro_lvm._typing import DataPlate, Guide, Model, Vectorize
from pyro_lvm.errors import ParameterError, PlateError, SiteError, SupportError
from pyro_lvm.tracing.batch import Batch, Rows
from pyro_lvm.tracing.enumerated import check_enumerated
from pyro_lvm.tracing.intercept import Trace, is_latent, is_observed, run
from pyro_lvm.tracing.isolation import validation
from pyro_lvm.tracing.modes import find_modes
from pyro_lvm.tracing.notes import note_dtypes, noted
from pyro_lvm.tracing.params import current_params, warn_of_strangers
from pyro_lvm.tracing.particles import Layout, Mode, Runner
from pyro_lvm.tracing.plates import check_enclosed, check_whole, find_guide_plate, find_plate, nesting
from pyro_lvm.tracing.sites import (
    Match,
    check_determined,
    check_shapes,
    check_spread,
    guide_sites,
    match_sites,
)
from pyro_lvm.tracing.supports import has_bounded_data

__all__ = [
    "MISMATCH",
    "PROBE_ROWS",
    "Plan",
    "check_finite",
    "empty_guide",
    "probe_pair",
    "run_or_explain",
    "run_pair",
]

_CPU_BYTES = 2**26  # what one chunk may allocate: a few times the cache, far below what a process has
_ROWS = {"cpu": 128, "cuda": 1024}  # data a chunk: the guide runs once for each
PROBE_ROWS = 3  # data in a probe: enough for a neighbour on either side


def empty_guide(*_: Any) -> None:
    """The guide of a model without latents."""


@dataclass(frozen=True)
class Plan:
    """How a pair is evaluated.

    Attributes:
        model_layout: data plate, its dimension and the number of plate dimensions, in the model.
        guide_layout: the same in the guide.
        match: the roles of the sites.
        model_mode: how the model runs particles.
        guide_mode: how the guide does; ``"once"`` means that one run gives the distributions of all draws.
        tied: the pair only runs on all of x, so that the data are not streamed.
        bounded_data: an observed site has a support that data could lie outside of.
        bytes_per_particle: memory that one particle of one datum needs while the model runs, an upper bound.
    """

    model_layout: Layout
    guide_layout: Layout
    match: Match
    model_mode: Mode
    guide_mode: Mode | Literal["once"]
    tied: bool
    bounded_data: bool
    bytes_per_particle: int

    def model_runner(self, model: Model) -> Runner:
        """The model, ready to be run for K particles."""
        return model_runner(model, self.model_layout, self.match)

    def chunk_sizes(self, num_data: int, num_particles: int, device: torch.device) -> tuple[int, int]:
        """(data, particles) to run at once within a memory budget."""
        budget, most_rows = _CPU_BYTES, _ROWS.get(device.type, _ROWS["cpu"])
        if device.type == "cuda":
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, and free
            budget = (torch.cuda.mem_get_info(device)[0] + kept) // 4
        rows = num_data if self.tied else min(num_data, most_rows, max(1, budget // self.bytes_per_particle))
        counted = 1 if self.model_layout.plate is None else rows
        return rows, max(1, min(num_particles, budget // (self.bytes_per_particle * counted)))

    @property
    def exact(self) -> bool:
        """No latent is drawn: every one is enumerated, or there is none."""
        return not self.match.sampled and not self.match.free


@dataclass(frozen=True)
class Run:
    """One plain run of a pair, without particles."""

    model: Trace
    guide: Trace
    batch: Batch


def run_pair(model: Model, guide: Guide, batch: Batch) -> Run:
    """Run the guide, and the model on its draws."""
    guide_trace = run(guide, batch.args)
    values = {n: s["value"] for n, s in guide_trace.items() if is_latent(s)}
    return Run(run(model, batch.args, values=values), guide_trace, batch)


def probe_pair(
    model: Model, guide: Guide, data: Rows, data_plate: DataPlate = "auto", vectorize: Vectorize = "auto"
) -> Plan:
    """Decide how to evaluate a pair on ``data``.

    Raises:
        PlateError: no single plate holds the data, a site lies outside of it, or the data are coupled.
        SiteError: the sites of model and guide do not fit, or a ``to_event`` is missing.
        SupportError: the guide does not cover the prior, or data lie outside the likelihood's support.
        ParameterError: a parameter is not finite.
    """
    check_program("model", model)
    with torch.no_grad(), noted(model, guide, data):
        runs, tied = _plain_runs(model, guide, data, data_plate)
        first = runs[0]
        check_finite(first)
        warn_of_strangers(model, guide, first.model.keys() | first.guide.keys())
        check_whole({"model": (model, first.model), "guide": (guide, first.guide)}, first.batch)
        match = match_sites(first.model, first.guide)
        hidden = bool(check_determined(guide, first.batch.args, first.guide))
        depth = nesting(first.model, first.guide)
        names = guide_sites(first.guide)
        if data_plate is None:
            layouts = (Layout(None, None, depth), Layout(None, None, depth))
        else:
            plate = find_plate([(r.model, len(r.batch)) for r in runs], data_plate)
            check_enclosed(plate, first.model, "model", match.model_sites(first.model))
            guide_plate = find_guide_plate(plate, first.model, first.guide, names)
            check_enclosed(guide_plate, first.guide, "guide", names)
            layouts = (
                Layout(plate, _dim(plate, first.model), depth),
                Layout(guide_plate, _dim(plate, first.model), depth),
            )
        check_shapes(match.sampled, first.model, first.guide)
        check_spread(match.sampled, first.guide)
        models = model_runner(model, layouts[0], match)
        guides = Runner(guide, layouts[1], guide_sites)
        with validation(False):
            drawn = {n: s["value"] for n, s in first.guide.items() if is_latent(s)}
            check_enumerated(model, first.batch.args, drawn, match.enumerated, match.free, depth)
            modes = find_modes(models, guides, first.batch, match, vectorize, tied, hidden)
        bounded = has_bounded_data(first.model)
        return Plan(*layouts, match, modes.model, modes.guide, tied, bounded, modes.bytes_per_particle)


def _plain_runs(model: Model, guide: Guide, data: Rows, data_plate: DataPlate) -> tuple[list[Run], bool]:
    """Runs at one or two sizes, and whether the pair is tied to the whole data set."""
    lazy = getattr(guide, "prototype_trace", ...) is None  # an AutoGuide takes the size of its first data for good
    if data_plate is None or lazy:
        whole = run_or_explain(model, guide, data.rows(slice(0, len(data))))
        if data_plate is None:
            return [whole], True
    few = _few(data)
    other = few.rows(slice(1, None)) if len(few) > 1 else few.repeat(2)
    try:
        with validation(not few.has_nan()):
            runs = [run_pair(model, guide, few), run_pair(model, guide, other)]
        if _follows(runs, data_plate):
            return runs, False
    except Exception:  # noqa: BLE001 - whatever a program raises on part of the data, all of the data decide
        pass
    return [run_or_explain(model, guide, data.rows(slice(0, len(data))))], True


def _few(data: Rows) -> Batch:
    """Some rows, without NaN where the first few dozen have such."""
    starts = range(0, max(1, min(len(data) - PROBE_ROWS + 1, 20 * PROBE_ROWS)), PROBE_ROWS)
    windows = (data.rows(slice(i, min(len(data), i + PROBE_ROWS))) for i in starts)
    return next((window for window in windows if not window.has_nan()), data.rows(slice(0, min(len(data), PROBE_ROWS))))


def _follows(runs: Sequence[Run], data_plate: str) -> bool:
    """Whether a plate, in the guide too, follows the data; that a model has none is found out later."""
    try:
        plate = find_plate([(r.model, len(r.batch)) for r in runs], data_plate)
    except PlateError:
        return False
    except SiteError:
        return True
    sizes = [
        {f.size for s in r.guide.values() if is_latent(s) for f in s["cond_indep_stack"] if f.name == plate}
        for r in runs
    ]
    sequential = _dim(plate, runs[0].model) is None  # its sites are named one by one
    return not sequential and all(size <= {len(r.batch)} for size, r in zip(sizes, runs, strict=True))


MISMATCH = re.compile(
    r"Shape mismatch inside plate\('(?P<plate>.+)'\) at site (?P<site>\S+) dim \S+, (?P<size>\d+) vs (\d+)"
)


def run_or_explain(model: Model, guide: Guide, batch: Batch) -> Run:
    """Run on all data; turn what Pyro says of a shape or of a parameter into what to do about it."""
    try:
        with validation(not batch.has_nan()):  # which torch would refuse as a parameter that an encoder made of it
            return run_pair(model, guide, batch)
    except ValueError as error:
        if found := MISMATCH.search(str(error)):
            if int(found["size"]) == len(batch) and _guide_follows(guide, batch, found["plate"]):
                raise SiteError(
                    f"site {found['site']!r}: {error}. Dimensions to the right of the plates belong to the event: "
                    "declare them, e.g. `dist.Normal(...).to_event(1)`.",
                    finding="event-dims",
                ) from error
            raise PlateError(
                f"plate {found['plate']!r}: expected size {len(batch)}, the length of x, in both programs: {error}. "
                "Give the plate the size len(x), or pass `subsample=` the indices of the rows of x. A guide with "
                "parameters for each datum (an AutoGuide) only knows the data that it was trained on.",
                finding="plate-size",
            ) from error
        if "Expected parameter" in str(error):
            check_finite(None)
            _check_data_finite(batch)
        raise
    except RuntimeError as error:
        note_dtypes(error, batch.args, model, guide)
        raise


def _guide_follows(guide: Guide, batch: Batch, plate: str) -> bool:
    try:
        frames = [f for s in run(guide, batch.args).values() if is_latent(s) for f in s["cond_indep_stack"]]
    except ValueError:  # the mismatch is in the guide itself
        return True
    return all(f.size == len(batch) for f in frames if f.name == plate)


def check_finite(pair: Run | None) -> None:
    """The parameters of a run, or of the store, are numbers.

    Raises:
        ParameterError: some are NaN or infinite.
    """
    if pair is None:
        values = {n: t for n, (t, _) in current_params().items()}
    else:
        sites = (s for t in (pair.model, pair.guide) for s in t.values() if s["type"] == "param")
        values = {s["name"]: s["value"] for s in sites}
    bad = [n for n, v in values.items() if not bool(v.isfinite().all())]
    if bad:
        raise ParameterError(
            f"parameters {bad}: expected finite values, got NaN or infinity. Train again from finite values "
            "(a lower learning rate or clipped gradients), or load a good checkpoint.",
            finding="not-finite",
        )


def _check_data_finite(batch: Batch) -> None:
    x = batch.args[0]
    bad = int((~x.isfinite()).flatten(1).any(1).sum()) if x.dim() > 1 else int((~x.isfinite()).sum())
    if bad:
        raise SupportError(
            f"x: expected finite numbers, got NaN or an infinity in {bad} of {len(x)} data, of which a distribution of "
            "the pair has made its parameters. Leave these data out.",
            finding="not-finite",
        )


def _dim(plate: str, trace: Trace) -> int | None:
    frames = (f for s in trace.values() if is_observed(s) for f in s["cond_indep_stack"] if f.name == plate)
    return next(frames).dim


def model_runner(model: Model, layout: Layout, match: Match) -> Runner:
    """The model of a pair, ready to be run for K particles."""
    return Runner(model, layout, match.model_sites, match.enumerated, match.check_support)
