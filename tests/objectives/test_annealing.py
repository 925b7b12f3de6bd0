"""KL terms with a weight: values and gradients, closed forms and enumeration; schedules; what stays the same."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoMessenger
from pyro.poutine import scale
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.errors import DataTypeError, ShapeError, SiteError
from pyro_lvm.nn import MLP
from pyro_lvm.objectives import FreeBits, ImportanceWeightedELBO, KLAnnealing, warm_up
from tests.objectives.test_weighted_bound_as_a_loss import learned_guide, subsampled
from tests.references import ENUMERATED, MEANS, SIGMA, WEIGHTS, data, normal_model

N = 6
X = data(N)


def free_bits() -> FreeBits:
    return FreeBits(0.0)


def enum_elbo() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)


def elbo_parts(x: torch.Tensor, gain: float = float(torch.tensor(0.1)), width: float = 1.0) -> tuple[float, float]:
    """E[log p(x | z)] and KL of `learned_guide`, summed over the data."""
    loc = gain * x
    likelihood = -0.5 * (math.log(2 * math.pi * SIGMA**2) + ((x - loc) ** 2 + width**2) / SIGMA**2)
    kl = 0.5 * (loc**2 + width**2 - 1) - math.log(width)
    return float(likelihood.sum()), float(kl.sum())


@pytest.mark.parametrize("make", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, enum_elbo, free_bits])
@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_value_is_the_likelihood_less_the_weighed_kl(make: Callable[[], Any], beta: float) -> None:
    """The loss is linear in beta, draw by draw: through 0 and 1, which are the likelihood and the loss itself."""
    losses = {}
    for weight in (0.0, 1.0, beta):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        losses[weight] = KLAnnealing(weight, make()).loss(normal_model, learned_guide, X)
    assert losses[beta] == pytest.approx(losses[0.0] + beta * (losses[1.0] - losses[0.0]), rel=1e-10)
    if make in (TraceMeanField_ELBO, free_bits):  # whose KL is exact
        assert losses[1.0] - losses[0.0] == pytest.approx(elbo_parts(X)[1], rel=1e-10)


@pytest.mark.statistical
def test_expected_value_and_gradient_in_closed_form() -> None:
    pyro.set_rng_seed(0)
    x, beta = data(2), 0.3
    likelihood, kl = elbo_parts(x)
    objective = KLAnnealing(beta, Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1))
    loss = objective.loss_and_grads(normal_model, learned_guide, x)
    # one particle's loss has a standard deviation below 4, and its gradient below 5 (from 20 000 draws)
    assert abs(loss - (-likelihood + beta * kl)) < 5 * 4 / 20_000**0.5
    gain = pyro.param("gain").grad
    exact = float((x * (-(x - 0.1 * x) / SIGMA**2 + beta * 0.1 * x)).sum())
    assert gain is not None
    assert abs(float(gain) - exact) < 5 * 5 / 20_000**0.5


@pytest.mark.parametrize("make", [Trace_ELBO, TraceMeanField_ELBO, enum_elbo, lambda: FreeBits(0.2)])
@pytest.mark.parametrize("beta", [1.0, 1, lambda step: 1.0, warm_up(3)])
def test_with_weight_one_it_is_the_wrapped_loss(make: Callable[[], Any], beta: Any) -> None:
    results = []
    for objective in (make(), KLAnnealing(beta, make())):
        if isinstance(objective, KLAnnealing):
            objective.step = 3
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = objective.loss_and_grads(normal_model, learned_guide, X)
        results.append([loss, *(float(p.grad) for _, p in sorted(pyro.get_param_store().named_parameters()))])
    assert results[0] == pytest.approx(results[1], rel=1e-12)


# ---------------------------------------------------------------- discrete latents


def logits_guide(logits: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=pyro.param("logits", logits)))

    return guide


def mixture(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(MEANS[c], SIGMA), obs=x)


def enumerated(logits: torch.Tensor, x: torch.Tensor, beta: float) -> torch.Tensor:
    log_q = logits.log_softmax(-1)
    log_lik = dist.Normal(MEANS, SIGMA).log_prob(x[:, None])
    return -(log_q.exp() * (log_lik + beta * (WEIGHTS.log() - log_q))).sum()


def test_a_discrete_latent_that_the_guide_enumerates() -> None:
    start = torch.tensor([[0.3, -0.5, 0.1]]).double().repeat(N, 1).requires_grad_()
    want = enumerated(start, X, 0.3)
    guide = config_enumerate(logits_guide(start.detach()))
    loss = KLAnnealing(0.3, enum_elbo()).loss_and_grads(mixture, guide, X)
    assert loss == pytest.approx(float(want.detach()), rel=1e-10)
    grad = pyro.param("logits").grad
    torch.testing.assert_close(grad, torch.autograd.grad(want, start)[0], rtol=0, atol=1e-10)


@pytest.mark.statistical
@pytest.mark.parametrize("make", [Trace_ELBO, TraceGraph_ELBO])
def test_scores_of_discrete_draws_have_the_mean_gradient(make: Callable[[], Any]) -> None:
    rows = 20_000
    start = torch.tensor([0.3, -0.5, 0.1]).double().requires_grad_()
    x = torch.tensor([1.3]).double()
    want = torch.autograd.grad(enumerated(start, x, 0.3), start)[0]
    pyro.set_rng_seed(0)
    guide = logits_guide(start.detach().repeat(rows, 1))
    KLAnnealing(0.3, make()).loss_and_grads(mixture, guide, x.repeat(rows))
    got = pyro.param("logits").grad
    assert got is not None
    assert ((got.mean(0) - want).abs() < 5 * got.std(0) / rows**0.5).all()


def test_a_latent_that_is_summed_out_is_likelihood() -> None:
    """A component that only the data depend on; refused where a latent of the guide depends on it."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(MEANS[c] + z, SIGMA), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5))

    losses = []
    for beta in (0.0, 1.0, 0.3):
        pyro.set_rng_seed(0)
        losses.append(KLAnnealing(beta, enum_elbo()).loss(model, guide, X))
    assert losses[2] == pytest.approx(losses[0] + 0.3 * (losses[1] - losses[0]), rel=1e-10)
    pyro.set_rng_seed(0)
    z = torch.distributions.Normal(X / 2, 0.5).sample()
    log_px = (dist.Normal(MEANS + z[:, None], SIGMA).log_prob(X[:, None]) + WEIGHTS.log()).logsumexp(-1)
    assert losses[0] == pytest.approx(-float(log_px.sum()), rel=1e-10)

    def chained(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(MEANS[c], 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    with pytest.raises(SiteError, match="model: expected no latent of the guide to depend on one that is summed out"):
        KLAnnealing(0.3, enum_elbo()).loss(chained, guide, X)


# ---------------------------------------------------------------- scales and schedules


def test_the_weight_multiplies_the_scales_of_plates() -> None:
    """A subsample, and a scale of the user's."""
    x = data(20)
    for wrap, factor in ((lambda p: p, 1.0), (lambda p: scale(p, 0.5), 0.5)):
        losses = []
        for beta in (0.0, 1.0, 0.3):
            pyro.set_rng_seed(0)
            model, guide = wrap(subsampled("model", 20, 4)), wrap(subsampled("rough", 20, 4))
            losses.append(KLAnnealing(beta, TraceMeanField_ELBO()).loss(model, guide, x))
        pyro.set_rng_seed(0)
        rows = torch.randperm(20)[:4]
        kl = factor * 20 / 4 * float((0.5 * ((0.3 * x[rows]) ** 2 + 0.81 - 1) - math.log(0.9)).sum())
        assert losses[2] - losses[0] == pytest.approx(0.3 * kl, rel=1e-10)
        assert losses[1] - losses[0] == pytest.approx(kl, rel=1e-10)


def test_steps_are_gradients() -> None:
    objective = KLAnnealing(warm_up(4, start=0.2))
    seen = []
    for _ in range(6):
        seen.append(objective.beta)
        objective.loss(normal_model, learned_guide, X)
        with torch.no_grad():
            objective.differentiable_loss(normal_model, learned_guide, X)
        objective.loss_and_grads(normal_model, learned_guide, X)
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0], rel=1e-15)
    assert seen[4:] == [1.0, 1.0]
    module = KLAnnealing(lambda step: 2.0 * step)(normal_model, learned_guide)
    for step in range(3):
        assert module.elbo.beta == 2.0 * step
        module(X).backward()
    svi = SVI(normal_model, learned_guide, pyro.optim.Adam({}), objective)
    svi.step(X)
    svi.evaluate_loss(X)
    assert objective.step == 7


def test_a_schedule_starts_where_it_says_and_ends_at_one() -> None:
    for num_steps, start in ((1, 0.0), (7, 0.1), (3, 5.0)):
        beta = warm_up(num_steps, start)
        assert beta(0) == start
        assert beta(num_steps) == beta(10 * num_steps) == 1.0
        assert float(torch.tensor([beta(t) for t in range(num_steps + 1)]).diff().std(correction=0)) < 1e-6


# ---------------------------------------------------------------- in fit


def vae() -> tuple[Any, Any, torch.Tensor]:
    torch.manual_seed(0)
    model = lvm.models.LinearGaussian(2, 3)
    return model, lvm.guides.DiagonalNormal(2, encoder=MLP(3, [8], 4)), data(48, 3).float()


def adam(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.02)


@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
@pytest.mark.parametrize("make", [lambda: KLAnnealing(warm_up(20)), lambda: KLAnnealing(4.0), lambda: FreeBits(0.3)])
def test_fit_and_the_numbers_reported_afterwards(make: Callable[[], Any]) -> None:
    """Training changes; what log_weights is of the parameters does not, whatever loss has trained them."""
    model, guide, x = vae()
    plain = lvm.fit(model, guide, x, num_steps=5, batch_size=24, seed=0, optim=adam)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    objective = make()
    result = lvm.fit(model, guide, x, loss=objective, num_steps=30, batch_size=24, seed=0, optim=adam)
    assert not torch.equal(before[0], next(iter(model.parameters())))
    assert not math.isclose(float(result.losses[0]), float(plain.losses[0]), rel_tol=1e-6)
    other_model, other_guide, _ = vae()  # the same parameters, never trained
    other_model.load_state_dict(model.state_dict())
    other_guide.load_state_dict(guide.state_dict())
    pyro.clear_param_store()
    for measure in (
        lambda *pair: lvm.log_weights(*pair, x, num_particles=3, seed=0),
        lambda *pair: lvm.elbo(*pair, x, seed=0),
        lambda *pair: lvm.log_marginal(*pair, x, num_particles=50, seed=0).value,
    ):
        torch.testing.assert_close(
            measure(result.model, result.guide), measure(other_model, other_guide), rtol=0, atol=1e-6
        )
    if isinstance(objective, KLAnnealing):
        assert objective.step == 30


def test_the_history_is_that_of_the_weighed_loss() -> None:
    """A guide that is fixed, with the KL in closed form."""

    def model(x: torch.Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.0).double())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((len(x),), 2.0).double(), 1.0))  # KL = 2

    objective = KLAnnealing(warm_up(4), TraceMeanField_ELBO())
    result = lvm.fit(model, guide, X, loss=objective, num_steps=6, optim=lambda p: torch.optim.SGD(p, lr=0.0))
    likelihood = float(dist.Normal(0.0, 1.0).log_prob(X).mean())
    want = -likelihood + 2 * torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.0]).double()
    torch.testing.assert_close(result.losses, want, rtol=1e-10, atol=0)
    assert "KL terms by a schedule, 1 after 6 steps" in objective.notes()[0]
    assert objective.notes()[0] in result.notes


def test_a_global_latent_in_mini_batches() -> None:
    """fit scales the plate to all data, the weight comes on top; the prior of the latent counts once."""

    def model(x: torch.Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.tensor(0.0).double(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0).double())
        width = pyro.param("width", torch.tensor(0.3).double(), constraint=dist.constraints.positive)
        pyro.sample("shift", dist.Normal(loc, width))

    x = data(60)
    objective = KLAnnealing(5.0, TraceMeanField_ELBO())
    result = lvm.fit(model, guide, x, loss=objective, num_steps=300, batch_size=20, seed=0, optim=adam)
    precision = 5.0 * 1 + 60  # of the maximiser of E[log p(x | z)] - 5 KL, q normal: prior counts 5 times
    assert float(result.params["loc"]) == pytest.approx(float(x.sum()) / precision, abs=0.06)
    assert float(result.params["width"]) == pytest.approx((5.0 / precision) ** 0.5, abs=0.06)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "loss",
    [
        ImportanceWeightedELBO(),
        RenyiELBO(num_particles=2),
        ReweightedWakeSleep(),
        TraceTMC_ELBO(),
        TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True),
        JitTrace_ELBO(),
        KLAnnealing(1.0),
        len,
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_losses_that_cannot_be_annealed(loss: Any) -> None:
    name = type(loss).__name__
    with pytest.raises(DataTypeError, match=f"loss: expected one of Trace_ELBO, .*, got {name}"):
        KLAnnealing(0.5, loss)


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf, True, "warm", None])
def test_weights_that_are_none(beta: Any) -> None:
    with pytest.raises(DataTypeError, match="beta: expected a finite number >= 0"):
        KLAnnealing(beta)
    with pytest.raises(DataTypeError, match=r"beta\(step\): expected a finite number >= 0"):
        KLAnnealing(lambda step: beta).loss(normal_model, learned_guide, X)
    with pytest.raises(DataTypeError, match="start: expected a finite number >= 0"):
        warm_up(3, start=beta)


def test_other_refusals() -> None:
    with pytest.raises(ShapeError, match="num_steps: expected 1 or more, got 0"):
        warm_up(0)

    class Guide(AutoMessenger):
        def get_posterior(self, name: str, prior: Any) -> Any:
            return prior

    with pytest.raises(DataTypeError, match="guide: expected a guide apart from its model, got Guide"):
        KLAnnealing(0.5).loss(normal_model, Guide(normal_model), X)

    def wrong(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(nn.Linear(2, 2)(x), 1.0))

    with pytest.raises(RuntimeError):  # what the user's own code raises passes as it is
        KLAnnealing(0.5).loss(normal_model, wrong, X.float())


def test_a_schedule_can_be_pickled() -> None:
    loss = KLAnnealing(warm_up(4, start=0.2))
    loss.step = 2
    assert pickle.loads(pickle.dumps(loss)).beta == loss.beta == pytest.approx(0.6)


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")  # of Pyro, where it validates
@pytest.mark.parametrize("loss", [KLAnnealing(0.5), Trace_ELBO()])
def test_a_discrete_latent_that_is_drawn_from_the_prior_is_noted(loss: Any, caplog: Any) -> None:
    pair = ENUMERATED["mixture"](4)
    model = lambda x: pair.model(x + pyro.param("shift", torch.tensor(0.0).double()))  # noqa: E731
    result = lvm.fit(model, None, pair.x, loss=loss, num_steps=1)
    assert "the guide lacks the discrete latents ['c'], which Trace" in result.notes[0]
    assert "draws from the model's prior" in caplog.text
    assert lvm.fit(model, None, pair.x, num_steps=1).notes == ()
