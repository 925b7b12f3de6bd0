"""Gradients from scores: REINFORCE with a baseline that learns, and the wake phase of reweighted wake-sleep."""

import math
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.errors import ShapeError
from pyro_lvm.objectives import ImportanceWeightedELBO
from pyro_lvm.objectives.estimators import Vimco
from tests.objectives.test_gradient_estimators import PHI, ROWS, THETA, X, log_weight, rows, switch_pair
from tests.objectives.test_importance_weighted import K, N, rough_guide
from tests.objectives.test_many_bounds import expected_bound
from tests.objectives.test_weighted_bound_as_a_loss import subsampled
from tests.references import MEANS, SIGMA, WEIGHTS, data, normal_model

START = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)


class Constant(nn.Module):
    """A baseline that is one number, and that keeps what it was handed."""

    def __init__(self, value: float = 0.0, *, column: bool = False) -> None:
        super().__init__()
        self.value, self.column = nn.Parameter(torch.tensor(value, dtype=torch.float64)), column
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return self.value.expand(len(x), 1) if self.column else self.value.expand(len(x))


def component_gradients(
    num_particles: int, gradient: str = "reinforce", num_rows: int = ROWS, **options: Any
) -> torch.Tensor:
    """Independent estimates of the gradient of the logits of a guide that draws the component, ``(num_rows, 3)``."""
    torch.manual_seed(0)
    logits = START.repeat(num_rows, 1).requires_grad_()
    objective = ImportanceWeightedELBO(num_particles, gradient, **options)
    x = torch.full((num_rows,), X).double()
    return -torch.autograd.grad(objective.differentiable_loss(*switch_pair(logits), x), logits)[0]


# ---------------------------------------------------------------- a baseline


@pytest.mark.statistical
@pytest.mark.parametrize("num_particles", [1, 3])
def test_any_baseline_leaves_the_mean_and_a_good_one_takes_the_variance(num_particles: int) -> None:
    logits = START.clone().requires_grad_()
    level = expected_bound(logits.log_softmax(-1), num_particles)
    want = torch.autograd.grad(level, logits)[0]
    variances = {}
    for name, value in {"good": float(level.detach()), "wrong": 50.0, "none": None}.items():
        got = component_gradients(num_particles, baseline=None if value is None else Constant(value))
        assert ((got.mean(0) - want).abs() < 5 * got.std(0) / ROWS**0.5).all()
        variances[name] = float(got.var(0).sum())
    assert variances["good"] < 0.75 * variances["none"] < 0.01 * variances["wrong"]


@pytest.mark.statistical
def test_mean_for_continuous_latents() -> None:
    """Against the reparameterised estimator, which is tested by quadrature."""
    torch.manual_seed(0)
    got, want = rows("reinforce", 3, ROWS, baseline=Constant(-2.0)), rows("doubly_reparameterized", 3, ROWS)
    error = (got.var(0) / ROWS + want.var(0) / ROWS).sqrt()
    assert ((got.mean(0) - want.mean(0)).abs() < 5 * error).all()


def test_nothing_is_left_at_the_posterior_with_the_evidence_as_baseline() -> None:
    precision = 1 + THETA[0] ** 2 / 0.25
    exact = (THETA[0] * (X - THETA[1]) / 0.25 / precision, -0.5 * math.log(precision))
    variance = THETA[0] ** 2 + 0.25
    log_px = -0.5 * (math.log(2 * math.pi * variance) + (X - THETA[1]) ** 2 / variance)
    for num_particles in (1, 3):
        assert rows("reinforce", num_particles, 100, exact, baseline=Constant(log_px))[:, 2:].abs().max() < 1e-10
        assert rows("reinforce", num_particles, 100, exact, num_bounds=2)[:, 2:].abs().max() < 1e-10


@pytest.mark.parametrize("column", [True, False])
def test_the_baseline_learns_by_its_squared_error_and_adds_no_value(column: bool) -> None:
    x = data(N)
    baseline, objective = Constant(0.4, column=column), ImportanceWeightedELBO(K, "reinforce")
    torch.manual_seed(1)
    plain = objective.loss_and_grads(normal_model, rough_guide, x)
    torch.manual_seed(1)
    bounds = -lvm.ops.log_mean_exp(lvm.log_weights(normal_model, rough_guide, x, num_particles=K)).neg()
    objective = ImportanceWeightedELBO(K, "reinforce", baseline=baseline)
    torch.manual_seed(1)
    assert objective.loss_and_grads(normal_model, rough_guide, x) == pytest.approx(plain, rel=1e-12)
    assert baseline.value.grad is not None
    torch.testing.assert_close(baseline.value.grad, 2 * (0.4 - bounds.detach()).sum(), rtol=1e-10, atol=0)
    torch.manual_seed(1)
    assert objective.loss(normal_model, rough_guide, x) == pytest.approx(plain, rel=1e-12)
    assert len(baseline.seen) == 1  # without gradients it is not needed


def test_a_baseline_of_another_shape_is_refused() -> None:
    objective = ImportanceWeightedELBO(K, "reinforce", baseline=nn.Linear(1, 2).double())
    with pytest.raises(ShapeError, match=r"baseline: expected \(4,\) or \(4, 1\), got \(4, 2\)"):
        objective.loss_and_grads(lambda x: normal_model(x[:, 0]), lambda x: rough_guide(x[:, 0]), data(N)[:, None])


def test_a_baseline_sees_the_rows_of_a_subsample() -> None:
    """Those that the plate draws, and those that it is handed."""
    x = data(20)
    for size, given in ((N, ()), (None, (torch.tensor([3, 1, 7, 11]),))):
        baseline = Constant()
        objective = ImportanceWeightedELBO(K, "reinforce", baseline=baseline)
        for vectorize in (True, False):
            objective.vectorize_particles = vectorize
            torch.manual_seed(0)
            rows = torch.randperm(20)[:N]
            torch.manual_seed(0)
            objective.loss_and_grads(subsampled("model", 20, size), subsampled("rough", 20, size), x, *given)
            assert torch.equal(baseline.seen[-1], x[given[0]] if given else x[rows])
        assert baseline.value.grad is not None


def component_guide(net: nn.Module) -> Any:
    def guide(x: torch.Tensor) -> None:
        pyro.module("logits", net)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=net(x[:, None])))

    return guide


class Level(nn.Module):
    """x -> a + b x + c x^2."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        level: torch.Tensor = self.linear(torch.stack([x, x**2], -1))  # (N, 1)
        return level


def gap(net: nn.Module, x: torch.Tensor) -> float:
    exact = (dist.Normal(MEANS, SIGMA).log_prob(x[:, None]) + WEIGHTS.log()).log_softmax(-1)
    learned = net(x[:, None]).log_softmax(-1)
    return float((learned.exp() * (learned - exact)).sum(-1).mean().detach())


def error_of(baseline: nn.Module, net: nn.Module, x: torch.Tensor) -> float:
    """Mean squared distance of the baseline from the expected bound of one particle, the ELBO."""
    log_joint = dist.Normal(MEANS, SIGMA).log_prob(x[:, None]) + WEIGHTS.log()
    log_q = net(x[:, None]).log_softmax(-1)
    elbo = (log_q.exp() * (log_joint - log_q)).sum(-1)
    return float((baseline(x).reshape(-1) - elbo).square().mean().detach())


def test_a_users_own_svi_trains_pair_and_baseline() -> None:
    x = data(60)
    torch.manual_seed(0)
    net, baseline = nn.Linear(1, 3).double(), Level()
    before = error_of(baseline, net, x)
    objective = ImportanceWeightedELBO(1, "reinforce", baseline=baseline)
    svi = SVI(switch_pair(x)[0], component_guide(net), pyro.optim.Adam({"lr": 0.03}), loss=objective)
    for _ in range(400):
        svi.step(x)
    assert gap(net, x) < 0.05
    assert error_of(baseline, net, x) < 0.1 < 0.5 < before
    assert "ImportanceWeightedELBO.baseline$$$linear.weight" in pyro.get_param_store()


def test_fit_trains_each_baseline_of_two_runs() -> None:
    x = data(60)
    adam = lambda p: torch.optim.Adam(p, lr=0.03)  # noqa: E731
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net, baseline = nn.Linear(1, 3).double(), Level()
        guide, before = component_guide(net), error_of(baseline, net, x)
        objective = ImportanceWeightedELBO(1, "reinforce", baseline=baseline)
        model = lambda x: switch_pair(x)[0](x)  # noqa: E731
        result = lvm.fit(model, guide, x, loss=objective, num_steps=400, batch_size=30, seed=seed, optim=adam)
        assert gap(net, x) < 0.08
        assert error_of(baseline, net, x) < 0.2 < before
        results.append((result, net, baseline))
    for result, net, _baseline in results:  # each pair is still its own
        got = lvm.elbo(result.model, result.guide, x, num_particles=2000, seed=0)
        log_joint, log_q = (
            dist.Normal(MEANS, SIGMA).log_prob(x[:, None]) + WEIGHTS.log(),
            net(x[:, None]).log_softmax(-1),
        )
        exact = (log_q.exp() * (log_joint - log_q)).sum(-1)
        assert abs(float((got - exact).mean().detach())) < 0.02


@pytest.mark.parametrize("update", ["both", "guide", "model"])
def test_fit_trains_a_baseline_with_the_guide(update: str) -> None:
    x = data(30)
    torch.manual_seed(0)
    net, baseline = nn.Linear(1, 3).double(), Level()

    def model(x: torch.Tensor) -> None:
        switch_pair(x)[0](x * pyro.param("factor", torch.tensor(1.0).double()))

    objective = ImportanceWeightedELBO(2, "reinforce", baseline=baseline)
    before = baseline.linear.weight.detach().clone()
    lvm.fit(model, component_guide(net), x, loss=objective, num_steps=2, update=update, seed=0)
    assert torch.equal(baseline.linear.weight, before) == (update == "model")


# ---------------------------------------------------------------- wake-sleep


def wake_gradients() -> dict[int, torch.Tensor]:
    """Of the guide's mean and log scale in expectation, by quadrature for K = 2, 3, 4; at 0 that of -KL(p || q)."""
    phi = torch.tensor(PHI, dtype=torch.float64, requires_grad=True)
    precision = 1 + THETA[0] ** 2 / 0.25
    mean = torch.tensor(THETA[0] * (X - THETA[1]) / 0.25 / precision).double()
    posterior = dist.Normal(mean, torch.tensor(precision**-0.5).double())
    guide = dist.Normal(phi[0], phi[1].exp())
    found = {0: -torch.autograd.grad(torch.distributions.kl_divergence(posterior, guide), phi, retain_graph=True)[0]}
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(30))
    for k in (2, 3, 4):
        z = (phi[0] + phi[1].exp() * torch.cartesian_prod(*[nodes] * k)).detach()  # (30^K, K)
        mass = torch.cartesian_prod(*[weights / weights.sum()] * k).prod(-1)
        share = log_weight(torch.tensor(THETA).double(), phi.detach(), z).softmax(-1)
        score = (mass * (share * guide.log_prob(z)).sum(-1)).sum()
        found[k] = torch.autograd.grad(score, phi, retain_graph=True)[0]
    return found


@pytest.mark.statistical
def test_wake_phase_is_biased_as_documented() -> None:
    want = wake_gradients()
    torch.testing.assert_close(want[0], torch.tensor([1.326, 0.597]).double(), rtol=0, atol=1e-3)
    means = torch.stack([want[k][0] for k in (2, 3, 4)])
    torch.testing.assert_close(means, torch.tensor([0.593, 0.842, 0.976]).double(), rtol=0, atol=1e-3)
    torch.manual_seed(0)
    for num_bounds in (1, 2):
        got = rows("reweighted_wake_sleep", 3, ROWS, num_bounds=num_bounds)
        model = rows("standard", 3, ROWS)[:, :2]  # that of the model is the gradient of the bound
        assert ((got.mean(0)[2:] - want[3]).abs() < 5 * got.std(0)[2:] / ROWS**0.5).all()
        error = (got.var(0)[:2] / ROWS + model.var(0) / ROWS).sqrt()
        assert ((got.mean(0)[:2] - model.mean(0)).abs() < 5 * error).all()


@pytest.mark.statistical
def test_wake_phase_of_discrete_draws() -> None:
    log_joint = dist.Normal(MEANS, SIGMA).log_prob(torch.tensor(X).double()) + WEIGHTS.log()
    exact = log_joint.softmax(-1) - START.softmax(-1)  # the gradient of -KL(p || q)
    biases = []
    for k in (2, 4, 8):
        draws = torch.cartesian_prod(*[torch.arange(3)] * k)  # (3^K, K)
        share = (log_joint - START.log_softmax(-1))[draws].softmax(-1)
        mass = START.log_softmax(-1)[draws].sum(-1).exp()
        score = torch.eye(3).double()[draws] - START.softmax(-1)  # (3^K, K, 3)
        want = (mass[:, None] * (share[..., None] * score).sum(1)).sum(0)
        got = component_gradients(k, "reweighted_wake_sleep")
        assert ((got.mean(0) - want).abs() < 5 * got.std(0) / ROWS**0.5).all()
        biases.append(float((want - exact).norm()))
    assert biases[2] < 0.6 * biases[1] < 0.6 * 0.6 * biases[0]  # about 1 / K
    far = component_gradients(400, "reweighted_wake_sleep", 50).mean(0)
    assert (far - exact).abs().max() < 0.02


def test_wake_sleep_learns_the_posterior_and_covers_it() -> None:
    x = data(60)
    torch.manual_seed(0)
    net = nn.Linear(1, 3).double()
    objective = ImportanceWeightedELBO(10, "reweighted_wake_sleep")
    svi = SVI(switch_pair(x)[0], component_guide(net), pyro.optim.Adam({"lr": 0.05}), loss=objective)
    losses = [svi.step(x) for _ in range(300)]
    assert gap(net, x) < 0.05
    log_px = float((dist.Normal(MEANS, SIGMA).log_prob(x[:, None]) + WEIGHTS.log()).logsumexp(-1).sum())
    assert sum(losses[-50:]) / 50 == pytest.approx(-log_px, rel=0.01)  # the value is the bound


# ---------------------------------------------------------------- weights of zero


def some_excluded(x: torch.Tensor) -> None:
    """The component, of which the first is impossible."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(WEIGHTS))
        pyro.factor("possible", torch.where(c == 0, -torch.inf, 0.0).double())
        pyro.sample("x", dist.Normal(MEANS[c], SIGMA), obs=x)


def test_vimco_of_weights_that_are_zero() -> None:
    """Against the formula, one draw after the other; log K where nothing is there to compare a draw with."""
    log_weights = torch.tensor([[0.3, -1.0, -torch.inf], [0.5, -torch.inf, -torch.inf], [-2.0, 0.1, 0.7]]).double()
    got = Vimco.factors(cast(Vimco, None), log_weights.mT[None])[0]  # (K, N)
    for n, row in enumerate(log_weights):
        for k in range(3):
            rest = torch.cat([row[:k], row[k + 1 :]])
            without = torch.cat([rest, rest.mean()[None]]).logsumexp(0)
            want = math.log(3) if bool(rest.isneginf().all()) else row.logsumexp(0) - without - row.softmax(0)[k]
            assert float(got[k, n]) == pytest.approx(float(want), abs=1e-12)


def test_vimco_learns_to_leave_out_what_is_excluded() -> None:
    torch.manual_seed(0)
    x = data(20)
    logits = torch.zeros(20, 3).double().requires_grad_()
    objective, optimizer = ImportanceWeightedELBO(10, "vimco"), torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        objective.loss_and_grads(some_excluded, switch_pair(logits)[1], x)
        assert bool(logits.grad.isfinite().all())
        optimizer.step()
    assert float(logits.softmax(-1)[:, 0].detach().mean()) < 0.1  # from 1/3
