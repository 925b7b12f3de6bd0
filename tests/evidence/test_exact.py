"""Enumeration and quadrature against brute force and closed forms, and the two proposals that need no guide."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_lvm import log_marginal, ops
from pyro_lvm.errors import PlateError, ShapeError, SupportError
from pyro_lvm.evidence import enumeration, prior, quadrature, uniform
from pyro_lvm.models import BinaryLatent
from pyro_lvm.tracing.probe import Plan

F64 = torch.float64


def bits(num_bits, seed=0, data_dim=6):
    """z in {0, 1}^d, x | z Bernoulli with linear logits; its data, and log p(x) by a double loop."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_bits, data_dim, generator=generator, dtype=F64)
    bias = torch.randn(data_dim, generator=generator, dtype=F64)
    logits = torch.randn(num_bits, generator=generator, dtype=F64)
    x = (torch.rand(5, data_dim, generator=generator) < 0.5).to(F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight + bias).to_event(1), obs=x)

    def truth(x):
        terms = []
        for z in itertools.product([0.0, 1.0], repeat=num_bits):
            z = torch.tensor(z, dtype=F64)
            log_prior = dist.Bernoulli(logits=logits).log_prob(z).sum()
            terms.append(log_prior + dist.Bernoulli(logits=z @ weight + bias).log_prob(x).sum(-1))
        return torch.stack(terms).logsumexp(0)

    return model, x, truth


@pytest.mark.parametrize("num_bits", [1, 4, 10])
@pytest.mark.parametrize("chunks", [None, (2, 3), (1, 1000)], ids=str)
def test_enumeration_is_the_double_loop(num_bits, chunks):
    model, x, truth = bits(num_bits)
    result = enumeration(model, x, chunks=chunks)
    torch.testing.assert_close(result.value, truth(x), atol=1e-10, rtol=0)
    assert set(result.status) == {"exact"}
    assert result.num_particles == 2**num_bits


def test_enumeration_of_vectors_of_several_kinds():
    """Two sites, one of categorical elements, one scalar that variable elimination takes; the model reshapes."""
    table = torch.randn(3, 3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(torch.ones(2, 3, dtype=F64)).to_event(1))
            b = pyro.sample("b", dist.Bernoulli(torch.full((1,), 0.3, dtype=F64)).to_event(1))
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.8], dtype=F64)))
            loc = table[a[..., 0].long(), a[..., 1].long(), b[..., 0].long()].sum(-1)
            pyro.sample("x", dist.Normal(loc + 2.0 * c, 1.0), obs=x)

    x = torch.linspace(-2, 2, 4, dtype=F64)
    terms = []
    for i, j, k, c in itertools.product(range(3), range(3), range(2), range(2)):
        log_prior = math.log(1 / 9) + math.log((0.7, 0.3)[k]) + math.log((0.2, 0.8)[c])
        terms.append(log_prior + dist.Normal(table[i, j, k].sum() + 2.0 * c, 1.0).log_prob(x))
    torch.testing.assert_close(enumeration(model, x).value, torch.stack(terms).logsumexp(0), atol=1e-10, rtol=0)


def test_enumeration_runs_a_model_that_reshapes_by_the_number_of_data():
    _, x, _ = bits(3)

    def reshaping(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5, dtype=F64)).to_event(1))
            loc = z.reshape(len(x), 3).sum(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:, 0])

    terms = [
        math.log(1 / 8) + dist.Normal(1.0 * sum(z), 1.0).log_prob(x[:, 0]) for z in itertools.product((0, 1), repeat=3)
    ]
    expected = torch.stack(terms).logsumexp(0)
    torch.testing.assert_close(enumeration(reshaping, x).value, expected, atol=1e-7, rtol=0)


def test_enumeration_of_a_model_that_is_tied_to_its_data():
    noise = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5], dtype=F64)  # one for each datum, from outside

    def tied(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5, dtype=F64)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), noise), obs=x)

    y = torch.linspace(-1, 4, 5, dtype=F64)
    terms = [
        math.log(1 / 8) + dist.Normal(1.0 * sum(z), noise).log_prob(y) for z in itertools.product((0, 1), repeat=3)
    ]
    torch.testing.assert_close(enumeration(tied, y).value, torch.stack(terms).logsumexp(0), atol=1e-10, rtol=0)


def test_too_many_terms_are_refused_with_their_number_and_time():
    model, x, _ = bits(12)
    with pytest.raises(SupportError, match=r"4,096, which would take about \d+ s.*max_terms=4096"):
        enumeration(model, x, max_terms=4000)


def test_enumeration_of_a_continuous_latent_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(SupportError, match="'z': expected a finite support, got Normal"):
        enumeration(model, torch.zeros(3))


@pytest.mark.slow
def test_sixty_five_thousand_terms_of_any_model():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((16,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)

    x = (torch.rand(100, 64, generator=generator) < 0.5).float()
    result = enumeration(model, x)
    assert result.num_particles == 2**16
    some = torch.tensor(list(itertools.product([0.0, 1.0], repeat=16)))
    terms = [dist.Bernoulli(logits=some @ weight).log_prob(x[i]).sum(-1).double().logsumexp(0) for i in range(3)]
    # Both in float32: 64 terms of about 10 nats round by some 64 x 10 x 6e-8 = 4e-5; ten times that is allowed.
    torch.testing.assert_close(result.value[:3], torch.stack(terms) - 16 * math.log(2), atol=4e-4, rtol=0)


# --- quadrature -------------------------------------------------------------------------------------------------------


def linear_gaussian(latent_dim, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(4, latent_dim, generator=generator, dtype=F64)
    mean = torch.randn(4, generator=generator, dtype=F64)
    variance = torch.rand(4, generator=generator, dtype=F64) + 0.3

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent_dim, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T + mean, variance.sqrt()).to_event(1), obs=x)

    x = 3.0 * torch.randn(6, 4, generator=generator, dtype=F64)
    return model, x, ops.linear_gaussian_log_marginal(x, weight, mean, variance)


@pytest.mark.parametrize("latent_dim", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_quadrature_is_the_closed_form(latent_dim, scale):
    """A scale of 30 makes the posterior a hundred times narrower than the prior, and far from its center."""
    model, x, truth = linear_gaussian(latent_dim, scale)
    result = quadrature(model, x)
    torch.testing.assert_close(result.value, truth, atol=1e-8, rtol=0)
    assert set(result.status) == {"exact"}
    assert bool((result.stderr < 1e-6).all())


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_quadrature_follows_the_posterior_to_data_far_away(latent_dim):
    """While the box moves there, its size may stay: z ~ N(0, I), x | z ~ N(z, s^2 I), so that x ~ N(0, (1 + s^2) I)."""
    scale = torch.tensor(0.7, dtype=torch.float64)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    x = torch.tensor([0.0, 5.0, -40.0, 100.0], dtype=torch.float64)[:, None].expand(4, latent_dim)
    found = quadrature(model, x)
    expected = dist.Normal(x.new_zeros(()), (1 + scale**2).sqrt()).log_prob(x).sum(-1)
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-5)
    assert set(found.status) == {"exact"}


@pytest.mark.parametrize("bounded", [False, True])
def test_quadrature_over_a_mixture_of_torch_s_own(bounded):
    def model(x: torch.Tensor) -> None:
        probs, loc = dist.Categorical(x.new_ones(2)), x.new_tensor([1.0, 3.0])
        parts = dist.Gamma(loc, 1.0) if bounded else dist.Normal(loc, 0.5)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(probs, parts))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.5, 2.0], dtype=torch.float64)
    if bounded and hasattr(torch.distributions.mixture_same_family, "MixtureSameFamilyConstraint"):
        with pytest.raises(SupportError, match="'z': expected a support with a bijection"):
            quadrature(model, x)
    elif not bounded:
        expected = dist.Normal(x.new_tensor([1.0, 3.0]), 1.25**0.5).log_prob(x[:, None]).exp().mean(1).log()
        torch.testing.assert_close(quadrature(model, x).value, expected, rtol=0, atol=1e-7)


def test_quadrature_of_the_lecture_s_two_modes():
    """z ~ N(0, 4^2), x | z ~ N(z + 0.85 exp(-z / 2), 1), x = 2.5: log p(x) by an independent fine sum."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 4.0))
            pyro.sample("x", dist.Normal(z + 0.85 * (-z / 2).exp(), 1.0), obs=x)

    x = torch.tensor([2.5], dtype=F64)
    z = torch.linspace(-40, 40, 400_001, dtype=F64)
    terms = dist.Normal(0.0 * z, 4.0).log_prob(z) + dist.Normal(z + 0.85 * (-z / 2).exp(), 1.0).log_prob(x)
    expected = terms.logsumexp(0) + math.log(80 / 400_000)
    result = quadrature(model, x)
    assert float(result.value[0] - expected) == pytest.approx(0.0, abs=1e-8)
    assert result.mean == pytest.approx(-1.988335, abs=1e-6)


@pytest.mark.parametrize(
    ("latent", "likelihood", "x", "expected"),
    [
        # Gamma-Poisson: negative binomial. Beta-Bernoulli: mean 2/5.
        (
            dist.Gamma(3.0, 2.0),
            dist.Poisson,
            4.0,
            dist.NegativeBinomial(3.0, torch.tensor(1 / 3)).log_prob(torch.tensor(4.0)),
        ),
        (dist.Beta(2.0, 3.0), dist.Bernoulli, 1.0, torch.tensor(0.4).log()),
    ],
    ids=["gamma", "beta"],
)
def test_quadrature_over_a_constrained_latent(latent, likelihood, x, expected):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", latent)
            pyro.sample("x", likelihood(z), obs=x)

    result = quadrature(model, torch.tensor([x]))
    assert result.mean == pytest.approx(float(expected), abs=1e-5)


def test_quadrature_beside_an_enumerated_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.25, 0.75], dtype=F64)))
            z = pyro.sample("z", dist.Normal(6.0 * k.double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([-1.0, 3.0, 7.0], dtype=F64)
    parts = [math.log(w) + dist.Normal(0.0 * x + m, math.sqrt(2.0)).log_prob(x) for w, m in ((0.25, 0.0), (0.75, 6.0))]
    torch.testing.assert_close(quadrature(model, x).value, torch.stack(parts).logsumexp(0), atol=1e-8, rtol=0)


def test_quadrature_says_when_it_is_too_coarse():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(x.new_zeros(()), 1.0))  # a kink: the rule converges slowly
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    result = quadrature(model, torch.tensor([0.3], dtype=F64), num_nodes=9)
    assert result.status[0] == "unreliable"
    assert result.stderr[0] > 1e-3


def test_four_dimensions_are_refused():
    model, x, _ = linear_gaussian(4)
    with pytest.raises(SupportError, match="one to three continuous dimensions a datum, got 4"):
        quadrature(model, x)


def test_a_global_latent_is_one_joint_integral():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    with pytest.raises(PlateError, match="'loc'"):
        quadrature(model, x)
    truth = dist.MultivariateNormal(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64) + 1).log_prob(x)
    torch.testing.assert_close(quadrature(model, x, data_plate=None).value, truth[None], atol=1e-8, rtol=0)


# --- proposals that need no guide -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")
@pytest.mark.statistical
@pytest.mark.parametrize("estimator", [prior, uniform])
def test_small_supports_are_estimated(estimator):
    model, x, truth = bits(4)
    result = estimator(model, x, num_particles=5000, seed=0)
    assert bool(((result.value - truth(x)).abs() <= 5 * result.stderr).all())


@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")
@pytest.mark.statistical
def test_the_prior_as_proposal_of_a_continuous_latent():
    model, x, truth = linear_gaussian(1, scale=0.3)
    result = prior(model, x, num_particles=5000, seed=0)
    assert bool(((result.value - truth).abs() <= 5 * result.stderr).all())


def test_uniform_needs_finite_supports():
    model, x, _ = linear_gaussian(1)
    with pytest.raises(SupportError, match="'z': expected a finite support, got Independent|got Normal"):
        uniform(model, x)


@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")
@pytest.mark.slow
@pytest.mark.statistical
def test_uniform_fails_as_the_number_of_bits_grows_and_a_guide_does_not():
    """The lecture's first try and its second: each bit is seen in its own pixel through little noise."""
    errors = []
    for num_bits in (4, 10, 16):

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(torch.full((num_bits,), 0.5, dtype=F64)).to_event(1))  # noqa: B023
                pyro.sample("x", dist.Normal(z, 0.2).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                logits = ((x**2 - (x - 1) ** 2) / (2 * 0.2**2)).clamp(-4, 4)  # the posterior's, held back
                pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

        x = (torch.rand(20, num_bits, generator=torch.Generator().manual_seed(0)) < 0.5).to(F64)
        exact = enumeration(model, x)
        naive = uniform(model, x, num_particles=100_000, seed=0)
        guided = log_marginal(model, guide, x, num_particles=2000, seed=0)
        errors.append(float((naive.value - exact.value).abs().mean()))
        assert bool(((guided.value - exact.value).abs() <= 5 * guided.stderr).all())
    assert errors[0] < errors[1] < errors[2]
    assert errors[2] > 1.0


def test_more_bits_than_an_index_can_number_are_refused():
    with pytest.raises(SupportError, match=r"expected fewer than 2\^62 joint values, got about 2\^64"):
        enumeration(BinaryLatent(64, 3), torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"got 2\^1100, about"):
        BinaryLatent(1100, 3).log_prob(torch.ones(2, 3))


# --- one result, and a part of them -----------------------------------------------------------------------------------


def noisy(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared(x):
    z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared_bit(x):
    z = pyro.sample("z", dist.Bernoulli(x.new_full((1,), 0.5)).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


@pytest.mark.parametrize(("estimator", "model"), [(quadrature, shared), (enumeration, shared_bit)])
def test_a_joint_result_says_of_how_many_data(estimator, model):
    assert "one joint result of 5 data" in repr(estimator(model, torch.zeros(5), data_plate=None))


@pytest.mark.parametrize(("estimator", "model"), [(quadrature, noisy), (enumeration, bits(3)[0])])
def test_ctrl_c_keeps_the_data_that_are_finished(estimator, model, monkeypatch):
    monkeypatch.setattr(Plan, "chunk_sizes", lambda *_: (2, 1000))
    x = torch.eye(6, dtype=F64) if estimator is enumeration else torch.linspace(-1, 1, 6, dtype=F64)

    def interrupted_at(row):
        def program(batch):
            if any(each.equal(x[row]) for each in batch):
                raise KeyboardInterrupt
            model(batch)

        return program

    whole, found = estimator(model, x), estimator(interrupted_at(5), x)
    assert whole.provenance["finished"]
    assert found.value.equal(whole.value[:4])
    assert "4 of 6 data (interrupted)" in repr(found)
    with pytest.raises(KeyboardInterrupt):
        estimator(interrupted_at(0), x)
