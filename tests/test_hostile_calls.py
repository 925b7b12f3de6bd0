"""A thousand calls with arguments that make no sense: only the package's own errors, and nothing is left behind."""

import inspect
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import Distribution

import pyro_lvm as lvm
from pyro_lvm.errors import PyroLVMError

CALLS = 1000


def model(x: torch.Tensor, *_: Any) -> None:
    """Whatever x is, its sum."""
    total = x.reshape(len(x), -1).double().sum(-1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=total)


def guide(x: torch.Tensor, *_: Any) -> None:
    total = x.reshape(len(x), -1).double().sum(-1)
    shift = pyro.param("shift", torch.tensor(0.1, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(total / 2 + shift, 1.0))


class Odd:
    """An object that is of no use."""


X = torch.randn(6, generator=torch.Generator().manual_seed(0))
DATA = [
    *(None, [], "x", 3, float("nan"), Odd(), {"x": X}, (X,), [1.0, 2.0], lambda: X),
    *(torch.empty(0), torch.tensor(1.0), torch.full((3,), torch.nan), torch.full((3,), torch.inf), X.to_sparse()),
    *(torch.randn(3, dtype=torch.cfloat), X > 0, X.long(), X[:1], X[:, None], X.half(), X.double(), X.numpy()),
    *(np.zeros((0, 3)), np.array(["a"]), np.array([1, 2], dtype=object), np.array(1.0)),
]
INTEGERS = [0, -1, 1.5, True, "a", None, 3, np.int64(2), float("nan"), [1], 7]
SEEDS = [None, 0, -1, 1.5, "a", 2**70, True, np.int64(3), [1], torch.tensor(1)]
CHUNKS = [None, (0, 1), 5, "a", (1,), (1, 2, 3), (2, 2), (1.5, 2), ("a", 1), [2, 2], (), {}]
ANYTHING = [None, "nope", 3, 1.5, -1, [], {}, "auto", True, "cpu", "cuda:7", torch.float32, (1, 2), X, Odd(), Odd]
PROGRAMS = [None, 3, "model", Odd(), Odd, [], torch.distributions.Normal(0.0, 1.0), model, guide, lambda x: None]
EVALUATION = {name: ANYTHING for name in ("data_args", "data_plate", "vectorize", "device", "progress")}
SAMPLING: dict[str, list[Any]] = EVALUATION | {"num_particles": INTEGERS, "seed": SEEDS, "chunks": CHUNKS}
SAMPLING |= {"compile": ANYTHING, "model_dtype": ANYTHING}


def compare(model: Any, guide: Any, x: Any, **options: Any) -> Any:
    return lvm.compare({"one": (model, guide), "two": (model, guide)}, x, **options)


def load(model: Any, guide: Any, x: Any, path: Any = None) -> Any:
    """`lvm.load` with its path last."""
    return lvm.load("nothing here.pt" if path is None else path, model, guide, x)


def save(model: Any, guide: Any, x: Any, path: Any = None) -> None:
    """A result that is none, or a path that is none."""
    lvm.save((model, guide, x), path)  # type: ignore[arg-type]


def expectation(model: Any, guide: Any, x: Any, fn: Any = lambda z: z, **options: Any) -> Any:
    return lvm.expectation(model, guide, x, fn, **options)


def decode(model: Any, x: Any, latents: Any = X, site: Any = None) -> Any:
    """`latent.decode` with the latents last."""
    return lvm.latent.decode(model, latents, x, site=site)


def sample(model: Any, x: Any, num_samples: Any = 2, seed: Any = None) -> Any:
    return lvm.latent.sample(model, x, num_samples, seed=seed)


def options_of(function: Callable[..., Any]) -> Any:
    own = {compare: lvm.compare, expectation: lvm.expectation}
    return inspect.signature(own.get(function, function)).parameters


STEPS = {"num_steps": [2, 0, -1, 1.5, "a"], "num_draws": INTEGERS, "learning_rate": [None, 0.1, 0, -1, "a", torch.nan]}
TRAINING = {name: INTEGERS for name in ("num_epochs", "num_steps", "batch_size")} | {"seed": SEEDS}
TRAINING |= {name: ANYTHING for name in ("optim", "update", "compile", "callbacks", "device", "progress", "resume")}
TRAINING |= {"loss": [*ANYTHING, Trace_ELBO(), Trace_ELBO]}
FUNCTIONS: dict[Callable[..., Any], dict[str, list[Any]]] = {
    lvm.log_marginal: SAMPLING,
    lvm.log_weights: SAMPLING,
    lvm.elbo: SAMPLING,
    lvm.evidence.prior: SAMPLING,
    lvm.evidence.uniform: SAMPLING,
    lvm.evidence.enumeration: EVALUATION | {"chunks": CHUNKS, "max_terms": INTEGERS},
    lvm.evidence.quadrature: EVALUATION | {"num_nodes": INTEGERS, "tolerance": ANYTHING},
    lvm.evidence.closed_form: EVALUATION,
    lvm.inference_gap: SAMPLING | STEPS,
    lvm.guides.refine: SAMPLING | STEPS,
    lvm.fit: TRAINING,
    compare: SAMPLING | {"reference": ANYTHING},
    lvm.check: {"loss": [*ANYTHING, Trace_ELBO(), Trace_ELBO]},
    expectation: SAMPLING | {"fn": [*ANYTHING, lambda: X, lambda y: y, lambda z: z.sum(), torch.abs]},
    lvm.latent.encode: SAMPLING | {"site": ANYTHING},
    lvm.latent.attribute: SAMPLING | {"site": ANYTHING},
    lvm.latent.reconstruct: {"num_draws": INTEGERS, "seed": SEEDS, "site": ANYTHING, "data_plate": ANYTHING},
    decode: {"latents": [*DATA, *ANYTHING, {"z": X}, {"y": X}], "site": ANYTHING},
    sample: {"num_samples": INTEGERS, "seed": SEEDS},
    load: {"path": ANYTHING},
    save: {"path": ANYTHING},
}
SMALL: dict[str, Any] = {"num_steps": 2, "num_particles": 3}  # unless drawn


def calls(number: int, seed: int) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Functions, and arguments most of which are as they should be."""
    draw = random.Random(seed)
    for _ in range(number):
        function = draw.choice(list(FUNCTIONS))
        known = options_of(function)
        options = {name: value for name, value in SMALL.items() if name in known}
        for name, values in FUNCTIONS[function].items():
            if name in known and draw.random() < 0.2:
                options[name] = draw.choice(values)
        if options.get("num_epochs") is not None:
            options.pop("num_steps", None)
        programs = (model, guide) if "guide" in inspect.signature(function).parameters else (model,)
        programs = tuple(draw.choice(PROGRAMS) if draw.random() < 0.15 else program for program in programs)
        yield function, (*programs, draw.choice(DATA) if draw.random() < 0.5 else X), options


@pytest.mark.filterwarnings("ignore")
def test_only_errors_of_the_package(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="pyro_lvm")
    finished = refused = 0
    validated = Distribution._validate_args
    for function, args, options in calls(CALLS, seed=0):
        pyro.clear_param_store()
        pyro.param("bystander", torch.ones(2))
        torch.manual_seed(1)
        before = torch.get_rng_state()
        message = ""
        try:
            function(*args, **options)
        except PyroLVMError as error:
            message = str(error)
        except Exception as error:
            raise AssertionError((function.__name__, args, options)) from error
        finished, refused = finished + (not message), refused + bool(message)
        assert not message or "expected" in message, (function, args, options, message)
        if function is not lvm.fit:
            assert set(pyro.get_param_store().keys()) == {"bystander"}
        if isinstance(options.get("seed"), int):
            assert torch.get_rng_state().equal(before), (function, args, options)
        assert pyro.param("bystander").tolist() == [1.0, 1.0]
        assert Distribution._validate_args == validated
    assert finished > CALLS / 20
    assert refused > CALLS / 2
