"""`importance(model_dtype=)`: products in half precision, everything else as it was, and what it costs is stated."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn import functional

from pyro_lvm.errors import DataTypeError, UnreliableEstimateWarning
from pyro_lvm.evidence import LogMarginal, importance
from pyro_lvm.evidence.precision import in_half
from tests.references import data, normal_guide, normal_model, plain

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")

HALVES = [torch.bfloat16, torch.float16]


class Decoder:
    """A small Bernoulli VAE of plain functions; keeps the dtypes that it met."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 30), torch.nn.Tanh(), torch.nn.Linear(30, 40)).to(dtype)
        self.encoder = torch.nn.Linear(40, 4).to(dtype)
        self.x = torch.bernoulli(torch.full((20, 40), 0.4)).to(dtype)
        self.met: set[tuple[str, torch.dtype]] = set()

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            logits = self.net(z)
            self.met |= {("z", z.dtype), ("logits", logits.dtype)}
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = 0.1 * self.encoder(x)
            self.met.add(("loc", loc.dtype))
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def estimate(pair: Decoder, **options: Any) -> LogMarginal:
    return importance(pair.model, pair.guide, pair.x, **{"num_particles": 200, "seed": 0} | options)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_numbers_are_those_of_rounded_products(half: torch.dtype, dtype: torch.dtype) -> None:
    """Against a decoder that rounds by hand; the draws are those of full precision."""
    pair = Decoder(dtype)

    def rounding_model(x: torch.Tensor) -> None:
        def linear(layer: Any, value: torch.Tensor) -> torch.Tensor:
            weight, bias = layer.weight.to(half), layer.bias.to(half)
            return functional.linear(value.to(half), weight, bias).to(dtype)

        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            logits = linear(pair.net[2], linear(pair.net[0], z).tanh())
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    result = estimate(pair, model_dtype=half, chunks=(10, 50))
    expected = importance(rounding_model, pair.guide, pair.x, num_particles=200, seed=0, chunks=(10, 50))
    torch.testing.assert_close(result.value, expected.value, rtol=0, atol=0)
    torch.testing.assert_close(result.khat, expected.khat, rtol=0, atol=0)
    assert pair.met == {("z", dtype), ("logits", dtype), ("loc", dtype)}
    assert result.provenance["dtype"] == str(dtype)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_the_stated_error_is_that_of_the_same_draws(half: torch.dtype) -> None:
    """All data and all draws, in one chunk, are those that were measured: 20 data, 100 particles."""
    pair = Decoder()
    options = {"num_particles": 100, "chunks": (20, 100), "seed": 0}
    found = estimate(pair, model_dtype=half, **options)
    moved = found.value - estimate(pair, **options).value
    stated = found.provenance["model_dtype"]
    assert (stated["dtype"], stated["data"], stated["particles"]) == (str(half), 20, 100)
    assert stated["mean_log_p"] == pytest.approx(float(moved.mean()), abs=1e-12)
    assert stated["rms_log_p"] == pytest.approx(float(moved.square().mean().sqrt()), abs=1e-12)
    assert stated["largest_log_p"] == pytest.approx(float(moved.abs().max()), abs=1e-12)
    assert 0 < stated["largest_log_p"] <= stated["largest_log_weight"]
    # 40 logits of size one, each rounded to 8 or 11 bits by three products, add up to less than their worst case
    assert stated["largest_log_weight"] < 40 * 3 * torch.finfo(half).eps


def test_a_model_without_products_is_not_touched() -> None:
    pair = plain(7)
    result = importance(pair.model, pair.guide, pair.x, num_particles=3, model_dtype=torch.bfloat16)
    torch.testing.assert_close(result.value, pair.log_px, atol=1e-10, rtol=0)
    assert result.provenance["model_dtype"]["largest_log_weight"] == 0
    assert result.verdict.endswith("posterior.")
    assert result.provenance["model"] == pair.model.__qualname__


X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
PRODUCTS = {
    "@": lambda x: x @ x.mT,
    "matmul": lambda x: torch.matmul(x, x.mT),
    "bmm": lambda x: torch.bmm(x, x.mT),
    "mm": lambda x: x[0].mm(x[1].T),
    "mv": lambda x: x[0].mv(x[1, 0]),
    "addmm": lambda x: torch.addmm(x[0, :, :3], x[0], x[1].T),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "einsum of a list": lambda x: torch.einsum("bij,bkj->bik", [x, x]),
    "conv1d": lambda x: functional.conv1d(x, x[:, :, :2]),
    "conv_transpose2d": lambda x: functional.conv_transpose2d(x[None], x[:, None, :2]),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x, x),
    "module": torch.nn.Conv1d(3, 2, 2),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_rounded_and_return_in_full(product: Any) -> None:
    rounded = in_half(product, torch.bfloat16)(X)
    assert rounded.dtype == torch.float32
    assert not rounded.equal(product(X))
    torch.testing.assert_close(rounded, product(X), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("function", [torch.exp, torch.Tensor.sum, torch.sigmoid, lambda x: x * x, torch.logsumexp])
def test_all_else_is_not(function: Any) -> None:
    args = (0,) if function is torch.logsumexp else ()
    assert in_half(function, torch.bfloat16)(X, *args).equal(function(X, *args))


def test_products_of_integers_stay_exact() -> None:
    x = torch.arange(300, 309).reshape(3, 3)
    assert in_half(torch.matmul, torch.bfloat16)(x, x).equal(x @ x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, "bfloat16", torch.int8], ids=str)
def test_what_is_no_half_precision_is_refused(dtype: Any) -> None:
    with pytest.raises(DataTypeError, match=r"model_dtype: expected torch.bfloat16 or torch.float16, got .*Leave it"):
        importance(normal_model, normal_guide, data(3), model_dtype=dtype)


def test_the_verdict_says_what_is_not_small() -> None:
    pair = Decoder()
    few, many = (estimate(pair, num_particles=k, model_dtype=torch.bfloat16) for k in (50, 200_000))
    assert "bfloat16" not in few.verdict
    stated = many.provenance["model_dtype"]
    assert f"bfloat16 moves log p-hat of a datum by {stated['rms_log_p']:.1g} nats" in many.verdict
    assert f"the mean by {stated['mean_log_p']:.1g}." in repr(many)
    assert not math.isnan(stated["mean_log_p"])


def test_overflow_in_float16_is_nonfinite_and_said() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            big = (torch.full((1, 1), 1e5) @ torch.ones(1, 1)).squeeze()
            pyro.sample("x", dist.Normal(z + big - 1e5, 1.0), obs=x)

    x = data(4).float()
    with pytest.warns(UnreliableEstimateWarning, match="4 nonfinite|4 no_support"):
        result = importance(model, normal_guide, x, num_particles=30, model_dtype=torch.float16)
    assert "not to be quoted" in result.verdict
