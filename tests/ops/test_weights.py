"""Importance-sampling numbers against the plain formulas, known weights and a calibrated simulation."""

import math

import pytest
import torch

from pyro_lvm import ops
from pyro_lvm.errors import DataTypeError, ShapeError

INF, NAN = math.inf, math.nan
FUNCTIONS = [ops.log_evidence, ops.effective_sample_size, ops.standard_error, ops.delta_bias, ops.elbo]


def naive(log_weights):
    """The five numbers of one datum, by loops over plain floats."""
    weights = [math.exp(value) for value in log_weights]
    count, total, squares = len(weights), sum(weights), sum(w * w for w in weights)
    variance = (count * squares / total**2 - 1) / (count - 1) if count > 1 else NAN
    mean_log = sum(log_weights) / count
    return [math.log(total / count), total**2 / squares, max(variance, 0.0) ** 0.5, -variance / 2, mean_log]


@pytest.mark.parametrize("num_particles", [1, 2, 3, 40])
def test_every_number_equals_the_naive_loop(num_particles):
    torch.manual_seed(0)
    log_weights = torch.randn(num_particles, 6, dtype=torch.float64)
    expected = torch.tensor([naive(column.tolist()) for column in log_weights.mT], dtype=torch.float64).mT
    result = torch.stack([function(log_weights) for function in FUNCTIONS])
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("num_particles", [2, 3, 1000])
def test_equal_weights_are_exact(num_particles):
    log_weights = torch.full((num_particles, 2), -123.4, dtype=torch.float64)
    evidence, ess, stderr, bias, bound = (function(log_weights) for function in FUNCTIONS)
    torch.testing.assert_close(evidence, log_weights[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(bound, log_weights[0], rtol=1e-14, atol=0)
    assert ess.tolist() == [num_particles] * 2
    assert stderr.tolist() == [0.0, 0.0]
    assert bias.tolist() == [0.0, 0.0]


def test_one_particle_has_a_value_but_no_error():
    log_weights = torch.tensor([[-3.0, 2.0]])
    assert ops.log_evidence(log_weights).tolist() == [-3.0, 2.0]
    assert ops.effective_sample_size(log_weights).tolist() == [1.0, 1.0]
    assert ops.standard_error(log_weights).isnan().all()
    assert ops.delta_bias(log_weights).isnan().all()


def test_one_dominant_weight_has_an_effective_size_of_one_and_a_standard_error_of_one():
    log_weights = torch.tensor([[0.0], [-2000.0], [-3000.0]])  # se^2 = (K - 1) / (K - 1)
    ess = ops.effective_sample_size(log_weights).item()
    assert 1 <= ess <= 1 + 1e-14
    assert ops.standard_error(log_weights).item() == pytest.approx(1, abs=1e-14)


def test_nearly_equal_weights_keep_their_digits():
    # w = 1 +- d gives se = d sqrt(K / (K - 1)) / sqrt(K) = d / sqrt(K - 1) up to a relative error d^2.
    step = 1e-10
    log_weights = torch.tensor([step, -step] * 50, dtype=torch.float64)[:, None]
    assert ops.standard_error(log_weights).item() == pytest.approx(step / math.sqrt(99), rel=1e-5)


def test_a_shift_moves_the_evidence_alone():
    torch.manual_seed(3)
    log_weights = torch.randn(30, 2, dtype=torch.float64)
    far = log_weights - 5000
    torch.testing.assert_close(ops.log_evidence(far), ops.log_evidence(log_weights) - 5000, rtol=1e-14, atol=0)
    for function in (ops.effective_sample_size, ops.standard_error, ops.delta_bias):
        torch.testing.assert_close(function(far), function(log_weights), rtol=1e-11, atol=1e-11)


def test_a_bad_datum_spoils_itself_alone():
    log_weights = torch.tensor([[0.0, -INF, -INF, NAN, INF], [0.0, 0.0, -INF, 0.0, 0.0]], dtype=torch.float64)
    results = [function(log_weights).tolist() for function in FUNCTIONS]
    half = math.log(0.5)
    expected = [
        [0.0, half, -INF, NAN, INF],
        [2.0, 1.0, NAN, NAN, NAN],
        [0.0, 1.0, NAN, NAN, NAN],
        [0.0, -0.5, NAN, NAN, NAN],
        [0.0, -INF, -INF, NAN, INF],
    ]
    for result, numbers in zip(results, expected, strict=True):
        assert result == pytest.approx(numbers, rel=1e-14, nan_ok=True)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32_weights_are_summed_in_float64(function):
    torch.manual_seed(4)
    log_weights = torch.randn(1000, 3)
    assert function(log_weights).dtype == torch.float64
    torch.testing.assert_close(function(log_weights), function(log_weights.double()), rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_bound_is_the_mean_over_groups(size):
    torch.manual_seed(5)
    log_weights = torch.randn(6, 2, dtype=torch.float64)
    groups = [log_weights[start : start + size] for start in range(0, 6, size)]
    expected = torch.stack([ops.log_mean_exp(group) for group in groups]).mean(0)
    result = ops.importance_weighted_bound(log_weights, size)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


def test_the_bound_runs_from_the_elbo_to_the_evidence():
    torch.manual_seed(6)
    log_weights = torch.randn(12, 5, dtype=torch.float64)
    bounds = [ops.importance_weighted_bound(log_weights, size) for size in (1, 2, 4, 12)]
    torch.testing.assert_close(bounds[0], ops.elbo(log_weights), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(bounds[-1], ops.log_evidence(log_weights), rtol=1e-14, atol=1e-14)
    # Jensen, group by group, for groups that nest.
    assert all((low <= high).all() for low, high in zip(bounds, bounds[1:], strict=False))


def test_the_group_size_must_divide_the_number_of_particles():
    with pytest.raises(ShapeError, match="num_particles: expected a divisor of K = 6, got 4"):
        ops.importance_weighted_bound(torch.zeros(6, 1), 4)
    with pytest.raises(DataTypeError, match="num_particles: expected an integer, got 2.0"):
        ops.importance_weighted_bound(torch.zeros(6, 1), 2.0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_vector_is_refused(function):
    with pytest.raises(ShapeError, match=r"expected shape \(K, N\) with K, N >= 1, got \(3,\)"):
        function(torch.zeros(3))


def test_the_bound_is_differentiable():
    torch.manual_seed(7)
    log_weights = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: ops.importance_weighted_bound(value, 2), log_weights)
    assert torch.autograd.gradcheck(ops.log_evidence, log_weights)


@pytest.mark.statistical
def test_standard_error_and_bias_are_calibrated():
    # log w ~ N(0, s^2): E w = exp(s^2 / 2), Var w / (E w)^2 = exp(s^2) - 1. 20,000 estimates with K = 400, s = 0.5:
    # terms of order K^-2 are 1e-6, the Monte Carlo error of the mean below is 1.9e-4.
    torch.manual_seed(8)
    particles, repeats, scale = 400, 20_000, 0.5
    error = ops.log_evidence(scale * torch.randn(particles, repeats, dtype=torch.float64)) - scale**2 / 2
    exact_variance = math.expm1(scale**2) / particles
    assert abs(error.mean().item() + exact_variance / 2) < 5 * math.sqrt(exact_variance / repeats) + 1e-5
    # The standard deviation of a sample variance is sqrt(2 / repeats) of it; the next order in 1/K adds about 1%.
    assert error.var().item() == pytest.approx(exact_variance, rel=5 * math.sqrt(2 / repeats) + 0.01)
    log_weights = scale * torch.randn(particles, 500, dtype=torch.float64)
    estimated = ops.standard_error(log_weights).square()
    assert abs(estimated.mean().item() - exact_variance) < 5 * estimated.std().item() / math.sqrt(500) + 1e-5
    torch.testing.assert_close(ops.delta_bias(log_weights), -estimated / 2, rtol=1e-14, atol=0)


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_moments_of_two_parts_merge_to_those_of_the_whole(cut):
    torch.manual_seed(9)
    log_weights = torch.randn(10, 4, dtype=torch.float64) * 20
    log_weights[:5, 1] = -INF  # no support in the first part
    log_weights[:, 2] = -INF
    log_weights[0, 3] = INF
    whole = ops.weight_moments(log_weights)
    merged = ops.merge_moments(ops.weight_moments(log_weights[:cut]), ops.weight_moments(log_weights[cut:]))
    assert merged.count == whole.count == 10
    for name in ("shift", "mean", "squares", "log_mean", "relative_variance", "effective_sample_size"):
        expected = getattr(whole, name)
        torch.testing.assert_close(getattr(merged, name), expected, rtol=1e-13, atol=1e-13, equal_nan=True)


def test_moments_in_parts_are_the_moments(monkeypatch):
    """Also of weights that need gradients: the parts are one graph."""
    torch.manual_seed(3)
    log_weights = torch.randn(50, 17, dtype=torch.float64, requires_grad=True)
    whole = ops.standard_error(log_weights)
    (gradient,) = torch.autograd.grad(whole.sum(), log_weights)
    monkeypatch.setattr("pyro_lvm.ops.moments._MAX_ELEMENTS", 250)  # five data at once
    parts = ops.standard_error(log_weights)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(parts.sum(), log_weights)[0], gradient, rtol=1e-10, atol=1e-15)
    assert ops.effective_sample_size(log_weights.float()).dtype == torch.float64
