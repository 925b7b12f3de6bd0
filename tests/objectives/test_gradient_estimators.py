"""Estimators of one gradient: means against quadrature and enumeration, variances, and losses that train pairs."""

import copy
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.nn import MLP
from pyro_lvm.objectives import ImportanceWeightedELBO
from tests.references import MEANS, SIGMA, WEIGHTS, data

X, THETA, PHI = 1.3, (0.8, 0.2), (0.1, -0.2)  # x; gain and offset of the model; mean and log scale of the guide
ROWS = 20_000  # repeats: so many data of one value, each with parameters of its own


def log_weight(theta: torch.Tensor, phi: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    likelihood = dist.Normal(theta[..., 0] * z + theta[..., 1], 0.5).log_prob(torch.tensor(X, dtype=torch.float64))
    return dist.Normal(0.0, 1.0).log_prob(z) + likelihood - dist.Normal(phi[..., 0], phi[..., 1].exp()).log_prob(z)


def expected(num_particles: int) -> dict[str, torch.Tensor]:
    """Gradients (theta, phi) in expectation, by Gauss-Hermite quadrature over the noise of all particles."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(30))
    noise = torch.cartesian_prod(*[nodes] * num_particles).reshape(-1, num_particles)
    mass = torch.cartesian_prod(*[weights / weights.sum()] * num_particles).reshape(-1, num_particles).prod(-1)
    theta, phi = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (THETA, PHI))
    z = phi[0] + phi[1].exp() * noise
    bound = (mass * (log_weight(theta, phi, z).logsumexp(-1) - math.log(num_particles))).sum()
    exact = torch.cat(torch.autograd.grad(bound, [theta, phi], retain_graph=True))
    path = log_weight(theta.detach(), phi.detach(), z)
    sticking = torch.autograd.grad((mass * (path.detach().softmax(-1) * path).sum(-1)).sum(), phi)[0]
    return {"exact": exact, "sticking_the_landing": torch.cat([exact[:2], sticking])}


def rows(
    gradient: str, num_particles: int, num_rows: int, phi: tuple[float, float] = PHI, **options: Any
) -> torch.Tensor:
    """Independent estimates of the gradient, ``(num_rows, 4)``."""
    theta, phi_ = (torch.tensor(v, dtype=torch.float64).repeat(num_rows, 1).requires_grad_() for v in (THETA, phi))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(theta[:, 0] * z + theta[:, 1], 0.5), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(phi_[:, 0], phi_[:, 1].exp()))

    objective = ImportanceWeightedELBO(num_particles, gradient, **options)
    loss = objective.differentiable_loss(model, guide, torch.full((num_rows,), X, dtype=torch.float64))
    return -torch.cat(torch.autograd.grad(loss, [theta, phi_]), 1)


@pytest.mark.statistical
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize(
    "gradient", ["standard", "sticking_the_landing", "doubly_reparameterized", "vimco", "reinforce"]
)
def test_mean_of_the_gradient(gradient: str, num_particles: int) -> None:
    if gradient == "vimco" and num_particles == 1:
        return
    torch.manual_seed(0)
    got, want = rows(gradient, num_particles, ROWS), expected(num_particles)
    error = got.std(0) / ROWS**0.5
    target = want.get(gradient, want["exact"])
    assert ((got.mean(0) - target).abs() < 5 * error).all()


def test_sticking_the_landing_is_unbiased_for_one_particle_only() -> None:
    one, three = expected(1), expected(3)
    torch.testing.assert_close(one["exact"], one["sticking_the_landing"], rtol=0, atol=1e-9)
    torch.testing.assert_close(three["exact"][2:], torch.tensor([1.156, 0.294]).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        three["sticking_the_landing"][2:], torch.tensor([1.997, 0.338]).double(), rtol=0, atol=1e-3
    )


def test_no_variance_at_the_posterior() -> None:
    precision = 1 + THETA[0] ** 2 / 0.25
    exact = (THETA[0] * (X - THETA[1]) / 0.25 / precision, -0.5 * math.log(precision))
    for num_particles, gradient in product((1, 3), ("sticking_the_landing", "doubly_reparameterized")):
        assert rows(gradient, num_particles, 100, exact)[:, 2:].abs().max() < 1e-10
    assert rows("standard", 1, 100, exact)[:, 2:].std(0).min() > 0.5


@pytest.mark.statistical
def test_signal_to_noise_of_the_guides_gradient() -> None:
    """Rainforth et al. (2018): the standard estimator's falls as K^-1/2; Tucker et al. (2019): the other's grows."""
    torch.manual_seed(0)
    particles = (8, 64, 512)

    def ratios(gradient: str) -> torch.Tensor:
        estimates = [rows(gradient, k, 2000)[:, 2:] for k in particles]
        return torch.stack([each.mean(0).abs() / each.std(0) for each in estimates])

    standard, double = ratios("standard"), ratios("doubly_reparameterized")
    assert (standard[-1] < standard[0] / 2).all()
    growth = double[1:] / double[:-1]  # over a factor of 8 in K
    assert ((growth > 2) & (growth < 4)).all()  # 8**0.5 = 2.83
    assert (double > 3 * standard).all()


# ---------------------------------------------------------------- discrete guides


def switch_pair(logits: torch.Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    """A mixture whose guide draws the component, from logits (N, 3)."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(MEANS[c], SIGMA), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=logits))

    return model, guide


@pytest.mark.statistical
@pytest.mark.parametrize("num_particles", [2, 4])
def test_mean_of_vimco_is_the_gradient_by_enumeration(num_particles: int) -> None:
    start = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    log_joint = dist.Normal(MEANS, SIGMA).log_prob(torch.tensor(X).double()) + WEIGHTS.log()
    log_q = start.log_softmax(-1)
    draws = torch.cartesian_prod(*[torch.arange(3)] * num_particles)  # all of them, (3^K, K)
    bounds = (log_joint - log_q)[draws].logsumexp(-1) - math.log(num_particles)
    want = torch.autograd.grad((log_q[draws].sum(-1).exp() * bounds).sum(), start, retain_graph=True)[0]

    torch.manual_seed(0)
    logits = start.detach().repeat(ROWS, 1).requires_grad_()
    x = torch.full((ROWS,), X).double()
    loss = ImportanceWeightedELBO(num_particles, "vimco").differentiable_loss(*switch_pair(logits), x)
    got = -torch.autograd.grad(loss, logits)[0]
    assert ((got.mean(0) - want).abs() < 5 * got.std(0) / ROWS**0.5).all()
    plain = torch.autograd.grad(((log_q.detach()[draws].sum(-1)).exp() * bounds).sum(), start)[0]
    assert ((plain - want).abs() > 0.01).all()  # what is left without the score is another gradient


def test_a_discrete_guide_learns_the_posterior() -> None:
    x = data(60)
    joint = dist.Normal(MEANS, SIGMA).log_prob(x[:, None]) + WEIGHTS.log()
    logits = nn.Linear(1, 3).double()

    def guide(x: torch.Tensor) -> None:
        pyro.module("logits", logits)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=logits(x[:, None])))

    model, _ = switch_pair(x)
    torch.manual_seed(0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=ImportanceWeightedELBO(5, "vimco"))
    for _ in range(300):
        svi.step(x)
    learned, exact = logits(x[:, None]).log_softmax(-1), joint.log_softmax(-1)  # linear logits can be exact here
    gap = (learned.exp() * (learned - exact)).sum(-1).mean()
    assert gap < 0.05  # nats; 0.024 measured


# ---------------------------------------------------------------- guides of the library


@pytest.mark.parametrize("gradient", ["sticking_the_landing", "doubly_reparameterized"])
@pytest.mark.parametrize("base", ["diagonal", "full"])
def test_flows(gradient: str, base: Any) -> None:
    """Against a copy of the flow, whose own parameters stay what they are."""
    torch.manual_seed(0)
    size = {"diagonal": 4, "full": 5}[base]
    guide = lvm.guides.Flow(2, encoder=MLP(3, [4], size + 3), base=base, hidden_dim=6, context_dim=3).double()
    model = lvm.models.LinearGaussian(2, 3).double()
    still, x = copy.deepcopy(guide), data(4, 3)

    objective = ImportanceWeightedELBO(3, gradient)
    torch.manual_seed(1)
    got = torch.autograd.grad(-objective.differentiable_loss(model, guide, x), list(guide.parameters()))

    torch.manual_seed(1)
    guide(x)  # the run that finds the distributions
    z = guide.distribution(x).expand(torch.Size([3, 4])).rsample()
    log_joint = model._prior().log_prob(z) + model._likelihood(z).log_prob(x)
    log_w = log_joint - still.distribution(x).log_prob(z)
    factor = log_w.detach().softmax(0) ** (2 if gradient == "doubly_reparameterized" else 1)
    want = torch.autograd.grad((factor * log_w).sum(), list(guide.parameters()))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.statistical
def test_hierarchical_guides_train() -> None:
    torch.manual_seed(0)
    model = lvm.models.HierarchicalGaussian(MLP(2, [8], 6), [2, 2], hidden_dims=(8,))
    x = model.sample(20)
    guide = lvm.guides.BottomUp([2, 2], MLP(6, [8], 4), hidden_dims=(8,))
    objective = ImportanceWeightedELBO(5, "doubly_reparameterized")
    torch.manual_seed(0)
    before = objective.loss(model, guide, x)
    adam = lambda p: torch.optim.Adam(p, lr=0.02)  # noqa: E731
    fitted = lvm.fit(model, guide, x, loss=objective, num_steps=200, update="guide", seed=0, optim=adam)
    after = lvm.log_weights(fitted.model, fitted.guide, x, num_particles=1000, seed=0)
    bound = float(lvm.ops.importance_weighted_bound(after, 5).sum().detach())
    assert -before + 5 < bound < float(lvm.ops.log_evidence(after).sum().detach())  # -91.3, -82.7 and -81.7
