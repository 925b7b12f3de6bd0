"""`inference_gap`: both parts against closed forms, quadrature and enumeration."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import TensorDataset

import pyro_lvm as lvm
from pyro_lvm.errors import ShapeError
from pyro_lvm.guides import DiagonalNormal, FullRankNormal, LowRankNormal
from pyro_lvm.models import LinearGaussian
from tests.references import ORACLES

N, D, L = 12, 6, 3
# A nearly exact proposal has weights so equal that a tail fitted to their differences may look heavy.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")


def linear(shift=0.0):
    """Model, data, log p(x) and posterior; a shift of all weights ties the latents to one another."""
    torch.manual_seed(0)
    model = LinearGaussian(L, D).double()
    with torch.no_grad():
        model.weight.add_(shift)
        x = model.sample(N)
        posterior = model.posterior(x)
        return model, x, model.log_prob(x), posterior


def weak_encoder(size):
    torch.manual_seed(1)
    return torch.nn.Linear(D, size).double()


def kl(q, p):
    return torch.distributions.kl_divergence(q, p).detach()


def within(difference, stderr, errors=5.0):
    return bool((difference.abs() <= errors * stderr + 1e-6).all())


def test_a_family_that_holds_the_posterior_loses_nothing_by_itself():
    model, x, log_px, posterior = linear()
    guide = FullRankNormal(L, weak_encoder(L + 6))
    result = lvm.inference_gap(model, guide, x, num_steps=600, seed=0)
    expected = kl(guide.distribution(x), posterior)  # log p(x) - ELBO, all of it the encoder's
    assert float(expected.mean()) > 1
    assert result.converged.all()
    assert float(result.approximation.mean().abs()) < 1e-3
    assert within(result.approximation, result.approximation_stderr + 1e-3)
    torch.testing.assert_close(result.log_marginal, log_px, rtol=0, atol=5e-3)
    assert within(result.amortization - expected, result.amortization_stderr)
    torch.testing.assert_close(result.approximation + result.amortization, result.log_marginal - result.elbo)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_both_parts_of_a_diagonal_guide_and_a_local_flow(shift):
    """The best diagonal Gaussian has the posterior's mean and the inverse diagonal of its precision.

    Its gap is (sum_l log P_ll - log det P) / 2 for the precision P; at a shift of 1 it is above 0.5 nats.
    """
    model, x, log_px, posterior = linear(shift)
    guide = DiagonalNormal(L, weak_encoder(2 * L))
    result = lvm.inference_gap(model, guide, x, seed=0)
    precision = posterior.precision_matrix[0]
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    assert (shift == 0) or float(gap) > 0.5
    noise = float(result.approximation_stderr.norm()) / N
    assert float((result.approximation - gap).mean()) < 0.01 + 5 * noise  # what the steps left, and draws
    assert within((result.approximation - gap)[result.converged], result.approximation_stderr[result.converged] + 0.01)
    whole = kl(dist.MultivariateNormal(*_moments(guide.distribution(x))), posterior)
    assert within(
        (result.amortization - (whole - gap))[result.converged], result.amortization_stderr[result.converged] + 0.01
    )
    # A flow of its own for each datum starts as the identity and is never worse; its affine part holds the posterior.
    assert bool((result.flow_elbo >= result.local_elbo - 5 * result.approximation_stderr).all())
    assert float((log_px - result.flow_elbo).mean()) < 0.01


def _moments(q):
    return q.mean, torch.diag_embed(q.variance)


def bimodal(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)


def test_two_modes_and_one_normal_by_quadrature():
    """The best Normal covers one of two equal modes: it loses log 2 and what that mode is from a Normal."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.5))

    x = torch.tensor([2.0, 3.0], dtype=torch.float64)
    reference = lvm.evidence.quadrature(bimodal, x)
    result = lvm.inference_gap(bimodal, guide, x, reference=reference, seed=0)
    assert torch.equal(result.log_marginal, reference.value)
    assert torch.equal(result.log_marginal_stderr, reference.stderr)
    assert result.converged.all()
    for n, value in enumerate(x):
        best = _best_normal(value, reference.value[n])
        assert best > math.log(2) - 0.02
        assert float(result.approximation[n]) == pytest.approx(best, abs=5 * float(result.approximation_stderr[n]))


def _best_normal(x, log_px):
    """min KL(N(m, s) || p(z | x)) on a grid, the integral over z by a sum."""
    unit = torch.linspace(-8, 8, 801, dtype=torch.float64)
    weights = torch.softmax(-0.5 * unit**2, 0)
    m = torch.linspace(0.8, 2.2, 141, dtype=torch.float64)[:, None, None]
    s = torch.linspace(0.05, 0.6, 111, dtype=torch.float64)[:, None]
    z = m + s * unit
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, 0.5).log_prob(x)
    entropy = 0.5 * math.log(2 * math.pi * math.e) + s[:, 0].log()
    return float(log_px - ((joint * weights).sum(-1) + entropy).max())


def test_a_shared_scale_is_named_among_what_was_free():
    def guide(x):
        scale = pyro.param("scale", torch.tensor(2.0, dtype=torch.float64), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, scale))

    pair = ORACLES["plain"](6)
    lvm.fit(pair.model, guide, pair.x, num_steps=1, seed=0)
    result = lvm.inference_gap(pair.model, guide, pair.x, num_steps=200, seed=0)
    assert result.free == ("z.loc", "z.scale")
    assert "Free for each datum: z.loc, z.scale." in str(result)
    assert float(result.approximation.abs().max()) < 1e-3


def test_discrete_latents_have_no_flow():
    model = ORACLES["discrete_guide"](4)
    result = lvm.inference_gap(model.model, model.guide, model.x, seed=0, num_steps=5)
    assert result.flow_elbo.isnan().all()
    assert "flow" not in str(result)
    assert float(result.approximation.abs().max()) < 1e-6


@pytest.mark.parametrize("as_dataset", [False, True])
def test_data_in_pieces(as_dataset):
    model, x, log_px, _ = linear()
    guide = LowRankNormal(L, L, weak_encoder(2 * L + L * L))
    data = TensorDataset(x) if as_dataset else x.numpy()
    result = lvm.inference_gap(model, guide, data, seed=0, chunks=(8, 100), num_steps=100)
    assert len(result) == N
    assert result.evidence.provenance["num_data"] == N
    assert float((log_px - result.local_elbo).abs().mean()) < 0.1  # of 9 nats
    assert float((log_px - result.elbo).mean()) > 5


def test_a_pair_with_companions_and_parameters_of_its_own():
    """Arguments with one row per datum go with x; a guide with a table for all data is refined in one piece."""
    pair = ORACLES["labels"](7)
    result = lvm.inference_gap(pair.model, pair.guide, pair.x, *pair.args, num_steps=2, chunks=(3, 10), seed=0)
    torch.testing.assert_close(result.local_elbo, pair.log_px, rtol=0, atol=1e-5)
    model, x, log_px, _ = linear()
    local = FullRankNormal(L, num_data=N).double()
    result = lvm.inference_gap(model, local, x, chunks=(3, 100), num_steps=100, seed=0)
    assert float((log_px - result.local_elbo).mean()) < 0.1


def test_a_model_that_learned_different_values_in_two_pairs():
    """Which parameters are meant is told by the pair, also for the guides that are made of it."""

    def model(x):
        noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def guide(name):
        def q(x):
            loc = pyro.param(name, torch.tensor(0.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc * x, 1.0))

        return q

    x = torch.linspace(-1, 1, 8)
    one, other = guide("one"), guide("other")
    lvm.fit(model, one, x, num_steps=3, seed=0)
    fitted = lvm.fit(model, other, 3 * x, num_steps=30, seed=0)
    result = lvm.inference_gap(model, other, x, num_steps=200, seed=0)
    exact = dist.Normal(0.0, (1 + fitted.params["noise"].detach() ** 2).sqrt()).log_prob(x)
    torch.testing.assert_close(result.local_elbo.float(), exact, rtol=0, atol=2e-3)


def test_the_table_and_the_picture():
    model, x, _, _ = linear()
    result = lvm.inference_gap(model, DiagonalNormal(L, weak_encoder(2 * L)), x, num_steps=20, seed=0)
    text = str(result)
    for words in ("approximation: the family", "amortization: the encoder", "20 steps", "counted as approximation"):
        assert words in text
    assert result.to_markdown().startswith("|")
    assert result._repr_html_().startswith("<table>")
    assert len(result.plot().axes) == 2


def test_a_reference_of_other_data_is_refused():
    pair = ORACLES["plain"](4)
    reference = lvm.evidence.quadrature(pair.model, pair.x[:2])
    with pytest.raises(ShapeError, match="reference: expected 4 values of log p\\(x\\), got 2"):
        lvm.inference_gap(pair.model, pair.guide, pair.x, reference=reference)


def test_seed_and_draws():
    model, x, _, _ = linear()
    guide = DiagonalNormal(L, weak_encoder(2 * L))
    one, two = (lvm.inference_gap(model, guide, x[:5], num_steps=10, num_particles=50, seed=3) for _ in range(2))
    assert torch.equal(one.local_elbo, two.local_elbo)
    with pytest.raises(ShapeError, match="num_draws: expected 2 or more"):
        lvm.inference_gap(model, guide, x, num_draws=1)
