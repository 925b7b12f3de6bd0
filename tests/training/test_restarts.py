"""Restarts: the best of them is the run that it would be alone, and the others leave nothing behind."""

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_lvm
from pyro_lvm import best_of
from pyro_lvm.errors import DataTypeError, NonFiniteError, ParameterError, ShapeError
from pyro_lvm.models import GaussianMixture
from pyro_lvm.tracing.params import current_params
from pyro_lvm.training.restarts import final_loss

X = torch.tensor([-3.0, -2.5, 2.0, 3.5])


def adam(params):
    return torch.optim.Adam(params, lr=0.1)


def mixture_run(seed):
    """A mixture from a random start: other seeds reach other optima."""
    x = pyro_lvm.datasets.pinwheel(100)[0]
    return pyro_lvm.fit(GaussianMixture(3, 2), None, x, num_steps=15, optim=adam)


def model(x):
    """x = |z| + noise: an optimum on either side of 0."""
    loc = pyro.param("loc", lambda: 6 * torch.rand(()) - 3)
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("x", dist.Normal(z.abs(), 0.5), obs=x)


def guide(x):
    shift = pyro.param("shift", lambda: torch.randn(()))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + shift, 0.5))


def function_run(seed):
    """Plain functions, shared by all runs."""
    return pyro_lvm.fit(model, guide, X.abs(), num_steps=20, optim=adam)


def alone(train, seed):
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return train(seed)


def value(result, x):
    return pyro_lvm.log_weights(result.model, result.guide, x, num_particles=5, seed=1)


@pytest.mark.parametrize("train", [mixture_run, function_run])
def test_the_best_run_is_what_it_is_alone(train):
    x = pyro_lvm.datasets.pinwheel(50)[0] if train is mixture_run else X.abs()
    runs = [alone(train, seed) for seed in range(2, 6)]
    losses = [float(run.losses[-1]) for run in runs]
    expected = runs[losses.index(min(losses))]
    values = value(expected, x)
    pyro.clear_param_store()
    result = best_of(train, num_restarts=4, seed=2)
    torch.testing.assert_close(result.losses, expected.losses, rtol=0, atol=0)
    torch.testing.assert_close(result.params, expected.params, rtol=0, atol=0)
    torch.testing.assert_close(value(result, x), values, rtol=0, atol=0)
    listed = ", ".join(f"{loss:.4f}" for loss in losses)
    chosen = 2 + losses.index(min(losses))
    assert 2 < chosen < 5  # earlier and later runs lose
    assert result.notes == (f"best of 4 restarts: seed {chosen}; final losses of seeds 2 to 5: {listed}",)


@pytest.mark.parametrize("train", [mixture_run, function_run])
def test_the_store_holds_the_best_run_and_no_other(train):
    pyro.param("mine", torch.tensor(7.0))
    result = best_of(train, num_restarts=4, seed=2)
    learned = result.model.params | result.guide.params
    here = current_params()
    assert set(here) == {"mine", *learned}
    assert all(here[name][0] is tensor for name, (tensor, _) in learned.items())
    for name, expected in result.params.items():
        torch.testing.assert_close(pyro.param(name).detach(), expected, rtol=0, atol=0)


def test_plain_functions_have_the_parameters_of_the_best_run():
    result = best_of(function_run, num_restarts=4, seed=2)
    weights = pyro_lvm.log_weights(model, guide, X.abs(), num_particles=5, seed=1)
    torch.testing.assert_close(weights, value(result, X.abs()), rtol=0, atol=0)
    again = pyro_lvm.fit(model, guide, X.abs(), num_steps=1, optim=lambda params: torch.optim.SGD(params, lr=1e-9))
    torch.testing.assert_close(again.params, result.params, rtol=0, atol=1e-6)  # goes on from there


def test_names_of_another_pair_in_the_store_stay_that_pairs(caplog):
    x = pyro_lvm.datasets.pinwheel(50)[0]
    earlier = GaussianMixture(2, 2)
    pyro_lvm.fit(earlier, None, x, num_steps=3)
    before, density = current_params(), earlier.log_prob(x).detach()
    result = best_of(mixture_run, num_restarts=2)
    assert {name: id(t) for name, (t, _) in current_params().items()} == {n: id(t) for n, (t, _) in before.items()}
    torch.testing.assert_close(pyro_lvm.log_marginal(earlier, None, x).value.float(), density)
    expected = alone(mixture_run, 0), alone(mixture_run, 1)
    losses = [float(run.losses[-1]) for run in expected]
    best = expected[losses.index(min(losses))]
    torch.testing.assert_close(result.params, best.params, rtol=0, atol=0)


def test_random_numbers_go_on_as_if_nothing_had_run():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    best_of(function_run, num_restarts=2)
    assert torch.equal(torch.rand(2), expected)


def test_each_restart_is_one_line_in_the_log(caplog):
    with caplog.at_level(logging.INFO, "pyro_lvm"):
        best_of(function_run, num_restarts=3)
    lines = [record.message for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [f"restart with seed {seed}" for seed in range(3)]
    assert all(line.endswith("nats per datum") for line in lines)


def broken_run(seed):
    """The runs of even seeds have a density of NaN."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(math.nan if seed % 2 == 0 else 0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False), obs=x)

    return pyro_lvm.fit(model, None, X, num_steps=20, optim=adam)


def test_a_run_that_failed_loses():
    result = best_of(broken_run, num_restarts=3)
    assert result.stop_reason == "num_steps"
    assert result.notes[0].startswith("best of 3 restarts: seed 1; final losses of seeds 0 to 2: inf, ")
    assert result.notes[0].endswith(", inf")


def test_where_all_runs_fail_that_is_an_error():
    with pytest.raises(NonFiniteError, match="parameter 'loc' of the model, log-density of site 'x' of the model"):
        best_of(lambda seed: broken_run(2 * seed), num_restarts=2)


def test_an_interrupted_run_is_the_last():
    def interrupt(state):
        raise KeyboardInterrupt

    def train(seed):
        callbacks = [interrupt] if seed == 1 else []
        return pyro_lvm.fit(model, guide, X.abs(), num_steps=5, optim=adam, callbacks=callbacks)

    assert best_of(train, num_restarts=5).notes[0].startswith("best of 2 restarts")


@pytest.mark.parametrize(("num_steps", "batch_size", "last"), [(7, 2, 2), (6, 2, 2), (5, 4, 1), (5, 3, 2), (1, 2, 1)])
def test_final_loss_is_the_mean_over_as_many_steps_as_an_epoch_has(num_steps, batch_size, last):
    result = pyro_lvm.fit(model, guide, X.abs(), num_steps=num_steps, batch_size=batch_size, seed=0)
    assert final_loss(result) == float(result.losses[-last:].mean())


def test_skipped_steps_do_not_count_in_the_final_loss():
    x = X.abs().clone()
    x[0] = math.nan  # in one of two batches
    result = pyro_lvm.fit(model, guide, x, num_steps=4, batch_size=2, seed=0)
    assert result.skipped == 2
    assert final_loss(result) == float(result.losses[-2:].nanmean())


# ---------------------------------------------------------------- refusals


def test_a_module_that_all_runs_share_is_refused():
    shared, x = GaussianMixture(2, 1), X[:, None]
    with pytest.raises(ParameterError, match="train: expected new parameters in each run, got the same tensors of"):
        best_of(lambda seed: pyro_lvm.fit(shared, None, x, num_steps=3, optim=adam), num_restarts=2)


def test_a_frozen_half_may_be_shared():
    shared, x = GaussianMixture(2, 1), X[:, None]

    def train(seed):
        loc = torch.nn.Linear(1, 2)
        guide = pyro_lvm.guides.as_guide(lambda x: dist.Categorical(logits=pyro.module("loc", loc)(x)))
        return pyro_lvm.fit(shared, guide, x, num_steps=3, optim=adam, update="guide")

    result = best_of(train, num_restarts=3)
    assert result.model.program is shared


def test_wrong_arguments_are_refused():
    with pytest.raises(DataTypeError, match="train: expected a function of a seed, got 3"):
        best_of(3, 2)
    with pytest.raises(DataTypeError, match="train: expected a function that returns a FitResult, got NoneType"):
        best_of(lambda seed: None, 2)
    with pytest.raises(ShapeError, match="num_restarts: expected 1 or more, got 0"):
        best_of(function_run, 0)
    with pytest.raises(ShapeError, match="seed: expected 0 or more, got -1"):
        best_of(function_run, 2, seed=-1)
