"""What a GPU makes of it: importance sampling at full size, a training step, and how often the host waits.

evidence    seconds for 10,000 images and 5000 draws, network 784-200-200-50, by ``log_marginal(..., compile=True)`` in
            the middle of one long call, in float32, not compiled, with products in TF32, and with the decoder's
            products in bfloat16; and of whole calls. Arithmetic is 2.1e13 operations.
training    milliseconds a step, batches of 100, contenders in turns (`benchmarks.rounds`): `fit` captured and plain,
            `SVI.step`, PyTorch written by hand eagerly and as one CUDA graph with its optimizer.
waiting     times a step that the host waits for the device, counted by a profiler over whole epochs of a captured run
            and by torch's own warnings. `fit` reads its losses once an epoch, or once in 100 steps.
equality    the largest distance of a parameter, captured from plain, relative to the largest parameter, after 50 steps.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch

import pyro_lvm as lvm
from benchmarks.rivals import evidence
from benchmarks.rivals.problems import Problem, make
from benchmarks.rounds import Contender, measure, ratios, spread
from benchmarks.speed import rounded, versions
from benchmarks.speed_tables import fill, printed

__all__ = ["distance", "main", "waits"]

TRAINERS = {
    "fit(compile=True)": "fit_captured",
    "fit": "fit_plain",
    "SVI.step": "svi",
    "hand-written PyTorch": "hand_written",
    "hand-written, one CUDA graph": "cuda_graph",
}
TRAINING = Problem("IWAE", 10_000, 100, device="cuda")
EVIDENCE = Problem("IWAE", 10_000, num_particles=5000, device="cuda")
ESTIMATORS = {
    "float32": "stream_compiled",
    "float32, not compiled": "stream_plain",
    "float32, products in TF32": "stream_tf32",
    "bfloat16": "stream_half",
}
ROUNDS = 7
#: What a profiler calls a host that waits; a copy to the host that waits is followed by one of these.
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def main() -> int:
    """Measure, write and print; 1 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--page", type=Path, help="a page whose table becomes that of this run")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and PyTorch finds none.", file=sys.stderr)
        return 1
    start = time.perf_counter()
    found: dict[str, Any] = training()  # in processes of its own, before this one holds memory of the device
    for measured in (estimates, waiting, equality, calls, memory):
        found |= measured()
        print(f"{time.perf_counter() - start:5.0f} s  {measured.__name__}", flush=True)
    report: dict[str, Any] = {
        "protocol": __doc__,
        "machine": {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        "versions": versions(),
        "date": date.today().isoformat(),
        "minutes": (time.perf_counter() - start) / 60,
        "gpu": found,
    }
    report = rounded(report)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.page:
        args.page.write_text(fill(args.page.read_text(encoding="utf-8"), report), encoding="utf-8")
    print(f"\n{printed(report)}\n{args.out}")
    return 0


def number(value: float, unit: str, **more: Any) -> dict[str, Any]:
    """A row of the table."""
    return {"value": value, "unit": unit} | more


def training() -> dict[str, Any]:
    """Milliseconds a step, and ratios of the captured step."""
    entrants = [
        Contender(name, f"benchmarks.rivals.training:{function}", TRAINING, TRAINING.epoch + 30)
        for name, function in TRAINERS.items()
    ]
    times = measure(entrants, ROUNDS, turn_seconds=0.3)
    rows, ours = {}, times["fit(compile=True)"]["rounds"]
    for name, row in times.items():
        if row["left_out"]:
            print(f"{name} is left out: {row['left_out']}", file=sys.stderr)
            continue
        ms = spread([1e3 * seconds for seconds in row["rounds"]])
        rows[f"{name}, a step"] = number(ms["median"], "ms", spread=ms, notes=row["notes"])
        if ours and row["rounds"] is not ours:
            ratio = ratios(ours, row["rounds"])
            rows[f"fit(compile=True) over {name}"] = number(ratio["median"], "ratio of times", spread=ratio)
    return rows


def waiting() -> dict[str, Any]:
    """Times a step that the host waits, within captured epochs."""
    events: list[str] = []
    steps = 0

    def watched(state: Any) -> None:
        """Epochs 3 to 5 with the profiler, 6 to 8 with torch's warnings."""
        nonlocal steps
        if state.epoch == 2:
            profiler.start()
        elif state.epoch == 5:
            profiler.stop()
            events.extend(event.name for event in profiler.events())
            steps = 3 * TRAINING.epoch
            torch.cuda.set_sync_debug_mode("warn")
        elif state.epoch == 8:
            torch.cuda.set_sync_debug_mode("default")

    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profiler = torch.profiler.profile(activities=kinds)
    pair = make(TRAINING)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = train(pair, True, num_epochs=8, callbacks=[watched])
    synchronising = [str(w.message) for w in warned if "synchroniz" in str(w.message)]
    return {
        "waits a captured step, profiler": number(waits(events) / steps, "a step", captured=result.captured),
        "waits a captured step, warnings": number(len(synchronising) / steps, "a step"),
    }


def waits(names: Iterable[str]) -> int:
    """How many events of a profiler are a host that waits."""
    return sum(name.startswith(WAITING) for name in names)


def equality() -> dict[str, Any]:
    """Captured against plain parameters after 50 steps from one seed."""
    found = []
    for compile in (False, True):
        result = train(make(TRAINING), compile, num_steps=50)
        found.append(result.params)
    return {"captured less plain parameters, 50 steps": number(distance(*found), "relative")}


def train(pair: Any, compile: bool, **options: Any) -> lvm.FitResult:
    """One run from one seed."""
    pyro.clear_param_store()
    return lvm.fit(
        pair.model,
        pair.guide,
        pair.x,
        batch_size=TRAINING.batch_size,
        compile=compile,
        seed=0,
        progress=False,
        **options,
    )


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest distance of two parameters of one name, relative to the largest parameter; NaN if one is NaN."""
    if first.keys() != second.keys():
        raise ValueError(f"other parameters: {sorted(first.keys() ^ second.keys())}")
    gaps = torch.stack([(first[name] - second[name]).abs().max() for name in first])
    return float(gaps.max() / torch.stack([value.abs().max() for value in first.values()]).max())


def estimates() -> dict[str, Any]:
    """Seconds of an estimate, one contender after the other: each takes its share of the memory that is free."""
    rows = {}
    draws, chunk = EVIDENCE.num_data * EVIDENCE.num_particles, 1024 * EVIDENCE.num_particles
    for name, function in ESTIMATORS.items():
        entrant = Contender(name, f"benchmarks.rivals.evidence:{function}", EVIDENCE, first=5 * chunk)
        row = measure([entrant], ROUNDS, turn_seconds=0.5)[name]
        if row["left_out"]:
            print(f"{name} is left out: {row['left_out']}", file=sys.stderr)
            continue
        seconds = spread([draws * each for each in row["rounds"]])
        what = f"{EVIDENCE.num_data:,} x {EVIDENCE.num_particles:,}, {name}"
        rows[what] = number(seconds["median"], "s", spread=seconds, notes=row["notes"])
    return rows


def calls(problem: Problem = EVIDENCE) -> dict[str, Any]:
    """Seconds of whole calls, and what half precision does to their values."""
    pair, rows = make(problem), {}
    work = partial(evidence.evaluate, problem, pair, seed=0)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "compile=True": {"compile": True},
        "bfloat16": {"model_dtype": torch.bfloat16},
    }
    expected = work().value  # and whatever happens once in a process
    for name, options in kinds.items():
        start = time.perf_counter()
        record = work(**options)
        float(record.mean)  # waits for the device
        seconds = time.perf_counter() - start
        rows[f"whole call, {name}"] = number(seconds, "s", tables=record.provenance["tables"])
    error = float((record.value - expected).square().mean().sqrt())
    return rows | {"log p-hat, bfloat16 less float32": number(error, "nats, root mean square")}


def memory() -> dict[str, Any]:
    """Peak of the allocator when N or K doubles."""
    rows = {}
    for n, k in ((5000, 2500), (10_000, 2500), (10_000, 5000)):
        problem = replace(EVIDENCE, num_data=n, num_particles=k)
        pair = make(problem)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        evidence.evaluate(problem, pair, seed=0)
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        rows[f"memory, {n:,} x {k:,}"] = number(peak, "10^6 bytes")
    return rows


if __name__ == "__main__":
    sys.exit(main())
