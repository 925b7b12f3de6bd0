"""How fast: a training step, importance sampling, growth with N and K, memory, and a mixture against EM.

Every figure is a median of rounds in which all contenders take turns (`benchmarks.rounds`), with quartiles. A ratio is
taken within each round, and then its median. Of one problem all contenders have the same data, networks, initial
weights, optimizer (Adam, 1e-3) and loss, one draw for each datum (`benchmarks.rivals.problems`);
`tests/test_speed_benchmarks.py` checks that their losses are equal. Each step gathers a batch of a new permutation of
data in memory. Times of `fit` are with everything that it does, from the second epoch on, after it has compiled.

training    milliseconds a step. Networks 64-32-2 ("toy") and 784-200-200-50 ("IWAE"), tanh; two strided convolutions
            each way for images of 28 x 28 ("conv"); a mixture of six Gaussians in the plane, its latent summed out
            ("mixture", where hand-written is the exact log p(x)). The number is the batch size.
evidence    draws a second: 100 images, K = 1000, the IWAE network. For `log_marginal` in the middle of one long call
            (the images over and over), with everything that it does but what happens once a call; whole calls are timed
            by themselves. Each rival has the chunk that is best for it. Pyro's vectorised weights are of all images
            together; NumPyro has the importance-weighted bound of `RenyiELBO`; pythae looks at five images.
scaling     the ratio of times of `log_marginal` when N or K doubles, on the IWAE network.
memory      what `log_marginal` takes, median of three calls in processes of their own, IWAE network.
mixture     seconds from k-means to the end of EM (scikit-learn, tol 1e-7), or to 0.01 nats a datum below it (`fit`,
            full batches, Adam at 0.03); 2000 points in the plane, six components.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.rivals import problems
from benchmarks.rivals.problems import Problem
from benchmarks.rounds import Contender, measure, pin, ratios, spread
from benchmarks.speed_tables import fill, printed

__all__ = ["ESTIMATORS", "OURS", "SECTIONS", "TRAINERS", "main"]

TRAINERS = {
    "fit(compile=True)": "training:fit_captured",
    "fit": "training:fit_plain",
    "hand-written PyTorch": "training:hand_written",
    "hand-written, torch.compile": "training:compiled",
    "NumPyro, jit(svi.update)": "numpyro_vae:update",
    "NumPyro, an epoch in fori_loop": "numpyro_vae:whole_epoch",
    "Pyro, SVI.step": "training:svi",
    "Pyro, SVI.step, validation off": "training:svi_unvalidated",
}
ESTIMATORS = {
    "log_marginal(compile=True)": "evidence:stream_compiled",
    "log_marginal": "evidence:stream_plain",
    "bare decoder": "evidence:decoder",
    "hand-written PyTorch": "evidence:hand_written",
    "hand-written, torch.compile": "evidence:compiled",
    "NumPyro, RenyiELBO": "numpyro_vae:importance",
    "Pyro, vectorized_importance_weights": "evidence:pyro_vectorized",
    "Pyro, a loop of traces": "evidence:pyro_traces",
    "pythae, get_nll": "evidence:pythae",
}
MIXTURES = {
    "scikit-learn, EM": "mixture:em",
    "fit": "mixture:fit_plain",
    "fit(compile=True)": "mixture:fit_captured",
}
OURS = ("fit(compile=True)", "fit", "log_marginal(compile=True)", "log_marginal")
PACKAGES = ("pyro-ppl", "torch", "numpyro", "jax", "pythae", "scikit-learn", "numpy")


def main() -> None:
    """Measure what is asked for, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    parser.add_argument("--smoke", action="store_true", help="tiny problems and turns, to see that it runs")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--page", type=Path, help="a page whose tables become those of this run")
    args = parser.parse_args()
    wanted, start = args.only.split(","), time.perf_counter()
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only takes {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    report: dict[str, Any] = {
        "protocol": __doc__,
        "smoke": args.smoke,
        "machine": {"cpu": cpu(), "threads": pin(), "load": os.getloadavg()[0], "system": platform.platform()},
        "versions": versions(),
        "date": date.today().isoformat(),
    }
    for name in SECTIONS:
        if name in wanted:
            report[name] = SECTIONS[name](args.smoke)
            print(f"{time.perf_counter() - start:5.0f} s  {name}", flush=True)
    report["minutes"] = (time.perf_counter() - start) / 60
    report = rounded(report)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.page:
        args.page.write_text(fill(args.page.read_text(encoding="utf-8"), report), encoding="utf-8")
    print(f"\n{printed(report)}\n{args.out}, {report['minutes']:.1f} minutes")


def contender(name: str, function: str, problem: Problem, first: int = 1, warm: int = 1) -> Contender:
    """With its function among the rivals."""
    return Contender(name, f"benchmarks.rivals.{function}", problem, first, warm)


def training(smoke: bool) -> dict[str, Any]:
    """Milliseconds a step, and the ratio of the captured step to each, by problem."""
    found = {}
    for problem in problems.SMALL if smoke else problems.TRAINING:
        rivals = {n: f for n, f in TRAINERS.items() if not (problem.network == "mixture" and n.startswith("NumPyro"))}
        first = problem.epoch + 30  # fit validates in the first epoch, and compiles at its 13th step
        times = measure([contender(n, f, problem, first) for n, f in rivals.items()], *effort(smoke, 0.3))
        found[problem.name] = {"num_data": problem.num_data} | compared(times, "fit(compile=True)", "ms", 1e3)
        print(f"       {problem.name}", flush=True)
    return found


def evidence(smoke: bool) -> dict[str, Any]:
    """Thousand draws a second; and seconds of a whole call."""
    problem = problems.SMALL_EVIDENCE if smoke else problems.EVIDENCE
    first = 5 * 100 * problem.num_particles  # a graph is compared on the first chunks of data
    entrants = [contender(n, f, problem, first if ":stream" in f else 1) for n, f in ESTIMATORS.items()]
    times = measure(entrants, *effort(smoke, 1.0))
    sizes = [replace(problem, num_particles=d * problem.num_particles) for d in (1, 5)]
    calls = [contender(f"log_marginal, K = {p.num_particles}", "evidence:call_plain", p, warm=0) for p in sizes]
    speeds = compared(times, "log_marginal(compile=True)", "thousand/s", 1e-3, inverse=True)
    return speeds | {"calls": compared(measure(calls, *effort(smoke, 1.0)), None, "s", 1.0)["contenders"]}


def scaling(smoke: bool) -> dict[str, Any]:
    """Seconds of a call, and the ratio to that of half the size."""
    base = Problem("IWAE", 100, num_particles=500)
    sizes: dict[str, list[Problem]] = {
        "N": [replace(base, num_data=n) for n in ((10, 20) if smoke else (100, 200, 400, 800))],
        "K": [replace(base, num_particles=k) for k in ((10, 20) if smoke else (500, 1000, 2000, 4000))],
    }
    found = {}
    for axis, cases in sizes.items():
        name: Callable[[Problem], int] = (lambda p: p.num_data) if axis == "N" else (lambda p: p.num_particles)
        entrants = [contender(str(name(case)), "evidence:call_plain", case) for case in cases]
        times = measure(entrants, *effort(smoke, 0.3))
        found[axis] = compared(times, None, "s", 1.0)["contenders"]
        for case, double in zip(cases, cases[1:], strict=False):
            short, long = (times[str(name(size))]["rounds"] for size in (case, double))
            found[axis][str(name(double))]["doubling"] = ratios(long, short) if short and long else None
    return found


def memory(smoke: bool) -> dict[str, Any]:
    """10^6 bytes of a call, the median of three processes, one after the other."""
    base = problems.SMALL_EVIDENCE if smoke else problems.EVIDENCE
    n, k = base.num_data, base.num_particles
    doublings = (1, 2) if smoke else (1, 2, 4, 8, 16)
    sizes = {
        "N": {n * d: replace(base, num_data=n * d) for d in doublings},
        "K": {k * d // 2: replace(base, num_particles=k * d // 2) for d in doublings},
    }
    found: dict[str, Any] = {}
    for axis, cases in sizes.items():
        for size, problem in cases.items():
            entrant = contender("peak", "evidence:peak", problem)
            peaks = [measure([entrant], 0, 0.0)["peak"]["notes"]["megabytes"] for _ in range(1 if smoke else 3)]
            found.setdefault(axis, {})[str(size)] = {"megabytes": median(peaks), "processes": peaks}
    return found


def mixture(smoke: bool) -> dict[str, Any]:
    """Seconds of a whole fit."""
    problem = Problem("mixture", 2000)
    times = measure([contender(name, function, problem) for name, function in MIXTURES.items()], *effort(smoke, 0.3))
    return compared(times, "scikit-learn, EM", "s", 1.0)


SECTIONS = {"training": training, "evidence": evidence, "scaling": scaling, "memory": memory, "mixture": mixture}


def effort(smoke: bool, turn_seconds: float) -> tuple[int, float]:
    """Rounds, and seconds a turn."""
    return (2, 0.01) if smoke else (7, turn_seconds)


def compared(
    times: dict[str, dict[str, Any]], ours: str | None, unit: str, factor: float, inverse: bool = False
) -> dict[str, Any]:
    """All times in a unit, and by how many times a contender takes that long as ``ours`` does, round by round."""
    rows = {}
    for name, row in times.items():
        rounds = [factor / t if inverse else factor * t for t in row["rounds"]]
        rows[name] = row | {"rounds": rounds, unit: spread(rounds) if rounds else None, "ratio": None}
        if ours and row["rounds"] and times[ours]["rounds"]:
            rows[name]["ratio"] = ratios(times[ours]["rounds"], row["rounds"])
    return {"contenders": rows}


def cpu() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def versions() -> dict[str, str]:
    """Of all that takes part and is installed."""
    found = {"python": platform.python_version(), "pyro_lvm": problems.lvm.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def rounded(value: Any) -> Any:
    """The same with numbers of five digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
