"""Gradient signal-to-noise ratios and the use of latents: closed forms first, then rates and pairs of all kinds."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_lvm as lvm
from pyro_lvm import guides, models
from pyro_lvm.nn import MLP
from pyro_lvm.objectives import ImportanceWeightedELBO, KLAnnealing, gradient_snr, warm_up
from tests.references import MEANS, SIGMA, WEIGHTS, data

Program = Callable[..., Any]
X = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)


def normal_pair(loc: float = 0.3, scale: float = 0.8) -> tuple[Program, Program]:
    """z ~ N(0, 1), x ~ N(z, 1), and q(z) = N(loc, scale) for every datum; parameters that exist already."""
    pyro.param("loc", torch.tensor(loc, dtype=torch.float64))
    pyro.param("scale", torch.tensor(scale, dtype=torch.float64))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc"), pyro.param("scale")))

    return model, guide


# ---------------------------------------------------------------- signal to noise


@pytest.mark.statistical
def test_a_gaussian_in_closed_form() -> None:
    """z = m + s e: d loss / dm = 2 m - x + 2 s e, and d loss / ds = (2 m - x) e + 2 s e^2 - 1 / s."""
    m, s, x, repeats = 0.3, 0.8, 1.5, 1000
    result = gradient_snr(*normal_pair(m, s), torch.tensor([x]).double(), num_repeats=repeats, seed=0)
    slope = 2 * m - x
    exact = {"loc": (slope, 2 * s), "scale": (2 * s - 1 / s, math.sqrt(slope**2 + 8 * s**2))}
    for name, (mean, std) in exact.items():
        group, snr = result.parameters[name], abs(mean) / std
        assert abs(float(group.mean) - mean) < 5 * std / repeats**0.5
        # Normal draws: (1 + snr^2 / 2) / R is the variance of the ratio; those of the scale have a heavier tail.
        error = math.sqrt((1 + (1 if name == "loc" else 4) * snr**2 / 2) / repeats)
        assert abs(float(group.element_snr) - snr) < 5 * error
    (m_mean, m_std), (s_mean, s_std) = exact.values()
    together = math.hypot(m_mean, s_mean) / math.hypot(m_std, s_std)
    assert result.guide is not None
    assert result.model is None
    assert abs(result.guide.snr - together) < 5 * math.sqrt(1 / repeats)
    assert result.guide.mean.shape == (2,)


@pytest.mark.statistical
def test_no_signal_counts_as_none() -> None:
    """At its optimum the gradient is zero in expectation: the uncorrected ratio would be R^-1/2 = 0.22."""
    result = gradient_snr(*normal_pair(0.75, 0.5**0.5), X[:1] * 0 + 1.5, num_repeats=20, seed=1)
    assert result.guide is not None
    assert result.guide.snr < result.resolution == pytest.approx(0.376, abs=1e-3)


def test_at_the_exact_posterior_there_is_neither_signal_nor_noise() -> None:
    loss = ImportanceWeightedELBO(1, "sticking_the_landing")
    result = gradient_snr(
        *normal_pair(0.75, 0.5**0.5), torch.full((50,), 1.5).double(), loss=loss, num_repeats=5, seed=0
    )
    assert result.guide is not None
    assert math.isnan(result.guide.snr)
    assert math.isnan(result.guide.mean_element_snr)
    assert "none: no gradient in any repeat but rounding error" in str(result)


def test_a_gradient_that_does_not_vary() -> None:
    _, guide = normal_pair()

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    result = gradient_snr(model, guide, X, loss=TraceMeanField_ELBO(), num_repeats=3)
    assert result.guide is not None
    assert result.guide.snr == math.inf
    assert float(result.parameters["loc"].mean) == pytest.approx(3 * 0.3)  # the KL of three data, d/dm m^2 / 2
    assert "inf: the same gradient in every repeat" in str(result)


@pytest.mark.statistical
def test_more_particles_help_one_estimator_and_harm_the_other() -> None:
    """Rainforth et al. (2018): as K^-1/2 for the standard gradient; Tucker et al. (2019): as K^1/2 for theirs.

    The guide is off the exact posterior by half its standard deviation, and 1.2 times as wide.
    """
    torch.manual_seed(0)
    model, guide = models.LinearGaussian(1, 2).double(), guides.DiagonalNormal(1, shared=True).double()
    x = model.sample(1).expand(50, 2)
    exact = model.posterior(x)
    with torch.no_grad():
        scale = exact.variance[0].sqrt()
        start = torch.cat([exact.mean[0] + scale / 2, ((1.2 * scale).expm1() / (math.e - 1)).log()])
        guide.phi.table.copy_(start)

    def ratio(gradient: Any, num_particles: int) -> float:
        loss = ImportanceWeightedELBO(num_particles, gradient)
        result = gradient_snr(model, guide, x, loss=loss, num_repeats=100, seed=0)
        assert result.guide is not None
        return result.guide.snr

    double = [ratio("doubly_reparameterized", k) for k in (8, 64, 512)]
    assert all(2 < larger / smaller < 4 for smaller, larger in pairwise(double))  # 8**0.5 = 2.83
    standard = [ratio("standard", k) for k in (8, 512)]
    assert standard[1] < standard[0] / 3  # 64**0.5 = 8; the second is close to what 100 repeats can tell from 0


LOSSES = {
    "Trace_ELBO": Trace_ELBO(),
    "several particles": Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceGraph_ELBO": TraceGraph_ELBO(),
    "weighted": ImportanceWeightedELBO(4),
    "annealed": KLAnnealing(1.0),
}


@pytest.mark.statistical
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    """All have d/dm = sum_n (2 m - x_n) = -0.7 in expectation but the weighted bound."""
    pair = normal_pair()
    result = gradient_snr(*pair, X, loss=LOSSES[name], num_repeats=100, seed=0)
    group = result.parameters["loc"]
    assert result.loss_name == type(LOSSES[name]).__name__
    if name != "weighted":
        assert abs(float(group.mean) + 0.7) < 5 * group.noise / 10


def test_a_function_as_loss() -> None:
    def squares(model: Program, guide: Program, x: torch.Tensor) -> torch.Tensor:
        guide(x)
        return (pyro.param("loc") - x).square().sum()

    result = gradient_snr(*normal_pair(), X, loss=squares, num_repeats=2)
    assert float(result.parameters["loc"].mean) == pytest.approx(2 * float((0.3 - X).sum()))
    assert math.isnan(result.parameters["scale"].snr)


def test_what_a_guide_leaves_out_is_summed_out() -> None:
    """As in `fit`: the gradient is exact, so nothing varies."""
    means = pyro.param("means", MEANS.clone())

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(pyro.param("means")[c], SIGMA), obs=x)

    x = data(5)
    result = gradient_snr(model, None, x, num_repeats=3)
    logs = (dist.Normal(means, SIGMA).log_prob(x[:, None]) + WEIGHTS.log()).logsumexp(-1).sum()
    assert result.loss_name == TraceEnum_ELBO.__name__
    assert result.guide is None
    torch.testing.assert_close(
        result.parameters["means"].mean, -torch.autograd.grad(logs, means)[0], atol=1e-10, rtol=0
    )
    assert result.model is not None
    assert result.model.snr == math.inf
    assert result.usage.summed_out == ("c",)


def test_modules_share_parameters_and_print() -> None:
    x = torch.rand(6, 4).round()
    guide = guides.DiagonalNormal(2, MLP(4, [5], 4))
    model = models.DeepGaussian(MLP(2, [5], 4), 2, "bernoulli", prior=models.priors.VampPrior(guide, x[:3]))
    result = gradient_snr(model, guide, x, num_repeats=3, seed=0)
    parts = {name: group.part for name, group in result.parameters.items()}
    assert {part for name, part in parts.items() if name.startswith("DiagonalNormal")} == {"both"}
    assert {part for name, part in parts.items() if name.startswith("DeepGaussian")} == {"model"}
    assert result.model is not None
    assert len(result.model.mean) == sum(p.numel() for p in [*model.parameters(), *guide.parameters()])
    lines = str(result).splitlines()
    assert lines[0].split()[:3] == ["gradient", "of", "part"]
    assert lines[2].startswith("all of the model")
    assert "Trace_ELBO, 3 repeats, eval mode" in str(result)
    assert lines[-2].split()[0] == "z"


def test_nothing_is_changed() -> None:
    x = torch.rand(6, 4).round()
    noisy = torch.nn.Sequential(MLP(4, [5], 4), torch.nn.Dropout(0.5))
    model, guide = models.DeepGaussian(MLP(2, [5], 4), 2, "bernoulli"), guides.DiagonalNormal(2, noisy)
    loss = KLAnnealing(warm_up(10))
    before = [p.detach().clone() for p in [*model.parameters(), *guide.parameters()]]
    held = next(guide.parameters())
    held.grad = torch.full_like(held, 7.0)
    state = torch.get_rng_state()
    one, two = (gradient_snr(model, guide, x, loss=loss, num_repeats=3, seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, [*model.parameters(), *guide.parameters()], strict=True))
    assert bool((held.grad == 7).all())
    assert all(p.grad is None for p in model.parameters())
    assert guide.training
    assert noisy[1].training
    assert loss.step == 0
    assert list(pyro.get_param_store().keys()) == []
    assert all(torch.equal(two.parameters[n].mean, group.mean) for n, group in one.parameters.items())


def test_a_pair_without_parameters_is_refused() -> None:
    model, _ = normal_pair()
    with pytest.raises(lvm.ParameterError, match="a parameter with a gradient, got none"):
        gradient_snr(model, fixed, X)
    with pytest.raises(lvm.ShapeError, match="num_repeats: expected 2 or more"):
        gradient_snr(model, fixed, X, num_repeats=1)


@pytest.mark.parametrize("loss", [Trace_ELBO, "elbo"])
def test_a_loss_of_the_wrong_kind_is_refused_as_in_fit(loss: Any) -> None:
    for run in (lambda: gradient_snr(*normal_pair(), X, loss=loss), lambda: lvm.fit(*normal_pair(), X, loss=loss)):
        with pytest.raises(lvm.DataTypeError, match="loss: expected a loss object or function"):
            run()


def fixed(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
