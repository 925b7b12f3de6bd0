"""Bounds from both sides: equal where the guide is exact, around the truth elsewhere; models that make no data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_lvm.errors import SiteError, SupportError
from pyro_lvm.evidence import quadrature, sandwich
from pyro_lvm.models import DeepGaussian, LinearGaussian
from pyro_lvm.nn import MLP

F64 = torch.float64


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def inside(record, truth):
    low, high = record.interval.T
    return (low <= truth) & (truth <= high)


def narrow_guide(model, factor):
    def guide(x):
        posterior = model.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(posterior.loc, factor * posterior.variance.sqrt()).to_event(1))

    return guide


def test_an_exact_guide_has_bounds_that_meet():
    model = LinearGaussian(3, 6).double()
    record = sandwich(model, model.posterior_guide, torch.zeros(4, 6), num_particles=3, num_steps=5, seed=0)
    truth = model.log_prob(record.x).detach()
    torch.testing.assert_close(record.lower, truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(record.upper, truth, rtol=0, atol=1e-10)
    assert inside(record, truth).all()
    assert ((record.width > 0) & (record.width < 1e-8)).all()


def test_bounds_allow_for_the_rounding_of_single_precision():
    """Sums are float64, densities are not: of 784 pixels each is rounded by some 1e-5 nats."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = LinearGaussian(2, 784)
    record = sandwich(model, model.posterior_guide, torch.zeros(20, 784), num_particles=3, num_steps=5, seed=0)
    truth = model.double().log_prob(record.x.double()).detach()
    assert float((record.lower - truth).abs().max()) > 1e-6  # there is something to allow for
    assert bool(((record.interval[:, 0] <= truth) & (truth <= record.interval[:, 1])).all())


def test_what_the_record_says():
    model = LinearGaussian(2, 4).double()
    record = sandwich(model, narrow_guide(model, 0.5), torch.zeros(3, 4), num_steps=30, chunks=(2, 40), seed=0)
    assert record.x.shape == (3, 4)
    assert record.x.std() > 0.1
    assert record.lower.shape == record.upper_stderr.shape == (3,)
    assert record.interval.shape == (3, 2)
    assert record.width.equal(record.interval[:, 1] - record.interval[:, 0])
    assert (record.interval[:, 0] < record.lower).all()
    assert (record.interval[:, 1] > record.upper).all()
    assert record.num_particles == 100
    assert record.provenance["annealing"]["start"] == "guide"
    assert record.provenance["annealing"]["num_steps"] == 30
    lines = repr(record).splitlines()
    assert len(lines) == 5
    assert "nothing about real data" in lines[-1]
    again = sandwich(model, narrow_guide(model, 0.5), torch.ones(3, 4), num_steps=30, chunks=(2, 40), seed=0)
    assert again.x.equal(record.x)  # the values of x do not matter
    assert again.upper.equal(record.upper)


def test_bounds_that_cross_are_told():
    model = LinearGaussian(1, 2).double()
    record = sandwich(model, None, torch.zeros(2, 2), num_steps=20, seed=0)
    crossed = type(record)(record.x, record.lower + 9, record.lower_stderr, record.upper, record.upper_stderr, 100)
    assert "cross for 100.0%" in crossed.verdict


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("start", ["guide", "prior"])
def test_inverse_weights_are_unbiased_with_few_temperatures(start):
    """E[p(x) / w] = 1 over data and chains: 3,000 data with two chains each way, 8 temperatures, 5 errors."""
    model = LinearGaussian(2, 3).double()
    guide = narrow_guide(model, 1.3) if start == "guide" else None
    record = sandwich(model, guide, torch.zeros(3000, 3), num_particles=2, num_steps=8, num_leapfrog=1, seed=0)
    truth = model.log_prob(record.x).detach()
    for ratio in ((record.lower - truth).exp(), (truth - record.upper).exp()):
        assert (ratio.mean() - 1).abs() < 5 * ratio.std() / 3000**0.5
        assert ratio.std() / 3000**0.5 < 0.05


@pytest.mark.statistical
def test_local_plates_and_classes():
    """Three values of a class of each datum, summed out; the truth is by quadrature over the rest."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(z + 2.0 * c, 0.5), obs=x)

    record = sandwich(model, None, torch.zeros(20), num_steps=100, seed=0)
    assert inside(record, quadrature(model, record.x).value).all()


@pytest.mark.statistical
def test_a_joint_result():
    model = LinearGaussian(1, 2).double()
    record = sandwich(model, None, torch.zeros(3, 2), data_plate=None, num_steps=60, seed=0)
    assert len(record) == 1
    assert inside(record, model.log_prob(record.x).detach().sum()).all()


def checked(record, truth):
    """At least 99 % inside, and all narrower than a nat."""
    assert inside(record, truth).double().mean() >= 0.99
    assert (record.width < 1.0).all()


@pytest.mark.slow
@pytest.mark.statistical
def test_500_data_of_a_linear_gaussian_model():
    model = LinearGaussian(5, 10).double()
    record = sandwich(model, narrow_guide(model, 0.5), torch.zeros(500, 10), num_steps=100, seed=0)
    checked(record, model.log_prob(record.x).detach())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.statistical
def test_500_data_of_a_deep_gaussian_model():
    model = DeepGaussian(MLP(2, [16], 24), 2, "normal").double()
    record = sandwich(model, None, torch.zeros(500, 12), num_steps=100, seed=0)
    checked(record, quadrature(model, record.x).value)


# ------------------------------------------------------------------------------------------- models that make no data


def refused(model, x, match, error=SiteError):
    with pytest.raises(error, match=match):
        sandwich(model, None, x, num_particles=5, num_steps=2)


def latent(x):
    return pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


def test_a_model_that_observes_something_else():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(latent(x), 1.0), obs=x.log())

    refused(model, torch.rand(3), "site 'x': expected x or another argument as obs=, got other values")


def test_a_model_that_observes_x_in_another_shape():
    def model(x):
        with pyro.plate("data", len(x)):
            z = latent(x)
            pyro.sample("x", dist.Normal(z[..., None] + torch.zeros(4), 1.0).to_event(1), obs=x.flatten(1))

    record = sandwich(model, None, torch.zeros(20, 2, 2).double(), seed=0)
    assert record.x.shape == (20, 2, 2)
    covariance = torch.eye(4).double() + 1  # of z in every pixel, and the noise of each
    checked(record, dist.MultivariateNormal(torch.zeros(4).double(), covariance).log_prob(record.x.flatten(1)))


def test_a_model_that_observes_x_twice():
    def model(x):
        with pyro.plate("data", len(x)):
            z = latent(x)
            pyro.sample("a", dist.Normal(z, 1.0), obs=x)
            pyro.sample("b", dist.Normal(z, 1.0), obs=x)

    refused(
        model, torch.rand(3), r"model: expected one site for each argument that is observed, got sites \['a', 'b'\]"
    )


def test_a_model_of_two_observations():
    def model(x):
        with pyro.plate("data", len(x)):
            z = latent(x)
            pyro.sample("a", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.sample("b", dist.Normal(z, 1.0), obs=x[:, 1])

    refused(model, torch.rand(3, 2), "site 'a': expected x or another argument as obs=, got other values")


def test_a_model_with_a_factor():
    def model(x):
        with pyro.plate("data", len(x)):
            z = latent(x)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("f", -z.abs())

    refused(model, torch.rand(3), "site 'f': expected a distribution of the data, got a factor")


def test_a_model_of_missing_values():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(latent(x), 1.0), obs=x, obs_mask=x > 0.5)

    refused(model, torch.tensor([0.2, 0.8, 0.9]), "expected data without missing values, got an obs_mask")


def test_a_likelihood_that_reads_x():
    def model(x):
        with pyro.plate("data", len(x)):
            z = latent(x)
            shifted = torch.cat([torch.zeros(len(x), 1), x[:, :-1]], 1)
            pyro.sample("x", dist.Normal(z[..., None] + shifted, 1.0).to_event(1), obs=x)

    refused(model, torch.rand(3, 2), "site 'x': expected a density that x does not enter")


def test_a_discrete_latent_that_the_guide_draws():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(c.sum(-1), 1.0), obs=x)

    refused(model, torch.rand(3), "latent site 'c': expected a continuous latent", SupportError)


@pytest.mark.statistical
def test_masked_values_of_x_have_no_part():
    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = latent(x)
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    seen = torch.tensor([True, False, True])
    record = sandwich(model, None, torch.zeros(3), seen, num_steps=50, seed=0)
    truth = dist.Normal(0.0, 2**0.5).log_prob(record.x) * seen
    assert inside(record, truth).all()
