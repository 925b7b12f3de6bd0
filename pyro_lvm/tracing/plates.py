"""Which plate holds the data. Decided from traces of the pair at two sizes of the data, never from a chunk of x."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from pyro_lvm._checks import refuse
from pyro_lvm.errors import PlateError, SiteError
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.handlers import noted_rows
from pyro_lvm.tracing.intercept import Trace, is_latent, is_observed, run
from pyro_lvm.tracing.isolation import evaluation_rng

__all__ = [
    "check_enclosed",
    "check_whole",
    "common_plates",
    "draws_rows",
    "find_guide_plate",
    "find_plate",
    "nesting",
    "site_table",
]

Program = Callable[..., Any]
_RUNS = 8  # a plate of two rows that takes one of them would often take the same in two
_CURE = (
    'Name the plate with data_plate="...", put every site inside one plate of size len(x), '
    "or ask for one joint result with data_plate=None."
)


def nesting(*traces: Trace) -> int:
    """Number of batch dimensions that the plates of these traces use."""
    sites = (site for trace in traces for site in trace.values() if site["type"] == "sample")
    return max((-f.dim for site in sites for f in site["cond_indep_stack"] if f.dim is not None), default=0)


def site_table(*traces: Trace) -> str:
    """One line a site: its name, its kind and its plates, for error messages."""
    lines = []
    for program, trace in zip(("model", "guide"), traces, strict=False):
        for name, site in trace.items():
            if is_latent(site) or is_observed(site):
                kind = "latent" if is_latent(site) else "observed"
                plates = ", ".join(repr(f.name) for f in site["cond_indep_stack"])
                lines.append(f"  {program} {kind} {name!r}: {'plates ' + plates if plates else 'no plate'}")
    return "\n" + "\n".join(lines)


def find_plate(runs: Sequence[tuple[Trace, int]], requested: str) -> str:
    """Name of the data plate of a model, from ``(trace, number of data)`` of one or two runs.

    A candidate encloses every observed site and has the size of the data in each run. Of several, those that enclose
    every latent site too are kept.

    Raises:
        SiteError: the model observes nothing.
        PlateError: no plate, or more than one, is the data plate.
    """
    trace, num_data = runs[0]
    observed = [site for site in trace.values() if is_observed(site)]
    latent = [site for site in trace.values() if is_latent(site)]
    if not any(True for site in observed):
        raise SiteError(
            'model: expected at least one observed site, got none. Write `pyro.sample("x", ..., obs=x)`.'
            + site_table(trace),
            finding="no-data",
        )
    names = common_plates(observed)
    if requested != "auto":
        return _requested_plate(requested, names, trace, num_data)
    fitting = [n for n in names if all(_sizes(n, t) == {rows} for t, rows in runs)]
    if len(fitting) > 1:
        fitting = [n for n in fitting if n in common_plates(latent)] or fitting
    if len(fitting) == 1:
        return fitting[0]
    why = _why_no_plate(fitting, names, trace, num_data)
    raise PlateError(why + site_table(trace), finding="data-plate")


def common_plates(sites: Iterable[Any]) -> list[str]:
    """Plates around all of ``sites``, outermost first."""
    stacks = [[f.name for f in site["cond_indep_stack"]] for site in sites]
    return [n for n in stacks[0] if all(n in stack for stack in stacks)] if stacks else []


def _sizes(plate: str, trace: Trace) -> set[int]:
    sites = (site for site in trace.values() if is_observed(site))
    return {f.size for site in sites for f in site["cond_indep_stack"] if f.name == plate}


def _requested_plate(plate: str, names: list[str], trace: Trace, num_data: int) -> str:
    if plate not in names:
        raise PlateError(
            f"data_plate={plate!r}: expected a plate around every observed site, got {names}. {_CURE}"
            + site_table(trace)
        )
    if _sizes(plate, trace) != {num_data}:
        raise PlateError(
            f"data_plate={plate!r}: expected size {num_data}, the length of x, got {sorted(_sizes(plate, trace))}. "
            f"Give the plate the size len(x).{site_table(trace)}"
        )
    return plate


def _why_no_plate(fitting: list[str], names: list[str], trace: Trace, num_data: int) -> str:
    if fitting:
        return f"data plate: expected one, got {len(fitting)} candidates {fitting} of size {num_data}. {_CURE}"
    for site in trace.values():
        for f in site["cond_indep_stack"] if is_observed(site) else ():
            if f.full_size == num_data != f.size:
                return (
                    f"data plate: plate {f.name!r} draws a subsample of {f.size} of the {num_data} data by itself, so "
                    "that x cannot be told from its subsample. Pass the rows to use and `subsample=` their indices."
                )
    if names:
        sizes = {n: sorted(_sizes(n, trace)) for n in names}
        return f"data plate: expected a plate of size {num_data}, the length of x, got plates of sizes {sizes}. {_CURE}"
    return f"data plate: expected one plate around every observed site, got none. {_CURE}"


def check_whole(programs: Mapping[str, tuple[Program, Trace]], batch: Batch) -> None:
    """No plate draws which of its rows count: log p(x, z) would be that of other rows in each run.

    Raises:
        PlateError: one does.
    """
    for name, (program, trace) in programs.items():
        frames = {f for site in trace.values() for f in site.get("cond_indep_stack", ())}
        for plate in sorted(f.name for f in frames if f.full_size not in (None, f.size)):
            if draws_rows(program, plate, batch):
                expected, got = "all of its rows, or rows that are named", "rows that it draws anew in each run"
                cure = (
                    "Leave subsample_size out for an estimate, or pass x of these rows and `subsample=` their numbers."
                )
                raise PlateError(refuse(f"{name} plate {plate!r}", expected, got, cure), "data-plate")


def draws_rows(program: Program, plate: str, batch: Batch) -> bool:
    """Whether a plate takes other rows from run to run."""
    watched, seen = noted_rows(program, plate)
    for seed in range(_RUNS):
        with evaluation_rng(seed):
            run(watched, batch.args)
    return any(not torch.equal(torch.as_tensor(seen[0]), torch.as_tensor(rows)) for rows in seen[1:])


def check_enclosed(plate: str, trace: Trace, program: str, names: Iterable[str]) -> None:
    """Every site of ``names`` lies in the data plate, else no per-datum result exists."""
    for name in names:
        if all(f.name != plate for f in trace[name]["cond_indep_stack"]):
            auxiliary = trace[name]["infer"].get("is_auxiliary")  # as AutoGuides with one joint site have
            joint = " AutoNormal has one site per latent, inside their plates." if auxiliary else ""
            raise PlateError(
                f"{program} site {name!r}: expected it inside the data plate {plate!r}, got it outside: it belongs to "
                f"all data at once, so a result per datum does not exist. {_CURE}{joint}"
                + site_table(*((trace,) if program == "model" else ({}, trace))),
                finding="outside-plate",
            )


def find_guide_plate(plate: str, model: Trace, guide: Trace, names: Sequence[str]) -> str:
    """Name of the guide's data plate: that of the model, or the one plate of the same dimension and size."""
    if not names or any(f.name == plate for n in names for f in guide[n]["cond_indep_stack"]):
        return plate
    frame = next(f for s in model.values() if is_observed(s) for f in s["cond_indep_stack"] if f.name == plate)
    alike = {f.name for n in names for f in guide[n]["cond_indep_stack"] if (f.dim, f.size) == (frame.dim, frame.size)}
    return alike.pop() if len(alike) == 1 else plate
