"""log p(x, z) - log q(z | x), per particle and datum, against closed forms."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_lvm.tracing import elbo, log_weights
from tests.references import ENUMERATED, ORACLES, SIGMA, Pair, data, normal_guide, normal_model, plain, posterior

every_oracle = pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
every_pair = pytest.mark.parametrize("oracle", (ORACLES | ENUMERATED).values(), ids=ORACLES | ENUMERATED)


def weights(pair: Pair, **options: Any) -> torch.Tensor:
    return log_weights(pair.model, pair.guide, pair.x, *pair.args, **{"num_particles": 3} | pair.options | options)


def assert_exact(table: torch.Tensor, log_px: torch.Tensor, num_particles: int = 3) -> None:
    torch.testing.assert_close(table, log_px.expand(num_particles, -1), atol=1e-10, rtol=0)


@every_pair
@pytest.mark.parametrize("num_data", [1, 2, 5, 50])
def test_every_weight_of_an_exact_posterior_is_the_evidence(oracle: Callable[[int], Pair], num_data: int) -> None:
    pair = oracle(num_data)
    assert_exact(weights(pair), pair.log_px)


@every_pair
def test_a_loop_over_particles_gives_the_same_weights(oracle: Callable[[int], Pair]) -> None:
    pair = oracle(5)
    assert_exact(weights(pair, vectorize=False), pair.log_px)


@every_oracle
def test_data_plate_none_gives_the_joint_evidence(oracle: Callable[[int], Pair]) -> None:
    pair = oracle(4)
    assert_exact(weights(pair, data_plate=None), pair.log_px.sum(0, keepdim=True))


@pytest.mark.parametrize("num_particles", [1, 2, 7])
def test_any_number_of_particles(num_particles: int) -> None:
    pair = ORACLES["either_side"](3)
    assert_exact(weights(pair, num_particles=num_particles), pair.log_px, num_particles)


@pytest.mark.parametrize("plate", ["data", "auto"])
def test_a_named_plate_is_the_one_that_is_found(plate: str) -> None:
    pair = plain(4)
    assert_exact(weights(pair, data_plate=plate), pair.log_px)


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (lambda x: normal_model(x), lambda x: normal_guide(x)),
        (functools.partial(normal_model), functools.partial(normal_guide)),
        (lambda x, y=2: normal_model(x), lambda x, *rest: normal_guide(x)),
    ],
    ids=["lambda", "partial", "defaults"],
)
def test_any_callable(model: Callable[..., Any], guide: Callable[..., Any]) -> None:
    pair = plain(4)
    assert_exact(log_weights(model, guide, pair.x, num_particles=3), pair.log_px)


def test_float32_stays_float32() -> None:
    pair = plain(4)
    table = log_weights(pair.model, pair.guide, pair.x.float(), num_particles=3)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), pair.log_px.expand(3, -1), atol=1e-5, rtol=0)


def test_a_numpy_array_is_data() -> None:
    pair = plain(4)
    assert_exact(log_weights(pair.model, pair.guide, pair.x.numpy(), num_particles=3), pair.log_px)


# --- a guide that is off: the weights of given draws ------------------------------------------------------------------


def shifted_guide(x: torch.Tensor) -> None:
    """Exact but for a shift of the mean by 0.4."""
    loc, scale, _ = posterior(x[:, None])
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + 0.4, scale))


@pytest.mark.parametrize("vectorize", ["auto", False])
def test_weights_are_log_p_minus_log_q_of_the_draws(vectorize: Any) -> None:
    x, drawn = data(3), []

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            drawn.append(z)
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    table = log_weights(model, shifted_guide, x, num_particles=4, vectorize=vectorize, seed=0)
    z = drawn[-1] if vectorize else torch.stack(drawn[-4:])
    loc, scale, _ = posterior(x[:, None])
    by_hand = (
        dist.Normal(0.0, 1.0).log_prob(z)
        + dist.Normal(z, SIGMA).log_prob(x)
        - dist.Normal(loc + 0.4, scale).log_prob(z)
    )
    torch.testing.assert_close(table, by_hand, atol=1e-10, rtol=0)


@pytest.mark.statistical
def test_the_distribution_of_a_weight_does_not_depend_on_the_other_data() -> None:
    """Mean weight of one datum alone and in company: both estimate the ELBO, closed form log p - 0.4^2 / (2 s^2)."""
    x = data(3)
    _, scale, log_px = posterior(x[:, None])
    expected = log_px - 0.5 * (0.4 / scale) ** 2
    for table in (
        log_weights(normal_model, shifted_guide, x, num_particles=4000, seed=1)[:, :1],
        log_weights(normal_model, shifted_guide, x[:1], num_particles=4000, seed=2),
    ):
        assert (table.mean() - expected[0]).abs() < 5 * table.std() / 4000**0.5


def test_elbo_is_the_mean_weight() -> None:
    x = data(3)
    table = log_weights(normal_model, shifted_guide, x, num_particles=5, seed=3)
    torch.testing.assert_close(elbo(normal_model, shifted_guide, x, num_particles=5, seed=3), table.mean(0))


@pytest.mark.parametrize("vectorize", ["auto", False])
def test_gradient_is_that_of_autograd_by_hand(vectorize: Any) -> None:
    """d/dloc and d/dscale of the ELBO with z = loc + scale * e, e from the same seed."""
    loc = pyro.param("loc", torch.tensor([0.1, -0.2, 0.7], dtype=torch.float64))
    scale = pyro.param(
        "scale", torch.tensor([0.5, 1.5, 0.9], dtype=torch.float64), constraint=dist.constraints.positive
    )
    draws = []

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            draws.append(z)
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc"), pyro.param("scale")))

    x = data(3)
    leaves = [pyro.param(name).unconstrained() for name in ("loc", "scale")]
    value = elbo(model, guide, x, num_particles=6, vectorize=vectorize).sum()
    got = torch.autograd.grad(value, leaves)
    z = (draws[-1] if vectorize else torch.stack(draws[-6:])).detach()
    noise = ((z - loc) / scale).detach()
    z = loc + scale * noise
    by_hand = (
        dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, SIGMA).log_prob(x) - dist.Normal(loc, scale).log_prob(z)
    )
    expected = torch.autograd.grad(by_hand.mean(0).sum(), leaves)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_gradient_reaches_the_modules() -> None:
    pair = ORACLES["methods"](4)
    elbo(pair.model, pair.guide, pair.x).sum().backward()
    (gradient,) = (p.grad for p in pair.model.__self__.parameters())
    assert gradient is not None
    assert gradient.isfinite().all()


# --- proposals with weights of known mean -----------------------------------------------------------------------------


def mean_weight(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean weight of each datum and its standard error."""
    w = table.double().exp()
    return w.mean(0), w.std(0) / math.sqrt(len(w))


@pytest.mark.statistical
def test_auto_normal_is_unbiased_for_the_evidence() -> None:
    """AutoNormal's auxiliary draw feeds a Delta with a density: the mean weight is p(x)."""
    x = data(3)
    guide = AutoNormal(normal_model, init_scale=0.8)
    guide(x)
    mean, error = mean_weight(log_weights(normal_model, guide, x, num_particles=20_000, seed=0))
    assert ((mean - posterior(x[:, None])[2].exp()).abs() < 5 * error).all()


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("prior", "proposal"),
    [
        (dist.HalfNormal(1.0), dist.Normal(0.5, 1.0)),
        (dist.Uniform(0.0, 1.0), dist.Normal(0.5, 0.5)),
        (dist.Gamma(2.0, 2.0), dist.Normal(1.0, 1.0)),
        (dist.Uniform(0.0, 1.0), dist.Uniform(-0.5, 1.5)),
        (dist.Beta(2.0, 2.0), dist.HalfNormal(1.0)),
        (dist.Poisson(2.0), dist.Geometric(0.3)),
    ],
    ids=str,
)
def test_a_guide_wider_than_the_prior_has_weights_zero_and_is_unbiased(
    prior: dist.Distribution, proposal: dist.Distribution
) -> None:
    """Without a likelihood that depends on z the mean weight is p(x) = N(x; 0, 1)."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", proposal)

    x = data(2)
    table = log_weights(model, guide, x, num_particles=20_000, seed=0)
    mean, error = mean_weight(table)
    assert ((mean - dist.Normal(0.0, 1.0).log_prob(x).exp()).abs() < 5 * error).all()
    assert not table.isnan().any()
    assert bool(table.isneginf().any()) == (not isinstance(prior, dist.Poisson))


# --- further arguments ------------------------------------------------------------------------------------------------


def with_noise(x: torch.Tensor, noise: torch.Tensor) -> None:
    """x ~ N(z, noise), noise one number for each datum or for all."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, noise), obs=x)


def exact_with_noise(x: torch.Tensor, noise: torch.Tensor) -> None:
    precision = 1 + noise**-2
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / noise**2 / precision, precision.rsqrt()))


@pytest.mark.parametrize("options", [{}, {"data_args": (0,)}, {"vectorize": False}], ids=str)
def test_arguments_with_a_row_for_each_datum_go_with_x(options: dict[str, Any]) -> None:
    x, noise = data(5), torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    expected = dist.Normal(0.0, (1 + noise**2).sqrt()).log_prob(x)
    assert_exact(log_weights(with_noise, exact_with_noise, x, noise, num_particles=3, **options), expected)


def test_a_vector_that_has_the_length_of_x_by_chance_is_kept_whole_on_request() -> None:
    pair = ORACLES["labels"](3)
    assert_exact(weights(pair), pair.log_px)


def test_an_argument_that_is_not_a_tensor_is_passed_on() -> None:
    def model(x: torch.Tensor, settings: dict[str, float], flag: None) -> None:
        assert flag is None
        with_noise(x, torch.tensor(settings["noise"], dtype=torch.float64))

    def guide(x: torch.Tensor, settings: dict[str, float], flag: None) -> None:
        exact_with_noise(x, torch.tensor(settings["noise"], dtype=torch.float64))

    x = data(4)
    expected = dist.Normal(0.0, torch.tensor(1.25, dtype=x.dtype).sqrt()).log_prob(x)
    assert_exact(log_weights(model, guide, x, {"noise": 0.5}, None, num_particles=3), expected)


# --- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", ["auto", False])
def test_a_seeded_call_repeats_bit_for_bit(vectorize: Any) -> None:
    first, second = (
        log_weights(normal_model, shifted_guide, data(3), num_particles=4, seed=5, vectorize=vectorize) for _ in "ab"
    )
    assert first.equal(second)


def test_an_unseeded_call_draws_from_the_global_state() -> None:
    first, second = (log_weights(normal_model, shifted_guide, data(3), num_particles=4) for _ in "ab")
    assert not first.equal(second)


def test_particles_and_data_have_draws_of_their_own() -> None:
    table = log_weights(normal_model, shifted_guide, torch.zeros(6, dtype=torch.float64), num_particles=5, seed=0)
    assert len(table.unique()) == 30
