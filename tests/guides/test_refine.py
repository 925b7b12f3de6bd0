"""`refine`: any guide with parameters of its own for each datum."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_lvm as lvm
from pyro_lvm.errors import DataTypeError, ShapeError, SiteError
from pyro_lvm.guides import refine
from pyro_lvm.guides.free import flowing, offset
from pyro_lvm.guides.leaves import Leaves
from pyro_lvm.models import LinearGaussian
from tests.references import ORACLES, normal_model

N, L = 5, 3


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def positive(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.5


def covariance():
    factor = randn(N, L, L)
    return factor @ factor.mT + 0.1 * torch.eye(L)


def distributions():
    torch.manual_seed(0)
    half = torch.tensor(0.5, dtype=torch.float64)
    components = dist.Normal(randn(N, 2, L), positive(N, 2, L)).to_event(1)
    return {
        "Normal": dist.Normal(randn(N, L), positive(N, L)).to_event(1),
        "Normal, one scale": dist.Normal(randn(N), 1.0),
        "Normal, expanded": dist.Normal(randn(1)[0], 1.0).expand([N]),
        "Normal, masked": dist.Normal(randn(N), 1.0).mask(torch.arange(N) > 2),
        "triangle": dist.MultivariateNormal(randn(N, L), scale_tril=torch.linalg.cholesky(covariance())),
        "covariance": dist.MultivariateNormal(randn(N, L), covariance()),
        "low rank": dist.LowRankMultivariateNormal(randn(N, L), randn(N, L, 2), positive(N, L)),
        "Student": dist.StudentT(positive(N) + 2, randn(N), positive(N)),
        "Laplace": dist.Laplace(randn(N), positive(N)),
        "Gamma": dist.Gamma(positive(N), positive(N)),
        "Beta": dist.Beta(positive(N), positive(N)),
        "LogNormal": dist.LogNormal(randn(N), positive(N)),
        "Dirichlet": dist.Dirichlet(positive(N, L)),
        "Weibull": dist.Weibull(positive(N), positive(N)),
        "Gumbel": dist.Gumbel(randn(N), positive(N)),
        "LogisticNormal": dist.LogisticNormal(randn(N, L), positive(N, L)),
        "relaxed": dist.RelaxedOneHotCategorical(half, logits=randn(N, L)),
        "transformed": dist.TransformedDistribution(
            dist.Normal(randn(N), positive(N)), [torch.distributions.SigmoidTransform()]
        ),
        "mixture": dist.MixtureSameFamily(dist.Categorical(logits=randn(N, 2)), components),
        "Bernoulli": dist.Bernoulli(positive(N) / 2),
        "Categorical": dist.Categorical(logits=randn(N, L)),
        "Poisson": dist.Poisson(positive(N)),
    }


@pytest.mark.parametrize("name", distributions())
def test_a_distribution_with_offsets_of_zero_is_itself(name):
    fn, leaves = distributions()[name], Leaves(-1)
    new, value = offset(leaves, "z", fn), fn.sample()
    assert not leaves.fixed
    assert all(leaf.shape[0] == N for leaf in leaves.tensors.values())
    torch.testing.assert_close(new.log_prob(value), fn.log_prob(value), rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(new.log_prob(value).sum(), list(leaves.tensors.values()))
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert any(bool((g != 0).any()) for g in gradients)


@pytest.mark.parametrize("name", distributions())
def test_a_flow_is_at_first_the_identity_and_then_a_density(name):
    fn, leaves = distributions()[name], Leaves(-1)
    new = flowing(leaves, "z", fn)
    if name in ("mixture", "Bernoulli", "Categorical", "Poisson"):
        assert "no continuous draws" in leaves.fixed["z"]
        assert new is fn
        return
    value = fn.sample()
    torch.testing.assert_close(new.log_prob(value), fn.log_prob(value), rtol=1e-9, atol=1e-9)
    for leaf in leaves.tensors.values():
        leaf.data += 0.1 * torch.randn_like(leaf)
    leaves.complete = True
    moved = flowing(leaves, "z", fn)
    z = moved.rsample((2,))
    alone = moved.log_prob(z[0])  # many draws at once or one
    torch.testing.assert_close(moved.log_prob(z)[0], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_determinant_and_inverse_of_the_flow(size):
    torch.manual_seed(size)
    leaves, base = Leaves(-1), dist.Normal(randn(2, size), positive(2, size)).to_event(1)
    flowing(leaves, "z", base)
    for leaf in leaves.tensors.values():
        leaf.data += 0.3 * torch.randn_like(leaf)
    leaves.complete = True
    flow, z = torch.distributions.ComposeTransform(flowing(leaves, "z", base).transforms), base.sample()
    torch.testing.assert_close(flow.inv(flow(z)), z, rtol=0, atol=1e-10)
    whole = torch.autograd.functional.jacobian(flow, z)  # (2, size, 2, size)
    expected = torch.stack([whole[n, :, n].slogdet()[1] for n in range(2)])
    torch.testing.assert_close(flow.log_abs_det_jacobian(z, flow(z)), expected, rtol=0, atol=1e-10)
    assert float(whole[0, :, 1].abs().max()) == 0  # data do not interact


@pytest.mark.parametrize("fn", [dist.Uniform(randn(N), randn(N) + 9), dist.FoldedDistribution(dist.Normal(0.0, 1.0))])
def test_what_cannot_be_freed_is_named(fn):
    leaves = Leaves(-1)
    assert offset(leaves, "z", fn) is fn
    assert list(leaves.fixed) == ["z"]
    assert not leaves.tensors


@pytest.mark.parametrize("name", ORACLES)
def test_the_exact_posterior_is_left_where_it_is(name):
    """Gradient without variance, zero: the log-weights stay equal, whatever the shape of the program."""
    pair = ORACLES[name](5)
    before = pyro.get_param_store().get_state()["params"].keys()
    result = refine(pair.model, pair.guide, pair.x, *pair.args, num_steps=2, seed=0, **pair.options)
    weights = lvm.log_weights(pair.model, result.guide, pair.x, *pair.args, num_particles=3, seed=1, **pair.options)
    torch.testing.assert_close(weights, pair.log_px.expand(3, -1), rtol=0, atol=1e-5)
    assert result.converged.all()
    assert pyro.get_param_store().get_state()["params"].keys() == before


def two_sites(x):
    """q(z2 | z1, x) of a chain, with a wrong slope and one scale for all data."""
    with pyro.plate("data", len(x)):
        first = pyro.sample("z1", dist.Normal(0.1 * x, 1.0))
        pyro.sample("z2", dist.Normal(0.2 * first, 1.0))


def chain(x):
    with pyro.plate("data", len(x)):
        first = pyro.sample("z1", dist.Normal(0.0, 1.0))
        second = pyro.sample("z2", dist.Normal(first, 0.7))
        pyro.sample("x", dist.Normal(second, 1.0), obs=x)


def test_dependences_between_sites_stay():
    """With q(z2 | z1) = N(a z1 + b, s^2), a = 0.2, the gap is a minimum over b, s and q(z1) alone.

    Posterior precision of (z1, z2): [[1 + g, -g], [-g, 1 + g]], g = 1 / 0.49. For z1 = m1 + s1 e, z2 = a z1 + ... the
    expected log-density is quadratic, and so KL = (tr(P S) - 2 - log det(P S)) / 2 with S from a, s1 and s2, where the
    best s2^2 = 1 / (1 + g) and s1^2 = 1 / (1 + g - 2 a g + a^2 (1 + g)).
    """
    x, g, a = torch.tensor([2.0, -1.0], dtype=torch.float64), 1 / 0.49, 0.2
    result = refine(chain, two_sites, x, seed=0)
    assert result.free == ("z1.loc", "z1.scale", "z2.loc", "z2.scale")
    conditional = torch.tensor(1 + g - 2 * a * g + a**2 * (1 + g), dtype=torch.float64)
    determinant = (1 + g) ** 2 - g**2
    expected = 0.5 * torch.log(conditional * (1 + g) / determinant)
    value = dist.Normal(0.0, torch.tensor(1 + 0.49 + 1.0, dtype=torch.float64).sqrt()).log_prob(x)
    elbo = lvm.elbo(chain, result.guide, x, num_particles=20_000, seed=1)
    torch.testing.assert_close(value - elbo, expected.expand(2), rtol=0, atol=0.01)


def test_discrete_latents_by_scores():
    """Three classes for each datum, exact by enumeration: the gap goes to zero without a gradient through draws."""
    means = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.full((3,), 1 / 3, dtype=torch.float64)))
            pyro.sample("x", dist.Normal(means[z], 1.0), obs=x)

    def uniform(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=torch.zeros(len(x), 3, dtype=torch.float64)))

    x = torch.tensor([0.5, 1.5, -2.0], dtype=torch.float64)
    result = refine(model, uniform, x, seed=0)
    exact = dist.Normal(means, 1.0).log_prob(x[:, None]).logsumexp(1) - torch.tensor(3.0).log()
    gap = exact - lvm.elbo(model, result.guide, x, num_particles=10_000, seed=1)
    assert float(gap.abs().max()) < 5e-3  # a class that is hardly ever drawn is learned last
    assert (result.gain > 0.05).all()


def test_an_autoguide():
    x = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    guide = AutoNormal(normal_model)
    guide(x)
    result = refine(normal_model, guide, x, seed=0)
    exact = dist.Normal(0.0, torch.tensor(1.49, dtype=torch.float64).sqrt()).log_prob(x)
    elbo = lvm.elbo(normal_model, result.guide, x, num_particles=1000, seed=1).detach()
    assert float((exact - elbo).abs().max()) < 1e-3


def test_a_guide_of_the_package_frees_what_its_encoder_puts_out():
    torch.manual_seed(0)
    model = LinearGaussian(2, 4)
    guide = lvm.guides.Flow(2, torch.nn.Linear(4, 4 + 8), context_dim=8)
    result = refine(model, guide, model.sample(3), num_steps=2, seed=0)
    assert result.free == ("phi",)
    assert result.guide.program.leaves.tensors["phi"].shape == (3, 12)


def test_nothing_changes_but_what_is_returned():
    torch.manual_seed(0)
    model = LinearGaussian(2, 4)
    guide = lvm.guides.DiagonalNormal(2, torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)))
    x, state = model.sample(3), torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    refine(model, guide, x, num_steps=3, seed=0)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in guide.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert guide.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not pyro.get_param_store().keys()


def test_a_datum_that_steps_make_worse_goes_back():
    """A rate that is absurd throws the offsets far away; the guide is then the one that came."""
    pair = ORACLES["plain"](4)

    def near(x):
        loc, scale = x / 1.49 + 0.1, 0.6
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    result = refine(pair.model, near, pair.x, num_steps=1, learning_rate=100.0, seed=0)
    weights = [lvm.log_weights(pair.model, q, pair.x, num_particles=5, seed=2) for q in (near, result.guide)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-12)
    assert result.gain.tolist() == [0.0] * 4


def test_errors():
    x = torch.zeros(2)
    with pytest.raises(DataTypeError, match="family: expected 'own' or 'flow', got 'spline'"):
        refine(normal_model, two_sites, x, family="spline")

    def misspelt(x):
        with pyro.plate("data", len(x)):
            pyro.sample("zz", dist.Normal(x, 1.0))

    with pytest.raises(SiteError, match="'zz'"):
        refine(normal_model, misspelt, x)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def uniform(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.zeros(len(x)), torch.ones(len(x))))

    with pytest.raises(SiteError, match="support of Uniform would move"):
        refine(model, uniform, x)


def test_a_refined_guide_belongs_to_its_data():
    pair = ORACLES["plain"](4)
    result = refine(pair.model, pair.guide, pair.x, num_steps=2, seed=0)
    with pytest.raises(ShapeError, match=r"x: expected \(4,\) data, got \(3,\)"):
        result.guide(pair.x[:3])
