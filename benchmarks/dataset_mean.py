"""How often the interval of `evidence.dataset_mean` holds the mean of log p(x), on lognormal weights.

x ~ N(0, 1) whatever z is, z ~ N(0, 1), and the guide is N(2, 1): log w is normal with standard deviation 2, and
log p(x) is known. 5,000 data, the same in all 500 repeats, which differ in their draws alone; K = 1,000.

    python -m benchmarks.dataset_mean --runs runs.jsonl --repeats 500  # adds to the file; 25 minutes on one core
    python -m benchmarks.dataset_mean --runs runs.jsonl --repeats 0 --out benchmarks/dataset_mean.json
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from tqdm.auto import tqdm

from pyro_lvm._version import versions
from pyro_lvm.evidence import dataset_mean

NUM_DATA, NUM_PARTICLES, SHIFT = 5000, 1000, 2.0
STATED = {"value": "stderr", "plain": "plain_stderr", "delta": "plain_stderr", "jackknife": "jackknife_stderr"}


def model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_full((), SHIFT), 1.0))


def one(seed):
    """Errors of each mean, and the stated ones."""
    x = torch.randn(NUM_DATA, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = float(dist.Normal(0.0, 1.0).log_prob(x).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k-hat of half of the data is above 0.7
        found = dataset_mean(model, guide, x, num_particles=NUM_PARTICLES, seed=seed)
    errors = {name: getattr(found, name) - exact for name in STATED}
    stated = {name: getattr(found, name) for name in set(STATED.values())}
    return {"seed": seed} | errors | stated | {"particles": found.particles / NUM_DATA}


def summary(runs):
    """What all repeats say of each mean."""
    column = {name: torch.tensor([run[name] for run in runs], dtype=torch.float64) for name in runs[0]}
    means = {}
    for name, stated in STATED.items():
        error = column[name]
        means[name] = {
            "mean_error": float(error.mean()),
            "mean_error_stderr": float(error.std()) / math.sqrt(len(runs)),
            "sd": float(error.std()),
            "stated_stderr": float(column[stated].mean()),
            "errors_off": float((error / column[stated]).mean()),
            "coverage": float((error.abs() <= 1.959964 * column[stated]).double().mean()),
        }
    settings = {"num_data": NUM_DATA, "num_particles": NUM_PARTICLES, "sd_log_weight": SHIFT}
    counts = {"repeats": len(runs), "seeds": len(set(column["seed"].tolist()))}
    particles = {"median_particles": float(column["particles"].median())}
    return {"protocol": __doc__, "versions": versions()} | settings | counts | particles | {"means": means}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="one line of JSON a repeat")
    parser.add_argument("--first", type=int, default=0, help="seed of the first repeat")
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--out", type=Path, help="write the summary of all lines")
    args = parser.parse_args()
    for seed in tqdm(range(args.first, args.first + args.repeats)):
        with args.runs.open("a") as file:
            file.write(json.dumps(one(seed)) + "\n")
    if args.out:
        runs = [json.loads(line) for line in args.runs.read_text().splitlines()]
        args.out.write_text(json.dumps(summary(runs), indent=1) + "\n")


if __name__ == "__main__":
    main()
