"""The mean of M bounds of K particles: values, gradients in expectation, and growth with K, by enumeration."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_lvm as lvm
from pyro_lvm.objectives import ImportanceWeightedELBO
from tests.objectives.test_gradient_estimators import ROWS, X, expected, rows, switch_pair
from tests.objectives.test_importance_weighted import (
    EVERY,
    PATHWISE,
    ROUGH,
    K,
    N,
    chain_guide,
    chain_model,
    formula,
    loss_of,
)
from tests.references import ENUMERATED, MEANS, ORACLES, SIGMA, WEIGHTS, Pair, data

M = 2


def mean_of_bounds(pair: Pair, vectorize: Any = "auto") -> float:
    """The definition, from log-weights of the same seed."""
    torch.manual_seed(1)
    table = lvm.log_weights(pair.model, pair.guide, pair.x, num_particles=M * K, vectorize=vectorize)
    groups = [table[:K], table[K:]]
    return float(sum((group.logsumexp(0) - math.log(K)).sum() for group in groups).detach() / M)


@EVERY
@pytest.mark.parametrize("vectorize", [True, False])
def test_value(gradient: str, vectorize: bool) -> None:
    objective = ImportanceWeightedELBO(K, gradient, num_bounds=M, vectorize_particles=vectorize)
    want = -mean_of_bounds(ROUGH, "auto" if vectorize else False)
    torch.testing.assert_close(loss_of(ROUGH, objective), want, rtol=0, atol=1e-10)
    scaled = Pair(poutine.scale(ROUGH.model, 0.25), poutine.scale(ROUGH.guide, 0.25), ROUGH.x, ROUGH.log_px)
    if vectorize:
        torch.testing.assert_close(loss_of(scaled, objective), 0.25 * want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mask_likelihood", "obs_mask", "discrete_guide", "mixture", "images", "subsample"])
def test_value_at_the_posterior(name: str) -> None:
    pair = (ORACLES | ENUMERATED)[name](N)
    scale = 1000 / N if name == "subsample" else 1.0
    with pyro.validation_enabled(False):  # which refuses the NaN of missing pixels
        for gradient in ("doubly_reparameterized", "vimco", "reinforce"):
            loss = loss_of(pair, ImportanceWeightedELBO(K, gradient, num_bounds=M))
            assert loss == pytest.approx(-scale * float(pair.log_px.sum()), rel=1e-10)


def test_one_particle_a_bound_is_the_elbo() -> None:
    torch.manual_seed(1)
    want = -lvm.elbo(ROUGH.model, ROUGH.guide, ROUGH.x, num_particles=3).sum()
    for gradient in (*PATHWISE, "reinforce"):
        got = loss_of(ROUGH, ImportanceWeightedELBO(1, gradient, num_bounds=3))
        assert got == pytest.approx(float(want), rel=1e-10)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("gradient", [*PATHWISE, "vimco", "reweighted_wake_sleep"])
def test_gradient_is_the_mean_of_the_formulas_of_each_bound(gradient: str) -> None:
    """Weights are normalised among the K particles of a bound; latents depend on one another in both programs."""
    theta = torch.tensor([0.7, 1.2]).double().requires_grad_()
    phi = torch.tensor([0.4, -0.3, 0.5, 0.2, -0.2]).double().requires_grad_()
    x = data(N)
    torch.manual_seed(2)
    draws = [torch.normal(torch.zeros(M * K, N).double(), torch.ones(M * K, N).double()) for _ in range(2)]
    parts = [formula(gradient, theta, phi, x, [e[m * K : (m + 1) * K] for e in draws]) for m in range(M)]
    objective = ImportanceWeightedELBO(K, gradient, num_bounds=M)
    torch.manual_seed(2)
    loss = objective.differentiable_loss(chain_model(theta), chain_guide(phi), x)
    for got, *each in zip(torch.autograd.grad(-loss, [theta, phi]), *parts, strict=True):
        torch.testing.assert_close(got, sum(each) / M, rtol=0, atol=1e-10)


@pytest.mark.statistical
@pytest.mark.parametrize("gradient", [*PATHWISE, "vimco", "reinforce"])
def test_mean_of_the_gradient_is_that_of_one_bound(gradient: str) -> None:
    torch.manual_seed(0)
    got, want = rows(gradient, 3, ROWS, num_bounds=M), expected(3)
    assert ((got.mean(0) - want.get(gradient, want["exact"])).abs() < 5 * got.std(0) / ROWS**0.5).all()


@pytest.mark.statistical
@pytest.mark.parametrize("gradient", ["standard", "doubly_reparameterized", "vimco", "reweighted_wake_sleep"])
def test_the_variance_is_divided_by_the_number_of_bounds(gradient: str) -> None:
    """Rainforth et al. (2018): at M * K particles the signal-to-noise ratio is that of K times the root of M."""
    torch.manual_seed(0)
    ratio = rows(gradient, 3, ROWS, num_bounds=4).var(0) / rows(gradient, 3, ROWS).var(0)
    assert ((ratio - 0.25).abs() < 0.05).all()  # a variance of ROWS draws has an error of 1% for a normal, more here


@pytest.mark.statistical
@pytest.mark.parametrize(("num_particles", "num_bounds"), [(1, 2), (2, 1), (2, 2)])
def test_scores_of_discrete_draws(num_particles: int, num_bounds: int) -> None:
    start = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(expected_bound(start.log_softmax(-1), num_particles), start)[0]
    x = torch.full((ROWS,), X).double()
    for gradient in ("reinforce", "vimco") if num_particles > 1 else ("reinforce",):
        torch.manual_seed(0)
        logits = start.detach().repeat(ROWS, 1).requires_grad_()
        objective = ImportanceWeightedELBO(num_particles, gradient, num_bounds=num_bounds)
        got = -torch.autograd.grad(objective.differentiable_loss(*switch_pair(logits), x), logits)[0]
        assert ((got.mean(0) - want).abs() < 5 * got.std(0) / ROWS**0.5).all()


# ---------------------------------------------------------------- from the ELBO to log p(x)


def expected_bound(log_q: torch.Tensor, num_particles: int) -> torch.Tensor:
    """E[log mean w] over all draws of the component of a mixture at X."""
    log_joint = dist.Normal(MEANS, SIGMA).log_prob(torch.tensor(X).double()) + WEIGHTS.log()
    draws = torch.cartesian_prod(*[torch.arange(3)] * num_particles).reshape(-1, num_particles)  # (3^K, K)
    bounds = (log_joint - log_q)[draws].logsumexp(-1) - math.log(num_particles)
    return (log_q[draws].sum(-1).exp() * bounds).sum()


@pytest.mark.statistical
def test_a_mixtures_bound_is_its_expectation_and_grows_up_to_log_p() -> None:
    log_q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    log_px = (dist.Normal(MEANS, SIGMA).log_prob(torch.tensor(X).double()) + WEIGHTS.log()).logsumexp(-1)
    exact = [float(expected_bound(log_q, k)) for k in range(1, 9)]
    assert exact == sorted(exact)
    assert exact[0] < log_px - 0.5
    assert exact[-1] < log_px
    assert float(log_px) - exact[-1] < 0.2 * (float(log_px) - exact[0])  # the gap falls as 1 / K
    x = torch.full((ROWS,), X).double()
    for num_particles, num_bounds in ((1, 1), (4, 1), (4, 3)):
        torch.manual_seed(0)
        table = lvm.log_weights(*switch_pair(log_q.repeat(ROWS, 1)), x, num_particles=num_particles, seed=0)
        error = num_bounds**-0.5 * float(lvm.ops.log_mean_exp(table).std()) / ROWS**0.5
        objective = ImportanceWeightedELBO(num_particles, "reinforce", num_bounds=num_bounds)
        loss = objective.loss(*switch_pair(log_q.repeat(ROWS, 1)), x) / ROWS
        assert abs(-loss - exact[num_particles - 1]) < 5 * error


def test_a_binary_models_bound_grows_up_to_log_p() -> None:
    """Against the sum over all states, on a model of the library with a guide that does not look at x."""
    torch.manual_seed(0)
    model = lvm.models.BinaryLatent(3, 4).double()
    x = (data(40, 4) > 0).double()

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.full((len(x), 3), 0.4).double()).to_event(1))

    exact = float(lvm.evidence.enumeration(model, x).total)
    torch.manual_seed(0)
    means = [
        -sum(ImportanceWeightedELBO(k, "vimco").loss(model, guide, x) for _ in range(r)) / r
        for k, r in ((2, 60), (6, 60), (600, 10))
    ]
    assert means == sorted(means)
    assert means[0] < exact - 0.5
    assert abs(means[-1] - exact) < 0.1
    small = data(2, seed=1)  # and a latent that the guide lacks is summed out: no gap at all
    mixture = ENUMERATED["mixture"](2)
    loss = ImportanceWeightedELBO(1).loss(mixture.model, lambda *_: None, small)
    torch.testing.assert_close(-loss, float(lvm.evidence.enumeration(mixture.model, small).total), rtol=1e-10, atol=0)
