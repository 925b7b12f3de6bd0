"""Where a step cannot be captured, or no longer says what a plain one would: plain steps, and the reason."""

import logging
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO
from torch.distributions import Distribution

import pyro_lvm.tracing.capture as capture
from pyro_lvm.training import captured
from tests.training.pairs import PAIRS, Pair, assert_equal, own, trained

NUMBERS = np.random.default_rng(0)
STEPS = []


def with_a_branch(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        logits = z.sum(-1, keepdim=True)
        if logits.mean() > 0:  # a branch
            logits = logits * 2
        pyro.sample("x", dist.Bernoulli(logits=logits.expand(-1, 6)).to_event(1), obs=x)


def with_numpy(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        shift = NUMBERS.normal()
        pyro.sample("x", dist.Bernoulli(logits=(z.sum(-1, keepdim=True) + shift).expand(-1, 6)).to_event(1), obs=x)


def with_a_counter(x):
    STEPS.append(1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        logits = (z.sum(-1, keepdim=True) * len(STEPS)).expand(-1, 6)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def simple_guide(x):
    loc = pyro.param("loc", torch.zeros(2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x), 2]).to_event(1))


def moving_average(model, guide, x):
    loss = Trace_ELBO().differentiable_loss(model, guide, x)
    average = pyro.param("average", torch.tensor(0.0))
    pyro.get_param_store()["average"] = (0.9 * average + 0.1 * loss).detach()
    return loss


REFUSED = {
    "branch": (
        lambda: (with_a_branch, simple_guide),
        Trace_ELBO,
        r"values of tensors, at test_captured_fallback.py:\d+: if log",
    ),
    "NumPy": (lambda: (with_numpy, simple_guide), Trace_ELBO, "no tensor has changed"),
    "counter": (lambda: (with_a_counter, simple_guide), Trace_ELBO, "no tensor has changed"),
    "graph": (own(discrete=True), TraceGraph_ELBO, "TraceGraph_ELBO has no differentiable_loss"),
    "wake-sleep": (own(), ReweightedWakeSleep, "ReweightedWakeSleep has no differentiable_loss"),
    "param store": (own(), lambda: moving_average, r"writes to the param store, at \['average'\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_plain_steps_with_a_reason(name, caplog):
    make, loss, reason = REFUSED[name]
    runs = []
    for compile in (False, True):
        NUMBERS.bit_generator.state = np.random.default_rng(0).bit_generator.state
        STEPS.clear()
        runs.append(trained(make, loss, compile)[0])
    assert runs[1].captured == 0
    (note,) = [note for note in runs[1].notes if note.startswith("compile=True: plain steps, because")]
    assert re.search(reason, note), note
    assert note in caplog.text
    if name not in ("NumPy", "counter"):  # whose Python state the comparison moves on
        assert_equal(runs[0], runs[1], 0.0)


def test_what_changes_later_is_found(monkeypatch):
    """A number that stays the same for the first steps: the comparison that comes every so often sees it."""
    monkeypatch.setattr(captured, "CHECK_EVERY", 20)

    def model(x):
        STEPS.append(1)
        factor = 1.0 if len(STEPS) < 30 else 5.0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = (z.sum(-1, keepdim=True) * factor).expand(-1, 6)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    STEPS.clear()
    STEPS.extend([1] * 20)
    result, _ = trained(lambda: (model, simple_guide), Trace_ELBO, True, num_steps=200, batch_size=52)
    assert 0 < result.captured < 200
    assert any("a replay has the loss" in note for note in result.notes)


def test_capturing_leaves_nothing_behind():
    def patched():
        return (
            pyro.util.torch_isnan,
            pyro.util.torch_isinf,
            pyro.infer.util._fulldot,
            torch.Tensor.item,
            torch.Tensor.all,
            Distribution._validate_args,
        )

    before = patched()
    for make in (own(), lambda: (with_a_branch, simple_guide)):
        trained(make, Trace_ELBO, True)
        assert before == patched()


def test_a_module_that_keeps_results_keeps_real_ones():
    class Keeping(Pair):
        kept = None

        def guide(self, x):
            super().guide(x)
            self.kept = self.encoder(x)

    pair = Keeping()
    result, _ = trained(lambda: (pair.model, pair.guide), Trace_ELBO, True)
    assert result.captured == 44
    assert type(pair.kept) is torch.Tensor


def test_a_short_run_is_not_compiled(caplog):
    caplog.set_level(logging.INFO, logger="pyro_lvm")
    trained(*PAIRS["plain"], True)
    assert "compiling" not in caplog.text


def test_without_a_compiler_the_graph_is_replayed_as_it_is(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(capture, "COMPILE_SECONDS", -1.0)
    monkeypatch.setattr(torch._inductor, "compile", broken)
    plain, replayed = (trained(*PAIRS["plain"], compile)[0] for compile in (False, True))
    assert replayed.captured == 44
    assert any("as it is, because it could not be compiled" in note and "C++" in note for note in replayed.notes)
    assert_equal(plain, replayed)
