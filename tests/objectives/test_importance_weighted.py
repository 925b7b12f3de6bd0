"""The bound against the log-weights that it is made of; its gradients at given draws against the papers' formulas."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.errors import PlateError
from pyro_lvm.nn import MLP
from pyro_lvm.objectives import ImportanceWeightedELBO
from tests.references import ENUMERATED, ORACLES, Pair, data, normal_model, posterior

GRADIENTS = [
    "standard",
    "sticking_the_landing",
    "doubly_reparameterized",
    "vimco",
    "reinforce",
    "reweighted_wake_sleep",
]
PATHWISE = GRADIENTS[:3]
EVERY = pytest.mark.parametrize("gradient", GRADIENTS)
N, K = 4, 3  # 12 draws: fewer than 16, which torch draws in the same order whatever their shape


def bound(pair: Pair, num_particles: int = K, **options: Any) -> float:
    """The definition, from log-weights of the same seed."""
    torch.manual_seed(1)
    table = lvm.log_weights(
        pair.model, pair.guide, pair.x, *pair.args, num_particles=num_particles, **{**pair.options, **options}
    )
    return float((table.logsumexp(0) - math.log(num_particles)).sum().detach())


def loss_of(pair: Pair, objective: Any) -> float:
    guide = pair.guide or (lambda *_: None)
    torch.manual_seed(1)
    return objective.differentiable_loss(pair.model, guide, pair.x, *pair.args).item()


def rough_guide(x: torch.Tensor, *_: Any) -> None:
    """Not the posterior, so that weights differ."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x, 0.9))


ROUGH = Pair(normal_model, rough_guide, data(N), posterior(data(N)[:, None])[2])

# ---------------------------------------------------------------- values

NOT_HERE = ("scale", "obs_mask")  # have tests of their own
SCALES = {"subsample": 1000 / N, "subsample in the model": 1000 / N}


@pytest.mark.parametrize("name", [name for name in ORACLES | ENUMERATED if name not in NOT_HERE])
def test_value_is_the_log_mean_exp_of_the_weights(name: str) -> None:
    pair = (ORACLES | ENUMERATED)[name](N)
    for gradient in GRADIENTS:
        if (name, gradient) != ("sequential_data", "doubly_reparameterized"):  # refused, see below
            loss = loss_of(pair, ImportanceWeightedELBO(K, gradient))
            torch.testing.assert_close(loss, -SCALES.get(name, 1.0) * bound(pair), rtol=1e-10, atol=0)
            torch.testing.assert_close(loss, -SCALES.get(name, 1.0) * float(pair.log_px.sum()), rtol=1e-10, atol=0)


@EVERY
@pytest.mark.parametrize("vectorize", [True, False])
def test_value_with_unequal_weights(gradient: str, vectorize: bool) -> None:
    objective = ImportanceWeightedELBO(K, gradient, vectorize_particles=vectorize)
    expected = bound(ROUGH, vectorize="auto" if vectorize else False)
    torch.testing.assert_close(loss_of(ROUGH, objective), -expected, rtol=0, atol=1e-10)
    torch.manual_seed(1)
    torch.testing.assert_close(objective.loss(normal_model, rough_guide, ROUGH.x), -expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gradient", PATHWISE)
@pytest.mark.parametrize("name", ["plain", "event", "chain", "either_side", "mask_likelihood", "subsample", "params"])
def test_one_particle_is_the_elbo(gradient: str, name: str) -> None:
    pair = ORACLES[name](N)
    objective = ImportanceWeightedELBO(1, gradient, vectorize_particles=False)  # which draws as Trace_ELBO does
    for each in (pair, ROUGH):
        torch.testing.assert_close(loss_of(each, objective), loss_of(each, Trace_ELBO()), rtol=1e-10, atol=0)


def test_missing_pixels() -> None:
    pair = ORACLES["obs_mask"](N)
    with pyro.validation_enabled(False):  # which refuses NaN, masked or not, as it does for Trace_ELBO
        assert loss_of(pair, ImportanceWeightedELBO(K)) == pytest.approx(-float(pair.log_px.sum()), rel=1e-10)


def test_one_scale_of_everything_multiplies_the_loss() -> None:
    scaled = Pair(poutine.scale(normal_model, 0.25), poutine.scale(rough_guide, 0.25), ROUGH.x, ROUGH.log_px)
    assert loss_of(scaled, ImportanceWeightedELBO(K)) == pytest.approx(-0.25 * bound(ROUGH), rel=1e-10)


def test_joint_weight() -> None:
    """A latent outside the plate: one weight of all data, as `log_weights` has it."""

    def model(x: torch.Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    def guide(_x: torch.Tensor) -> None:
        pyro.sample("shift", dist.Normal(torch.tensor(0.2).double(), 0.6))

    pair = Pair(model, guide, data(N), torch.zeros(N))
    for gradient in GRADIENTS:
        objective = ImportanceWeightedELBO(K, gradient, data_plate=None)
        assert loss_of(pair, objective) == pytest.approx(-bound(pair, data_plate=None), rel=1e-10)
        with pytest.raises(PlateError, match="'shift': expected it inside the data plate 'data', got it outside"):
            ImportanceWeightedELBO(K, gradient).loss(model, guide, pair.x)


class Flattening(nn.Module):
    """A decoder that takes rows alone, as reshaping and convolutional ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.linear(z.view(z.shape[0], -1)[:, :2])


def deep_pair() -> tuple[Any, Any, torch.Tensor]:
    torch.manual_seed(0)
    decoder, encoder = Flattening().double(), MLP(3, [5], 4).double()

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.7).to_event(1), obs=x)

    return model, lvm.guides.DiagonalNormal(2, encoder=encoder), data(2, 3)


@EVERY
def test_folded_models_have_the_loss_and_gradient_of_the_loop(gradient: str) -> None:
    results = []
    for vectorize in (True, False):
        pyro.clear_param_store()
        model, guide, x = deep_pair()
        objective = ImportanceWeightedELBO(K, gradient, vectorize_particles=vectorize)
        torch.manual_seed(1)
        if not vectorize:
            guide(x)  # as the other does once, for the distributions that it then draws from
        loss = objective.loss_and_grads(model, guide, x)
        grads = [p.unconstrained().grad for _, p in sorted(pyro.get_param_store().items())]
        results.append([torch.tensor(loss), *grads])
    assert len(results[0]) == 1 + 2 + 4
    for together, alone in zip(*results, strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [lvm.models.LinearGaussian, None])
def test_bound_grows_with_particles_up_to_the_evidence(make: Any) -> None:
    x = data(50, 3, seed=2)
    if make:
        torch.manual_seed(0)
        model = make(1, 3).double()
        log_px = model.log_prob(x)
    else:

        def model(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=2 * z.expand(*z.shape[:-1], 3)).to_event(1), obs=x)

        x = (x > 0).double()
        log_px = lvm.evidence.quadrature(model, x).value

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1).double(), 1.0).to_event(1))

    torch.manual_seed(0)
    means = []
    for num_particles, repeats in ((1, 60), (4, 60), (16, 60), (2000, 10)):
        objective = ImportanceWeightedELBO(num_particles)
        means.append(-sum(objective.loss(model, guide, x) for _ in range(repeats)) / repeats)
    evidence = float(log_px.detach().sum())
    assert means == sorted(means)
    assert means[0] < evidence - 10
    assert abs(means[-1] - evidence) < 0.3  # measured: 0.06 and 0.01


# ---------------------------------------------------------------- gradients at given draws


def chain_model(theta: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            second = pyro.sample("z2", dist.Normal(0.0, 1.0))
            first = pyro.sample("z", dist.Normal(theta[0] * second, 0.8))
            pyro.sample("x", dist.Normal(theta[1] * first + 0.1 * second**2, 0.5), obs=x)

    return model


def chain_guide(phi: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            first = pyro.sample("z", dist.Normal(phi[0] * x, phi[1].exp()))
            pyro.sample("z2", dist.Normal(phi[2] * first + phi[3] * first**2, phi[4].exp()))

    return guide


def joint(theta: torch.Tensor, x: torch.Tensor, z: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    likelihood = dist.Normal(theta[1] * z + 0.1 * z2**2, 0.5).log_prob(x)
    return dist.Normal(0.0, 1.0).log_prob(z2) + dist.Normal(theta[0] * z2, 0.8).log_prob(z) + likelihood


def density(phi: torch.Tensor, x: torch.Tensor, z: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    upper = dist.Normal(phi[2] * z + phi[3] * z**2, phi[4].exp()).log_prob(z2)
    return dist.Normal(phi[0] * x, phi[1].exp()).log_prob(z) + upper


def noise(size: int, vectorize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal draws ``(K, N)`` for z and z2, in the order in which a run draws them."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.normal(torch.zeros(shape).double(), torch.ones(shape).double())

    if vectorize:
        return draw(K, size), draw(K, size)
    rows = [(draw(size), draw(size)) for _ in range(K)]
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def formula(gradient: str, theta: torch.Tensor, phi: torch.Tensor, x: torch.Tensor, e: Any) -> list[torch.Tensor]:
    """The gradients of Burda et al., Roeder et al., Tucker et al., Mnih and Rezende, Mnih and Gregor, Bornschein and
    Bengio, term by term."""
    z = phi[0] * x + phi[1].exp() * e[0]  # (K, N)
    z2 = phi[2] * z + phi[3] * z**2 + phi[4].exp() * e[1]
    at = [z.detach().requires_grad_(), z2.detach().requires_grad_()]
    log_w = joint(theta, x, *at) - density(phi.detach(), x, *at)
    slopes = torch.autograd.grad(log_w.sum(), at)
    log_w = log_w.detach()
    share = log_w.softmax(0)
    score = density(phi, x, *(v.detach() for v in at))
    if gradient == "reweighted_wake_sleep":
        surrogate = (share * score).sum()
    elif gradient == "reinforce":
        surrogate = ((log_w.exp().mean(0).log() - share + 1 / K) * score).sum()
    elif gradient == "vimco":
        factor = torch.empty_like(log_w)
        for k in range(K):
            others = torch.cat([log_w[:k], log_w[k + 1 :]])
            without = torch.cat([others, others.mean(0, keepdim=True)])
            factor[k] = log_w.logsumexp(0) - without.logsumexp(0) - share[k]
        surrogate = (factor * score).sum()
    else:
        factor = share**2 if gradient == "doubly_reparameterized" else share
        surrogate = sum((factor * slope * v).sum() for slope, v in zip(slopes, (z, z2), strict=True))
        surrogate = surrogate - (share * score).sum() * (gradient == "standard")
    model_part = (share * joint(theta, x, *(v.detach() for v in at))).sum()
    return [torch.autograd.grad(model_part, theta)[0], torch.autograd.grad(surrogate, phi)[0]]


@EVERY
@pytest.mark.parametrize("vectorize", [True, False])
def test_gradients_are_the_formulas_of_the_papers(gradient: str, vectorize: bool) -> None:
    """Latents that depend on one another in both programs."""
    theta = torch.tensor([0.7, 1.2]).double().requires_grad_()
    phi = torch.tensor([0.4, -0.3, 0.5, 0.2, -0.2]).double().requires_grad_()
    x = data(N)
    torch.manual_seed(2)
    expected = formula(gradient, theta, phi, x, noise(N, vectorize))
    objective = ImportanceWeightedELBO(K, gradient, vectorize_particles=vectorize)
    torch.manual_seed(2)
    loss = objective.differentiable_loss(chain_model(theta), chain_guide(phi), x)
    for got, want in zip(torch.autograd.grad(-loss, [theta, phi]), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
