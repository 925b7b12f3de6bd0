"""Callbacks: which hooks run when, early stopping, schedules, loggers."""

import logging
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_lvm.errors import DataTypeError, PyroLVMError, ShapeError
from pyro_lvm.tracing import elbo
from pyro_lvm.training import TrainingState, fit
from pyro_lvm.training.callbacks import EarlyStopping, Log, Schedule, validation_elbo


def make_pair():
    def model(x):
        slope = pyro.param("slope", torch.tensor(0.2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(slope * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("gain", torch.tensor(0.1)) * x, 0.8))

    return model, guide


def data(num_data=20):
    return torch.randn(num_data, generator=torch.Generator().manual_seed(3))


def sgd(params):
    return torch.optim.SGD(params, lr=1e-2)


class Recorder:
    """Every hook, with what the state showed."""

    def __init__(self):
        self.calls = []

    def on_start(self, state):
        self.calls.append(("start", state.step, type(state.optimizer).__name__, sorted(state.params)))

    def on_step(self, state):
        self.calls.append(("step", state.step, state.epoch, state.updated, state.history[-1]["loss"] == state.loss))

    def on_epoch(self, state):
        self.calls.append(("epoch", state.step, state.epoch))

    def on_end(self, state):
        self.calls.append(("end", state.step, state.stop_reason))


def test_hooks_and_what_they_see():
    recorder = Recorder()
    fit(*make_pair(), data(), optim=sgd, num_epochs=2, batch_size=10, callbacks=[recorder])
    assert recorder.calls == [
        ("start", 0, "SGD", ["gain", "slope"]),
        ("step", 1, 1, True, True),
        ("step", 2, 1, True, True),
        ("epoch", 2, 1),
        ("step", 3, 2, True, True),
        ("step", 4, 2, True, True),
        ("epoch", 4, 2),
        ("end", 4, "num_epochs"),
    ]


def test_a_plain_function_runs_after_each_epoch_and_may_stop():
    pair = make_pair()

    def stop(state):
        assert isinstance(state, TrainingState)
        assert (state.model, state.guide) == pair
        if state.epoch == 3:
            state.stop("enough")
            state.stop("a later reason does not count")

    result = fit(*pair, data(), num_epochs=9, batch_size=10, callbacks=(stop,))
    assert (result.stop_reason, result.num_steps) == ("enough", 6)


def test_a_callback_stops_within_an_epoch():
    class AtStep:
        def on_step(self, state):
            if state.loss < math.inf and state.step == 3:
                state.stop("there")

    result = fit(*make_pair(), data(), num_epochs=9, batch_size=5, callbacks=[AtStep()])
    assert (result.stop_reason, result.num_steps) == ("there", 3)


def test_the_pyro_optimizer_that_was_given_is_the_one_that_callbacks_see():
    optim = pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.5})
    seen = []

    def step(state):
        state.optimizer.step()
        seen.append(state.optimizer)

    fit(*make_pair(), data(), optim=optim, num_epochs=2, callbacks=[step])
    assert seen == [optim] * 2
    rates = {s.optimizer.param_groups[0]["lr"] for s in optim.optim_objs.values()}
    assert rates == {0.1 * 0.5**2}


@pytest.mark.parametrize("callbacks", [[], [Schedule(print)], [EarlyStopping(lambda model, guide: 0.0, 3)]])
def test_a_pyro_scheduler_that_nobody_steps_is_refused(callbacks):
    optim = pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.5})
    with pytest.raises(DataTypeError, match=r"optim: expected an optimizer, got PyroLRScheduler.*callbacks\.Schedule"):
        fit(*make_pair(), data(), optim=optim, num_epochs=2, callbacks=callbacks)
    assert not list(pyro.get_param_store().keys())


# ---------------------------------------------------------------------------------------------------------------------
# Early stopping.


def scores(*values):
    left = iter(values)
    return lambda model, guide: next(left)


def test_early_stopping_counts_evaluations_without_a_new_best():
    stopper = EarlyStopping(scores(0.0, 2.0, 1.0, math.nan, 9.0), patience=2)
    result = fit(*make_pair(), data(), num_epochs=50, callbacks=[stopper])
    assert (result.stop_reason, result.num_steps) == ("early_stopping", 4)
    assert (stopper.best_score, stopper.best_step) == (2.0, 2)
    assert [row.get("score") for row in result.history][:3] == [0.0, 2.0, 1.0]


def test_early_stopping_every_few_epochs():
    stopper = EarlyStopping(scores(1.0, 0.0), patience=1, every=3)
    result = fit(*make_pair(), data(), num_epochs=50, callbacks=[stopper])
    assert result.num_steps == 6
    assert ["score" in row for row in result.history] == [False, False, True] * 2


@pytest.mark.parametrize("limit", [{"num_epochs": 4}, {"num_epochs": 50}, {"num_steps": 4}])
def test_early_stopping_restores_the_best_whatever_ended_training(limit):
    pair = make_pair()
    best = fit(*pair, data(), optim=sgd, num_epochs=2, seed=0).params
    pyro.clear_param_store()
    stopper = EarlyStopping(scores(0.0, 1.0, 0.5, 0.5, 0.5), patience=3)
    result = fit(*make_pair(), data(), optim=sgd, **limit, seed=0, callbacks=[stopper])
    assert result.num_steps > 2
    assert {name: value.item() for name, value in result.params.items()} == {n: v.item() for n, v in best.items()}


def test_early_stopping_may_keep_the_last():
    last = fit(*make_pair(), data(), optim=sgd, num_epochs=4, seed=0).params
    pyro.clear_param_store()
    stopper = EarlyStopping(scores(0.0, 1.0, 0.5, 0.5), patience=2, restore_best=False)
    result = fit(*make_pair(), data(), optim=sgd, num_epochs=50, seed=0, callbacks=[stopper])
    assert torch.equal(result.params["gain"], last["gain"])


def test_scores_without_patience_are_recorded_to_the_end():
    stopper = EarlyStopping(scores(*range(9, 0, -1)), patience=None)
    result = fit(*make_pair(), data(), optim=sgd, num_epochs=9, callbacks=[stopper])
    assert (result.stop_reason, stopper.best_step) == ("num_epochs", 1)
    assert [row["score"] for row in result.history] == list(range(9, 0, -1))


@pytest.mark.parametrize(
    ("value", "got"),
    [(torch.zeros(300), r"shape \(300,\)"), (np.zeros(2), r"shape \(2,\)"), (None, "None"), ("high", "str")],
)
def test_a_score_that_is_no_number_is_named_and_nothing_trained_is_lost(value, got):
    stopper = EarlyStopping(lambda model, guide: value, patience=3)
    with pytest.raises(DataTypeError, match=f"score: expected one number, got {got}.*mean"):
        fit(*make_pair(), data(), optim=sgd, num_epochs=2, callbacks=[stopper])
    assert pyro.param("gain").item() != pytest.approx(0.1)


def test_a_score_may_have_a_gradient():
    x = data()
    stopper = EarlyStopping(lambda model, guide: elbo(model, guide, x, seed=0).mean(), patience=3)
    result = fit(*make_pair(), x, num_epochs=2, callbacks=[stopper])
    assert type(result.history[-1]["score"]) is float


class Normalised(nn.Module):
    """A guide with batch statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        pyro.module("norm", self.norm)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.norm(x[:, None]).squeeze(-1), 0.8))


def test_early_stopping_restores_batch_statistics():
    model, _ = make_pair()
    reference, guide = Normalised(), Normalised()
    fit(model, reference, data(), num_epochs=2, seed=0)
    stopper = EarlyStopping(scores(0.0, 1.0, 0.5, 0.5), patience=2)
    fit(make_pair()[0], guide, data(), num_epochs=50, seed=0, callbacks=[stopper])
    for name, value in reference.state_dict().items():
        assert torch.equal(value, guide.state_dict()[name]), name


def test_early_stopping_starts_anew_in_each_run():
    stopper = EarlyStopping(scores(5.0, 0.0, 1.0, 2.0, 0.0), patience=1)
    assert fit(*make_pair(), data(), num_epochs=50, callbacks=[stopper]).num_steps == 2
    pyro.clear_param_store()
    assert fit(*make_pair(), data(), num_epochs=50, callbacks=[stopper]).num_steps == 3
    assert stopper.best_score == 2.0


# ---------------------------------------------------------------------------------------------------------------------
# Validation.


def test_validation_elbo_is_the_mean_elbo_of_held_out_data():
    # z = gain x with variance s^2 = 0.64, slope b: ELBO = log N(x; bm, 1) - b^2 s^2 / 2 - KL(N(m, s^2) || N(0, 1))
    model, guide = make_pair()
    x = data(2300).double()
    m, b, s = 0.1 * x, 0.2, 0.8
    exact = dist.Normal(b * m, 1.0).log_prob(x) - b**2 * s**2 / 2 - (m**2 + s**2 - 1 - math.log(s**2)) / 2
    fit(model, guide, data(), num_steps=1, optim=lambda p: torch.optim.SGD(p, lr=0.0))
    score = validation_elbo(x.float().numpy(), num_particles=50)
    got = score(model, guide)
    # one draw's variance over z is below 1 here, so that the standard error is below 1 / sqrt(50 * 2300) = 0.003
    assert got == pytest.approx(float(exact.mean()), abs=5 * 0.003)
    assert score(model, guide) == got


def test_validation_elbo_weighs_slices_by_their_size():
    # without a latent the ELBO is log p(x), so that the mean over slices of 1000, 1000 and 300 must be exact
    def model(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x * pyro.param("a", torch.tensor(0.5)), 1.0), obs=y)

    x, y = data(2300), data(2300) ** 2
    fit(model, None, (x, y), num_steps=1, optim=lambda p: torch.optim.SGD(p, lr=0.0))
    exact = dist.Normal(0.5 * x.double(), 1.0).log_prob(y.double()).mean()
    assert validation_elbo(x, y)(model, None) == pytest.approx(float(exact), rel=1e-6)


class Items(Dataset):
    """Data that are read one by one, with noise."""

    def __init__(self, *columns, noise=0.0):
        self.columns, self.noise = columns, noise

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, i):
        items = tuple(column[i] + self.noise * torch.randn(()) for column in self.columns)
        return items if len(items) > 1 else items[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (TensorDataset(x, y),),
        lambda x, y: (Items(x, y),),
        lambda x, y: (Items(x), y),
        lambda x, y: (DataLoader(Items(x, y), batch_size=7, shuffle=True),),
        lambda x, y: (DataLoader(TensorDataset(x, y), collate_fn=lambda items: torch.tensor(items).unbind(-1)),),
        lambda x, y: (x.numpy(), y.numpy()),
    ],
)
def test_validation_takes_the_data_that_fit_takes(make):
    # y differs in each row, so that rows of x and y that do not belong together would show
    def model(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x * pyro.param("a", torch.tensor(0.5)), 1.0), obs=y)

    x, y = data(2300), data(2300) ** 2
    fit(model, None, (x, y), num_steps=1, optim=lambda p: torch.optim.SGD(p, lr=0.0))
    exact = dist.Normal(0.5 * x.double(), 1.0).log_prob(y.double()).mean()
    assert validation_elbo(*make(x, y))(model, None) == pytest.approx(float(exact), rel=1e-6)


def test_validation_of_a_data_set_that_draws_leaves_training_as_it_is():
    x = data()
    plain = fit(*make_pair(), x, optim=sgd, num_epochs=4, batch_size=10, seed=0)
    pyro.clear_param_store()
    score = validation_elbo(Items(x, noise=0.1))
    stopper = EarlyStopping(score, patience=None, restore_best=False)
    pair = make_pair()
    watched = fit(*pair, x, optim=sgd, num_epochs=4, batch_size=10, seed=0, callbacks=[stopper])
    assert watched.losses.tolist() == plain.losses.tolist()
    assert score(*pair) == score(*pair) == watched.history[-1]["score"]


def test_validation_sees_the_parameters_of_the_run_and_leaves_training_as_it_is():
    x = data()
    plain = fit(*make_pair(), x, optim=sgd, num_epochs=6, batch_size=10, seed=0)
    pyro.clear_param_store()
    stopper = EarlyStopping(validation_elbo(x, num_particles=10), patience=50, restore_best=False)
    pair = make_pair()
    watched = fit(*pair, x, optim=sgd, num_epochs=6, batch_size=10, seed=0, callbacks=[stopper])
    assert watched.losses.tolist() == plain.losses.tolist()
    in_run = [row["score"] for row in watched.history if "score" in row]
    assert len(set(in_run)) == 6
    assert validation_elbo(x, num_particles=10)(*pair) == in_run[-1]


def test_validation_in_a_store_of_its_own():
    x = data()
    fit(*make_pair(), x, optim=sgd, num_epochs=2)  # holds the names
    pair = make_pair()
    stopper = EarlyStopping(validation_elbo(x), patience=50, restore_best=False)
    result = fit(*pair, x, optim=sgd, num_epochs=3, callbacks=[stopper])
    expected = validation_elbo(x)(result.model, result.guide)
    assert result.history[-1]["score"] == expected
    assert len({row["score"] for row in result.history}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and loggers.


class Rates(torch.optim.SGD):
    """Notes the rate of each update."""

    def __init__(self, rates, params, lr):
        super().__init__(params, lr=lr)
        self.rates = rates

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.mark.parametrize(("every", "expected"), [("step", [1, 0.5, 0.25, 0.125]), ("epoch", [1, 1, 0.5, 0.5])])
def test_schedule(every, expected):
    rates = []
    schedule = Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), every=every)
    fit(
        *make_pair(), data(), optim=lambda p: Rates(rates, p, lr=1.0), num_epochs=2, batch_size=10, callbacks=[schedule]
    )
    assert rates == expected


def test_a_schedule_sets_the_rate_of_the_first_update():
    rates = []
    warm_up = Schedule(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: (step + 1) / 4))
    for _ in range(2):  # and again in a second run
        fit(*make_pair(), data(), optim=lambda p: Rates(rates, p, lr=2**-10), num_steps=4, callbacks=[warm_up])
    assert rates == [0.25 * 2**-10, 0.5 * 2**-10, 0.75 * 2**-10, 2**-10] * 2


def test_skipped_steps_do_not_advance_a_schedule():
    x = data(20)
    x[3] = torch.nan
    seen = []

    class After(Schedule):
        def on_end(self, state):
            seen.append(state.optimizer.param_groups[0]["lr"])

    schedule = After(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    optim = lambda p: torch.optim.SGD(p, lr=1.0)  # noqa: E731
    result = fit(*make_pair(), x, optim=optim, num_epochs=1, batch_size=5, seed=0, callbacks=[schedule])
    assert result.skipped == 1
    assert seen == [0.5**3]


@pytest.mark.parametrize(
    ("every", "expected"), [("epoch", [1e-4] * 6 + [1e-5] * 2), ("step", [1e-4] * 3 + [1e-5] * 2 + [1e-6] * 2 + [1e-7])]
)
def test_a_plateau_is_found_in_the_loss(every, expected):
    # the loss never falls by 9: the first value stays the best, and two more are a plateau; an epoch is 2 steps
    rates = []
    schedule = Schedule(
        lambda optimizer: ReduceLROnPlateau(optimizer, patience=1, threshold=9.0, threshold_mode="abs"), every
    )
    fit(
        *make_pair(),
        data(),
        optim=lambda p: Rates(rates, p, lr=1e-4),
        num_epochs=4,
        batch_size=10,
        callbacks=[schedule],
    )
    assert rates == pytest.approx(expected)


def test_the_loss_of_an_epoch_is_the_mean_of_its_finite_steps():
    x = data(20)
    x[3] = torch.nan
    seen = []

    class Plateau(ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(metrics)

    result = fit(
        *make_pair(), x, num_epochs=2, batch_size=5, seed=0, callbacks=[Schedule(lambda o: Plateau(o), "epoch")]
    )
    assert result.skipped == 2
    assert seen == pytest.approx([epoch.nanmean().item() for epoch in result.losses.split(4)])


def test_a_plateau_of_what_should_rise_is_refused():
    schedule = Schedule(lambda optimizer: ReduceLROnPlateau(optimizer, mode="max"))
    with pytest.raises(DataTypeError, match='make_scheduler: expected mode="min", got "max"'):
        fit(*make_pair(), data(), num_steps=1, callbacks=[schedule])


@pytest.mark.parametrize("adapt", [lambda logger: logger, lambda logger: logging.LoggerAdapter(logger, {})])
def test_log_to_the_standard_library(adapt, caplog):
    stopper = EarlyStopping(scores(1.0, 2.0), patience=5)
    with caplog.at_level(logging.INFO, "runs"):
        log = Log(adapt(logging.getLogger("runs")), every=3)
        result = fit(*make_pair(), data(), num_epochs=2, batch_size=5, callbacks=[stopper, log])
    lines = [record.getMessage() for record in caplog.records if record.name == "runs"]
    assert [line.split(":")[0] for line in lines] == ["step 3", "step 4", "step 6", "step 8"]
    assert lines[0].startswith(f"step 3: epoch 1, loss {result.losses[2]:.6g}, seconds ")
    assert lines[1] == "step 4: score 1"


@pytest.mark.parametrize("method", ["log_metrics", "log"])
def test_log(method):
    sent = []
    logger = type("Logger", (), {method: lambda self, metrics, step: sent.append((step, metrics))})()
    result = fit(
        *make_pair(),
        data(),
        num_epochs=2,
        batch_size=5,
        callbacks=[EarlyStopping(scores(1.0, 2.0), patience=5), Log(logger, every=3)],
    )
    assert [step for step, _ in sent] == [3, 4, 6, 8]
    assert sent[0][1] == {name: result.history[2][name] for name in ("epoch", "loss", "seconds")}
    assert sent[1][1] == {"score": 1.0}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EarlyStopping(None, 3), DataTypeError, "score: expected a function of"),
        (lambda: EarlyStopping(scores(), 0), ShapeError, "patience: expected 1 or more, got 0"),
        (lambda: EarlyStopping(scores(), 1, every=0.5), DataTypeError, "every: expected an integer"),
        (lambda: Schedule(0.1), DataTypeError, "make_scheduler: expected a function of the optimizer, got 0.1"),
        (lambda: Schedule(print, every="batch"), DataTypeError, 'every: expected "step" or "epoch", got .batch'),
        (lambda: Log(print), DataTypeError, "logger: expected log_metrics"),
        (lambda: Log(math, every=0), ShapeError, "every: expected 1 or more, got 0"),
        (lambda: validation_elbo(torch.zeros(0)), ShapeError, "x: expected shape"),
        (lambda: validation_elbo(Items([])), ShapeError, "x: expected shape"),
        (
            lambda: validation_elbo(type("Stream", (IterableDataset,), {"__iter__": iter})()),
            DataTypeError,
            "x: expected data with a length",
        ),
        (lambda: validation_elbo(DataLoader(data(), sampler=[1, 2])), DataTypeError, "x: expected a DataLoader of all"),
        (lambda: validation_elbo(torch.zeros(2), device="gpuu"), DataTypeError, "device: expected a torch device"),
        (lambda: validation_elbo("x"), DataTypeError, "x: expected a tensor, got str"),
        (lambda: validation_elbo(torch.zeros(2), num_particles=0), ShapeError, "num_particles: expected 1 or more"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message) as info:
        make()
    assert isinstance(info.value, PyroLVMError)


def test_a_schedule_needs_a_torch_optimizer():
    schedule = Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    with pytest.raises(DataTypeError, match="optim: expected a torch optimizer, got PyroOptim"):
        fit(*make_pair(), data(), optim=pyro.optim.Adam({"lr": 0.1}), num_steps=1, callbacks=[schedule])
