"""The bound as a loss: mini-batches, a user's own SVI, and fit."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_lvm as lvm
from pyro_lvm.nn import MLP
from pyro_lvm.objectives import ImportanceWeightedELBO
from tests.objectives.test_importance_weighted import EVERY, PATHWISE, K, N, loss_of, rough_guide
from tests.references import SIGMA, Pair, data, normal_model, posterior

# ---------------------------------------------------------------- mini-batches


def subsampled(program: str, total: int, size: int | None = None) -> Callable[..., None]:
    """Model or guide on all data, whose plate takes a part of them: its own draw, or the rows that it is handed."""

    def run(x: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        with pyro.plate("data", total, subsample_size=size, subsample=rows) as index:
            if program == "model":
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, SIGMA), obs=x[index])
            elif program == "posterior":
                loc, scale, _ = posterior(x[index][:, None])
                pyro.sample("z", dist.Normal(loc, scale))
            else:
                pyro.sample("z", dist.Normal(0.3 * x[index], 0.9))

    return run


@EVERY
@pytest.mark.parametrize("vectorize", [True, False])
def test_a_plate_that_draws_its_own_subsample(gradient: str, vectorize: bool) -> None:
    """Model and guide, and all particles, get the same rows, new ones in each step."""
    x = data(20)
    log_px = posterior(x[:, None])[2]
    objective = ImportanceWeightedELBO(K, gradient, vectorize_particles=vectorize)
    for seed in range(3):
        torch.manual_seed(seed)
        rows = torch.randperm(20)[:N]
        torch.manual_seed(seed)
        loss = objective.loss(subsampled("model", 20, N), subsampled("posterior", 20, N), x)
        assert loss == pytest.approx(-20 / N * float(log_px[rows].sum()), rel=1e-10)
    model, rough = subsampled("model", 20, N), subsampled("rough", 20, N)
    alone = ImportanceWeightedELBO(1, vectorize_particles=False)
    assert loss_of(Pair(model, rough, x, log_px), alone) == pytest.approx(
        loss_of(Pair(model, rough, x, log_px), Trace_ELBO()), rel=1e-10
    )


@pytest.mark.statistical
def test_mini_batches_are_unbiased_where_renyi_is_not() -> None:
    x, model, guide = data(40), subsampled("model", 40), subsampled("rough", 40)
    draws = lvm.log_weights(normal_model, rough_guide, x, num_particles=5 * 4000, seed=0)
    want = -lvm.ops.importance_weighted_bound(draws, 5).sum()  # of all data; its own error is below 0.05

    def mean_and_error(objective: Any, steps: int) -> tuple[float, float]:
        torch.manual_seed(0)
        losses = torch.tensor([objective.loss(model, guide, x, torch.randperm(40)[:N]) for _ in range(steps)])
        return float(losses.mean()), float(losses.std() / steps**0.5)

    mean, error = mean_and_error(ImportanceWeightedELBO(5), 600)
    assert abs(mean - want) < 5 * error
    renyi = RenyiELBO(0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    other, error = mean_and_error(renyi, 600)  # 42.9 +- 0.3 measured, where 59.0 is right
    assert other + 10 * error < -float(posterior(x[:, None])[2].sum())  # 57.2: it bounds nothing


# ---------------------------------------------------------------- training


def learned_guide(x: torch.Tensor, *_: Any) -> None:
    gain = pyro.param("gain", torch.tensor(0.1).double())
    scale = pyro.param("scale", torch.tensor(1.0).double(), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(gain * x, scale))


@pytest.mark.parametrize("gradient", PATHWISE)
def test_in_a_users_own_svi(gradient: str) -> None:
    torch.manual_seed(0)
    svi = SVI(normal_model, learned_guide, pyro.optim.Adam({"lr": 0.02}), ImportanceWeightedELBO(5, gradient))
    x = data(50)
    for step in range(300):
        loss = svi.step(x)
        assert step or math.isfinite(loss)
    assert float(pyro.param("gain").detach()) == pytest.approx(1 / (1 + SIGMA**2), abs=0.1)
    assert float(pyro.param("scale").detach()) == pytest.approx(SIGMA / (1 + SIGMA**2) ** 0.5, abs=0.1)
    assert svi.evaluate_loss(x) == pytest.approx(-float(posterior(x[:, None])[2].sum()), rel=0.01)


def test_as_a_module() -> None:
    loss = ImportanceWeightedELBO(3)(normal_model, learned_guide)(data(5))
    loss.backward()
    assert pyro.get_param_store()._params["gain"].grad is not None


@pytest.mark.parametrize("update", ["model", "guide", "both"])
def test_fit(update: Any) -> None:
    torch.manual_seed(0)
    model = lvm.models.LinearGaussian(1, 3)
    guide = lvm.guides.DiagonalNormal(1, encoder=MLP(3, [8], 2))
    x = data(64, 3).float()
    before = [[p.detach().clone() for p in half.parameters()] for half in (model, guide)]
    adam = lambda p: torch.optim.Adam(p, lr=0.02)  # noqa: E731
    objective = ImportanceWeightedELBO(5, "doubly_reparameterized")
    result = lvm.fit(model, guide, x, loss=objective, num_steps=60, batch_size=24, update=update, seed=0, optim=adam)
    assert result.losses[-20:].mean() < result.losses[:20].mean() - 0.05
    for name, half, old in zip(("model", "guide"), (model, guide), before, strict=True):
        moved = [not torch.equal(p, q) for p, q in zip(half.parameters(), old, strict=True)]
        assert all(moved) if update in (name, "both") else not any(moved)


def test_no_step_pays_for_the_look_at_the_pair() -> None:
    calls = {"model": 0, "guide": 0}

    def counted(name: str, program: Any) -> Any:
        def run(*args: Any) -> None:
            calls[name] += 1
            program(*args)

        return run

    model, guide = counted("model", normal_model), counted("guide", learned_guide)
    objective, x = ImportanceWeightedELBO(50, "doubly_reparameterized"), data(N)
    objective.loss_and_grads(model, guide, x)
    calls.update(model=0, guide=0)
    objective.loss_and_grads(model, guide, x + 1)
    assert calls == {"model": 1, "guide": 1}


def test_keyword_arguments_and_guides_of_pyro() -> None:
    def model(x: torch.Tensor, *, width: float) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, width))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    x = data(N)
    objective = ImportanceWeightedELBO(K, "sticking_the_landing")
    for width in (1.0, 2.0):
        guide = AutoNormal(model)
        wide = lambda x, width=width: model(x, width=width)  # noqa: E731
        torch.manual_seed(0)
        loss = objective.loss_and_grads(model, guide, x, width=width)
        torch.manual_seed(0)
        narrow = lambda x, guide=guide: guide(x, width=1.0)  # noqa: E731
        assert loss == pytest.approx(ImportanceWeightedELBO(K).loss(wide, narrow, x), rel=1e-6)
