"""Two small runs of a pair that decide how it is evaluated, and refuse what cannot be evaluated.

The pair runs on a few data, at two sizes, so that a plate is known to follow the data rather than to have their size by
chance. Then the same latents go through every way of running particles: a program that mixes particles with data (a
reshape by ``len(x)``) or couples the data (a batch mean) gives other numbers, and is folded, looped, or refused.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from pyro_lvm._typing import DataPlate, Guide, Model, Vectorize
from pyro_lvm.errors import ParameterError, PlateError, SiteError
from pyro_lvm.tracing.batch import Batch, Rows, make_batch
from pyro_lvm.tracing.intercept import Trace, is_latent, is_observed, run
from pyro_lvm.tracing.isolation import eval_mode, forked_rng, validation
from pyro_lvm.tracing.params import current_params, evaluation_store, module_parameters
from pyro_lvm.tracing.particles import Draws, Layout, Mode, run_program
from pyro_lvm.tracing.plates import check_enclosed, common_plates, find_guide_plate, find_plate, nesting
from pyro_lvm.tracing.sites import Match, guide_sites, has_bounded_data, match_sites
from pyro_lvm.tracing.tables import Table, tabulate

__all__ = ["Plan", "batch_plate", "empty_guide", "parameter_names", "probe_pair"]

_ROWS = 3  # data in a probe: enough for a neighbour on either side
_PARTICLES = 3


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

    @property
    def exact(self) -> bool:
        """No latent is drawn: every one is enumerated, or there is none."""
        return not self.match.sampled and not self.match.free


@dataclass(frozen=True)
class _Run:
    """One plain run of a pair, without particles."""

    model: Trace
    guide: Trace
    batch: Batch


def _run_pair(model: Model, guide: Guide, batch: Batch) -> _Run:
    guide_trace = run(guide, batch.args)
    values = {n: s["value"] for n, s in guide_trace.items() if is_latent(s)}
    return _Run(run(model, batch.args, values=values), guide_trace, batch)


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
    with torch.no_grad():
        runs, tied = _plain_runs(model, guide, data, data_plate)
        first = runs[0]
        _check_finite(first)
        match = match_sites(first.model, first.guide)
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
        with validation(False):
            return _plan_modes(model, guide, runs, layouts, match, vectorize, tied)


def _plain_runs(model: Model, guide: Guide, data: Rows, data_plate: DataPlate) -> tuple[list[_Run], bool]:
    """Runs at one or two sizes, and whether the pair is tied to the whole data set."""
    lazy = getattr(guide, "prototype_trace", ...) is None  # an AutoGuide takes the size of its first data for good
    if data_plate is None or lazy:
        whole = _run_or_explain(model, guide, data.rows(slice(0, len(data))))
        if data_plate is None:
            return [whole], True
    few = data.rows(slice(0, min(len(data), _ROWS)))
    other = few.rows(slice(1, None)) if len(few) > 1 else few.repeat(2)
    try:
        with validation(True):
            runs = [_run_pair(model, guide, few), _run_pair(model, guide, other)]
        if _follows(runs, data_plate):
            return runs, False
    except Exception:  # noqa: BLE001 - whatever a program raises on part of the data, all of the data decide
        pass
    return [_run_or_explain(model, guide, data.rows(slice(0, len(data))))], True


def _follows(runs: Sequence[_Run], data_plate: str) -> bool:
    """Whether a plate has the size of the data in both runs; a model without data has other troubles."""
    try:
        find_plate([(r.model, len(r.batch)) for r in runs], data_plate)
    except PlateError:
        return False
    except SiteError:
        pass
    return True


_MISMATCH = re.compile(
    r"Shape mismatch inside plate\('(?P<plate>.+)'\) at site (?P<site>\S+) dim \S+, (?P<size>\d+) vs (\d+)"
)


def _run_or_explain(model: Model, guide: Guide, batch: Batch) -> _Run:
    """Run on all data; turn what Pyro says of a shape or of a parameter into what to do about it."""
    try:
        with validation(True):
            return _run_pair(model, guide, batch)
    except ValueError as error:
        if found := _MISMATCH.search(str(error)):
            if int(found["size"]) == len(batch):
                raise SiteError(
                    f"site {found['site']!r}: {error}. Dimensions to the right of the plates belong to the event: "
                    "declare them, e.g. `dist.Normal(...).to_event(1)`."
                ) from error
            raise PlateError(
                f"plate {found['plate']!r}: expected size {len(batch)}, the length of x, got {found['size']}: {error}. "
                "Give the plate the size len(x), or pass `subsample=` the indices of the rows of x."
            ) from error
        if "Expected parameter" in str(error):
            _check_finite(None)
        raise


def _check_finite(pair: _Run | None) -> None:
    if pair is None:
        values = {n: t for n, (t, _) in current_params().items()}
    else:
        sites = (s for t in (pair.model, pair.guide) for s in t.values() if s["type"] == "param")
        values = {s["name"]: s["value"] for s in sites}
    bad = [n for n, v in values.items() if not bool(v.isfinite().all())]
    if bad:
        raise ParameterError(
            f"parameters {bad}: expected finite values, got NaN or infinity. Train again from finite values "
            "(a lower learning rate or clipped gradients), or load a good checkpoint."
        )


def _dim(plate: str, trace: Trace) -> int | None:
    frames = (f for s in trace.values() if is_observed(s) for f in s["cond_indep_stack"] if f.name == plate)
    return next(frames).dim


# ------------------------------------------------------------------------------------------------------------------
# The same latents through every way of running particles.


def _plan_modes(
    model: Model,
    guide: Guide,
    runs: Sequence[_Run],
    layouts: tuple[Layout, Layout],
    match: Match,
    vectorize: Vectorize,
    tied: bool,
) -> Plan:
    batch = runs[0].batch
    model_layout, guide_layout = layouts
    run_guide = partial(run_program, guide, layout=guide_layout, names=guide_sites)
    run_model = partial(
        run_program,
        model,
        layout=model_layout,
        names=match.model_sites,
        enumerated=match.enumerated,
        check_support=match.check_support,
    )
    guide_table, proposed = run_guide(batch, mode="looped", num_particles=_PARTICLES)
    model_table, drawn = run_model(batch, mode="looped", num_particles=_PARTICLES, draws=proposed)
    everything = {**drawn, **proposed}  # with the draws that only the model makes
    if not tied and len(batch) > 1:
        _check_uncoupled("guide", run_guide, batch, guide_table, proposed, guide_layout)
        _check_uncoupled("model", run_model, batch, model_table, everything, model_layout)
    ranks: dict[str, int] = {}
    guide_mode: Mode | Literal["once"] = _mode(run_guide, batch, guide_table, proposed, guide_layout, vectorize, ranks)
    if guide_mode == "vectorised" and _independent(runs[0].guide, ranks, guide_layout):
        guide_mode = "once"
    model_mode = _mode(run_model, batch, model_table, everything, model_layout, vectorize, None)
    with _Allocated() as allocated:
        run_model(batch, mode=model_mode, num_particles=_PARTICLES, draws=everything)
    per_particle = allocated.bytes // (_PARTICLES * (1 if model_layout.plate is None else len(batch))) + 1
    bounded = has_bounded_data(runs[0].model)
    return Plan(model_layout, guide_layout, match, model_mode, guide_mode, tied, bounded, per_particle)


def _mode(
    run_it: Callable[..., tuple[Table, Draws]],
    batch: Batch,
    expected: Table,
    draws: Draws,
    layout: Layout,
    vectorize: Vectorize,
    ranks: dict[str, int] | None,
) -> Mode:
    """The fastest way of running particles that gives the numbers of a loop."""
    modes: list[Mode] = ["vectorised"] if layout.dim is None else ["vectorised", "folded"]
    for mode in modes if vectorize is not False else []:
        extra = {"ranks": ranks} if mode == "vectorised" else {}
        try:
            got, _ = run_it(batch, mode=mode, num_particles=_PARTICLES, draws=draws, **extra)
        except Exception:  # noqa: BLE001 - a program that was not written for a batch of particles may raise anything
            continue
        if _agree(expected, got):
            return mode
    return "looped"


def _agree(expected: Table, got: Table) -> bool:
    if got.total.shape not in (expected.total.shape, (1, *expected.total.shape[1:])):
        return False
    eps = torch.finfo(got.total.dtype).eps
    allowed = 256 * eps * torch.maximum(expected.magnitude, got.magnitude).clamp(min=1.0)
    same = (expected.total - got.total).abs() <= allowed
    same |= (expected.total == got.total) | (expected.total.isnan() & got.total.isnan())
    return bool(same.all())


def _check_uncoupled(
    program: str,
    run_it: Callable[..., tuple[Table, Draws]],
    batch: Batch,
    expected: Table,
    draws: Draws,
    layout: Layout,
) -> None:
    """The densities of a datum, for the same latents, do not change with the company it is in."""
    if layout.dim is None:
        return
    for rows in (slice(0, len(batch) - 1), slice(1, len(batch))):
        some = {n: d.rows(rows, layout) for n, d in draws.items()}
        got, _ = run_it(batch.rows(rows), mode="looped", num_particles=_PARTICLES, draws=some)
        if not _agree(Table(expected.total[:, rows], expected.magnitude[rows]), got):
            raise PlateError(
                f"{program}: expected data that are independent given their latents, got densities of one datum that "
                "change with the other data in x. Remove what couples them (a batch mean, batch normalisation that is "
                "always in train mode, a dependence on neighbours), or ask for one joint result with data_plate=None."
            )


def _independent(trace: Trace, ranks: dict[str, int], layout: Layout) -> bool:
    """Whether no guide site has parameters that depend on the particle, so that one run serves all draws."""
    sites = {n: s for n, s in trace.items() if s["type"] == "sample"}
    return all(is_latent(s) and "_auxiliary" not in n for n, s in sites.items()) and all(
        ranks.get(n, layout.nesting + 1) <= layout.nesting and not s["infer"].get("is_auxiliary")
        for n, s in sites.items()
    )


class _Allocated(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the sizes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.bytes += tensor.untyped_storage().nbytes()
        return out


# ------------------------------------------------------------------------------------------------------------------
# What training asks.


def parameter_names(model: Model, guide: Guide, *args: Any) -> tuple[set[str], set[str]]:
    """Names of the parameters that the model and the guide use, from one run of each."""
    with torch.no_grad():
        pair = _run_pair(model, guide, Batch(args, (True,) * len(args)))
    model_names, guide_names = (
        {n for n, s in trace.items() if s["type"] == "param"} for trace in (pair.model, pair.guide)
    )
    return model_names, guide_names


def batch_plate(model: Model, guide: Guide, *args: Any) -> str | None:
    """The data plate, where the sites of a mini-batch must be scaled up because a latent lies outside of it.

    None if all latents are inside (a constant factor does not move the optimum), or if the plate, made with the size of
    the whole data set, scales by itself.
    """
    batch = make_batch(args[0], args[1:])
    with torch.no_grad():
        runs = [_run_pair(model, guide, batch)]
        with suppress(Exception):  # local parameters run on all of their data only
            runs += [_run_pair(model, guide, batch.rows(slice(1, None)))]
    sites = [s for s in runs[0].model.values() if is_latent(s) or is_observed(s)]
    if common_plates(sites):
        return None
    plate = find_plate([(r.model, len(r.batch)) for r in runs], "auto")
    frames = [f for s in sites for f in s["cond_indep_stack"] if f.name == plate]
    return plate if all(f.full_size == f.size for f in frames) else None


def count_parameters(model: Model, guide: Guide | None, data: Rows) -> int:
    """Number of scalars in the parameters that a pair uses, and in those of the modules that its callables are."""
    guide = guide or empty_guide
    parameters = {id(p): p.numel() for program in (model, guide) for p in module_parameters(program)}
    with evaluation_store(model, guide), torch.no_grad(), forked_rng(0):
        try:
            pair = _run_pair(model, guide, data.rows(slice(0, len(data))))
        except Exception:  # noqa: BLE001 - a model with a log_prob need not be a Pyro program
            return sum(parameters.values())
        sites = (s for t in (pair.model, pair.guide) for s in t.values() if s["type"] == "param")
        leaves = [s["value"].unconstrained() for s in sites]
    return sum((parameters | {id(leaf): leaf.numel() for leaf in leaves}).values())


def same_model(one: tuple[Model, Guide | None], other: tuple[Model, Guide | None], data: Rows) -> bool:
    """Whether two pairs have one model: its log p(x, z) agrees at latents drawn from the first guide."""
    few = data.rows(slice(0, min(len(data), _ROWS)))
    tables = []
    with torch.no_grad(), forked_rng(0), validation(False):
        try:
            with evaluation_store(*one):
                proposed = run(one[1] or empty_guide, few.args)
            values = {n: s["value"] for n, s in proposed.items() if is_latent(s)}
            for model, guide in (one, other):
                with evaluation_store(model, guide), eval_mode(model):
                    trace = run(model, few.args, values=values)
                    sites = [n for n, s in trace.items() if (is_latent(s) and n in values) or is_observed(s)]
                    missing = [n for n, s in trace.items() if is_latent(s) and n not in values]
                    depth = nesting(trace)
                    tables.append((sites, missing, tabulate(trace, sites, None, 1, batch_dims=depth)))
        except Exception:  # noqa: BLE001 - programs that cannot be run on the same latents do not share a model
            return False
    return tables[0][:2] == tables[1][:2] and _agree(tables[0][2], tables[1][2])
