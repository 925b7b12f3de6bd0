"""One seed, one machine, one result: bit for bit, twice in a process and in another process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_lvm as lvm
from pyro_lvm import evidence, guides, models, objectives
from pyro_lvm.nn import MLP

ROOT = Path(__file__).parents[1]
X = (torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()


class Noisy(Dataset):
    """Draws anew for each datum that it is asked for, also in a worker."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> torch.Tensor:
        return (torch.rand(6) > 0.5).float()


def pair() -> tuple[Any, Any]:
    torch.manual_seed(1)
    encoder = torch.nn.Sequential(MLP(6, [8], 4), torch.nn.Dropout(0.1))
    return models.DeepGaussian(MLP(2, [8], 6), 2), guides.DiagonalNormal(2, encoder=encoder)


def numbers(result: Any) -> list[bytes]:
    """All tensors and arrays of a record, deep inside."""
    if isinstance(result, torch.Tensor):
        return [result.detach().numpy().tobytes()]
    if isinstance(result, np.ndarray):
        return [str(result.tolist()).encode()]
    if isinstance(result, dict):
        return [part for key, value in result.items() if key != "seconds" for part in numbers(value)]
    if isinstance(result, list | tuple):
        return [part for value in result for part in numbers(value)]
    if isinstance(result, int | float | str):
        return [repr(result).encode()]
    if hasattr(result, "__dict__") and not callable(result):
        return numbers({k: v for k, v in vars(result).items() if k not in ("seconds", "cost", "provenance")})
    return []


def fit(data: Any = X, **options: Any) -> lvm.FitResult:
    with pyro.get_param_store().scope():
        return lvm.fit(*pair(), data, **{"num_epochs": 2, "batch_size": 8, "seed": 3} | options)


def refined() -> Any:
    model, guide = pair()
    guide = guides.refine(model, guide, X[:5], num_steps=5, seed=0).guide
    return lvm.elbo(model, guide, X[:5], seed=1)


def discrete() -> tuple[Any, Any]:
    torch.manual_seed(1)
    return models.BinaryLatent(3, 6), guides.Bernoulli(3, encoder=torch.nn.Linear(6, 3))


def mixture(seed: int) -> lvm.FitResult:
    return lvm.fit(models.GaussianMixture(2, 6).initialize(X, seed), None, X, num_steps=3)


RUNS: dict[str, Callable[[], Any]] = {
    "fit": fit,
    "fit, a loader": lambda: fit(DataLoader(TensorDataset(X), batch_size=8, shuffle=True)),
    "fit, a data set that draws": lambda: fit(Noisy()),
    "fit, the weighted bound": lambda: fit(loss=objectives.ImportanceWeightedELBO(3)),
    "best_of": lambda: lvm.best_of(mixture, num_restarts=2),
    "log_weights": lambda: lvm.log_weights(*pair(), X, num_particles=3, seed=0),
    "elbo": lambda: lvm.elbo(*pair(), X, num_particles=3, seed=0),
    "log_marginal": lambda: lvm.log_marginal(*pair(), X, num_particles=50, seed=0),
    "log_marginal, in chunks": lambda: lvm.log_marginal(*pair(), X, num_particles=50, seed=0, chunks=(7, 11)),
    "prior": lambda: evidence.prior(pair()[0], X, num_particles=50, seed=0),
    "quadrature": lambda: evidence.quadrature(pair()[0], X[:3]),
    "enumeration": lambda: evidence.enumeration(discrete()[0], X),
    "closed form": lambda: evidence.closed_form(discrete()[0], X),
    "inference_gap": lambda: lvm.inference_gap(*pair(), X[:5], num_steps=5, num_particles=20, seed=0),
    "compare": lambda: lvm.compare({"one": pair(), "two": discrete()}, X, num_particles=20, seed=0),
    "refine": refined,
    "latent_usage": lambda: objectives.latent_usage(*pair(), X, num_particles=5, seed=0),
    "gradient_snr": lambda: objectives.gradient_snr(*pair(), X, num_repeats=3, num_particles=3, seed=0),
    "expectation": lambda: lvm.expectation(*pair(), X, lambda z: z, num_particles=50, seed=0, chunks=(7, 11)),
    "attribute": lambda: lvm.latent.attribute(models.GaussianMixture(2, 6).initialize(X, 0), None, X),
    "reconstruct": lambda: lvm.latent.reconstruct(*pair(), X, seed=0),
    "sample": lambda: lvm.latent.sample(pair()[0], X, 5, seed=0),
    "check": lambda: str(lvm.check(*pair(), X)),
}


@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
@pytest.mark.parametrize("name", RUNS)
def test_twice_the_same(name: str) -> None:
    found = []
    for elsewhere in (5, 6):
        torch.manual_seed(elsewhere)
        np.random.seed(elsewhere)  # noqa: NPY002
        found.append(numbers(RUNS[name]()))
    assert found[0] == found[1]
    assert len(b"".join(found[0])) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_twice_the_same_with_workers(workers: int) -> None:
    found = [fit(DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=workers)) for _ in range(2)]
    assert numbers(found[0].params) == numbers(found[1].params)
    assert torch.equal(found[0].losses, found[1].losses)


def test_other_seeds_are_other_results() -> None:
    assert not torch.equal(fit(seed=3).losses, fit(seed=4).losses)
    one, other = (lvm.elbo(*pair(), X, seed=seed) for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.slow
def test_another_process_says_the_same() -> None:
    code = "import hashlib, warnings; warnings.simplefilter('ignore'); import torch; torch.set_num_threads(1)\n"
    code += "from tests.test_reproducibility import RUNS, numbers\n"
    code += "print([hashlib.sha256(b''.join(numbers(RUNS[n]()))).hexdigest() for n in RUNS])"
    command = [sys.executable, "-c", code]
    found = []
    for hashes in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hashes}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
        found.append(done.stdout)
    assert found[0] == found[1]
    assert len(found[0]) > 1000
