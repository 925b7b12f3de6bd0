"""Draws from p(z | x): which particles they are, their moments, their log-likelihood, and ArviZ."""

import math
import warnings
from typing import Any

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_lvm as lvm
from pyro_lvm.errors import DataTypeError, PlateError, ShapeError, SiteError
from pyro_lvm.evidence import posterior_draws
from pyro_lvm.evidence.resampling import Reservoir
from pyro_lvm.tracing.isolation import forked_rng
from tests.references import MEANS, ORACLES, SIGMA, WEIGHTS, data, normal_guide, normal_model, posterior

X = data(6)
LOC, SCALE, LOG_PX = posterior(X[:, None])  # of p(z | x)


def wide_guide(x: torch.Tensor) -> None:
    """Wider than the posterior and off its mean: bounded weights."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(posterior(x[:, None])[0] + 0.3, 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Which particles, and how often.


def test_every_particle_has_its_share_of_the_places_rounded_up_or_down():
    log_weights = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)) * 2
    reservoir = Reservoir(1000)
    with forked_rng(0):
        reservoir.update(log_weights, {"k": torch.arange(200)[:, None].expand(-1, 7)})
    shares = 1000 * log_weights.double().softmax(0)
    for n in range(7):
        counts = torch.bincount(reservoir.values["k"][:, n], minlength=200)
        assert ((counts - shares[:, n]).abs() < 1).all()


@pytest.mark.statistical
@pytest.mark.parametrize("chunk", [20, 7, 1])
def test_expected_counts_are_the_weights_however_the_particles_come(chunk):
    """20,000 streams of 20 particles, 5 places: a count has a variance of at most 5 p, so a mean an error of its root
    / 141; five of them for 20 means, a false failure in 1e5 or less.
    """
    log_weights = torch.linspace(-2, 1, 20, dtype=torch.float64).sin()[:, None] * 2
    shares = log_weights.softmax(0)[:, 0]
    reservoir = Reservoir(5)
    with forked_rng(1):
        for start in range(0, 20, chunk):
            some = log_weights[start : start + chunk].expand(-1, 20_000)
            reservoir.update(some, {"k": torch.arange(start, start + len(some))[:, None].expand(-1, 20_000)})
    counts = torch.bincount(reservoir.values["k"].flatten(), minlength=20) / 20_000
    assert ((counts - 5 * shares).abs() < 5 * (5 * shares / 20_000).sqrt()).all()
    assert torch.equal(reservoir.values["k"], reservoir.particle)


def test_particles_without_weight_are_not_drawn():
    table = torch.tensor([[-torch.inf, 0.0], [0.0, -torch.inf], [torch.nan, torch.inf], [-torch.inf, -torch.inf]])
    reservoir = Reservoir(3)
    for row in table:
        reservoir.update(row[None], {})
    assert reservoir.particle.tolist() == [[1, 0]] * 3


def test_no_weight_at_all_leaves_draws_of_the_guide():
    reservoir = Reservoir(4)
    for _ in range(2):
        reservoir.update(torch.full((3, 1), -torch.inf), {})
    assert set(reservoir.particle.flatten().tolist()) <= {0, 1, 2}


def test_equal_weights_return_what_the_guide_drew():
    """All of it, once, in another order."""
    options, seen = {"num_particles": 300, "seed": 3, "chunks": (6, 300)}, []
    found = posterior_draws(normal_model, normal_guide, X, num_draws=300, **options)
    lvm.expectation(normal_model, normal_guide, X, lambda z: seen.append(z) or z, **options)
    drawn = seen[0]  # (K, N) of the same seed
    torch.testing.assert_close(found.latents["z"].sort(0).values, drawn.sort(0).values, atol=0, rtol=0)
    assert not torch.equal(found.latents["z"], drawn)
    assert found.num_unique.tolist() == [300] * 6
    assert set(found.status) == {"zero_variance"}


def test_sites_of_a_datum_stay_together():
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            first = pyro.sample("z1", dist.Normal(0.0, 1.0))
            pyro.sample("z2", dist.Delta(2 * first, log_density=dist.Normal(0.0, 1.0).log_prob(first)))

    pair = ORACLES["chain"](4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lvm.UnreliableEstimateWarning)
        found = posterior_draws(pair.model, guide, pair.x, num_particles=50, chunks=(3, 20), seed=0)
    torch.testing.assert_close(found.latents["z2"], 2 * found.latents["z1"])


# ---------------------------------------------------------------------------------------------------------------------
# Moments and densities.


@pytest.mark.statistical
@pytest.mark.parametrize("chunks", [None, (4, 300)])
def test_moments_are_those_of_the_posterior(chunks):
    """Mean and mean square of 4000 draws from K = 4000. By their sampling and by resampling alone they have errors of
    sd / sqrt(ESS) and less than sd / sqrt(M); five of both together.
    """
    found = posterior_draws(normal_model, wide_guide, X, num_particles=4000, num_draws=4000, chunks=chunks, seed=0)
    z = found.latents["z"]
    inverse = (1 / found.ess + 1 / 4000).sqrt()
    assert ((z.mean(0) - LOC).abs() < 5 * SCALE * inverse).all()
    square_sd = (2 * SCALE**4 + 4 * LOC**2 * SCALE**2).sqrt()
    assert ((z.square().mean(0) - LOC**2 - SCALE**2).abs() < 5 * square_sd * inverse).all()
    assert ((z.mean(0) - LOC).abs() < 0.2).all()  # where those of the guide are .3 away


def test_they_agree_with_the_weighted_means_of_the_same_particles():
    """Systematic resampling moves a mean by a few steps between neighbours in the order of the particles."""
    options = {"num_particles": 2000, "chunks": (6, 2000), "seed": 5}
    draws = posterior_draws(normal_model, wide_guide, X, num_draws=20_000, **options)
    means = lvm.expectation(normal_model, wide_guide, X, lambda z: z, **options)
    assert ((draws.latents["z"].mean(0) - means.value).abs() < means.stderr).all()
    assert torch.equal(draws.ess, means.ess)
    assert torch.equal(draws.khat, means.khat)
    assert (draws.status == means.status).all()


def normal(loc: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return dist.Normal(loc, SIGMA).log_prob(x)


LIKELIHOODS: dict[str, Any] = {
    "plain": lambda x, z: normal(z, x),
    "event": lambda x, z: normal(z, x).sum(-1),
    "images": lambda x, z: normal(z[..., None], x.flatten(1)).sum(-1),
    "data -3, pixels -5": lambda x, z: normal(z[..., 0], x).sum(-1),
    "auto_dims": lambda x, z: normal(z, x).sum(-1),
    "either_side": lambda x, z, u: normal(z, x[:, :, 3]).sum(-1) + normal(u[:, :, None], x[:, :, :3]).sum((-1, -2)),
    "chain": lambda x, z1, z2: dist.Normal(z2, 1.0).log_prob(x),
    "factor": lambda x, z: normal(z[..., None], x).sum(-1),
    "scale": lambda x, z: normal(z, x),
    "obs_mask": lambda x, z: (normal(z, x.nan_to_num(0.0)) * ~x.isnan()).sum(-1),
    "discrete_guide": lambda x, c: normal(MEANS[c], x),
    "mixed": lambda x, z: normal(z, x),  # z hangs on the component, which is summed out
}


@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
@pytest.mark.parametrize("options", [{}, {"vectorize": False}, {"chunks": (2, 3)}], ids=["one chunk", "loop", "chunks"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_log_likelihood_is_that_of_all_observed_sites(name, options):
    pair = ORACLES[name](3)
    found = posterior_draws(
        pair.model, pair.guide, pair.x, *pair.args, num_particles=5, num_draws=8, seed=0, **pair.options, **options
    )
    assert found.log_likelihood.shape == (8, 3)
    expected = LIKELIHOODS[name](pair.x, **found.latents)
    torch.testing.assert_close(found.log_likelihood, expected, atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
def test_a_latent_below_another_is_summed_out_of_the_likelihood():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Bernoulli(logits=z))
            pyro.sample("x", dist.Normal(z + 3 * y, SIGMA), obs=x)

    found = posterior_draws(model, wide_guide, X, num_particles=50, num_draws=20, seed=0)
    z = found.latents["z"]
    parts = torch.stack([normal(z, X) + torch.sigmoid(-z).log(), normal(z + 3, X) + torch.sigmoid(z).log()])
    assert list(found.latents) == ["z"]
    torch.testing.assert_close(found.log_likelihood, parts.logsumexp(0), atol=1e-10, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Joint draws.


def shared_model(x: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def shared_guide(x: torch.Tensor) -> None:
    loc, scale = shared_posterior(x)
    pyro.sample("mu", dist.Normal(loc + 0.05, 1.2 * scale))


def shared_posterior(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    precision = len(x) + 1 / 9
    return x.sum() / precision, precision**-0.5


MANY = data(50)


def test_a_joint_result_has_the_log_likelihood_of_each_datum():
    found = posterior_draws(shared_model, shared_guide, MANY, data_plate=None, num_draws=400, seed=0)
    assert found.latents["mu"].shape == (400,)
    assert len(found) == 1
    expected = dist.Normal(found.latents["mu"][:, None], 1.0).log_prob(MANY)
    torch.testing.assert_close(found.log_likelihood, expected, atol=1e-10, rtol=0)


def test_a_joint_result_without_one_plate_around_the_data_has_one_log_likelihood():
    def model(x: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(mu.expand(len(x)), 1.0).to_event(1), obs=x)

    found = posterior_draws(
        model, shared_guide, MANY, data_plate=None, vectorize=False, num_particles=50, num_draws=20, seed=0
    )
    expected = dist.Normal(found.latents["mu"][:, None], 1.0).log_prob(MANY).sum(1, keepdim=True)
    torch.testing.assert_close(found.log_likelihood, expected, atol=1e-10, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# ArviZ.


def in_arviz(found: Any) -> dict[str, float]:
    """Mean and standard deviation by `arviz.summary`, whose rows and columns are words or numbers."""
    summary = arviz.summary(found.to_arviz(), kind="stats", round_to="none")
    return {name: (float(row["mean"]), float(row["sd"])) for name, row in summary.iterrows()}


def test_arviz_summarises_them():
    found = posterior_draws(normal_model, wide_guide, X, num_draws=500, seed=0)
    summary, z = in_arviz(found), found.latents["z"]
    assert list(summary) == [f"z[{n}]" for n in range(6)]
    for n in range(6):
        assert summary[f"z[{n}]"] == pytest.approx((float(z[:, n].mean()), float(z[:, n].std())), rel=1e-3)


@pytest.mark.statistical
def test_loo_of_a_latent_that_all_data_share_is_the_exact_one():
    """Leaving each of 50 data out, in closed form. k-hat is good for all, and the draws' error, by repeats, is 0.03."""
    exact = 0.0
    for i in range(50):
        loc, scale = shared_posterior(torch.cat([MANY[:i], MANY[i + 1 :]]))
        exact += float(dist.Normal(loc, math.sqrt(1 + scale**2)).log_prob(MANY[i]))
    found = posterior_draws(shared_model, shared_guide, MANY, data_plate=None, num_particles=4000, seed=0)
    loo = arviz.loo(found.to_arviz())
    elpd = getattr(loo, "elpd", None) or loo["elpd_loo"]  # in ArviZ 1.x and 0.x
    assert abs(float(elpd) - exact) < 0.15


def test_groups_dimensions_and_what_the_weights_say():
    pair = ORACLES["either_side"](3)
    found = posterior_draws(pair.model, pair.guide, pair.x, num_draws=7, num_particles=7, seed=0)
    tree = found.to_datatree()
    assert tree["posterior"]["u"].dims == ("chain", "draw", "datum", "u_dim_0")
    assert tree["posterior"]["u"].shape == (1, 7, 3, 3)
    assert tree["log_likelihood"]["x"].shape == (1, 7, 3)
    assert tree["sample_stats"]["status"].values.tolist() == ["zero_variance"] * 3
    assert {"ess", "khat", "num_unique"} < set(tree["sample_stats"])
    assert tree["posterior"].attrs["num_particles"] == 7
    joint = posterior_draws(shared_model, shared_guide, MANY, data_plate=None, num_draws=7, seed=0).to_datatree()
    assert joint["posterior"]["mu"].dims == ("chain", "draw")
    assert joint["sample_stats"]["ess"].dims == ()


# ---------------------------------------------------------------------------------------------------------------------
# What it says, and what is refused.


def narrow_guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(posterior(x[:, None])[0], 0.1))


def test_it_prints_and_warns_where_the_weights_say_nothing():
    with pytest.warns(lvm.UnreliableEstimateWarning, match=r"PosteriorDraws\.status"):
        found = posterior_draws(normal_model, narrow_guide, X, seed=0)
    assert "not to be quoted as draws from p(z | x)" in repr(found)
    assert "z (1000, 6)" in repr(found)
    assert len(found) == 6
    assert found.num_draws == 1000
    assert math.isclose(sum(found.status_shares().values()), 1.0)


def test_a_seed_repeats_them_and_nothing_outside_changes():
    before = torch.random.get_rng_state()
    first, second = (posterior_draws(normal_model, wide_guide, X, num_draws=20, seed=1) for _ in range(2))
    assert torch.equal(first.latents["z"], second.latents["z"])
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.provenance["num_data"] == 6


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: posterior_draws(normal_model, wide_guide, X, num_draws=0), ShapeError, "num_draws: expected 1 or"),
        (lambda: posterior_draws(normal_model, wide_guide, X, num_particles=1.5), DataTypeError, "num_particles"),
        (lambda: posterior_draws(normal_model, None, X), DataTypeError, "guide: expected a Pyro program, got None"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_guide_that_draws_nothing_and_a_loop_over_the_data():
    def mixture(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(MEANS[c], SIGMA), obs=x)

    with pytest.raises(SiteError, match=r"guide that draws latents, got none.*latent\.attribute"):
        posterior_draws(mixture, lambda x: None, X)
    loop = ORACLES["sequential_data"](3)
    with pytest.raises(PlateError, match="got a loop over 'data'"):
        posterior_draws(loop.model, loop.guide, loop.x)
