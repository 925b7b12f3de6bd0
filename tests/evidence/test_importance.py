"""`importance`: exact where the guide is, calibrated where it is not, and the same however it is cut."""

import itertools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_lvm.errors import DataTypeError, ShapeError, UnreliableEstimateWarning
from pyro_lvm.evidence import LogMarginal, importance
from tests.references import (
    ENUMERATED,
    ORACLES,
    SIGMA,
    Pair,
    data,
    images,
    normal_guide,
    normal_model,
    plain,
    posterior,
)

CHUNKS = [None, (1, 1), (2, 2), (3, 5), (1, 100), (100, 1), (50, 7)]

few_particles = pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")


def estimate(pair: Pair, **options: Any) -> LogMarginal:
    return importance(pair.model, pair.guide, pair.x, *pair.args, **{"num_particles": 3} | pair.options | options)


def assert_exact(result: LogMarginal, log_px: torch.Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(result.value, log_px, atol=atol, rtol=0)


# --- exact guides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
@pytest.mark.parametrize("num_data", [1, 2, 50])
def test_an_exact_guide_has_zero_variance(oracle: Callable[[int], Pair], num_data: int) -> None:
    pair = oracle(num_data)
    result = estimate(pair)
    assert_exact(result, pair.log_px)
    assert set(result.status) == {"zero_variance"}
    assert not result.stderr.any()
    assert_exact(LogMarginal(**vars(result) | {"value": result.elbo}), pair.log_px)
    assert (result.ess == 3).all()


@pytest.mark.parametrize("oracle", [plain, images, ORACLES["data -3, pixels -1"], ORACLES["labels"], ORACLES["mixed"]])
@pytest.mark.parametrize("num_particles", [1, 2, 3, 7])
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@few_particles
def test_any_chunks_and_any_number_of_particles(
    oracle: Callable[[int], Pair], num_particles: int, chunks: tuple[int, int] | None
) -> None:
    pair = oracle(5)
    result = estimate(pair, num_particles=num_particles, chunks=chunks)
    assert_exact(result, pair.log_px)
    assert result.num_particles == num_particles
    assert (result.status == ("zero_variance" if num_particles > 1 else "unreliable")).all()


@pytest.mark.parametrize("oracle", ENUMERATED.values(), ids=ENUMERATED)
@pytest.mark.parametrize("num_data", [1, 2, 50])
@pytest.mark.parametrize("chunks", [None, (3, 2)], ids=str)
def test_without_a_guide_the_result_is_exact(
    oracle: Callable[[int], Pair], num_data: int, chunks: tuple[int, int] | None
) -> None:
    pair = oracle(num_data)
    result = estimate(pair, chunks=chunks)
    assert_exact(result, pair.log_px)
    assert set(result.status) == {"exact"}
    assert not result.stderr.any()
    assert not result.bias.any()
    assert result.method in ("enumeration", "exact density")
    assert bool(result.provenance["enumerated"]) == (result.method == "enumeration")


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
def test_data_plate_none_is_one_joint_result(oracle: Callable[[int], Pair]) -> None:
    pair = oracle(4)
    result = estimate(pair, data_plate=None, chunks=(2, 2))
    assert_exact(result, pair.log_px.sum(0, keepdim=True))
    assert result.provenance["finished"]


@pytest.mark.parametrize("num_data", [1, 3, 200])
def test_float32(num_data: int) -> None:
    """Computed in float32, summed in float64; equal weights are recognised through the rounding."""
    for oracle in (plain, images):
        pair = oracle(num_data)
        result = importance(pair.model, pair.guide, pair.x.float(), num_particles=50)
        assert result.value.dtype == torch.float64
        assert_exact(result, pair.log_px, atol=2e-5)
        assert set(result.status) == {"zero_variance"}
        assert result.provenance["dtype"] == "torch.float32"


def test_integer_data() -> None:
    """Counts x ~ Poisson(z), z ~ Gamma(2, 3): the posterior is Gamma(2 + x, 4), the evidence negative binomial."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 3.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2.0 + x.double(), 4.0))

    x = torch.tensor([0, 1, 5, 2])
    expected = dist.NegativeBinomial(
        torch.tensor(2.0, dtype=torch.float64), probs=torch.tensor(0.25, dtype=torch.float64)
    )
    assert_exact(importance(model, guide, x.double(), num_particles=3), expected.log_prob(x.double()))
    # torch's lgamma of an integer tensor is float32
    assert_exact(importance(model, guide, x, num_particles=3), expected.log_prob(x.double()), atol=1e-6)


# --- calibrated guides ------------------------------------------------------------------------------------------------

SHIFT = 0.4


def shifted_guide(x: torch.Tensor) -> None:
    """Exact but for the mean: KL = SHIFT^2 / (2 s^2)."""
    loc, scale, _ = posterior(x[:, None])
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + SHIFT, scale))


def narrow_guide(x: torch.Tensor) -> None:
    """Half the standard deviation of the posterior: the weights have no variance, k-hat is 3/4."""
    loc, scale, _ = posterior(x[:, None])
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale / 2))


@pytest.mark.statistical
@pytest.mark.parametrize("chunks", [None, (3, 300)], ids=str)
def test_value_elbo_and_gap_of_a_guide_that_is_off_by_a_known_amount(chunks: tuple[int, int] | None) -> None:
    x, num_particles = data(8), 4000
    _, scale, log_px = posterior(x[:, None])
    kl = SHIFT**2 / (2 * scale**2)
    result = importance(normal_model, shifted_guide, x, num_particles=num_particles, chunks=chunks, seed=0)
    # log w is normal with variance 2 KL; the relative variance of w is exp(2 KL) - 1
    assert ((result.value - log_px).abs() < 5 * result.stderr).all()
    assert ((result.elbo - (log_px - kl)).abs() < 5 * (2 * kl / num_particles).sqrt()).all()
    torch.testing.assert_close(result.stderr, ((2 * kl).exp() - 1).div(num_particles).sqrt(), rtol=0.1, atol=0)
    torch.testing.assert_close(result.ess, num_particles * (-2 * kl).exp(), rtol=0.1, atol=0)
    torch.testing.assert_close(result.bias, -(result.stderr**2) / 2)
    torch.testing.assert_close(result.gap, result.value - result.elbo)
    assert set(result.status) == {"no_fault_found"}


@pytest.mark.statistical
def test_the_standard_error_is_the_spread_over_repeats() -> None:
    """200 repeats: the standard deviation of a standard deviation is 5 %; the bound is 15 %."""
    x = data(1).expand(200)
    result = importance(normal_model, shifted_guide, x, num_particles=500, seed=1)
    assert result.stderr.square().mean().sqrt() == pytest.approx(float(result.value.std()), rel=0.15)
    assert (result.value.mean() - posterior(x[:, None])[2][0]).abs() < 5 * result.value.std() / 200**0.5


@pytest.mark.statistical
def test_a_narrow_guide_is_found_out() -> None:
    """The weights' tail index is 1 - 1/4 = 3/4, above the threshold of 0.7."""
    with pytest.warns(UnreliableEstimateWarning, match=r"of 4 data: \d unreliable"):
        result = importance(normal_model, narrow_guide, data(4), num_particles=20_000, seed=0)
    assert result.khat.mean() == pytest.approx(0.75, abs=0.15)


@pytest.mark.statistical
def test_draws_do_not_depend_on_the_other_data() -> None:
    """Estimates of one datum alone and in company agree within their errors."""
    x = data(5)
    alone = importance(normal_model, shifted_guide, x[2:3], num_particles=4000, seed=1)
    together = importance(normal_model, shifted_guide, x, num_particles=4000, seed=2)
    error = math.hypot(float(alone.stderr), float(together.stderr[2]))
    assert abs(float(alone.value - together.value[2])) < 5 * error


@few_particles
def test_the_record_is_that_of_the_log_weights_of_the_same_seed() -> None:
    from pyro_lvm.ops import effective_sample_size, log_mean_exp
    from pyro_lvm.tracing import log_weights

    x = data(3)
    table = log_weights(normal_model, shifted_guide, x, num_particles=50, seed=4)
    result = importance(normal_model, shifted_guide, x, num_particles=50, seed=4, chunks=(3, 50))
    torch.testing.assert_close(result.value, log_mean_exp(table), atol=1e-12, rtol=0)
    torch.testing.assert_close(result.elbo, table.mean(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(result.ess, effective_sample_size(table), atol=1e-9, rtol=0)


@few_particles
@pytest.mark.parametrize("chunks", [None, (2, 7)], ids=str)
def test_a_seeded_call_repeats_bit_for_bit(chunks: tuple[int, int] | None) -> None:
    first, second = (
        importance(normal_model, shifted_guide, data(5), num_particles=100, seed=3, chunks=chunks) for _ in "ab"
    )
    assert first.value.equal(second.value)


@few_particles
def test_an_unseeded_call_draws_anew() -> None:
    first, second = (importance(normal_model, shifted_guide, data(3), num_particles=100) for _ in "ab")
    assert not first.value.equal(second.value)


@few_particles
def test_every_chunk_has_draws_of_its_own() -> None:
    """Six copies of one datum, cut in all ways: no two estimates share their draws."""
    x = torch.ones(6, dtype=torch.float64)
    values = [
        importance(normal_model, shifted_guide, x, num_particles=40, seed=0, chunks=chunks).value
        for chunks in ((6, 40), (2, 40), (6, 10), (2, 10))
    ]
    assert all(len(v.unique()) == 6 for v in values)


@pytest.mark.statistical
def test_a_discrete_guide_that_is_off_is_no_reason_for_doubt() -> None:
    """Three weights, all bounded, each drawn thousands of times: the error estimate is as good as it gets."""
    means = torch.tensor([-1.0, 1.0, 2.0])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(torch.ones(3)))

    x = data(4).float()
    result = importance(model, guide, x, num_particles=20_000, seed=0)
    expected = dist.Normal(means, 1.0).log_prob(x[:, None]).logsumexp(-1) - math.log(3)
    assert ((result.value - expected).abs() < 5 * result.stderr).all()
    assert set(result.status) == {"no_fault_found"}


# --- statuses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 2, 40])
@pytest.mark.parametrize("source", ["tensor", "dataset"])
@pytest.mark.parametrize("chunks", [None, (1, 2), (7, 1)], ids=str)
def test_a_datum_that_is_not_a_number_spoils_only_itself(row: int, source: str, chunks: tuple[int, int] | None) -> None:
    pair = plain(50)
    x = pair.x.clone()
    x[row] = torch.nan
    given = x if source == "tensor" else Rows(x)
    with pytest.warns(UnreliableEstimateWarning, match="of 50 data: 1 nonfinite"):
        result = importance(pair.model, pair.guide, given, num_particles=3, chunks=chunks)
    assert np.flatnonzero(result.status == "nonfinite").tolist() == [row]
    others = torch.arange(50) != row
    torch.testing.assert_close(result.value[others], pair.log_px[others], atol=1e-10, rtol=0)


def test_a_datum_out_of_reach_has_no_support() -> None:
    """The guide stays in [0, 1] where the prior is [0, 1] and the likelihood of the second datum needs z > 5."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.factor("x", torch.where(z > x, 0.0, -torch.inf))

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(0.0, 1.0))

    with pytest.warns(UnreliableEstimateWarning, match="1 no_support"):
        result = importance(model, guide, torch.tensor([-1.0, 5.0, -1.0]), num_particles=100)
    assert result.status.tolist() == ["zero_variance", "no_support", "zero_variance"]
    assert result.value.tolist() == [0.0, -math.inf, 0.0]


@few_particles
def test_draws_of_zero_density_do_not_hide_a_heavy_tail() -> None:
    """Half of the draws are impossible; the others have the tail of a guide that is far too narrow."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("sign", dist.Delta(z[..., 0].sign()), obs=torch.ones(len(x)))
            pyro.sample("x", dist.Normal(z.sum(-1), 3.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 0.4).to_event(1))

    result = importance(model, guide, torch.zeros(5), num_particles=1000, seed=0)
    assert bool(result.khat.isfinite().all())
    assert "no_fault_found" not in result.status


def test_one_particle_is_no_estimate() -> None:
    with pytest.warns(UnreliableEstimateWarning, match="of 3 data: 3 unreliable"):
        result = importance(normal_model, shifted_guide, data(3), num_particles=1)
    assert result.khat.isnan().all()
    assert result.stderr.isnan().all() or result.stderr.isinf().all()


# --- sources of data --------------------------------------------------------------------------------------------------


class Rows(Dataset):
    """A map-style data set of tensors."""

    def __init__(self, x: torch.Tensor, *others: torch.Tensor) -> None:
        self.columns = (x, *others)

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, i: int) -> Any:
        row = tuple(column[i] for column in self.columns)
        return row if len(row) > 1 else row[0]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([torch.zeros(())])


SOURCES: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda x: x.numpy(),
    "read-only numpy": lambda x: np.broadcast_to(x.numpy(), x.shape),
    "dataset": Rows,
    "tensor dataset": TensorDataset,
    "loader": lambda x: DataLoader(Rows(x), batch_size=2),
    "shuffled loader": lambda x: DataLoader(TensorDataset(x), batch_size=3, shuffle=True, drop_last=True),
    "transposed": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("chunks", [None, (2, 2)], ids=str)
@pytest.mark.parametrize("oracle", [plain, images])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_every_source_of_data_gives_the_result_of_the_tensor(
    oracle: Callable[[int], Pair], source: Callable[[torch.Tensor], Any], chunks: tuple[int, int] | None
) -> None:
    pair = oracle(7)
    assert_exact(importance(pair.model, pair.guide, source(pair.x), num_particles=3, chunks=chunks), pair.log_px)


@pytest.mark.parametrize("chunks", [None, (2, 2)], ids=str)
@pytest.mark.parametrize("wrap", [TensorDataset, Rows, lambda *c: DataLoader(TensorDataset(*c), batch_size=4)])
def test_the_items_of_a_data_set_are_the_arguments(wrap: Callable[..., Any], chunks: tuple[int, int] | None) -> None:
    pair = ORACLES["labels"](7)
    label, offsets = pair.args
    result = importance(pair.model, pair.guide, wrap(pair.x, label), offsets, num_particles=3, chunks=chunks)
    assert_exact(result, pair.log_px)


@pytest.mark.parametrize("num_data", [2, 7, 300])
def test_an_argument_beside_a_data_set_goes_with_its_rows(num_data: int) -> None:
    pair = ORACLES["mask_pixels"](num_data)
    result = importance(pair.model, pair.guide, Rows(pair.x), *pair.args, num_particles=3)
    assert_exact(result, pair.log_px)
    assert result.provenance["streamed"] == "data and particles"


def test_a_pair_tied_to_its_data_reads_a_data_set_whole() -> None:
    pair = ORACLES["conditioned_whole"](5)
    assert_exact(importance(pair.model, pair.guide, Rows(pair.x), num_particles=3, chunks=(2, 2)), pair.log_px)


def test_a_folded_pair_tied_to_a_data_set() -> None:
    """All of the rows, K times over."""
    n = 5

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            assert len(x) % n == 0, "only whole data sets"
            pyro.sample("x", dist.Normal(z.reshape(len(x), -1)[:, 0], SIGMA), obs=x)

    pair = plain(n)
    result = importance(model, pair.guide, Rows(pair.x), num_particles=3)
    assert_exact(result, pair.log_px)
    assert result.provenance["streamed"] == "particles"
    assert result.provenance["particles"]["model"] == "folded"


def test_a_data_set_is_read_once_for_each_chunk_of_data() -> None:
    reads: list[int] = []

    class Counting(Rows):
        def __getitem__(self, i: int) -> Any:
            reads.append(i)
            return super().__getitem__(i)

    pair = plain(20)
    importance(pair.model, pair.guide, Counting(pair.x), num_particles=10, chunks=(4, 2))
    assert len(reads) <= 20 + 3 * 3 + 2  # the probe reads its few rows apart, and so does the digest of the parameters


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (Stream(), DataTypeError, "IterableDataset"),
        (DataLoader(Stream()), DataTypeError, "IterableDataset"),
        (Rows(torch.empty(0)), ShapeError, "N >= 1"),
        ({"x": torch.zeros(3)}, DataTypeError, "dict"),
        (np.array(["a", "b"]), DataTypeError, "ndarray"),
    ],
    ids=["stream", "loader of a stream", "empty", "dict", "strings"],
)
def test_data_that_cannot_be_read(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        importance(normal_model, normal_guide, x)


def test_a_loader_without_batches_is_its_data_set() -> None:
    pair = plain(5)
    loader = DataLoader(Rows(pair.x), batch_size=None)
    assert_exact(importance(pair.model, pair.guide, loader, num_particles=3), pair.log_px)


def test_device_is_where_the_result_is() -> None:
    pair = plain(3)
    result = estimate(pair, device="cpu")
    assert result.provenance["device"] == "cpu"
    assert result.value.device.type == "cpu"


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_ctrl_c_returns_the_data_that_are_finished() -> None:
    pair = plain(10)

    def model(x: torch.Tensor) -> None:
        if len(x) == 2 and float(x[0]) == float(pair.x[6]):
            raise KeyboardInterrupt
        normal_model(x)

    result = importance(model, pair.guide, pair.x, num_particles=5, chunks=(2, 2))
    assert_exact(result, pair.log_px[:6])
    assert result.provenance["finished"] is False
    assert result.provenance["num_data"] == 10
    assert len(result) == 6


def test_ctrl_c_before_any_datum_is_finished_is_an_interrupt() -> None:
    def model(x: torch.Tensor) -> None:
        if len(x) == 5:
            raise KeyboardInterrupt
        normal_model(x)

    with pytest.raises(KeyboardInterrupt):
        importance(model, normal_guide, data(20), num_particles=5, chunks=(5, 5))


@pytest.mark.parametrize("limit", [1, 2, 5, 12])
@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_out_of_memory_halves_the_chunks(limit: int, error: Exception) -> None:
    """A model that holds at most so many (particle, datum) pairs at once."""
    pair = plain(7)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if len(x) not in (2, 3) and z.numel() > limit or len(x) > 3 and z.numel() > limit:
                raise error
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    result = importance(model, pair.guide, pair.x, num_particles=13, chunks=(7, 13))
    assert_exact(result, pair.log_px)
    assert result.num_particles == 13
    assert set(result.status) == {"zero_variance"}


def test_out_of_memory_for_a_single_particle_and_datum_is_raised() -> None:
    def model(x: torch.Tensor) -> None:
        normal_model(x)
        if float(x[-1]) == 9.0:
            raise RuntimeError("out of memory")

    x = data(10)
    x[7] = 9.0
    with pytest.raises(RuntimeError, match="out of memory"):
        importance(model, normal_guide, x, num_particles=4, chunks=(8, 4))


@pytest.mark.parametrize(
    ("chunks", "error"), [((0, 1), ShapeError), ((1, -1), ShapeError), ((1.5, 1), DataTypeError)], ids=str
)
def test_chunks_that_are_no_counts(chunks: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="chunks"):
        importance(normal_model, normal_guide, data(3), chunks=chunks)


# --- progress and warnings --------------------------------------------------------------------------------------------


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    pair = plain(4)
    estimate(pair, progress=False)
    assert capsys.readouterr().err == ""
    estimate(pair, progress=True)
    assert "100%" in capsys.readouterr().err


def test_the_warning_names_the_line_of_the_user() -> None:
    with pytest.warns(UnreliableEstimateWarning) as caught:
        importance(normal_model, shifted_guide, data(2), num_particles=1)
    assert [w.filename for w in caught] == [__file__]


def test_a_sound_pair_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importance(normal_model, shifted_guide, data(20), num_particles=1000, seed=0)
    assert not caught


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys, torch, pyro, pyro.distributions as dist
from pyro_lvm.evidence import importance
torch.set_num_threads(1)
decoder, encoder = torch.nn.Linear(10, 784), torch.nn.Linear(784, 10)
def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)
def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.1 * encoder(x), 1.0).to_event(1))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
import warnings; warnings.simplefilter("ignore")
x = (torch.rand(2000, 784) < 0.3).float()
peaks = [peak()]
importance(model, guide, x[:2], num_particles=2)
peaks.append(peak())
for num_data, num_particles in RUNS:
    importance(model, guide, x[:num_data], num_particles=num_particles)
    peaks.append(peak())
print(*peaks)
"""


def peaks(*runs: tuple[int, int]) -> list[float]:
    """Peak memory of a process in MB: at the start, after a first small call, and after each run (N, K)."""
    script = MEMORY.replace("RUNS", repr(list(runs)))
    # a fixed threshold returns every large tensor to the system: by default glibc keeps some, by chance 0 to 20 MB
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return [float(figure) for figure in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_particles() -> None:
    start, _, few, many = peaks((100, 5000), (100, 50_000))
    assert few - start < 600
    assert many - few < 20


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_data() -> None:
    start, _, few, many = peaks((200, 500), (2000, 500))
    assert few - start < 600
    assert many - few < 20


def test_all_options_together() -> None:
    """Every combination of the ways to cut and to run gives one number."""
    pair = ORACLES["labels"](6)
    for vectorize, chunks, seed in itertools.product(("auto", True, False), (None, (4, 2)), (None, 1)):
        assert_exact(estimate(pair, vectorize=vectorize, chunks=chunks, seed=seed), pair.log_px)
