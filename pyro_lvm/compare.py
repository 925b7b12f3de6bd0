"""Several model/guide pairs side by side on the same data and the same random numbers."""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pyro_lvm._checks import refuse
from pyro_lvm._interrupts import kept_if, whole_results
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Model, Vectorize
from pyro_lvm.comparison import Comparison, ComparisonRow
from pyro_lvm.contradictions import contradictions
from pyro_lvm.errors import DataTypeError, ShapeError, UnreliableEstimateWarning, UntrainedParameterWarning
from pyro_lvm.evidence import LogMarginal, importance
from pyro_lvm.evidence.data import data_source, device_of
from pyro_lvm.evidence.pooled import pool
from pyro_lvm.evidence.record import check_reference
from pyro_lvm.evidence.same_data import check_same_data
from pyro_lvm.evidence.verdict import data_in_words, is_joint
from pyro_lvm.tracing.batch import DataArgs, Rows
from pyro_lvm.tracing.questions import count_parameters, holds_probabilities, same_model

__all__ = ["compare"]

Pair = tuple[Model, Guide | None]


def compare(
    rows: Mapping[str, Pair | Sequence[Pair] | LogMarginal],
    x: Data,
    *args: Any,
    reference: LogMarginal | None = None,
    seed: int = 0,
    num_particles: int = 1000,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    device: torch.device | str | None = None,
    compile: bool = False,
    progress: bool | None = None,
) -> Comparison:
    """Measure several pairs on the same data with the same seed, and rank them.

    Args:
        rows: name -> ``(model, guide)``; ``(model, None)`` for a model with an exact ``log_prob``; a list of pairs for
            several training runs of one kind; or a `LogMarginal` that is already there, of the same data.
        x: data ``(N, ...)``, or a ``Dataset`` or ``DataLoader``.
        *args: further arguments of all programs.
        reference: log p(x) of the shared model, that gaps are measured from. None is a row that is exact, if there is
            one; else the guides of all rows (of several runs the first one's) as one mixture, see `evidence.pooled`,
            with about 2 K draws in all, each of which every guide scores: long for a flow that draws fast and scores
            slowly. The notes say what it was and how long it took. Where it cannot be had, each row's own log p-hat
            stands in.
        seed: the same for all rows, which draws common random numbers where they run in the same way.
        num_particles: K of every row.
        data_plate: see `log_marginal`, as are the options below.
        data_args: positions of the arguments with one row per datum.
        vectorize: ``False`` for Python control flow on latents.
        chunks: (data, particles) at once.
        device: where to compute.
        compile: capture and compile each pair where that pays.
        progress: show a bar a row.

    Returns:
        `Comparison`; its ``str`` is the table. Differences are paired over data, so their errors cover the data and
        the draws, not the training: a claim about families of guides needs several training runs of each.

    Raises:
        DataTypeError: no row, or one of none of the kinds above.
        ShapeError: rows and reference with different numbers of data.
        CheckpointError: a record, as a row or as the reference, is of other data than x, by the digests that records
            keep of theirs. The precision of x, further arguments that the record did without, and how the data came
            make no difference; records without a digest, and data that are drawn anew at each reading, pass.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def exact(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> def wide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> result = compare({"wide": (model, wide), "exact": (model, exact)}, torch.linspace(-1, 1, 20))
        >>> [row.name for row in result.rows], result.ranked_by
        (['exact', 'wide'], 'elbo')
    """
    if not isinstance(rows, Mapping) or not rows:
        got = "none" if isinstance(rows, Mapping) else type(rows).__name__
        raise DataTypeError(refuse("rows", "a dictionary of at least one pair", got, 'Pass {"name": (model, guide)}.'))
    check_reference(reference)
    source = data_source(x, args, data_args, device)
    kinds = {name: _pairs(name, row) for name, row in rows.items()}
    options: dict[str, Any] = {"num_particles": num_particles, "data_plate": data_plate, "data_args": data_args}
    options |= {"vectorize": vectorize, "chunks": chunks, "seed": seed, "device": device}
    options |= {"compile": compile, "progress": progress}
    _check_records(kinds, reference, source, data_plate)
    measured: dict[str, ComparisonRow] = {}
    with kept_if(lambda: measured):
        for name, kind in kinds.items():
            try:
                measured[name] = _measure(name, kind, source, x, args, options)
            except Exception as error:
                error.add_note(f"in row {name!r} of compare()")
                raise
    shared = _one_model([kinds[name] for name in measured], source)
    ranked_by = "elbo" if shared else "value"
    ranked = sorted(measured.values(), key=lambda row: -float(row.mean_over_runs(ranked_by).mean()))
    missing = [name for name in kinds if name not in measured]
    about = ""
    if reference is None and shared and not missing and len(ranked) > 1:
        reference, about = _shared_reference(ranked, kinds, x, args, options)
    result = Comparison(tuple(ranked), ranked_by, reference, ())
    return replace(
        result, notes=_notes(result, about, shared, missing) + _mixed({name: kinds[name] for name in measured}, source)
    )


def _one_model(kinds: Sequence[list[Pair] | LogMarginal], source: Rows) -> bool | None:
    """Whether all rows share one model; None where that cannot be told."""
    pairs = [pair for kind in kinds if not isinstance(kind, LogMarginal) for pair in kind]
    answers: list[bool | None] = [None for kind in kinds if isinstance(kind, LogMarginal) and len(kinds) > 1]
    answers += [same_model(pairs[0], pair, source) for pair in pairs[1:]]
    return False if False in answers else None if None in answers else True


def _shared_reference(
    rows: Sequence[ComparisonRow],
    kinds: Mapping[str, list[Pair] | LogMarginal],
    x: Data,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[LogMarginal | None, str]:
    """log p(x) of the one model of all rows, and words on where it is from."""
    for row in rows:
        if row.status_shares() == {"exact": 1.0}:
            return row.runs[0], f"gap = reference - ELBO; the reference is that of {row.name}, which is exact."
    pairs = {name: kind[0] for name, kind in kinds.items() if isinstance(kind, list) and kind[0][1] is not None}
    if len(pairs) < 2:
        return None, ""
    start = time.perf_counter()
    settings = {name: options[name] for name in ("data_plate", "vectorize", "chunks", "progress")}
    settings["num_particles"] = math.ceil(2 * options["num_particles"] / len(pairs))
    settings["seed"] = (options["seed"] + 1) % 2**32  # so that its errors are independent of those of the rows
    with kept_if(lambda: rows), whole_results(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedParameterWarning)  # of every row, or in the notes
        try:
            pooled = pool(pairs, data_source(x, args, options["data_args"], options["device"]), **settings)
        except Exception as error:  # noqa: BLE001 - what a guide makes of draws of another; the rows stand without it
            return None, f"There is no shared reference, for the guides cannot be pooled: {error}"
        return pooled, _of_the_pooled(pooled, time.perf_counter() - start)
    return None, "Interrupted: the guides were not pooled to a reference."


def _of_the_pooled(pooled: LogMarginal, seconds: float) -> str:
    """What the guides say together, and who of them misses what."""
    each = pooled.provenance["particles_of_each_guide"]
    words = (
        f"gap = reference - ELBO; the reference is pooled: a {pooled.method} with K = {each} draws of each, mean "
        f"{pooled.mean_with_error(3)}, {seconds:.1f} seconds."
    )
    missing = {name: found["disagreement"] for name, found in pooled.provenance["guides"].items()}
    if said := ", ".join(f"{name} on {share:.1%} of the data" for name, share in missing.items() if share):
        words += f" The guides disagree: mass that another one sees is missed by {said}. The reference holds it."
    if pooled.doubt:
        words += f" It is {pooled.doubt} of the data, and likely too low there."
    return words


def _mixed(kinds: Mapping[str, list[Pair] | LogMarginal], source: Rows) -> tuple[str, ...]:
    """Say so where some rows hold probabilities and others densities."""
    pairs = {name: kind[0] for name, kind in kinds.items() if not isinstance(kind, LogMarginal)}
    answers = {name: holds_probabilities(*pair, source) for name, pair in pairs.items()}
    discrete, continuous = ([name for name, answer in answers.items() if answer is kind] for kind in (True, False))
    if not (discrete and continuous):
        return ()
    return (
        f"{discrete} hold probabilities of discrete data, {continuous} densities, which have no upper bound on such "
        "data: these are different things, and the order of the rows says nothing about them.",
    )


def _pairs(name: str, row: Any) -> list[Pair] | LogMarginal:
    if isinstance(row, LogMarginal):
        return row
    pairs = [row] if isinstance(row, tuple) else row
    if isinstance(pairs, list) and pairs and all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        return pairs
    cure = "Pass (model, guide), a list of such pairs, (model, None) or a LogMarginal."
    raise DataTypeError(refuse(f"rows[{name!r}]", "a pair", repr(row), cure))


def _measure(
    name: str, kind: list[Pair] | LogMarginal, source: Rows, x: Data, args: tuple[Any, ...], options: dict[str, Any]
) -> ComparisonRow:
    if isinstance(kind, LogMarginal):
        return ComparisonRow(name, (kind,), 0, 0.0, None)
    start, device, before = time.perf_counter(), device_of(source), 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with warnings.catch_warnings(), whole_results():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # the table and its notes say it of every row
        runs = tuple(importance(model, guide, x, *args, **options) for model, guide in kind)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return ComparisonRow(name, runs, count_parameters(*kind[0], source), seconds, peak)


def _check_records(
    kinds: Mapping[str, list[Pair] | LogMarginal], reference: LogMarginal | None, source: Rows, data_plate: DataPlate
) -> None:
    records = {f"rows[{name!r}]": kind for name, kind in kinds.items() if isinstance(kind, LogMarginal)}
    pairs = len(kinds) - len(records)
    records |= {} if reference is None else {"reference": reference}
    lengths = {name: len(record) for name, record in records.items()}
    lengths |= {"x": 1 if data_plate is None else len(source)} if pairs else {}
    if len(set(lengths.values())) > 1:
        cure = "Estimate every row on the same x, with the same data_plate; differences are paired datum by datum."
        raise ShapeError(refuse("rows", "one number of data", lengths, cure))
    check_same_data(records, source)


def _notes(result: Comparison, about: str, shared: bool | None, missing: Sequence[str]) -> tuple[str, ...]:
    """What the numbers cover, and what they do not."""
    rows, reference = result.rows, result.reference
    several = any(len(row.runs) > 1 for row in rows)
    notes = [
        _units(rows[0].runs[0]),
        "The errors do not cover training: another seed of it gives other parameters, and may rank jointly trained "
        "pairs otherwise." + (" For the rows of several runs, sd says by how much." if several else ""),
    ]
    if len(rows) > 1:
        notes.append(
            {
                True: "All rows share one model: a difference of ELBOs is minus the difference of KL(q || p(z|x)).",
                False: "The rows do not share one model: they are ranked by log p-hat, and gaps are not comparable.",
                None: "Whether all rows share one model could not be checked: they are ranked by log p-hat.",
            }[shared]
        )
    notes += [about] if about else []
    if reference is None:
        notes.append("gap = log p-hat - ELBO from each row's own log p-hat, which is too small where a guide is bad.")
    elif not about:
        notes.append(f"gap = reference - ELBO; the reference is {reference.method}, mean {reference.mean:.3f}.")
    notes += contradictions(result, about, shared)
    enumerated = {tuple(run.provenance.get("enumerated", ())) for row in rows for run in row.runs}
    if len(enumerated) > 1:
        notes.append(f"The rows enumerate different sites {sorted(enumerated)}: their ELBOs are different bounds.")
    for row in rows:
        if doubt := ", ".join(sorted({run.doubt for run in row.runs} - {""})):
            notes.append(f"{row.name}: log p-hat is {doubt} of the data, and likely too low there.")
    notes += [f"Interrupted: {list(missing)} were not measured."] if missing else []
    return tuple(notes)


def _units(record: LogMarginal) -> str:
    data = data_in_words(len(record), record.provenance)
    scale = "in all" if is_joint(record.provenance) else "per datum"
    words = f"{data[0].upper()}{data[1:]}; nats {scale}, higher is better. +- is one standard error"
    if len(record) == 1:
        return f"{words} over the draws: of log p-hat, and of differences as if the draws of two rows were independent."
    return f"{words}: of log p-hat over the draws, of differences (paired) over data and draws."
