"""Active units and KL terms: hand-made encoders with known answers, closed forms, and pairs whose latents depend."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from pyro.poutine import mask, scale

import pyro_lvm as lvm
from pyro_lvm import guides, models
from pyro_lvm.nn import MLP
from pyro_lvm.objectives import latent_usage
from tests.references import mixed, obs_mask

Program = Callable[..., Any]
X = torch.tensor([[-1.0, 0.2], [0.5, 0.3], [3.0, 0.1]], dtype=torch.float64)
SCALES = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def prior_model(prior: dist.TorchDistribution) -> Program:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)

    return model


STANDARD = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)


def means(x: torch.Tensor) -> torch.Tensor:
    """Of three units: one follows the data, one hardly does, one does not."""
    return torch.stack([2 * x[:, 0], x[:, 1], 0 * x[:, 0] + 4], -1)


def diagonal(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(means(x), SCALES).to_event(1))


def normal_kl(x: torch.Tensor) -> torch.Tensor:
    """KL(N(m, s) || N(0, 1)) = (m^2 + s^2 - 1) / 2 - log s, mean over the data."""
    return ((means(x).square() + SCALES**2 - 1) / 2 - SCALES.log()).mean(0)


def test_a_diagonal_guide_in_closed_form() -> None:
    site = latent_usage(prior_model(STANDARD), diagonal, X)["z"]
    torch.testing.assert_close(site.kl, normal_kl(X), atol=1e-10, rtol=0)
    torch.testing.assert_close(site.activity, means(X).var(0), atol=1e-10, rtol=0)
    assert site.active.tolist() == [True, False, False]  # variances 16.33, 0.01 less rounding, 0
    assert site.activity[1] == pytest.approx(0.01, abs=1e-10)
    assert (site.method, site.total_stderr) == ("analytic", 0.0)


@pytest.mark.statistical
def test_a_prior_without_closed_form_by_dimension() -> None:
    """From N(m, s) to a standard logistic, by quadrature over the noise of each element."""
    site = latent_usage(prior_model(dist.Logistic(torch.zeros(3).double(), 1.0).to_event(1)), diagonal, X, seed=0)["z"]
    q, nodes = dist.Normal(means(X)[..., None], SCALES[:, None]), torch.linspace(-12, 12, 8001, dtype=torch.float64)
    z = q.loc + q.scale * nodes
    terms = q.log_prob(z) - dist.Logistic(0.0, 1.0).log_prob(z)
    exact = torch.trapezoid(dist.Normal(0.0, 1.0).log_prob(nodes).exp() * terms, nodes).mean(0)
    assert site.method == "Monte Carlo"
    assert ((site.kl - exact).abs() < 5 * site.kl_stderr).all()
    torch.testing.assert_close(site.activity, means(X).var(0), atol=1e-10, rtol=0)


@pytest.mark.statistical
def test_a_full_covariance_has_one_term() -> None:
    tril = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.7, 0.0], [0.2, -0.3, 0.4]], dtype=torch.float64)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(means(x), scale_tril=tril))

    site = latent_usage(prior_model(STANDARD), guide, X, seed=0)["z"]
    squares = means(X).square().sum(-1).mean()
    exact = (squares + tril.square().sum() - 3) / 2 - tril.diagonal().log().sum()
    assert site.kl.shape == (1,)
    assert site.activity.shape == (3,)
    assert abs(float(site.kl - exact)) < 5 * float(site.kl_stderr)
    joint = dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    analytic = latent_usage(prior_model(joint), guide, X)["z"]
    assert analytic.method == "analytic"
    torch.testing.assert_close(analytic.kl, exact[None], atol=1e-10, rtol=0)


def test_masks_count_and_scales_do_not() -> None:
    seen = torch.tensor([True, False, True])

    def masked(program: Program) -> Program:
        def run(x: torch.Tensor) -> None:
            with mask(mask=seen), scale(scale=7.0):
                program(x)

        return run

    site = latent_usage(masked(prior_model(STANDARD)), masked(diagonal), X)["z"]
    each = (means(X).square() + SCALES**2 - 1) / 2 - SCALES.log()
    torch.testing.assert_close(site.kl, (each * seen[:, None]).mean(0), atol=1e-10, rtol=0)


# ---------------------------------------------------------------- latents that depend on one another


def layers(noise: float) -> tuple[Program, Program]:
    """z2 ~ N(0, 1), z ~ N(z2, 1); q(z2 | x) = N(x1, noise), q(z | z2) = N(z2 / 2, 1)."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.sample("z2", dist.Normal(0.0, 1.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 1])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x[:, 0], noise))
            pyro.sample("z", dist.Normal(z2 / 2, 1.0))

    return model, guide


@pytest.mark.statistical
def test_two_layers() -> None:
    """E KL(q(z | z2) || p(z | z2)) = E (z2 / 2)^2 / 2 = (x1^2 + noise^2) / 8, and E_q[z] = x1 / 2."""
    usage = latent_usage(*layers(0.5), X, num_particles=400, seed=0)
    z2, z = usage["z2"], usage["z"]
    assert z2.total_stderr == 0
    assert (z2.method, z.method) == ("analytic", "analytic")
    assert abs(float(z.kl) - float((X[:, 0].square() + 0.25).mean() / 8)) < 5 * float(z.kl_stderr)
    # The mean of each of the three data has variance (0.5 / 2)^2 / 400: 0.0125 is its standard deviation.
    assert abs(float(z.activity) - float(X[:, 0].var() / 4)) < 5 * 2 * float(X[:, 0].std() / 2) * 0.0125
    assert usage.num_particles == 400


@pytest.mark.statistical
def test_draws_alone_make_no_unit_active() -> None:
    """No datum matters here; without the correction the variance of the means would be 1 / (4 K) = 0.025."""
    x = torch.zeros(2000, 2, dtype=torch.float64)
    site = latent_usage(*layers(1.0), x, num_particles=10, seed=0)["z"]
    assert abs(float(site.activity)) < 5 * 0.025 * (2 / 2000) ** 0.5
    assert not site.active.any()


@pytest.mark.statistical
def test_terms_that_are_no_conditional_kl() -> None:
    """Bottom-up: the two terms together are the KL of the chain, by the log-weights of a model without data."""
    model, _ = layers(1.0)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, 0], 0.7))
            pyro.sample("z2", dist.Normal(z / 2, 0.6))

    usage = latent_usage(model, guide, X, num_particles=1000, seed=0)
    assert (usage["z2"].method, usage["z"].method) == ("analytic", "Monte Carlo")
    # E log q(z) + E log q(z2 | z) - E log p(z2) - E log p(z | z2), all moments of z = x + 0.7 e, z2 = z / 2 + 0.6 e'.
    square = X[:, 0].square() + 0.49  # E z^2
    entropy = -torch.tensor([0.7, 0.6]).double().log().sum() - 1.0
    exact = (entropy + (square / 4 + 0.36) / 2 + (square / 4 + 0.36) / 2).mean()
    total = float(usage["z"].kl + usage["z2"].kl)
    assert abs(total - float(exact)) < 5 * (usage["z"].total_stderr + usage["z2"].total_stderr)


# ---------------------------------------------------------------- kinds of latents


def test_bits() -> None:
    probs = torch.tensor([0.9, 0.5, 0.3], dtype=torch.float64)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(probs.expand(len(x), 3)).to_event(1))

    model = prior_model(dist.Bernoulli(torch.full((3,), 0.5).double()).to_event(1))
    site = latent_usage(model, guide, X)["z"]
    exact = probs * (2 * probs).log() + (1 - probs) * (2 * (1 - probs)).log()
    torch.testing.assert_close(site.kl, exact, atol=1e-10, rtol=0)
    assert site.activity.tolist() == pytest.approx([0, 0, 0], abs=1e-12)


def test_classes_have_a_kl_and_no_mean() -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.8]).double()))

    usage = latent_usage(prior_model(dist.Categorical(torch.tensor([0.5, 0.5]).double())), guide, X)
    assert float(usage["z"].kl) == pytest.approx(float(torch.tensor(0.4).log() * 0.2 + torch.tensor(1.6).log() * 0.8))
    assert usage["z"].row()[1] == "-"


def test_a_prior_given_what_is_summed_out_has_no_term() -> None:
    pair = mixed(4)
    usage = latent_usage(pair.model, pair.guide, pair.x, num_particles=3)
    assert usage.summed_out == ("c",)
    assert usage["z"].kl.isnan().all()
    assert usage["z"].activity.isfinite().all()
    assert "summed out, not sampled: c" in str(usage)


def test_missing_data_are_no_latent() -> None:
    pair = obs_mask(4)
    usage = latent_usage(pair.model, pair.guide, pair.x, *pair.args)
    assert usage.summed_out == ()


def test_a_latent_of_all_data() -> None:
    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x[:, 0])

    def guide(x: torch.Tensor) -> None:
        pyro.sample("w", dist.Normal(torch.tensor(2.0).double(), 1.0))

    for data_plate in ("auto", None):
        site = latent_usage(model, guide, X, data_plate=data_plate)["w"]
        assert float(site.kl) == pytest.approx(2.0)  # of all data together
        assert site.activity.isnan().all()


def test_latents_in_a_plate_of_their_own() -> None:
    def program(loc: Any, observe: bool) -> Program:
        def run(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(loc(x), 1.0))
                if observe:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return run

    site = latent_usage(program(lambda x: 0.0, True), program(lambda x: x, False), X)["z"]
    torch.testing.assert_close(site.kl, X.square().mean(0) / 2, atol=1e-10, rtol=0)
    torch.testing.assert_close(site.activity, X.var(0), atol=1e-10, rtol=0)


def test_guides_of_pyro() -> None:
    """Their latents are `Delta` sites, whose density is that of an auxiliary site."""
    model = prior_model(STANDARD)
    for guide in (autoguide.AutoNormal(model), autoguide.AutoDelta(model)):
        guide(X)
        site = latent_usage(model, guide, X)["z"]
        assert site.kl.isnan().all()
        assert site.activity.shape == (3,)


@pytest.mark.statistical
def test_the_terms_are_the_elbo_less_the_likelihood() -> None:
    torch.manual_seed(0)
    model = models.HierarchicalGaussian(MLP(3, [5], 4), [3, 2]).double()
    guide = guides.TopDown([3, 2], MLP(4, [5], 4), feature_dim=4).double()
    x = torch.rand(6, 4, dtype=torch.float64).round()
    usage = latent_usage(model, guide, x, num_particles=500, seed=0)

    def prior_only(x: torch.Tensor) -> None:  # a factor per datum in the place of the data
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", model.prior)
            pyro.sample("z", model.conditional(1, z2))
            pyro.sample("x", dist.Unit(torch.zeros(len(x)).double()), obs=torch.empty(len(x), 0).double())

    weights = lvm.log_weights(prior_only, guide, x, num_particles=2000, seed=1).detach().mean(1)  # (K,)
    total = float(usage["z"].kl.sum() + usage["z2"].kl.sum())
    error = float(weights.std() / 2000**0.5) + usage["z"].total_stderr + usage["z2"].total_stderr
    assert abs(total + float(weights.mean())) < 5 * error


def test_it_prints() -> None:
    lines = str(latent_usage(*layers(0.5), X, num_particles=5, seed=0)).splitlines()
    assert lines[2].split()[:5] == ["z2", "1", "of", "1", "2.026"]  # (10.25 / 3 + 0.25 - 1) / 2 + log 2
    assert lines[4].startswith("3 data, 5 draws each")
    assert "exact in one run" in str(latent_usage(prior_model(STANDARD), diagonal, X))


def test_one_draw_and_unknown_latents_are_refused() -> None:
    with pytest.raises(lvm.ShapeError, match="num_particles: expected 2 or more, got 1"):
        latent_usage(*layers(1.0), X, num_particles=1)
    usage = latent_usage(*layers(1.0), X, num_particles=2, seed=0)
    with pytest.raises(lvm.SiteError, match=r"name: expected one of the latents \['z2', 'z'\], got 'w'"):
        usage["w"]
