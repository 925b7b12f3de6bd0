"""Captured steps against plain ones: the same parameters from the same seed, for every kind of pair and loss."""

import copy
import logging

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import Distribution

import pyro_lvm.tracing.capture as capture
import pyro_lvm.training.engine as engine
from pyro_lvm.guides import DiagonalNormal, Flow, FullRankNormal
from pyro_lvm.models import DeepGaussian
from pyro_lvm.nn import MLP
from pyro_lvm.training import callbacks, fit
from pyro_lvm.training.history import History
from pyro_lvm.training.ledger import Ledger
from pyro_lvm.training.plain import Outcome
from pyro_lvm.training.state import TrainingState
from tests.training.pairs import BATCH, PAIRS, X, assert_equal, trained


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_parameters_after_fifty_steps(name):
    make, loss = PAIRS[name]
    (plain, plain_buffers), (replayed, buffers) = (trained(make, loss, compile) for compile in (False, True))
    assert not any("compile" in note for note in replayed.notes)
    assert plain.captured == 0
    assert replayed.captured == 44  # all but three of each shape of batch
    assert_equal(plain, replayed)
    for key, value in plain_buffers.items():
        torch.testing.assert_close(value, buffers[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update", ["model", "guide"])
def test_the_other_half_stays(update):
    plain, replayed = (trained(*PAIRS["plain"], compile, update=update)[0] for compile in (False, True))
    assert replayed.captured == 44
    assert_equal(plain, replayed)


OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.99)),
    "Adam with decay": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.1),
    "groups": lambda params: torch.optim.Adam([{"params": params[:3], "lr": 1e-2}, {"params": params[3:], "lr": 1e-3}]),
    "AMSGrad": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
    "Pyro": pyro.optim.ClippedAdam({"lr": 1e-2}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name):
    optim = copy.deepcopy(OPTIMIZERS[name])
    plain, replayed = (trained(*PAIRS["plain"], compile, optim=optim)[0] for compile in (False, True))
    assert replayed.captured == 44
    assert_equal(plain, replayed)


def test_the_state_of_the_optimizer_is_that_of_plain_steps():
    states = []
    for compile in (False, True):
        seen = []
        trained(*PAIRS["plain"], compile, num_steps=51, callbacks=[lambda state, seen=seen: seen.append(state)])
        states.append(copy.deepcopy(seen[-1].optimizer.state_dict()["state"]))
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert float(one["step"]) == float(other["step"]) == 51
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(one[moment], other[moment], rtol=1e-4, atol=1e-4)


def test_learning_rates_and_early_stopping():
    def options():
        schedule = callbacks.Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        stopping = callbacks.EarlyStopping(callbacks.validation_elbo(X), patience=3)
        return {"callbacks": [schedule, stopping], "optim": lambda params: torch.optim.Adam(params, lr=1e-1)}

    plain, replayed = (trained(*PAIRS["plain"], compile, **options())[0] for compile in (False, True))
    assert replayed.captured > 10
    assert plain.stop_reason == replayed.stop_reason
    assert_equal(plain, replayed)


def test_each_replay_draws_anew():
    result, _ = trained(*PAIRS["plain"], True, batch_size=52, optim=lambda params: torch.optim.SGD(params, lr=0.0))
    assert result.captured == 47
    assert len(set(result.losses.tolist())) == 50


@pytest.mark.parametrize("optim", [None, lambda params: torch.optim.SGD(params, lr=1e-3)])
def test_steps_that_are_not_finite_are_skipped_and_counted(optim):
    x = torch.cat([X.repeat(6, 1), torch.full((1, 6), torch.nan)])  # one bad batch of 16 in each epoch
    options = {"x": x, "optim": optim, "num_steps": 96}
    with pyro.validation_enabled(False):  # which raises before all random numbers of a bad batch are drawn
        plain, replayed = (trained(*PAIRS["plain"], compile, **options)[0] for compile in (False, True))
    assert plain.skipped == replayed.skipped == 6
    assert replayed.captured > 80
    assert torch.equal(plain.losses.isnan(), replayed.losses.isnan())
    for name, value in plain.params.items():
        torch.testing.assert_close(value, replayed.params[name], rtol=2e-5, atol=2e-5)


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run():
    x = torch.cat([X.repeat(20, 1), torch.full((300, 6), torch.nan)])
    loader = torch.utils.data.DataLoader(x, BATCH)  # in order: the last fifteen batches are bad
    with pytest.warns(RuntimeWarning, match="10 of 62 steps"):
        result, _ = trained(*PAIRS["plain"], True, x=loader, num_steps=200)
    assert (result.stop_reason, result.skipped) == ("nonfinite", 10)


def test_an_update_that_overflows_is_taken_back():
    def loss(model, guide, x):
        weight = pyro.param("weight", torch.ones(2))
        return (weight * x.mean()).sum()

    def model(x):
        pyro.param("weight", torch.ones(2))

    def explode(state):
        if state.step == 20:
            state.optimizer.param_groups[0]["lr"] = 3e38  # two such updates are beyond float32

    callback = type("Explode", (), {"on_step": staticmethod(explode)})()
    result = fit(model, None, X, loss=loss, num_steps=60, batch_size=52, callbacks=[callback], compile=True)
    assert result.captured == 57
    assert result.losses.min() < -1e36
    assert result.params["weight"].isfinite().all()


GUIDES = {"diagonal": (DiagonalNormal, 4), "full rank": (FullRankNormal, 5), "flow": (Flow, 36)}


@pytest.mark.parametrize("name", GUIDES)
def test_guides_of_the_library(name):
    def make():
        torch.manual_seed(0)
        family, size = GUIDES[name]
        return DeepGaussian(MLP(2, [8], 6), 2), family(2, MLP(6, [8], size))

    plain, replayed = (trained(make, Trace_ELBO, compile)[0] for compile in (False, True))
    assert replayed.captured == 44
    assert_equal(plain, replayed, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["plain", "dropout", "batch statistics", "score function", "functions", "annealed", "mixture"],
)
def test_the_same_parameters_compiled(name, monkeypatch, caplog):
    """By Inductor, which rounds otherwise."""
    monkeypatch.setattr(capture, "COMPILE_SECONDS", -1.0)
    caplog.set_level(logging.INFO, logger="pyro_lvm")
    make, loss = PAIRS[name]
    validated = Distribution._validate_args
    (plain, plain_buffers), (replayed, buffers) = (trained(make, loss, compile) for compile in (False, True))
    assert "compiling" in caplog.text
    assert not any("compile" in note for note in replayed.notes)
    assert replayed.captured == 44
    assert_equal(plain, replayed, 1e-4)
    for key, value in plain_buffers.items():
        torch.testing.assert_close(value, buffers[key], rtol=1e-4, atol=1e-5)
    assert Distribution._validate_args == validated


def test_losses_that_are_read_together():
    """On CUDA the host reads them now and then; here three at a time."""
    state = TrainingState(None, None, History())
    ledger = Ledger(state, every=3)
    for step, (loss, finite) in enumerate([(2.0, 1.0), (torch.nan, 0.0), (torch.nan, 0.0)]):
        assert not ledger.is_due
        flag = torch.tensor(finite)
        ledger.write(Outcome(torch.tensor(loss), flag, flag), num_data=2, epoch=1, seconds=float(step))
    assert ledger.is_due
    ledger.settle()
    assert [row["loss"] for row in state.history][:1] == [1.0]
    assert (ledger.skipped, ledger.streak, state.step, state.updated) == (2, 2, 3, False)
    ledger.write(Outcome(4.0, finite=True, updated=True), num_data=2, epoch=2, seconds=3.0)
    ledger.settle()
    assert (state.loss, ledger.streak, state.epoch, state.updated) == (2.0, 0, 2, True)


def test_results_that_the_next_replay_overwrites(monkeypatch):
    """As on CUDA, where a replay always writes to the same tensors, and losses are read for many steps at once."""
    replay, buffers = capture.Graph.__call__, {}

    def overwriting(self, *inputs):
        results = replay(self, *inputs)
        own = buffers.setdefault(id(self), [torch.empty_like(result) for result in results])
        return tuple(buffer.copy_(result) for buffer, result in zip(own, results, strict=True))

    plain, _ = trained(*PAIRS["plain"], False)
    monkeypatch.setattr(capture.Graph, "__call__", overwriting)
    monkeypatch.setattr(engine, "Ledger", lambda state, every: Ledger(state, every=7))
    replayed, _ = trained(*PAIRS["plain"], True)
    assert replayed.captured == 44
    assert_equal(plain, replayed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_parameters_on_cuda(name):
    make, loss = PAIRS[name]

    def on_cuda():
        model, guide = make()
        owner = getattr(model, "__self__", None)
        if owner is not None:
            owner.cuda()
        return model, guide

    plain, replayed = (trained(on_cuda, loss, compile, device="cuda")[0] for compile in (False, True))
    assert replayed.captured == 44
    assert_equal(plain, replayed, 1e-4)
