"""Batched PSIS against ArviZ (whichever line is installed), known tail indices and the rules for bad data."""

import math

import pytest
import torch

from pyro_lvm import ops
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.ops import pareto

INF, NAN = math.inf, math.nan


def arviz_psis(log_weights):
    """Self-normalised smoothed log-weights (K, N), k-hat (N,), and whether the line rounds the tail size down."""
    arviz = pytest.importorskip("arviz")
    rows = log_weights.mT.numpy()  # samples on the last axis
    if hasattr(arviz, "psislw"):  # 0.x takes log-weights
        smoothed, khat = arviz.psislw(rows.copy())
        return torch.from_numpy(smoothed).mT, torch.from_numpy(khat), False
    from arviz_stats.base import array_stats  # 1.x takes a log-likelihood: the negated log-weights

    smoothed, khat = array_stats.psislw(-rows, r_eff=1.0, axis=-1)
    return torch.from_numpy(smoothed).mT, torch.from_numpy(khat), True


def draw(num_particles, num_data, seed):
    """Log-weights whose tails run from bounded to without a mean."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.1, 4, num_data, dtype=torch.float64)
    return scales * torch.randn(num_particles, num_data, generator=generator, dtype=torch.float64) - 50


def pareto_log_weights(khat, num_particles, num_data, seed):
    """Pareto weights of tail index k: log w = k e with e exponential, so that exceedances are generalized Pareto."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_particles, num_data, generator=generator, dtype=torch.float64)
    return -khat * torch.log1p(-uniform)


@pytest.mark.parametrize(
    ("num_particles", "size"), [(1, 0), (24, 4), (25, 5), (224, 44), (225, 45), (226, 45), (1000, 94), (10**6, 3000)]
)
def test_tail_size_is_the_smaller_rule_rounded_down(num_particles, size):
    assert ops.tail_size(num_particles) == size == math.floor(min(num_particles / 5, 3 * math.sqrt(num_particles)))


@pytest.mark.parametrize(
    ("num_particles", "threshold"),
    [(1, -INF), (10, 0.0), (25, 1 - 1 / math.log10(25)), (100, 0.5), (1000, 2 / 3), (5000, 0.7)],
)
def test_threshold_follows_the_sample_size(num_particles, threshold):
    # 0.5, 0.67 and 0.7 at K = 100, 1000 and beyond 2200 are the values printed by the R package loo.
    assert ops.khat_threshold(num_particles) == pytest.approx(threshold, abs=1e-15)


@pytest.mark.parametrize("num_particles", [100, 400, 900, 2500])  # both ArviZ lines have our tail size here
def test_psis_equals_arviz(num_particles):
    log_weights = draw(num_particles, 25, seed=num_particles)
    expected, expected_khat, _ = arviz_psis(log_weights)
    smoothed, khat = ops.pareto_smooth(log_weights)
    torch.testing.assert_close(khat, expected_khat, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ops.log_normalize(smoothed), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ops.pareto_khat(log_weights), khat, rtol=0, atol=0)


@pytest.mark.parametrize("num_particles", [33, 226, 1000])
def test_khat_equals_arviz_for_the_tail_size_of_either_line(num_particles):
    log_weights = draw(num_particles, 25, seed=num_particles)
    _, expected, rounds_down = arviz_psis(log_weights)
    size = ops.tail_size(num_particles) + (0 if rounds_down else 1)
    log_tail = log_weights.topk(size + 1, dim=0).values
    torch.testing.assert_close(ops.khat_from_tail(log_tail), expected, rtol=1e-10, atol=1e-10)
    # One exceedance more or less changes k-hat, whose variance is (1 + k)^2 / M, by about (1 + k) / M.
    khat = ops.pareto_khat(log_weights)
    assert ((khat - expected).abs() <= 5 * (1 + khat.abs()) / size).all()


@pytest.mark.statistical
@pytest.mark.parametrize("khat", [-0.3, 0.0, 0.3, 0.7, 1.2])
@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_fit_recovers_a_known_shape_and_scale(khat, scale):
    size, repeats = 1000, 200
    generator = torch.Generator().manual_seed(10)
    hazard = -torch.log1p(-torch.rand(size, repeats, generator=generator, dtype=torch.float64))
    draws = scale * (hazard if khat == 0 else torch.expm1(khat * hazard) / khat)
    shape, sigma = ops.fit_generalized_pareto(draws.sort(dim=0).values)
    expected = (size * khat + 5) / (size + 10)  # ten prior observations at 0.5
    # Maximum likelihood has variances (1 + k)^2 / M and 2 (1 + k) / M of k and log sigma; the bias is of order 1 / M.
    assert abs(shape.mean().item() - expected) < 5 * (1 + khat) / math.sqrt(size * repeats) + 3 / size
    assert shape.std().item() == pytest.approx((1 + khat) / math.sqrt(size), rel=0.25)  # 5 / sqrt(2 * 200)
    error = math.sqrt(2 * (1 + khat) / (size * repeats))
    assert abs(sigma.log().mean().item() - math.log(scale)) < 5 * error + 3 / size


@pytest.mark.statistical
@pytest.mark.parametrize("khat", [0.2, 0.5, 0.9])
def test_khat_recovers_the_tail_index_of_pareto_weights(khat):
    particles, repeats = 4000, 200
    size = ops.tail_size(particles)
    result = ops.pareto_khat(pareto_log_weights(khat, particles, repeats, seed=11))
    expected = (size * khat + 5) / (size + 10)
    assert abs(result.mean().item() - expected) < 5 * (1 + khat) / math.sqrt(size * repeats) + 3 / size


def test_khat_does_not_depend_on_the_scale_or_the_order_of_the_weights():
    log_weights = draw(500, 8, seed=12)
    khat = ops.pareto_khat(log_weights)
    torch.testing.assert_close(ops.pareto_khat(log_weights + 700), khat, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ops.pareto_khat(log_weights.flip(0)), khat, rtol=1e-12, atol=1e-12)


def test_khat_from_the_tail_alone_is_the_same():
    log_weights = draw(300, 8, seed=13)
    log_tail = log_weights.sort(dim=0, descending=True).values[: ops.tail_size(300) + 1]
    torch.testing.assert_close(ops.khat_from_tail(log_tail), ops.pareto_khat(log_weights), rtol=0, atol=0)


def test_chunks_of_data_do_not_change_the_fit(monkeypatch):
    log_weights = draw(300, 17, seed=14)
    whole = ops.pareto_khat(log_weights)
    for elements in (1, 20_000):  # one datum at a time, and eight or nine
        monkeypatch.setattr(pareto, "_MAX_ELEMENTS", elements)
        torch.testing.assert_close(ops.pareto_khat(log_weights), whole, rtol=1e-12, atol=1e-12)


def test_float32_is_fitted_in_float64():
    log_weights = draw(400, 5, seed=15).float()
    khat = ops.pareto_khat(log_weights)
    assert khat.dtype == torch.float64
    torch.testing.assert_close(khat, ops.pareto_khat(log_weights.double()), rtol=0, atol=0)


@pytest.mark.parametrize("num_particles", [1, 2, 3, 24])
def test_too_few_particles_give_nan_and_unsmoothed_weights(num_particles):
    log_weights = draw(num_particles, 3, seed=16)
    smoothed, khat = ops.pareto_smooth(log_weights)
    assert khat.isnan().all()
    assert ops.pareto_khat(log_weights).isnan().all()
    torch.testing.assert_close(smoothed, log_weights, rtol=0, atol=0)


def test_twenty_five_particles_are_enough():
    assert ops.pareto_khat(draw(25, 3, seed=17)).isfinite().all()


def test_bad_data_get_their_own_verdict_and_spoil_nothing():
    good = draw(200, 1, seed=18)
    size = ops.tail_size(200)
    bad = good.repeat(1, 10)
    bad[:, 1] = -3.0  # constant
    bad[7, 2] = NAN
    bad[7, 3] = INF
    bad[:, 4] = -INF
    order = good[:, 0].argsort(descending=True)
    bad[order[size + 1 :], 5] = -INF  # just the tail and its cut-off are positive
    bad[order[size:], 6] = -INF  # one less: no cut-off
    bad[:, 7] = 100 * bad[:, 7].argsort().argsort().double()  # ranks, 100 nats apart: all but a few underflow
    bad[order[:50], 8] = 5.0  # ties across the cut-off
    bad[:, 9] = -INF
    bad[3, 9] = NAN
    khat = ops.pareto_khat(bad)
    reference = ops.pareto_khat(good).item()
    expected = [reference, NAN, NAN, NAN, INF, reference, INF, INF, NAN, NAN]
    assert khat.tolist() == pytest.approx(expected, nan_ok=True)
    smoothed, smooth_khat = ops.pareto_smooth(bad)
    torch.testing.assert_close(smooth_khat, khat, equal_nan=True)
    unfit = ~khat.isfinite()
    torch.testing.assert_close(smoothed[:, unfit], bad[:, unfit], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(smoothed[:, :1], ops.pareto_smooth(good)[0], rtol=1e-13, atol=1e-13)


def test_ties_that_fill_the_first_quartile_give_nan():
    log_weights = torch.zeros(100, 1, dtype=torch.float64)
    log_weights[-5:] = torch.arange(1.0, 6.0, dtype=torch.float64)[:, None]  # M = 20, 15 of them at the cut-off
    assert ops.pareto_khat(log_weights).isnan().all()


@pytest.mark.parametrize("noise", [1e-6, torch.tensor([1e-6, 1e-6, 1e-14], dtype=torch.float64)])
def test_a_tail_that_is_rounding_noise_gives_nan(noise):
    # With k-hat of a tail that is not noise unchanged by the shrinking of its spread to 1e-8.
    log_weights = draw(200, 1, seed=19).repeat(1, 3)
    log_weights[:, 1:] *= 1e-8
    expected_nan = [False, True, not isinstance(noise, torch.Tensor)]
    assert ops.pareto_khat(log_weights, noise).isnan().tolist() == expected_nan
    assert ops.pareto_khat(log_weights).isfinite().all()


def test_a_tail_exactly_as_wide_as_the_noise_gives_nan():
    log_weights = torch.arange(100.0, dtype=torch.float64)[:, None] / 4  # M = 20: the tail is 5 nats wide
    assert ops.pareto_khat(log_weights, 5.0).isnan().all()
    assert ops.pareto_khat(log_weights, 4.99).isfinite().all()


def test_smoothing_leaves_the_body_the_order_and_the_largest_weight():
    log_weights = draw(200, 20, seed=20)
    smoothed, khat = ops.pareto_smooth(log_weights)
    rank = log_weights.argsort(0)
    body, tail = rank[:-40], rank[-40:]
    assert khat.isfinite().all()
    torch.testing.assert_close(smoothed.gather(0, body), log_weights.gather(0, body), rtol=0, atol=0)
    assert (smoothed.gather(0, tail).diff(dim=0) >= 0).all()
    assert (smoothed.amax(0) <= log_weights.amax(0)).all()
    assert (smoothed.gather(0, tail[:1]) > log_weights.gather(0, body[-1:])).all()


def test_a_grid_point_at_zero_is_the_exponential_limit():
    # M = 16 has a grid of m = 34; b = 1 / max + (1 - sqrt(m / (j - 1/2))) / (3 q) is zero at j = 9 for q = 1, max = 3.
    exceedances = torch.tensor([0.5, 0.6, 0.7, *torch.linspace(1.0, 3.0, 13).tolist()], dtype=torch.float64)[:, None]
    nudged = exceedances.clone()
    nudged[-1] += 1e-9
    result, expected = ops.fit_generalized_pareto(exceedances), ops.fit_generalized_pareto(nudged)
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-7)


def test_the_quantile_at_shape_zero_is_the_exponential_limit():
    probability, khat = torch.tensor([0.5, 0.9], dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    quantile = pareto._quantile(probability, khat, torch.tensor(2.0))
    torch.testing.assert_close(quantile, -2 * (1 - probability).log(), rtol=1e-14, atol=0)


def test_the_result_is_detached():
    log_weights = draw(100, 2, seed=21).requires_grad_()
    smoothed, khat = ops.pareto_smooth(log_weights)
    assert not smoothed.requires_grad
    assert not khat.requires_grad


def test_errors_name_the_argument():
    with pytest.raises(ShapeError, match="exceedances: expected 5 rows or more, got 4"):
        ops.fit_generalized_pareto(torch.rand(4, 2))
    with pytest.raises(ShapeError, match=r"log_tail: expected shape \(K, N\)"):
        ops.khat_from_tail(torch.rand(4))
    with pytest.raises(DataTypeError, match="exceedances: expected a floating tensor, got torch.int64"):
        ops.fit_generalized_pareto(torch.ones(6, 2, dtype=torch.int64))
    with pytest.raises(ShapeError, match="num_particles: expected 1 or more, got 0"):
        ops.tail_size(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_particles", [1, 2, 40, 401])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_largest_are_those_of_topk(dtype, num_particles, share):
    """Infinities, NaN, ties and a transposed table included; and the table stays as it is."""
    torch.manual_seed(8)
    table = torch.randn(6, num_particles).to(dtype).T
    table[-1, 1], table[0, 2], table[:, 3], table[0, 4] = -torch.inf, torch.inf, 1.5, torch.nan
    before, count = table.clone(), max(1, int(share * num_particles))
    found = pareto.largest(table, count)
    expected = before.topk(count, dim=0).values.double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(table, before, rtol=0, atol=0, equal_nan=True)
    single = before[:, :1].contiguous()  # whose transpose is contiguous, and so must be copied
    assert pareto.largest(single, count).equal(single.topk(count, dim=0).values.double())
    assert single.equal(before[:, :1])
