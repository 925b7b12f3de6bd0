"""Annealing from several guides at once: exact where their mixture is, unbiased, and on every mode that one is on."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_lvm.errors import PlateError, ShapeError, SiteError, SupportError
from pyro_lvm.evidence import annealed, quadrature
from pyro_lvm.models import LinearGaussian
from tests.references import ORACLES

F64 = torch.float64
doubtful = pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
X = torch.tensor([0.7, 1.5, 2.2], dtype=F64)


def normal(loc, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * loc, scale))

    return guide


def mirrored(x):
    """The sign of z is lost: one mode on either side of zero."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.1), obs=x)


def two_bumps(x):
    """The posterior of z is the equal mixture of N(x, 0.3^2) and N(-x, 0.5^2), and x ~ N(0, 1) whatever z is."""
    with pyro.plate("data", len(x)):
        locs, scales = torch.stack([x, -x], -1), x.new_tensor([0.3, 0.5])
        bumps = dist.MixtureSameFamily(dist.Categorical(x.new_ones(2)), dist.Normal(locs, scales))
        pyro.sample("z", bumps)
        pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)


@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("name", [name for name in ORACLES if name not in ("sequential_data", "discrete_guide")])
def test_every_kind_of_pair_has_equal_weights_with_an_exact_guide(name, several):
    """Masks, plates, parameters, summed-out classes, joint results; the two left out are refused, see below."""
    pair = ORACLES[name](3)
    guide = [pair.guide] * 2 if several else pair.guide
    record = annealed(pair.model, guide, pair.x, *pair.args, num_particles=2, num_steps=3, seed=0, **pair.options)
    torch.testing.assert_close(record.value, pair.log_px, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [("sequential_data", PlateError, "a Python loop"), ("discrete_guide", SupportError, "'c': expected a continuous")],
)
def test_what_cannot_be_annealed(name, error, words):
    pair = ORACLES[name](3)
    with pytest.raises(error, match=words):
        annealed(pair.model, pair.guide, pair.x, *pair.args, **pair.options)


def test_missing_values_that_something_depends_on_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            whole = pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=x > 1)
            pyro.sample("y", dist.Normal(whole, 1.0), obs=x)

    with pytest.raises(SiteError, match="missing values that nothing depends on"):
        annealed(model, normal(0.5, 0.7), X)


def test_copies_of_the_posterior_have_equal_weights():
    torch.manual_seed(0)
    model = LinearGaussian(3, 6).double()
    x = model.sample(4)
    record = annealed(model, [model.posterior_guide] * 2, x, num_particles=3, num_steps=7, seed=0)
    torch.testing.assert_close(record.value, model.log_prob(x).detach(), rtol=0, atol=1e-10)
    assert set(record.status) == {"zero_variance"}


@pytest.mark.parametrize("num_steps", [1, 5])
def test_guides_whose_mixture_is_the_posterior_have_equal_weights(num_steps):
    """Each alone is far from it."""
    guides = {"narrow": normal(1.0, 0.3), "wide": normal(-1.0, 0.5)}
    record = annealed(two_bumps, guides, X, num_particles=4, num_steps=num_steps, seed=0)
    torch.testing.assert_close(record.value, dist.Normal(0.0, 1.0).log_prob(X), rtol=0, atol=1e-10)
    assert record.provenance["annealing"]["start"] == "narrow, wide"
    assert len(record.provenance["guide"]) == 2


@pytest.mark.statistical
@doubtful
def test_a_mode_that_the_guide_misses_is_in_the_value():
    truth = quadrature(mirrored, X).value
    alone = annealed(mirrored, normal(1.0, 0.1), X, seed=0)
    assert (alone.value - truth - math.log(0.5)).abs().max() < 0.05  # at 0.7 to 2.2 the modes lie far apart
    both = annealed(mirrored, [normal(1.0, 0.1), None], X, seed=0)
    assert ((both.value - truth).abs() < 5 * both.stderr).all()
    assert (both.stderr < 0.3).all()
    assert both.provenance["annealing"]["start"] == "guide 1, prior"


@pytest.mark.statistical
@pytest.mark.parametrize("chunks", [None, (1000, 2)])
@doubtful
def test_an_odd_number_of_chains_is_unbiased(chunks):
    """2,000 data alike, three chains and two temperatures each: one guide has two of the chains, by chance."""
    x = torch.ones(2000, dtype=F64)
    guides = [normal(1.0, 0.3), normal(-1.0, 0.3)]
    record = annealed(mirrored, guides, x, num_particles=3, num_steps=2, num_leapfrog=2, chunks=chunks, seed=0)
    weights = (record.value - quadrature(mirrored, x[:1]).value).exp()
    assert (weights.mean() - 1).abs() < 5 * weights.std() / len(x) ** 0.5


@pytest.mark.statistical
@doubtful
def test_constrained_latents_and_an_auto_guide():
    """Poisson counts of a Gamma rate; the prior and an untrained AutoNormal, which draws in coordinates of its own."""

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), x.new_tensor(1.0)))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    counts = torch.tensor([0.0, 3.0, 9.0], dtype=F64)
    truth = dist.NegativeBinomial(torch.tensor(2.0, dtype=F64), torch.tensor(0.5, dtype=F64)).log_prob(counts)
    torch.set_default_dtype(F64)
    try:
        auto = AutoNormal(model)
        auto(counts)
        for guides in ([auto, None], [None, auto]):
            record = annealed(model, guides, counts, seed=0)
            assert ((record.value - truth).abs() < 5 * record.stderr).all()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.statistical
def test_classes_that_the_guide_leaves_out_are_left_out_of_the_prior():
    weights = torch.tensor([0.3, 0.7], dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2 * c, 0.5), obs=x)

    record = annealed(model, [normal(0.5, 0.2), None], X, seed=0)
    locs, scale = torch.tensor([0.0, 2.0], dtype=F64), math.sqrt(1.25)
    truth = (weights.log() + dist.Normal(locs, scale).log_prob(X[:, None])).logsumexp(1)
    assert ((record.value - truth).abs() < 5 * record.stderr).all()
    assert record.provenance["enumerated"] == ("c",)


def test_guides_that_cannot_be_joined():
    def other(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, 1.0))

    with pytest.raises(SiteError):
        annealed(mirrored, [normal(1.0, 0.1), other], X)
    with pytest.raises(ShapeError, match="guides: expected at least two, got 1"):
        annealed(mirrored, [normal(1.0, 0.1)], X)
