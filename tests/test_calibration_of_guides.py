"""Simulation-based calibration: false alarms, faults that are found, weights that mend them, and what is refused."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chi2, kstest

import pyro_lvm as lvm
from pyro_lvm.errors import DataTypeError, PlateError, ShapeError, SiteError, SupportError
from pyro_lvm.ops.uniformity import holm, symmetry_test, uniformity_test
from tests.references import ORACLES, SIGMA, data, normal_guide, normal_model, posterior

X = data(1)


def off(shift: float, scale: float) -> Callable[[torch.Tensor], None]:
    """The exact posterior, moved by ``shift`` and widened by ``scale`` of its standard deviations."""

    def guide(x: torch.Tensor) -> None:
        loc, sd, _ = posterior(x[:, None])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + shift * sd, scale * sd))

    return guide


# ---------------------------------------------------------------------------------------------------------------------
# The tests themselves.


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_symmetry_is_the_share_of_all_signs_with_as_high_a_walk(count):
    """By enumeration of the 2^n signs."""
    distances = torch.linspace(0.4, 0.1, count, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=count)), dtype=torch.float64).T  # (n, 2^n)
    heights = signs.cumsum(0).abs().amax(0)
    expected = torch.stack([(heights >= height).double().mean() for height in heights])
    found = symmetry_test(0.5 + signs * distances[:, None])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_distance_is_that_of_yao_and_others():
    """Between the empirical distributions of v and 1 - v, as scipy has it for two samples; the p-value is another."""
    values = torch.rand(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 1.3
    order = (values - 0.5).abs().argsort(0, descending=True)
    height = (values - 0.5).sign().gather(0, order).cumsum(0).abs().amax(0) / 200
    for column in range(3):
        v = values[:, column].numpy()
        assert math.isclose(kstest(v, 1 - v).statistic, float(height[column]), abs_tol=1e-12)


def test_uniformity_is_the_test_of_kolmogorov_and_smirnov():
    values = torch.rand(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [kstest(values[:, i].numpy(), "uniform", method="exact").pvalue for i in range(4)]
    torch.testing.assert_close(uniformity_test(values), torch.tensor(expected, dtype=torch.float64))


def test_holm_by_hand():
    adjusted = holm(torch.tensor([0.04, 0.01, 0.03, 0.9]))
    torch.testing.assert_close(adjusted, torch.tensor([0.09, 0.04, 0.09, 0.9]))


# ---------------------------------------------------------------------------------------------------------------------
# A guide that is exact, and guides that are not.


@pytest.mark.slow
@pytest.mark.statistical
def test_an_exact_guide_raises_false_alarms_as_often_as_stated():
    """300 runs of 3 marginals: a word of fault in at most 3 % of them, 9; the binomial exceeds 18 once in 400. Each
    p-value before adjustment is uniform or more: a share below .05 of more than .1 has a chance of 1e-5.
    """
    pair, alarms, small = ORACLES["event"](1), 0, {"symmetry": 0, "width": 0, "uniformity": 0}
    for seed in range(300):
        found = lvm.calibration(pair.model, pair.guide, pair.x, num_data=100, num_draws=19, seed=seed)
        alarms += (found.status != "no_fault_found").any()
        for name in small:
            small[name] += bool((getattr(found, name) < 0.05).any())
    assert alarms <= 18
    assert all(count <= 30 for count in small.values())


@pytest.mark.statistical
def test_ranks_of_an_exact_guide_are_uniform_at_few_draws():
    """9 draws have 10 ranks; their counts over 5000 data by chi-square, a false failure in 1e5."""
    found = lvm.calibration(normal_model, normal_guide, X, num_data=5000, num_draws=9, seed=0)
    counts = torch.bincount(found.ranks[:, 0], minlength=10)
    assert counts.sum() == 5000
    assert float((counts - 500).square().sum()) / 500 < chi2.isf(1e-5, 9)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("shift", "scale", "word"),
    [(0.3, 1.0, "biased_high"), (-0.3, 1.0, "biased_low"), (0.0, 0.7, "too_narrow"), (0.0, 1.4, "too_wide")],
)
def test_faults_have_their_words_and_weights_mend_them(shift, scale, word):
    """1000 data: effects of 8 standard errors or more in the shift or the spread."""
    found = lvm.calibration(normal_model, off(shift, scale), X, num_draws=400, seed=0)
    assert found.status.tolist() == [word]
    assert "in z." in found.verdict
    assert found.weighted.status.tolist() == ["no_fault_found"]
    if not shift:
        assert found.symmetry[0] > 0.01  # only its width is at fault
        # p = F(u / s), of u ~ N(0, 1) in units of the guide: the spread is an integral of the normal density
        u = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
        p = dist.Normal(0.0, 1.0).cdf(u / scale)
        expected = 12 * torch.trapezoid((p - 0.5).square() * dist.Normal(0.0, 1.0).log_prob(u).exp(), u)
        assert abs(float(found.spread[0] - expected)) < 5 * (0.8 / 1000) ** 0.5 * max(1.0, float(expected))


def test_another_shape_has_its_word():
    """A guide of two narrow halves, symmetric, with the spread of a calibrated one but few draws at the middle."""

    def guide(x: torch.Tensor) -> None:
        loc, sd, _ = posterior(x[:, None])
        parts = dist.Normal(torch.stack([loc - 0.93 * sd, loc + 0.93 * sd], -1), 0.37 * sd[:, None])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))

    found = lvm.calibration(normal_model, guide, X, num_data=3000, num_draws=200, seed=0)
    assert found.uniformity[0] < 1e-4
    assert found.symmetry[0] > 0.01


def test_the_prior_is_calibrated_and_the_verdict_says_so():
    def prior(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    found = lvm.calibration(normal_model, prior, X, num_draws=50, seed=0)
    assert found.status.tolist() == ["no_fault_found"]
    assert "q(z | x) = p(z) would pass" in found.verdict


# ---------------------------------------------------------------------------------------------------------------------
# All kinds of pairs.


RUN = {
    "event": ["z[0]", "z[1]", "z[2]"],
    "images": ["z"],
    "chain": ["z1", "z2"],
    "auto_dims": ["z[0]", "z[1]", "z[2]", "z[3]"],
    "data -3, pixels -1": ["z[0, 0]"],
    "renamed_plate": ["z"],
    "mask_pixels": ["z"],
    "deterministic": ["z"],
    "conditioned": ["z"],
    "params": ["z"],
    "methods": ["latent[0]"],
    "mixed": ["z"],
    "subsample": ["z"],
}


@pytest.mark.statistical
@pytest.mark.parametrize("name", RUN)
def test_exact_pairs_of_every_kind_are_calibrated(name):
    """A false alarm in 3 % at most; seeds are fixed. Equal weights change nothing."""
    pair = ORACLES[name](3)
    found = lvm.calibration(
        pair.model, pair.guide, pair.x, *pair.args, num_data=200, num_draws=39, seed=4, **pair.options
    )
    assert list(found.names) == RUN[name]
    assert set(found.status) == {"no_fault_found"}
    torch.testing.assert_close(found.pit, found.weighted.pit)


def test_chunks_cut_nothing():
    """Every datum is compared with its own truth: an almost certain guide gives ranks that are not at the ends."""

    def sharp(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(z, 1e-3), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-3))

    found = lvm.calibration(sharp, guide, X, num_data=100, num_draws=19, chunks=(7, 4), seed=0)
    assert set(found.status) == {"no_fault_found"}


def test_constrained_and_discrete_latents():
    """A rate from a gamma prior with counts, its exact posterior; and a coin of each datum, with ties of its draws."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2 + x, 2.0))

    found = lvm.calibration(model, guide, torch.zeros(1), num_data=500, num_draws=99, seed=0)
    assert found.status.tolist() == ["no_fault_found"]

    def coin(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guess(bias: float) -> Callable[[torch.Tensor], None]:
        def guide(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Bernoulli(logits=x - 0.5 + math.log(0.3 / 0.7) + bias))

        return guide

    assert lvm.calibration(coin, guess(0.0), torch.zeros(1), seed=0).status.tolist() == ["no_fault_found"]
    assert lvm.calibration(coin, guess(1.5), torch.zeros(1), seed=0).status.tolist() == ["biased_high"]


def test_one_of_several_sites():
    pair = ORACLES["chain"](1)
    for site in ("z2", ["z2"]):
        found = lvm.calibration(pair.model, pair.guide, pair.x, num_data=50, num_draws=9, site=site, seed=0)
        assert found.names == ("z2",)


def test_latents_that_whole_data_sets_share():
    def model(x: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, SIGMA), obs=x)

    def guide(shift: float) -> Callable[[torch.Tensor], None]:
        def program(x: torch.Tensor) -> None:
            loc, sd, _ = posterior(x)
            pyro.sample("mu", dist.Normal(loc + shift * sd, sd))

        return program

    options: dict[str, Any] = {"num_data": 100, "num_draws": 50, "data_plate": None, "seed": 0}
    assert lvm.calibration(model, guide(0.0), data(5), **options).status.tolist() == ["no_fault_found"]
    found = lvm.calibration(model, guide(1.0), data(5), **options)
    assert found.status.tolist() == ["biased_high"]
    assert found.pit.shape == (100, 1)


def test_other_arguments_go_with_their_rows():
    """Half of the data are shifted by 5, and the guide knows."""

    def model(x: torch.Tensor, offset: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + offset, SIGMA), obs=x)

    def guide(x: torch.Tensor, offset: torch.Tensor) -> None:
        normal_guide(x - offset)

    found = lvm.calibration(model, guide, data(2), torch.tensor([0.0, 5.0]), num_data=200, num_draws=50, seed=0)
    assert found.status.tolist() == ["no_fault_found"]


# ---------------------------------------------------------------------------------------------------------------------
# What it says, and what is refused.


def test_several_observed_arguments():
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)
            pyro.sample("y", dist.Normal(z, SIGMA), obs=y)

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        loc, sd, _ = posterior(torch.stack([x, y], -1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, sd))

    found = lvm.calibration(model, guide, data(2), data(2, seed=1), num_data=300, num_draws=50, seed=0)
    assert found.status.tolist() == ["no_fault_found"]


def test_it_prints_and_a_seed_repeats_it():
    before = torch.random.get_rng_state()
    first, second = (lvm.calibration(normal_model, off(0.0, 0.5), X, num_draws=50, seed=0) for _ in range(2))
    assert torch.equal(first.pit, second.pit)
    assert torch.equal(before, torch.random.get_rng_state())
    assert "1000 simulated data, 50 draws of each, 1 marginals" in repr(first)
    assert "the guide is too narrow in z." in repr(first)
    assert "weighted" in repr(first)
    assert "of the data say nothing" in first.weighted.verdict
    assert len(first) == 1000
    assert first.ranks.min() == 0
    assert first.ranks.max() == 50


def test_data_without_weights_are_left_out_and_draws_that_are_no_numbers_too():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    def elsewhere(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full_like(x, 40.0), 1.0))

    def broken(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(x > 0.5, torch.nan, x), 1.0, validate_args=False))

    found = lvm.calibration(model, elsewhere, X, num_data=50, num_draws=9, seed=0)
    assert found.status.tolist() == ["biased_high"]
    assert found.weighted.status.tolist() == ["untested"]
    assert found.weighted.ranks.eq(-1).all()
    assert "no numbers to test in z. The weights of 100.0% of the data say nothing." in found.weighted.verdict
    some = lvm.calibration(normal_model, broken, torch.zeros(1), num_data=50, num_draws=9, seed=0)
    assert 0 < some.pit.isnan().sum() < 50
    assert some.shift.isfinite().all()


def run(model: Any, guide: Any, x: torch.Tensor = X, **options: Any) -> Any:
    return lvm.calibration(model, guide, x, num_data=20, num_draws=5, **options)


def halves(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, SIGMA), obs=x / 2)


def fixed(x: torch.Tensor) -> None:
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, SIGMA), obs=x)


def forced(x: torch.Tensor) -> None:
    """The second number is predicted from the first of the data."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = torch.stack([z, z + x[:, 0]], -1)
        pyro.sample("x", dist.Normal(loc, SIGMA).to_event(1), obs=x)


def first(x: torch.Tensor) -> None:
    normal_guide(x[:, 0])


local = lvm.guides.DiagonalNormal(1, num_data=4)
linear = lvm.models.LinearGaussian(1, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: run(linear, local, torch.zeros(4, 2)), PlateError, "an amortised pair.*An encoder gives"),
        (lambda: run(fixed, normal_guide, data(3)), PlateError, r"Plates have the size len\(x\)"),
        (lambda: run(halves, normal_guide), SiteError, "site 'x': expected x or another argument as obs="),
        (
            lambda: run(forced, first, data(1, 2), vectorize=False),
            SiteError,
            "site 'x': expected a density that x does",
        ),
        (lambda: run(normal_model, normal_guide, site="y"), SiteError, r"latent sites .*\['z'\], got 'y'"),
        (lambda: run(normal_model, None), DataTypeError, "guide: expected a Pyro program, got None"),
        (lambda: run(normal_model, normal_guide, vectorize=False, chunks=3), DataTypeError, "chunks"),
        (lambda: lvm.calibration(normal_model, normal_guide, X, num_data=1), ShapeError, "num_data: expected 2"),
        (lambda: lvm.calibration(normal_model, normal_guide, X, num_draws=0), ShapeError, "num_draws"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("factor", SiteError, "site 'second': expected a distribution of the data, got a factor"),
        ("obs_mask", SiteError, "expected data without missing values, got an obs_mask"),
        ("sequential_data", PlateError, "an amortised pair"),
        ("discrete_guide", SupportError, "'c': expected values with an order, got classes.*OneHotCategorical"),
    ],
)
def test_models_without_simulations(name, error, words):
    pair = ORACLES[name](3)
    with pytest.raises(error, match=words):
        run(pair.model, pair.guide, pair.x)
