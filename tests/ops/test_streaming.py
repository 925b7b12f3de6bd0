"""Streamed numbers against the one-shot functions for every way of cutting, and the statuses."""

import math

import pytest
import torch

from pyro_lvm import ops
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.ops import streaming

INF, NAN = math.inf, math.nan
EPS = torch.finfo(torch.float64).eps


def accumulate(log_weights, chunk, noise_scale=None):
    num_particles, num_data = log_weights.shape
    noise_scale = torch.ones(num_data, dtype=torch.float64) if noise_scale is None else noise_scale
    accumulator = ops.WeightAccumulator(num_data, num_particles)
    for part in log_weights.split(chunk):
        accumulator.update(part, noise_scale)
    return accumulator.summary()


def mixed_data(num_particles):
    """Ordinary, heavy, far-off, zero-containing, unsupported, NaN and infinite data side by side."""
    torch.manual_seed(0)
    table = torch.randn(num_particles, 9, dtype=torch.float64)
    table[:, 1] *= 5
    table[:, 2] -= 1e5
    table[0, 3] = -INF
    table[:, 4] = -INF
    table[-1, 5] = NAN
    table[0, 6] = INF
    table[:, 7] = -INF
    table[-1, 7] = -2.0
    table[:, 8] += torch.arange(num_particles) * 40.0  # the running maximum moves at every step
    return table


def spread_of_the_mean(log_weights):
    """Standard error of the mean log-weight; equal weights have none."""
    if len(log_weights) == 1:
        return torch.full((log_weights.shape[1],), NAN, dtype=torch.float64)
    return log_weights.std(0) / len(log_weights) ** 0.5


@pytest.mark.parametrize("num_particles", [1, 2, 3, 25, 100, 401])
@pytest.mark.parametrize("chunk", [1, 2, 7, 100, 1000])
def test_every_chunking_equals_the_one_shot_functions(num_particles, chunk):
    log_weights = mixed_data(num_particles)
    summary = accumulate(log_weights, chunk)
    expected = {
        "value": ops.log_evidence(log_weights),
        "stderr": ops.standard_error(log_weights),
        "bias": ops.delta_bias(log_weights),
        "elbo": ops.elbo(log_weights),
        "elbo_stderr": spread_of_the_mean(log_weights),
        "ess": ops.effective_sample_size(log_weights),
        "khat": ops.pareto_khat(log_weights),
        "spread": log_weights.amax(0) - log_weights.amin(0),
    }
    for name, value in expected.items():
        rtol = 1e-10 if name == "elbo_stderr" else 1e-12  # of log-weights near -1e5, the mean is right to 1e-11
        torch.testing.assert_close(getattr(summary, name), value, rtol=rtol, atol=1e-12, equal_nan=True, msg=name)
    assert summary.num_particles == num_particles
    assert all(getattr(summary, name).dtype == torch.float64 for name in expected)


@pytest.mark.parametrize("num_particles", [2, 3, 100])
def test_equal_weights_are_zero_variance(num_particles):
    torch.manual_seed(1)
    scale = torch.tensor([100.0, 100.0, 1.0], dtype=torch.float64)
    jitter = torch.tensor([60.0, 70.0, 70.0], dtype=torch.float64) * EPS * torch.tensor([100.0, 100.0, 100.0])
    log_weights = torch.full((num_particles, 3), 0.0, dtype=torch.float64)
    log_weights[0] = jitter  # a spread of 60 or 70 roundings of size 100; the last datum says its terms have size 1
    summary = accumulate(log_weights, 2, scale)
    assert ops.status_names(summary.status)[0] == "zero_variance"
    assert ops.status_names(summary.status)[1:] == ("unreliable", "unreliable")
    assert (summary.stderr[0], summary.bias[0], summary.ess[0]) == (0.0, 0.0, num_particles)
    assert summary.khat[0].isnan()
    assert (summary.stderr[1:] > 0).all()
    torch.testing.assert_close(summary.noise, 64 * EPS * scale, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_noise_follows_the_dtype_of_the_weights(dtype):
    log_weights = torch.zeros(3, 2, dtype=dtype)
    summary = accumulate(log_weights, 1, torch.tensor([1.0, 300.0]))
    expected = 64 * torch.finfo(dtype).eps * torch.tensor([1.0, 300.0], dtype=torch.float64)
    torch.testing.assert_close(summary.noise, expected, rtol=1e-15, atol=0)
    assert summary.value.dtype == torch.float64


def test_weights_equal_up_to_coarse_rounding_report_no_variance_at_all():
    log_weights = torch.tensor([[0.0], [0.05], [0.0]], dtype=torch.float16)  # 64 eps = 0.0625
    summary = accumulate(log_weights, 2)
    assert ops.status_names(summary.status) == ("zero_variance",)
    assert (summary.stderr.item(), summary.bias.item(), summary.ess.item()) == (0.0, 0.0, 3.0)


def test_noise_is_the_largest_over_the_chunks():
    accumulator = ops.WeightAccumulator(2, 3)
    for scale in ([1.0, 5.0], [4.0, 2.0], [3.0, 3.0]):
        accumulator.update(torch.zeros(1, 2, dtype=torch.float64), torch.tensor(scale))
    assert accumulator.summary().noise.tolist() == [64 * EPS * 4, 64 * EPS * 5]


@pytest.mark.parametrize("scale", [INF, NAN])
def test_unknown_noise_is_never_zero_variance(scale):
    summary = accumulate(torch.zeros(3, 1), 3, torch.tensor([scale]))
    assert ops.status_names(summary.status) == ("unreliable",)


def test_float32_weights_are_accumulated_in_float64():
    torch.manual_seed(2)
    log_weights = torch.randn(1000, 3)
    summary = accumulate(log_weights, 100)
    torch.testing.assert_close(summary.value, ops.log_evidence(log_weights.double()), rtol=1e-12, atol=1e-12)


def test_one_particle_is_unreliable_without_an_error():
    summary = accumulate(torch.tensor([[-2.0]]), 1)
    assert summary.value.item() == -2.0
    assert summary.ess.item() == 1.0
    assert ops.status_names(summary.status) == ("unreliable",)
    assert torch.stack([summary.stderr, summary.bias, summary.khat]).isnan().all()


def test_bad_data_have_their_own_status_and_spoil_nothing():
    log_weights = mixed_data(100)
    summary = accumulate(log_weights, 30)
    names = ops.status_names(summary.status)
    assert names[0] == names[2] == "no_fault_found"
    assert names[1] == names[7] == names[8] == "unreliable"
    assert names[4:7] == ("no_support", "nonfinite", "nonfinite")
    assert summary.elbo[3].item() == summary.value[4].item() == -INF
    assert summary.khat[7].item() == INF


def classify(khat, num_particles, value=0.0, spread=1.0, noise=0.0, flat_tail=False, even=False):
    numbers = [torch.tensor([number], dtype=torch.float64) for number in (value, spread, noise, khat)]
    flags = torch.tensor([flat_tail]), torch.tensor([even])
    return ops.status_names(ops.classify(*numbers, *flags, num_particles=num_particles))[0]


def test_bounded_weights_with_a_flat_tail_are_no_fault():
    # Weights 1 and 2, half each: 500 of 1,000 are at the bound, more than the 94 of the tail.
    accumulator = ops.WeightAccumulator(num_data=1, num_particles=1000)
    accumulator.update(torch.tensor([1.0, 2.0]).double().log().repeat(500)[:, None], torch.ones(1))
    summary = accumulator.summary()
    assert ops.status_names(summary.status) == ("no_fault_found",)
    assert summary.khat.isnan().all()


@pytest.mark.parametrize(
    ("khat", "num_particles", "status"),
    [
        (-0.2, 1000, "no_fault_found"),
        (0.4999, 1000, "no_fault_found"),
        (0.5, 1000, "heavy_tail"),
        (0.66, 1000, "heavy_tail"),
        (0.67, 1000, "unreliable"),  # 1 - 1 / log10(1000) = 0.667
        (0.7, 10_000, "heavy_tail"),  # capped at 0.7
        (0.7001, 10_000, "unreliable"),
        (0.4999, 100, "no_fault_found"),
        (0.5, 100, "heavy_tail"),  # 1 - 1 / log10(100) = 0.5
        (0.5001, 100, "unreliable"),
        (0.28, 25, "no_fault_found"),  # 1 - 1 / log10(25) = 0.285: below 0.5 the threshold wins
        (0.29, 25, "unreliable"),
        (NAN, 1000, "unreliable"),
        (INF, 1000, "unreliable"),
        (NAN, 1, "unreliable"),
    ],
)
def test_status_follows_khat(khat, num_particles, status):
    assert classify(khat, num_particles) == status


def test_at_a_threshold_below_one_half_the_estimate_is_unreliable():
    assert classify(ops.khat_threshold(50), 50) == "unreliable"


def test_nearly_equal_weights_are_not_unreliable_by_the_tail_of_their_differences():
    assert classify(0.9, 1000, even=True) == "heavy_tail"
    assert classify(0.2, 1000, even=True) == "no_fault_found"
    assert classify(NAN, 1, even=True) == classify(INF, 1000, even=True) == "unreliable"
    torch.manual_seed(0)
    noise = 1e-3 * torch.rand(1000, 200, dtype=torch.float64).reciprocal().clamp(max=50).log()  # an exponential tail
    accumulator = ops.WeightAccumulator(num_data=200, num_particles=1000)
    accumulator.update(noise, torch.ones(200))
    assert "unreliable" not in ops.status_names(accumulator.summary().status)


def test_status_order_of_precedence():
    assert classify(0.1, 1000, spread=1e-3, noise=1e-3) == "zero_variance"
    assert classify(NAN, 1, spread=0.0, noise=1e-3) == "unreliable"  # one weight has no variance
    assert classify(0.1, 1000, value=-INF, spread=NAN) == "no_support"
    assert classify(0.1, 1000, value=INF, spread=0.0) == "nonfinite"
    assert classify(0.1, 1000, value=NAN, spread=0.0) == "nonfinite"


def test_statuses_are_the_documented_ones():
    usable = ["exact", "zero_variance", "no_fault_found", "heavy_tail", "disagreement"]
    assert list(ops.STATUSES) == [*usable, "unreliable", "no_support", "nonfinite"]  # from the best to the worst
    assert list(ops.DOUBTFUL) == ["unreliable", "no_support", "nonfinite"]


@pytest.mark.parametrize(
    ("difference", "own_stderr", "missed", "lacks"),
    [
        (0.7, 0.01, 0.5, True),
        (0.7, 0.01, 0.0, False),  # what it lacks it proposes: a tail, drawn too rarely
        (0.7, 0.01, 0.2, False),  # less than half of 1 - exp(-0.7) = 0.50
        (0.7, 0.2, 0.5, False),  # within four standard errors
        (0.03, 0.001, 0.03, True),
        (0.009, 0.001, 0.03, False),  # below 0.01 nats nobody would quote another number
        (-0.7, 0.01, 0.5, False),  # higher, by its own noise
        (math.inf, math.nan, 1.0, True),  # none of its draws has any mass
        (math.nan, 0.01, 1.0, False),
    ],
)
def test_a_guide_disagrees_by_two_signs(difference, own_stderr, missed, lacks):
    value, stderr = torch.tensor([-3.0]), torch.tensor([0.002])
    numbers = (torch.tensor([[number], [0.0]]) for number in (-3.0 - difference, own_stderr, missed))
    own, errors, share = numbers
    own[1] = -3.0  # the other guide agrees
    codes, lacking = ops.disagreement(torch.tensor([2]), value, stderr, own, errors, share)
    assert lacking.tolist() == [[lacks], [False]]
    assert ops.status_names(codes) == (("disagreement",) if lacks else ("no_fault_found",))


def test_disagreement_takes_the_place_of_better_statuses_only():
    codes, one = torch.arange(len(ops.STATUSES)), torch.ones(len(ops.STATUSES))
    found, _ = ops.disagreement(codes, 0.0 * one, 0.01 * one, -one[None], 0.01 * one[None], one[None])
    assert ops.status_names(found) == ("disagreement",) * 5 + ops.STATUSES[5:]


def test_the_table_of_large_weights_stays_small():
    accumulator = ops.WeightAccumulator(2, 900)
    for _ in range(9):
        accumulator.update(torch.randn(100, 2), torch.ones(2))
        assert len(accumulator._largest) <= 91  # 3 sqrt(900) + 1


def test_the_graph_is_dropped():
    log_weights = torch.zeros(2, 1, requires_grad=True)
    assert not accumulate(log_weights * 2, 1, torch.ones(1, requires_grad=True)).value.requires_grad


@pytest.mark.parametrize("fed", [0, 2, 4])
def test_the_particle_count_must_be_exact(fed):
    accumulator = ops.WeightAccumulator(1, 3)
    for _ in range(fed):
        accumulator.update(torch.zeros(1, 1), torch.ones(1))
    with pytest.raises(ShapeError, match=f"num_particles: expected 3 particles, got {fed}"):
        accumulator.summary()


def test_errors_name_the_argument():
    accumulator = ops.WeightAccumulator(2, 3)
    with pytest.raises(ShapeError, match=r"log_weights: expected shape \(k, 2\), got \(3, 1\)"):
        accumulator.update(torch.zeros(3, 1), torch.ones(1))
    with pytest.raises(ShapeError, match=r"noise_scale: expected shape \(2,\), got \(1,\)"):
        accumulator.update(torch.zeros(3, 2), torch.ones(1))
    with pytest.raises(DataTypeError, match="log_weights: expected a floating tensor, got torch.int64"):
        accumulator.update(torch.zeros(3, 2).long(), torch.ones(2))
    with pytest.raises(ShapeError, match="num_data: expected 1 or more, got 0"):
        ops.WeightAccumulator(0, 3)


def test_the_record_is_frozen():
    summary = accumulate(torch.zeros(2, 1), 1)
    with pytest.raises(AttributeError):
        summary.value = torch.zeros(1)


@pytest.mark.parametrize("waiting", [1, 30, 9 * 64, 9 * 150])
@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_what_waits_and_is_taken_in_together_changes_nothing(monkeypatch, waiting, chunk):
    """Room for no more than a row, for less than the tail of 60, for some chunks, and for all but a few particles."""
    log_weights = mixed_data(401)
    expected = accumulate(log_weights, 401)
    monkeypatch.setattr(streaming, "_MAX_WAITING", waiting)
    monkeypatch.setattr(streaming, "_MAX_ELEMENTS", 9 * 64)
    summary = accumulate(log_weights, chunk)
    for name in ("value", "stderr", "bias", "elbo", "elbo_stderr", "ess", "khat", "spread", "noise"):
        rtol = 1e-10 if name == "elbo_stderr" else 1e-12
        found, wanted = getattr(summary, name), getattr(expected, name)
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-12, equal_nan=True, msg=name)
    assert summary.status.equal(expected.status)


def test_the_chunk_of_the_caller_may_change_afterwards():
    torch.manual_seed(4)
    log_weights = torch.randn(50, 3, dtype=torch.float64)
    accumulator, chunk = ops.WeightAccumulator(3, 50), torch.empty(10, 3, dtype=torch.float64)
    for part in log_weights.split(10):
        accumulator.update(chunk.copy_(part), torch.ones(3))
    chunk.zero_()
    assert accumulator.summary().value.equal(accumulate(log_weights, 50).value)
    assert accumulator.summary().khat.equal(accumulate(log_weights, 50).khat)


def test_memory_waits_within_its_bound():
    assert ops.WeightAccumulator(10_000, 5000)._waiting.numel() <= 2**22
    assert ops.WeightAccumulator(2**22 + 1, 5000)._waiting.shape == (1, 2**22 + 1)
    assert ops.WeightAccumulator(10, 30)._waiting.shape == (30, 10)
