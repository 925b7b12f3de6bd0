r"""Eight families of guides by two objectives on frozen decoders of digits: which is nearer to the posterior?

    gap  =  log p(x) - ELBO(q)  =  KL(q(z | x) || p(z | x))  =  approximation + amortization

Protocol. Scikit-learn's digits, thresholded, 1437 images to train on and 360 to test on, the same for all seeds. For
each training seed a deep Gaussian model, z in R^8, decoder 8-64-64-64, is trained by the importance-weighted bound of
5 particles (1500 steps) and frozen. Then each guide is trained from scratch (2000 steps, encoder 64-128-128) by the
ELBO of one draw, or by the bound of 5 particles with the doubly reparameterised gradient. Batches of 128; Adam at
2e-3 for half of the steps, then down a line to 2 % of it. No option was tuned for any row.

Measured on the test images, K = 1000 draws from a common seed: ELBO, log p-hat, ESS/K, k-hat, statuses. log p(x), one
for all rows of a decoder, is by K = 10,000 draws from a guide that owes nothing to the rows: a Gaussian with a flow on
top, both refined for each image alone. On the first 100 images `inference_gap` splits the gap of each row.

`--out` gets all numbers of all runs and their summary; the table on the screen has the means over seeds.
"""

import argparse
import json
import logging
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

import pyro_lvm as lvm
from pyro_lvm.guides import DiagonalNormal, Flow, FullRankNormal, LowRankNormal, MixtureOfNormals, refine
from pyro_lvm.models import DeepGaussian
from pyro_lvm.nn import MLP
from pyro_lvm.objectives import ImportanceWeightedELBO
from pyro_lvm.table import TextTable

DIM = 8
FULL = DIM + DIM * (DIM + 1) // 2  # numbers of a mean and a triangle
CONTEXT = 32

GUIDES: dict[str, Callable[[], torch.nn.Module]] = {
    "mean-field": lambda: DiagonalNormal(DIM, encoder(2 * DIM)),
    "low rank": lambda: LowRankNormal(DIM, 2, encoder(4 * DIM)),
    "full rank": lambda: FullRankNormal(DIM, encoder(FULL)),
    "mixture": lambda: MixtureOfNormals(4, DIM, encoder(8 * DIM)),
    "coupling flow": lambda: Flow(DIM, encoder(2 * DIM + CONTEXT), transform="coupling"),
    "spline flow": lambda: Flow(DIM, encoder(2 * DIM + CONTEXT), transform="spline"),
    "autoregressive flow": lambda: Flow(DIM, encoder(2 * DIM + CONTEXT)),
    "full rank + autoregressive": lambda: Flow(DIM, encoder(FULL + CONTEXT), base="full"),
}
OBJECTIVES: dict[str, Callable[[], object]] = {
    "ELBO": Trace_ELBO,
    "IW-5": lambda: ImportanceWeightedELBO(5, gradient="doubly_reparameterized"),
}


@dataclass(frozen=True)
class Settings:
    """All numbers of the protocol."""

    decoder_steps: int = 1500
    guide_steps: int = 2000
    num_particles: int = 1000
    reference_particles: int = 10_000
    refine_steps: int = 200
    test_images: int = 360
    gap_images: int = 100


SMOKE = Settings(5, 5, 20, 40, 4, 12, 4)


def main() -> None:
    """Train all, measure all, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of training seeds")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    settings, start = SMOKE if args.smoke else Settings(), time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, spawn, initializer=quiet) as pool:
        decoders = {}
        for job in as_completed([pool.submit(train_decoder, seed, settings) for seed in range(args.seeds)]):
            decoder = job.result()
            decoders[decoder["seed"]] = decoder
            print(f"{time.perf_counter() - start:5.0f} s  decoder of seed {decoder['seed']}", flush=True)
        rows = [(seed, guide, objective) for seed in decoders for objective in OBJECTIVES for guide in GUIDES]
        jobs = [pool.submit(run_guide, *row, decoders[row[0]], settings) for row in rows]
        runs = []
        for number, job in enumerate(as_completed(jobs), start=1):
            run = job.result()
            runs.append(run)
            name = f"{run['guide']}, {run['objective']}, seed {run['seed']}"
            print(
                f"{time.perf_counter() - start:5.0f} s  {number:3d} of {len(rows)}  {name}: gap {run['gap']:.3f}",
                flush=True,
            )
    runs.sort(key=lambda run: rows.index((run["seed"], run["guide"], run["objective"])))
    add_differences(runs)
    summary = summarise(runs)
    report = {
        "protocol": __doc__,
        "settings": asdict(settings) | {"seeds": args.seeds},
        "versions": {"pyro_lvm": lvm.__version__, "pyro": pyro.__version__, "torch": torch.__version__},
        "date": date.today().isoformat(),
        "minutes": (time.perf_counter() - start) / 60,
        "references": [decoders[seed]["reference"] for seed in sorted(decoders)],
        "runs": [{key: value for key, value in run.items() if key != "elbos"} for run in runs],
        "summary": summary,
    }
    args.out.write_text(json.dumps(rounded(report), indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(summary)}\n{args.out}, {report['minutes']:.1f} minutes")


def quiet() -> None:
    """What each process does first."""
    logging.getLogger("pyro_lvm").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", lvm.UnreliableEstimateWarning)  # the table says it
    torch.set_num_threads(1)  # networks as small as these gain nothing from a second


def encoder(size: int) -> MLP:
    """64-128-128-size; q starts near the prior."""
    net = MLP(64, [128, 128], size)
    with torch.no_grad():
        net.layers[-1].weight.mul_(0.1)  # type: ignore[operator]
    return net


def train(model: Callable, guide: Callable, x: torch.Tensor, steps: int, **options: Any) -> float:
    """Adam at 2e-3 for half of the steps, then down a line to 2 % of it; returns seconds."""

    def decay(optimizer: Adam) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: min(1.0, 0.02 + 1.96 * (1 - step / steps)))

    schedule = lvm.callbacks.Schedule(decay)
    optim = partial(Adam, lr=2e-3)
    return lvm.fit(model, guide, x, optim=optim, num_steps=steps, callbacks=[schedule], **options).seconds


def train_decoder(seed: int, settings: Settings) -> dict:
    """One decoder, and log p(x) of the test images under it."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    images = lvm.datasets.digits("threshold")
    x = images.test[: settings.test_images]
    model = DeepGaussian(MLP(DIM, [64, 64], 64), DIM)
    teacher = DiagonalNormal(DIM, encoder(2 * DIM))
    train(model, teacher, images.train, settings.decoder_steps, seed=seed, loss=ImportanceWeightedELBO(5))
    steps: dict[str, Any] = {"num_steps": settings.refine_steps, "seed": seed, "progress": False}
    local = refine(model, teacher, x, **steps)
    proposal = refine(model, local.guide, x, family="flow", **steps)
    record = lvm.log_marginal(model, proposal.guide, x, num_particles=settings.reference_particles, seed=seed)
    reference = {"seed": seed, "num_particles": record.num_particles} | evidence(record)
    return {"seed": seed, "state": model.state_dict(), "log_marginal": record.value, "reference": reference}


def run_guide(seed: int, guide_name: str, objective: str, decoder: dict, settings: Settings) -> dict:
    """Train one guide on a frozen decoder, and measure it."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    images = lvm.datasets.digits("threshold")
    x = images.test[: settings.test_images]
    model, guide = DeepGaussian(MLP(DIM, [64, 64], 64), DIM), GUIDES[guide_name]()
    model.load_state_dict(decoder["state"])
    options = {"loss": OBJECTIVES[objective](), "update": "guide", "seed": seed}
    seconds = train(model, guide, images.train, settings.guide_steps, **options)
    record = lvm.log_marginal(model, guide, x, num_particles=settings.num_particles, seed=0, progress=False)
    gap = decoder["log_marginal"] - record.elbo  # (N,)
    return {
        "seed": seed,
        "guide": guide_name,
        "objective": objective,
        "parameters": sum(parameter.numel() for parameter in guide.parameters()),
        "training_seconds": seconds,
        **evidence(record),
        "log_marginal_less_reference": float((record.value - decoder["log_marginal"]).mean()),
        "gap": float(gap.mean()),
        "gap_data_stderr": float(gap.std()) / math.sqrt(len(gap)),
        "parts": parts(model, guide, x[: settings.gap_images], gap, decoder["log_marginal"], settings),
        "elbos": record.elbo.tolist(),
    }


def evidence(record: lvm.LogMarginal) -> dict:
    """Means over images of one estimate, and how far to trust it."""
    khat = record.khat
    return {
        "log_marginal": record.mean,
        "log_marginal_stderr": record.mean_stderr,
        "log_marginal_bias": record.mean_bias,
        "elbo": record.elbo.mean().item(),
        "elbo_stderr": mean_stderr(record.elbo_stderr),
        "ess_share": float((record.ess / record.num_particles).median()),
        "khat_median": float(khat.nanmedian()),
        "khat_above_0.5": float((khat > 0.5).double().mean()),
        "khat_above_0.7": float((khat > 0.7).double().mean()),
        "status": record.status_shares(),
    }


def parts(
    model: Callable,
    guide: Callable,
    x: torch.Tensor,
    gap: torch.Tensor,
    log_marginal: torch.Tensor,
    settings: Settings,
) -> dict:
    """Approximation and amortization on these images; ``gap`` is that of the table, by other draws."""
    num, steps = len(x), settings.refine_steps
    split = lvm.inference_gap(
        model, guide, x, num_steps=steps, num_particles=settings.num_particles, seed=0, progress=False
    )
    reference = log_marginal[:num]
    return {
        "gap": float(gap[:num].mean()),
        "approximation": float((reference - split.local_elbo).mean()),
        "amortization": float(split.amortization.mean()),
        "amortization_stderr": mean_stderr(split.amortization_stderr),
        "left_by_a_flow": float((reference - split.flow_elbo).mean()),
        "converged": float(split.converged.double().mean()),
        "last_gain": float(split.last_gain.mean()),
        "log_marginal_less_reference": float((split.log_marginal - reference).mean()),
        "log_marginal_stderr": mean_stderr(split.log_marginal_stderr),
    }


def mean_stderr(errors: torch.Tensor) -> float:
    """Standard error of a mean over images, from those of the images."""
    return float(errors.square().sum().sqrt()) / len(errors)


def add_differences(runs: list[dict]) -> None:
    """ELBO of each run less that of the best row, on the same decoder, paired over images."""
    keys = dict.fromkeys((run["guide"], run["objective"]) for run in runs)
    best = max(keys, key=lambda key: mean(run["elbo"] for run in runs if (run["guide"], run["objective"]) == key))
    tops = {run["seed"]: run["elbos"] for run in runs if (run["guide"], run["objective"]) == best}
    for run in runs:
        paired = torch.tensor(run["elbos"]) - torch.tensor(tops[run["seed"]])  # (N,)
        run["difference"] = float(paired.mean())
        run["difference_stderr"] = float(paired.std()) / math.sqrt(len(paired))


def summarise(runs: list[dict]) -> list[dict]:
    """Mean and standard deviation over training seeds, a row for each guide and objective, the best ELBO first."""
    rows = []
    for key in dict.fromkeys((run["guide"], run["objective"]) for run in runs):
        own = [flat(run) for run in runs if (run["guide"], run["objective"]) == key]
        numbers = [name for name, value in own[0].items() if isinstance(value, float)]
        statuses = {name for run in own for name in run if name.startswith("status.")}
        row: dict = {"guide": key[0], "objective": key[1], "parameters": own[0]["parameters"]}
        for name in sorted({*numbers, *statuses}):
            values = [run.get(name, 0.0) for run in own]
            row[name] = {"mean": mean(values), "sd": sd(values)}
        row["difference"]["seeds"] = [(run["difference"], run["difference_stderr"]) for run in own]
        rows.append(row)
    return sorted(rows, key=lambda row: -row["elbo"]["mean"])


def flat(run: dict) -> dict:
    """Nested numbers as ``"parts.gap"``, ``"status.unreliable"``."""
    nested = {f"{name}.{key}": v for name in ("parts", "status") for key, v in run[name].items()}
    return {name: value for name, value in run.items() if not isinstance(value, dict | list)} | nested


def mean(values: Iterable[float]) -> float:
    """Mean of some numbers."""
    values = list(values)
    return sum(values) / len(values)


def sd(values: list[float]) -> float | None:
    """Standard deviation; None for one number."""
    return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else None


def rounded(value: object) -> object:
    """The same with numbers of five decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


COLUMNS = {  # header -> (number, format)
    "gap": ("gap", "{:.2f}"),
    "approximation": ("parts.approximation", "{:.2f}"),
    "amortization": ("parts.amortization", "{:.2f}"),
    "ESS/K": ("ess_share", "{:.2f}"),
    "k-hat > 0.7": ("khat_above_0.7", "{:.0%}"),
}


def table(summary: list[dict]) -> TextTable:
    """Means over seeds of the guide by each objective; in brackets standard deviations over seeds."""
    rows = {(row["guide"], row["objective"]): row for row in summary}
    lines = []
    for guide in dict.fromkeys(row["guide"] for row in summary if row["objective"] == "ELBO"):
        pair = [rows[guide, objective] for objective in OBJECTIVES]
        cells = [" / ".join(form.format(row[name]["mean"]) for row in pair) for name, form in COLUMNS.values()]
        lines.append((guide, *(difference(row["difference"]) for row in pair), *cells))
    header = ("guide", *(f"ELBO less the best, by {objective}" for objective in OBJECTIVES), *COLUMNS)
    return TextTable(header, tuple(lines))


def difference(number: dict) -> str:
    """Mean and standard deviation over seeds."""
    return f"{number['mean']:.3f}" + ("" if number["sd"] is None else f" ({number['sd']:.3f})")


if __name__ == "__main__":
    main()
