"""Quadrature where it is hard or refused: mass at the edge of a support, missing numbers, supports that move."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_lvm.errors import SiteError, SupportError
from pyro_lvm.evidence import quadrature

F32, F64 = torch.float32, torch.float64


def pair(prior, likelihood):
    """z ~ prior, x | z ~ likelihood(z), for each datum."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", likelihood(z), obs=x)

    return model


def covered(result, truth):
    """The error in nats, which is stated."""
    error = (result.value - truth.double()).abs()
    assert bool((error <= result.stderr).all()), (error, result.stderr)
    return error


# --- mass at the edge of the support ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("tolerance", [1e-6, 1e-3])
@pytest.mark.parametrize("shape", [0.02, 0.1, 0.3, 1.0, 4.0])
def test_beta_binomial(shape, tolerance, dtype):
    """log p(x) = log C(5, x) + log B(x + a, 5 - x + a) - log B(a, a)."""
    x = torch.arange(6.0, dtype=dtype)
    a = torch.tensor(shape, dtype=dtype)
    model = pair(dist.Beta(a, a), lambda z: dist.Binomial(5, z))
    truth = dist.BetaBinomial(a.double(), a.double(), 5).log_prob(x.double())
    covered(quadrature(model, x, tolerance=tolerance), truth)


@pytest.mark.parametrize(("shape", "allowed"), [(0.1, 1e-5), (0.3, 1e-7), (1.0, 1e-10)])
def test_mass_near_one_is_counted(shape, allowed):
    """Half of it lies where 1 - z is below the spacing of floating-point numbers, or would be found to a few digits."""
    x = torch.tensor([0.0, 5.0], dtype=F64)
    a = torch.tensor(shape, dtype=F64)
    result = quadrature(pair(dist.Beta(a, a), lambda z: dist.Binomial(5, z)), x)
    assert bool((covered(result, dist.BetaBinomial(a, a, 5).log_prob(x)) <= allowed).all())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [0.05, 0.5, 3.0])
def test_gamma_poisson(shape, dtype):
    """Negative binomial: log p(x) = log Gamma(a + x) - log Gamma(a) - log x! - (a + x) log 2 with rate 1."""
    x = torch.tensor([0.0, 1.0, 7.0], dtype=dtype)
    a, y = torch.tensor(shape, dtype=dtype), x.double()
    truth = torch.lgamma(a + y) - torch.lgamma(a.double()) - torch.lgamma(y + 1) - (a + y) * math.log(2)
    result = quadrature(pair(dist.Gamma(a, 1.0), dist.Poisson), x)
    assert bool((covered(result, truth) <= {0.05: 1e-3}.get(shape, 1e-5)).all())


@pytest.mark.parametrize("dtype", [F32, F64])
def test_dirichlet_multinomial(dtype):
    """log p(x) = log 4! - sum log x_i! + log Gamma(A) - log Gamma(A + 4) + sum log Gamma(a_i + x_i) / Gamma(a_i)."""
    a = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    x = torch.tensor([[0.0, 0.0, 4.0], [4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [1.0, 2.0, 1.0]], dtype=dtype)
    model = pair(dist.Dirichlet(a), lambda z: dist.Multinomial(4, z, validate_args=False))
    truth = dist.DirichletMultinomial(a.double(), 4).log_prob(x.double())
    assert bool((covered(quadrature(model, x), truth) <= (1e-4 if dtype == F32 else 1e-6)).all())


@pytest.mark.parametrize("low", [10.0, 1e3, 1e6])
def test_an_interval_far_from_zero(low):
    """z ~ Uniform(a, a + 1), x | z ~ N(z, 10) at a + 1/4 in float32, which has but 16 such z at 1e6."""
    x = torch.tensor([low + 0.25], dtype=F32)
    model = pair(dist.Uniform(torch.tensor(low), low + 1.0), lambda z: dist.Normal(z, 10.0))
    z = (torch.arange(10_000, dtype=F64) + 0.5) / 10_000
    truth = dist.Normal(z, 10.0).log_prob(torch.tensor(0.25, dtype=F64)).exp().mean().log()[None]
    result = quadrature(model, x)
    assert bool((covered(result, truth) < (0.1 if low == 1e6 else 1e-3)).all())
    assert result.status[0] == "unreliable"


def test_the_rounding_of_float32_is_stated():
    """z ~ N(0, 1), x_i | z ~ N(z, 1), 50 of them: x ~ N(0, I + 1 1^T)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand((*z.shape, 50)).to_event(1), obs=x)

    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    truth = dist.MultivariateNormal(torch.zeros(50, dtype=F64), torch.eye(50, dtype=F64) + 1).log_prob(x.double())
    result = quadrature(model, x)
    covered(result, truth)
    assert bool((result.stderr < 1e-3).all())
    assert set(result.status) == {"exact"}
    assert bool((quadrature(model, x.double()).stderr < 1e-10).all())


# --- what is not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_a_datum_that_is_not_a_number_is_the_only_one_lost(latent_dim):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.linspace(-1, 1, 5, dtype=F64)[:, None].repeat(1, latent_dim)
    x[2, 0] = math.nan
    result = quadrature(model, x)
    assert list(result.status) == ["exact", "exact", "nonfinite", "exact", "exact"]
    kept = [0, 1, 3, 4]
    truth = dist.Normal(0.0, math.sqrt(2.0), validate_args=False).log_prob(x).sum(-1)
    torch.testing.assert_close(result.value[kept], truth[kept], rtol=0, atol=1e-6)
    assert not bool(result.value[2].isfinite())


def test_an_infinite_density_is_not_finite():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("infinite", torch.where(z.abs() < 1.0, torch.inf, 0.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert list(quadrature(model, torch.zeros(2, dtype=F64)).status) == ["nonfinite"] * 2


def test_a_periodic_density_on_the_real_line_is_never_exact():
    model = pair(dist.VonMises(torch.zeros((), dtype=F64), 1.0), lambda z: dist.Normal(z.cos(), 1.0))
    result = quadrature(model, torch.tensor([0.3, 1.0], dtype=F64))
    finite = result.value.isfinite().numpy()
    assert list(result.status) == list(np.where(finite, "unreliable", "nonfinite"))


def test_data_without_support_keep_their_status():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("nowhere", torch.where(x > 0, -torch.inf, 0.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert list(quadrature(model, torch.tensor([-1.0, 1.0], dtype=F64)).status) == ["exact", "no_support"]


# --- supports that move, and missing values ---------------------------------------------------------------------------


def test_a_support_that_moves_with_another_latent_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Gamma(x.new_tensor(2.0), 1.0))
            u = pyro.sample("u", dist.Uniform(x.new_zeros(()), s))
            pyro.sample("x", dist.Normal(u, 0.3), obs=x)

    with pytest.raises(SupportError, match=r"'u': expected a support that depends on x alone.*fixed support and scale"):
        quadrature(model, torch.tensor([3.0], dtype=F64))


def test_the_cure_of_a_support_that_moves():
    """u = s v with v ~ Uniform(0, 1), against p(x) = int Gamma(s; 2, 1) (Phi((s-x)/.3) - Phi(-x/.3)) / s ds."""

    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Gamma(x.new_tensor(2.0), 1.0))
            v = pyro.sample("v", dist.Uniform(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(s * v, 0.3), obs=x)

    x, s = torch.tensor([3.0], dtype=F64), torch.linspace(1e-6, 60.0, 400_001, dtype=F64)
    inside = (torch.special.ndtr((s - x) / 0.3) - torch.special.ndtr(-x / 0.3)) / s
    truth = ((dist.Gamma(s.new_tensor(2.0), 1.0).log_prob(s).exp() * inside).sum() * (s[1] - s[0])).log()
    assert float(truth) == pytest.approx(-2.955, abs=1e-3)
    result = quadrature(model, x)
    assert abs(float(result.value[0] - truth)) <= max(float(result.stderr[0]), 1e-6)


def test_a_support_that_moves_with_an_enumerated_latent_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5)))
            u = pyro.sample("u", dist.Uniform(x.new_zeros(()), 1.0 + k))
            pyro.sample("x", dist.Normal(u, 0.3), obs=x)

    with pytest.raises(SupportError, match="'u': expected a support that depends on x alone"):
        quadrature(model, torch.tensor([0.3], dtype=F64))


def test_a_support_that_moves_with_the_data_is_exact():
    """z ~ Uniform(x_0, x_0 + 2), x_1 | z ~ N(z, 1)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x[:, 0], x[:, 0] + 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 1])

    x = torch.tensor([[0.0, 1.0], [5.0, 5.5], [-3.0, 0.0]], dtype=F64)
    upper, lower = x[:, 0] + 2.0 - x[:, 1], x[:, 0] - x[:, 1]
    truth = ((torch.special.ndtr(upper) - torch.special.ndtr(lower)) / 2).log()
    result = quadrature(model, x)
    torch.testing.assert_close(result.value, truth, rtol=0, atol=1e-7)
    assert set(result.status) == {"exact"}


@pytest.mark.parametrize("likelihood", [lambda z: dist.Normal(z, 1.0), lambda z: dist.Poisson(z.exp())])
def test_missing_values_cancel(likelihood):
    """log p of the values that are there: a missing one adds nothing."""
    mask = torch.tensor([True, False, True, False])

    def missing(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", likelihood(z), obs=x, obs_mask=mask)

    x = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=F64)
    result = quadrature(missing, x, mask)
    model = pair(dist.Normal(torch.zeros((), dtype=F64), 1.0), likelihood)
    truth = torch.where(mask, quadrature(model, x).value, 0.0)
    torch.testing.assert_close(result.value, truth, rtol=0, atol=1e-8)
    assert set(result.status) == {"exact"}


@pytest.mark.parametrize(
    "latent", [dist.Normal(torch.zeros((), dtype=F64), 1.0), dist.Bernoulli(torch.tensor(0.5, dtype=F64))]
)
def test_a_missing_value_that_something_depends_on_is_refused(latent):
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            y = pyro.sample("y", latent, obs=x.new_ones(len(x)), obs_mask=mask)
            pyro.sample("x", dist.Normal(z + 3.0 * y, 1.0), obs=x)

    with pytest.raises(SiteError, match=r"'y_unobserved'.*nothing depends on.*log_marginal"):
        quadrature(model, torch.zeros(4, dtype=F64), torch.tensor([True, False, True, False]))


def test_a_latent_without_density_is_refused():
    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(SiteError, match=r"'z'.*a density for every element, got 1 of 2 masked"):
        quadrature(model, torch.tensor([-1.0, 1.0], dtype=F64))
