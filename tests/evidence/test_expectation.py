"""Means over p(z | x): exact pairs, the definition, chunks, error bars, and what is refused."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_lvm as lvm
from pyro_lvm.errors import DataTypeError, ShapeError, SiteError
from tests.references import ORACLES, SIGMA, data, normal_model, posterior

X = data(6)
LOC, SCALE, _ = posterior(X[:, None])  # of p(z | x)


def wide_guide(x: torch.Tensor) -> None:
    """Wider than the posterior and off its mean: bounded weights."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(posterior(x[:, None])[0] + 0.3, 1.0))


def moments(z: torch.Tensor) -> torch.Tensor:
    return torch.stack([z, z**2], -1)


EXACT = torch.stack([LOC, LOC**2 + SCALE**2], -1)  # (N, 2)


@pytest.mark.statistical
def test_moments_of_an_exact_posterior_within_five_errors():
    found = lvm.expectation(normal_model, wide_guide, X, moments, num_particles=20_000, seed=0)
    assert ((found.value - EXACT).abs() < 5 * found.stderr).all()
    assert ((found.under_guide - EXACT).abs() > 5 * found.under_guide_stderr).any()  # what the weights mend
    assert set(found.status) <= {"no_fault_found", "heavy_tail"}


@pytest.mark.statistical
def test_stated_errors_are_those_of_repeated_runs():
    """400 repeats for 6 data: the spread of z-scores has a relative error of 1 / sqrt(4800) = 1.4 %; allowed 5."""
    scores = []
    for seed in range(400):
        found = lvm.expectation(normal_model, wide_guide, X, moments, num_particles=500, seed=seed)
        scores.append((found.value - EXACT) / found.stderr)
    assert abs(torch.stack(scores).std() - 1) < 0.07


@pytest.mark.parametrize("chunks", [(6, 1000), (6, 300), (4, 300)])
def test_it_is_the_weighted_mean_of_the_draws(chunks):
    """The definition, written out on the draws that fn was given, however they come."""
    seen = []
    found = lvm.expectation(normal_model, wide_guide, X, lambda z: seen.append(z) or z, chunks=chunks, seed=3)
    sizes = dict.fromkeys(z.shape[1] for z in seen)  # data in each chunk of data
    z = torch.cat([torch.cat([part for part in seen if part.shape[1] == size]) for size in sizes], 1)  # (K, N)
    assert z.shape == (1000, 6)
    log_weights = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, SIGMA).log_prob(X)
    weights = (log_weights - dist.Normal(LOC + 0.3, 1.0).log_prob(z)).exp()
    torch.testing.assert_close(found.value, (weights * z).sum(0) / weights.sum(0))
    torch.testing.assert_close(found.under_guide, z.mean(0))


def test_ess_khat_and_status_are_those_of_log_marginal():
    options = {"num_particles": 300, "chunks": (4, 70), "seed": 1}
    found = lvm.expectation(normal_model, wide_guide, X, lambda z: z, **options)
    record = lvm.log_marginal(normal_model, wide_guide, X, **options)
    assert torch.equal(found.ess, record.ess)
    assert torch.equal(found.khat, record.khat)
    assert (found.status == record.status).all()
    assert found.provenance == record.provenance  # it is as quotable


PER_DATUM = {name: make for name, make in ORACLES.items() if make(3).options.get("data_plate", "") is not None}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", sorted(PER_DATUM.keys() - {"sequential_data"}))
def test_every_kind_of_pair(name, several):
    """Under an exact posterior all weights are equal, so that both means agree, whatever plates the pair has."""
    pair = PER_DATUM[name](3)

    def total(**latents: torch.Tensor) -> torch.Tensor:
        return torch.stack([value.double().reshape(*value.shape[:2], -1).sum(-1) for value in latents.values()]).sum(0)

    guide = [pair.guide] * 2 if several else pair.guide
    found = lvm.expectation(pair.model, guide, pair.x, total, *pair.args, num_particles=7, seed=0, **pair.options)
    assert found.value.shape == (3,)
    torch.testing.assert_close(found.value, found.under_guide)
    assert set(found.status) == {"zero_variance"}


def test_a_joint_result_and_several_sites():
    def model(x: torch.Tensor) -> None:
        shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shared, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + shared) / 2, 0.5**0.5))

    x = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    found = lvm.expectation(
        model,
        guide,
        x,
        lambda shared, z: torch.cat([shared[:, None], z], -1),
        data_plate=None,
        num_particles=50_000,
        seed=0,
    )
    assert found.value.shape == (1, 4)
    mean = x.sum() / (2 + len(x))  # shared | x: prior precision 1, each x adds 1/2
    expected = torch.cat([mean[None], (x + mean) / 2])
    assert ((found.value[0] - expected).abs() < 5 * found.stderr[0]).all()


def test_values_of_any_shape_and_kind():
    found = lvm.expectation(normal_model, wide_guide, X, lambda z: z > 0, num_particles=50, seed=0)
    assert found.value.dtype == torch.float64
    assert ((found.value >= 0) & (found.value <= 1)).all()
    image = lvm.expectation(normal_model, wide_guide, X, lambda z: z[..., None, None].expand(-1, -1, 2, 3), seed=0)
    assert image.value.shape == image.stderr.shape == (6, 2, 3)


def test_it_prints_and_warns_where_the_weights_say_nothing():
    def narrow(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(posterior(x[:, None])[0], 0.1))

    with pytest.warns(lvm.UnreliableEstimateWarning, match=r"Expectation\.status"):
        found = lvm.expectation(normal_model, narrow, X, lambda z: z, seed=0)
    assert "not to be quoted as means over p(z | x)" in repr(found)
    assert len(found) == 6
    assert math.isclose(sum(found.status_shares().values()), 1.0)


def test_nothing_outside_changes():
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lvm.expectation(normal_model, wide_guide, X, lambda z: z, num_particles=5, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("fn", "error", "words"),
    [
        (lambda latents: latents, SiteError, r"among the latent sites \['z'\], got \['latents'\]"),
        (lambda: 0.0, SiteError, r"got none"),
        (lambda z: z.sum(), ShapeError, r"fn: expected values of shape \(10, 6\)"),
        (lambda z: z.mean(0), ShapeError, r"got \(6,\)"),
        (lambda z: 1.0, DataTypeError, r"returns a real tensor, got float"),
        (lambda z: z + 1j, DataTypeError, r"got torch.complex"),
        (3, DataTypeError, r"fn: expected a function with named parameters"),
    ],
)
def test_a_function_that_cannot_be_averaged_is_refused(fn, error, words):
    with pytest.raises(error, match=words):
        lvm.expectation(normal_model, wide_guide, X, fn, num_particles=10, seed=0)


def test_a_site_that_is_summed_out_is_named_with_what_to_ask_instead():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(SiteError, match=r"'y' is summed out: latent.attribute"):
        lvm.expectation(model, wide_guide, X, lambda y: y, num_particles=10)


def test_ctrl_c_says_how_many_data_there_are() -> None:
    def model(x: torch.Tensor) -> None:
        if len(x) == 2 and float(x[0]) == float(X[4]):
            raise KeyboardInterrupt
        normal_model(x)

    result = lvm.expectation(model, wide_guide, X, moments, num_particles=50, chunks=(2, 50), seed=0)
    assert len(result) == 4
    assert repr(result).startswith("Expectation: 4 of 6 data (interrupted)")
