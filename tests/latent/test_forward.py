"""decode, reconstruct, sample: the user's model run forwards, against formulas and moments."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_lvm.errors import PlateError, ShapeError, SiteError, SupportError
from pyro_lvm.latent import decode, reconstruct, sample
from pyro_lvm.models import GaussianMixture, HierarchicalGaussian, LinearGaussian
from pyro_lvm.nn import MLP
from tests.references import ORACLES

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def linear() -> LinearGaussian:
    torch.manual_seed(0)
    return LinearGaussian(2, 5)


def test_decode_is_the_likelihood(linear):
    z = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    p = decode(linear, z, X)
    with torch.no_grad():
        expected = dist.Normal(z @ linear.weight.T + linear.mean, linear.variance.sqrt()).to_event(1)
    torch.testing.assert_close(p.mean, expected.mean)
    torch.testing.assert_close(p.log_prob(torch.zeros(7, 5)), expected.log_prob(torch.zeros(7, 5)))
    assert p.sample().shape == (7, 5)
    assert not p.mean.requires_grad
    torch.testing.assert_close(decode(linear, {"z": z.numpy()}, X[:1].numpy()).mean, expected.mean)
    assert torch.equal(decode(linear, torch.ones(2, 2).long(), X).mean, decode(linear, torch.ones(2, 2), X).mean)


def test_arguments_go_with_their_rows_or_the_first_stands_for_all():
    def model(x: torch.Tensor, shift: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    x, shift = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    assert decode(model, torch.zeros(3), x, shift).mean.tolist() == [1.0, 2.0, 3.0]
    assert decode(model, torch.zeros(2), x, shift).mean.tolist() == [1.0, 1.0]


def test_latents_that_are_left_out_are_drawn():
    torch.manual_seed(0)
    model = HierarchicalGaussian(MLP(3, [8], 5), [3, 2], hidden_dims=[8])
    drawn = sample(model, X, 6, seed=0)
    assert drawn.keys() == {"z", "z2", "x"}
    first, again = (decode(model, {"z2": drawn["z2"]}, X).mean for _ in range(2))
    assert not torch.equal(first, again)  # z was drawn twice
    first, again = (decode(model, {"z2": drawn["z2"], "z": drawn["z"]}, X).mean for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.statistical
def test_samples_have_the_moments_of_the_model(linear):
    """20,000 draws: five errors of a mean are 5 sd / 141."""
    draws = sample(linear, X, 20_000, seed=0)
    with torch.no_grad():
        covariance = linear.weight @ linear.weight.T + linear.variance * torch.eye(5)
        assert ((draws["x"].mean(0) - linear.mean).abs() < 5 * (covariance.diag() / 20_000).sqrt()).all()
        assert (draws["x"].T.cov() - covariance).abs().max() < 0.05 * covariance.diag().max()
    assert draws["z"].shape == (20_000, 2)
    assert torch.equal(sample(linear, X, 3, seed=1)["x"], sample(linear, X, 3, seed=1)["x"])


@pytest.mark.parametrize("name", [n for n in ORACLES if n not in ("conditioned_whole", "sequential_data")])
def test_any_pair_can_be_sampled(name):
    """The template has three rows; five are asked for, and no site keeps an observation."""
    pair = ORACLES[name](3)
    first, second = (sample(pair.model, pair.x, 5, *pair.args, seed=seed) for seed in (0, 1))
    assert first
    for site, value in first.items():
        assert 5 in value.shape
        assert not torch.equal(value, second[site])


def test_what_follows_from_other_sites_keeps_its_shape():
    pair = ORACLES["deterministic"](3)  # Pyro would draw the mean anew, in the shape of its plate: (5, 5)
    assert {name: value.shape for name, value in sample(pair.model, pair.x, 5).items()} == {"z": (5,), "x": (5,)}


def test_reconstructions_of_a_linear_model(linear):
    """E_q[W z + mu] has a formula; the error of 4000 draws is that of z's posterior."""
    found = reconstruct(linear, linear.posterior_guide, X, num_draws=4000, seed=0)
    with torch.no_grad():
        q = linear.posterior(X)
        expected = q.mean @ linear.weight.T + linear.mean
        sd = (linear.weight @ q.covariance_matrix @ linear.weight.T).diagonal(dim1=-2, dim2=-1).sqrt()
        assert ((found - expected).abs() < 5 * sd / 4000**0.5 + 1e-6).all()


def test_discrete_latents_that_the_guide_lacks_are_drawn_from_their_posterior():
    """Each datum is put back to the mean of its own component; p(y | x) is 0 or 1 to 1e-9 here."""
    mixture = GaussianMixture(2, 1, covariance="spherical").double()
    x = torch.tensor([[-9.0], [-9.2], [9.0], [9.2]], dtype=torch.float64)
    found = reconstruct(mixture.initialize(x), None, x, num_draws=3, seed=0)
    torch.testing.assert_close(found, torch.tensor([[-9.1], [-9.1], [9.1], [9.1]], dtype=torch.float64))


def test_the_template_s_content_does_not_matter(linear):
    torch.testing.assert_close(decode(linear, torch.ones(2, 2), X).mean, decode(linear, torch.ones(2, 2), X * 0).mean)


def test_parameters_that_were_learned_are_used():
    def model(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + loc, 1.0), obs=x)

    pyro.clear_param_store()
    pyro.param("loc", torch.tensor(5.0))
    assert decode(model, torch.zeros(2), torch.zeros(1)).mean.tolist() == [5.0, 5.0]
    pyro.clear_param_store()


def two(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)
        pyro.sample("label", dist.Categorical(logits=torch.stack([a, b], -1)), obs=torch.zeros(len(x)))


def fixed(x: torch.Tensor) -> None:
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:3])


ROWS = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: decode(two, ROWS, ROWS), SiteError, r"one of the latent sites \['a', 'b'\]"),
        (lambda: decode(two, {"c": ROWS}, ROWS, site="x"), SiteError, r"latents: expected values of some of"),
        (lambda: decode(two, {}, ROWS, site="x"), SiteError, "got none"),
        (lambda: decode(two, {"a": ROWS}, ROWS), SiteError, r"observed sites \['x', 'label'\], got None"),
        (lambda: decode(two, {"a": ROWS}, ROWS, site="X"), SiteError, "got 'X'"),
        (lambda: decode(two, {"a": torch.zeros(3, 2)}, ROWS, site="x"), ShapeError, r"latents\['a'\].*\(3,\)"),
        (lambda: decode(two, {"a": ROWS, "b": ROWS[:2]}, ROWS, site="x"), ShapeError, r"latents\['b'\]"),
        (lambda: sample(fixed, ROWS, 5), PlateError, r"a plate that follows x, here of 5 rows, got \[\{'data': 3\}\]"),
        (lambda: sample(fixed, ROWS, 0), ShapeError, "num_samples"),
        (lambda: reconstruct(two, lambda x: two_guide(x), ROWS, site="label"), SupportError, "with a mean, got Cat"),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def two_guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))


def test_nothing_outside_changes(linear):
    linear.train()
    state = torch.random.get_rng_state()
    sample(linear, X, 3, seed=0)
    reconstruct(linear, linear.posterior_guide, X, seed=0)
    assert linear.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(pyro.get_param_store()) == 0
