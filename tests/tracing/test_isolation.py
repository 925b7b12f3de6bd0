"""An evaluation leaves the process as it was."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_lvm.evidence import importance
from pyro_lvm.tracing import log_weights
from pyro_lvm.tracing.isolation import eval_mode, forked_rng, validation
from tests.references import ENUMERATED, ORACLES, Pair, data, normal_guide, normal_model, posterior

Program = Callable[..., Any]
evaluators = pytest.mark.parametrize("evaluate", [log_weights, importance])


def rng_state() -> list[Any]:
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]]


def broken_model(x: torch.Tensor) -> None:
    normal_model(x)
    raise RuntimeError("mine")


# --- random numbers ---------------------------------------------------------------------------------------------------


@evaluators
@pytest.mark.parametrize("model", [normal_model, broken_model])
def test_a_seeded_call_leaves_the_random_state(evaluate: Program, model: Program) -> None:
    before = rng_state()
    if model is broken_model:
        with pytest.raises(RuntimeError, match="mine"):
            evaluate(model, normal_guide, data(3), num_particles=2, seed=1)
    else:
        evaluate(model, normal_guide, data(3), num_particles=2, seed=1)
    assert rng_state() == before


class FakeCuda:
    """Two devices in use, whose generators are those of the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generators = [torch.Generator().manual_seed(7 + i) for i in range(2)]
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: self.generators[int(device)].get_state())
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: self.generators[device].set_state(state))
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: [g.manual_seed(seed) for g in self.generators])

    def draws(self) -> list[float]:
        return [float(torch.rand(1, generator=generator)) for generator in self.generators]


def test_generators_of_all_cuda_devices_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed seeds all of them, wherever the data are."""
    fake = FakeCuda(monkeypatch)
    before = [generator.get_state().tolist() for generator in fake.generators]
    seen = []
    for _ in "ab":
        with forked_rng(3):
            seen.append(fake.draws())
    assert seen[0] == seen[1]
    importance(normal_model, normal_guide, data(3), num_particles=2)
    importance(normal_model, normal_guide, data(3), num_particles=2, seed=1)
    assert [generator.get_state().tolist() for generator in fake.generators] == before


def test_cuda_that_is_not_in_use_starts_with_the_seed_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with forked_rng(3):
        torch.rand(1)
    assert not seeds


@evaluators
def test_a_global_seed_determines_an_unseeded_call(evaluate: Program) -> None:
    results = []
    for _ in "ab":
        pyro.set_rng_seed(3)
        result = evaluate(normal_model, wide_guide, data(3), num_particles=200)
        results.append(result.value if evaluate is importance else result)
    assert results[0].equal(results[1])


@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UntrainedParameterWarning")
def test_the_first_call_of_an_auto_guide_takes_the_draws_of_the_second() -> None:
    """Its first run makes the parameters, with random numbers of its own: common random numbers must not shift."""
    guide = AutoNormal(normal_model)
    first, second = (log_weights(normal_model, guide, data(3), num_particles=2, seed=1) for _ in "ab")
    assert first.equal(second)


def wide_guide(x: torch.Tensor) -> None:
    loc, _, _ = posterior(x[:, None])
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


def test_forked_rng_seeds_all_three_generators() -> None:
    draws = []
    for _ in "ab":
        with forked_rng(7):
            draws.append((float(torch.rand(1)), random.random(), float(np.random.rand())))  # noqa: NPY002
    assert draws[0] == draws[1]


def test_forked_rng_without_a_seed_does_nothing() -> None:
    before = rng_state()
    with forked_rng(None):
        torch.rand(1)
    assert rng_state() != before


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pyro_flag", [True, False])
@pytest.mark.parametrize("torch_flag", [True, False])
@evaluators
def test_validation_flags_come_back_also_where_they_disagree(
    evaluate: Program, pyro_flag: bool, torch_flag: bool
) -> None:
    saved = torch.distributions.Distribution._validate_args
    with pyro.validation_enabled(pyro_flag):
        torch.distributions.Distribution.set_default_validate_args(torch_flag)
        try:
            evaluate(normal_model, normal_guide, data(3), num_particles=2)
            assert torch.distributions.Distribution._validate_args is torch_flag
            assert pyro.poutine.util.is_validation_enabled() is pyro_flag
        finally:
            torch.distributions.Distribution.set_default_validate_args(saved)


def test_validation_is_restored_after_an_error() -> None:
    before = torch.distributions.Distribution._validate_args
    with pytest.raises(ZeroDivisionError), validation(not before):
        raise ZeroDivisionError
    assert torch.distributions.Distribution._validate_args is before


# --- modules ----------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Batch normalisation and dropout around the identity: exact in eval mode, wrong and drifting in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, eps=0.0, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, x: torch.Tensor) -> Any:
        return self.frozen(self.dropout(self.norm(x[:, None])))[:, 0]

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("noisy", self)
        normal_guide(self(x))


class NoisyGuide(Noisy):
    """The guide is the module itself."""

    def forward(self, x: torch.Tensor) -> Any:
        normal_guide(super().forward(x))


def pair_with(kind: str) -> tuple[Program, Any]:
    if kind == "module":
        module = NoisyGuide()
        return module, module
    net = Noisy()
    guides: dict[str, Program] = {
        "method": net.guide,
        "registered": lambda x: normal_guide(pyro.module("net", net)(x)),
        "closure": lambda x: normal_guide(net(x)),
        "forward": lambda x: normal_guide(net.forward(x)),
    }
    return guides[kind], net


@evaluators
@pytest.mark.parametrize("kind", ["module", "method", "registered", "closure", "forward"])
@pytest.mark.parametrize("training", [True, False])
def test_modules_run_in_eval_mode_and_get_their_mode_back(evaluate: Program, kind: str, training: bool) -> None:
    guide, net = pair_with(kind)
    net.train(training)
    net.frozen.eval()
    modes = [m.training for m in net.modules()]
    statistics = net.norm.running_mean.clone(), net.norm.running_var.clone(), net.norm.num_batches_tracked.clone()
    x = data(4)
    result = evaluate(normal_model, guide, x, num_particles=3)
    value = result.value if evaluate is importance else result[0]
    torch.testing.assert_close(value, posterior(x[:, None])[2], atol=1e-10, rtol=0)
    assert [m.training for m in net.modules()] == modes
    after = net.norm.running_mean, net.norm.running_var, net.norm.num_batches_tracked
    assert all(a.equal(b) for a, b in zip(after, statistics, strict=True))


def test_modes_come_back_after_an_error() -> None:
    net = Noisy()

    def guide(x: torch.Tensor) -> None:
        net(x)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        log_weights(normal_model, guide, data(3))
    assert [m.training for m in net.modules()] == [True, True, True, False]


def test_eval_mode_of_nothing() -> None:
    with eval_mode(None, normal_model):
        pass


# --- the store, gradients, the arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", (ORACLES | ENUMERATED).values(), ids=ORACLES | ENUMERATED)
def test_the_store_is_left_as_it_was(oracle: Callable[[int], Pair]) -> None:
    pair = oracle(3)
    pyro.param("mine", torch.tensor(2.0), constraint=dist.constraints.positive)
    before = pyro.get_param_store().get_state()
    tensors = {n: (id(t), t._version) for n, t in before["params"].items()}
    importance(pair.model, pair.guide, pair.x, *pair.args, num_particles=2, **pair.options)
    after = pyro.get_param_store().get_state()
    assert {n: (id(t), t._version) for n, t in after["params"].items()} == tensors
    assert after["constraints"] == before["constraints"]


def test_the_store_is_left_as_it_was_after_an_error() -> None:
    pyro.param("mine", torch.tensor(2.0))

    def model(x: torch.Tensor) -> None:
        pyro.param("other", torch.tensor(1.0))
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        importance(model, normal_guide, data(3))
    assert list(pyro.get_param_store()) == ["mine"]


@pytest.mark.parametrize("enabled", [True, False])
def test_gradient_mode_is_that_of_the_caller(enabled: bool) -> None:
    pair = ORACLES["methods"](3)
    with torch.set_grad_enabled(enabled):
        assert log_weights(pair.model, pair.guide, pair.x).requires_grad is enabled
        assert not importance(pair.model, pair.guide, pair.x, num_particles=2).value.requires_grad
        assert torch.is_grad_enabled() is enabled


def test_handlers_outside_do_not_see_the_evaluation() -> None:
    with pyro.poutine.trace() as trace, pyro.poutine.scale(scale=5.0), pyro.poutine.mask(mask=False):
        table = log_weights(normal_model, normal_guide, data(3), num_particles=2)
    assert not trace.trace.nodes
    torch.testing.assert_close(table[0], posterior(data(3)[:, None])[2], atol=1e-10, rtol=0)


def test_x_is_not_changed() -> None:
    pair = ORACLES["obs_mask"](4)
    before = pair.x.clone()
    importance(pair.model, pair.guide, pair.x, num_particles=2)
    torch.testing.assert_close(pair.x, before, equal_nan=True)


def test_the_default_dtype_may_be_float64() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        table = log_weights(normal_model, normal_guide, data(3), num_particles=2)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(table[0], posterior(data(3)[:, None])[2], atol=1e-10, rtol=0)
