"""The randomised multilevel terms, against enumeration and naive loops."""

import math

import pytest
import torch

from pyro_lvm.errors import ShapeError
from pyro_lvm.ops.multilevel import HalfSums, antithetic_difference, draw_levels, jackknife, level_probability

LOW, HIGH, SHARE = 0.2, 3.0, 0.3  # a weight is HIGH with probability SHARE


def log_means(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All values of the log mean of ``size`` two-point weights, with their probabilities."""
    count = torch.arange(size + 1, dtype=torch.float64)
    means = (LOW * (size - count) + HIGH * count) / size
    probabilities = torch.distributions.Binomial(size, torch.tensor(SHARE, dtype=torch.float64)).log_prob(count).exp()
    return means.log(), probabilities


def expected_log_mean(size: int) -> float:
    values, probabilities = log_means(size)
    return float(values @ probabilities)


def expected_difference(size: int) -> float:
    """Of the antithetic difference of two halves of ``size`` weights each."""
    values, probabilities = log_means(size)
    return float(probabilities @ antithetic_difference(values[:, None], values) @ probabilities)


def test_the_levels_telescope() -> None:
    """E log p-hat of K weights, and what doublings add, is E log p-hat of 2^L K weights, for every L."""
    total = expected_log_mean(3)
    for level in range(1, 8):
        total += expected_difference(3 * 2 ** (level - 1))
        assert total == pytest.approx(expected_log_mean(3 * 2**level), abs=1e-12)


def test_the_random_level_stands_for_the_sum() -> None:
    """sum_l P(l) E[difference / P(l)] tends to log p; what is left beyond a level is the delta-method bias there."""
    levels = range(1, 10)
    value = expected_log_mean(2)
    value += sum(
        float(level_probability(n)) * (expected_difference(2**n) / float(level_probability(n))) for n in levels
    )
    mean = LOW + SHARE * (HIGH - LOW)
    variance = SHARE * (1 - SHARE) * (HIGH - LOW) ** 2
    left = variance / mean**2 / 2 / 2**10  # v / 2 K
    assert math.log(mean) - value == pytest.approx(left, rel=0.01)


def test_squares_of_differences_decay_fast_enough() -> None:
    """By 4 a level, so that those over P(l), which grows by 2^1.5, have a finite sum."""
    squares = []
    for size in (256, 512, 1024):
        values, probabilities = log_means(size)
        squares.append(float(probabilities @ antithetic_difference(values[:, None], values).square() @ probabilities))
    assert squares[0] / squares[1] == pytest.approx(4, rel=0.05)
    assert squares[1] / squares[2] == pytest.approx(4, rel=0.05)


def test_probabilities_add_up_to_one() -> None:
    assert float(level_probability(torch.arange(1, 60)).sum()) == pytest.approx(1, abs=1e-14)
    ratios = level_probability(torch.arange(2, 9)) / level_probability(torch.arange(1, 8))
    torch.testing.assert_close(ratios, torch.full_like(ratios, 2**-1.5))


@pytest.mark.statistical
def test_levels_have_their_probabilities() -> None:
    """10^6 draws: each share within 5 standard errors; a false alarm in one of 10^5 seeds."""
    torch.manual_seed(0)
    levels = draw_levels(2, 500_000)
    assert levels.shape == (2, 500_000)
    for level in range(1, 8):
        expected = float(level_probability(level))
        share = float((levels == level).double().mean())
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 1e6)
    assert int(levels.min()) == 1


@pytest.mark.parametrize("cuts", [(8,), (1, 7), (4, 4), (3, 3, 2)])
def test_halves_do_not_depend_on_the_chunks(cuts: tuple[int, ...]) -> None:
    table = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    halves = HalfSums(5, 8)
    for part in table.split(cuts):
        halves.update(part)
    weights = table.exp()
    first, second = weights[:4].mean(0), weights[4:].mean(0)
    expected = ((first + second) / 2).log() - (first.log() + second.log()) / 2
    torch.testing.assert_close(halves.difference(), expected, rtol=0, atol=1e-12)


def test_halves_of_huge_and_tiny_weights() -> None:
    table = torch.tensor([[800.0, -1000.0], [800.0, -1000.0], [802.0, -1000.0], [802.0, -1000.0]])
    halves = HalfSums(2, 4)
    halves.update(table)
    expected = [math.log(math.cosh(1.0)), 0.0]
    assert halves.difference().tolist() == pytest.approx(expected, abs=1e-12)


def test_what_halves_refuse() -> None:
    with pytest.raises(ShapeError, match="even number, got 3"):
        HalfSums(1, 3)
    halves = HalfSums(1, 4)
    halves.update(torch.zeros(3, 1))
    with pytest.raises(ShapeError, match="4 particles, got 3"):
        halves.difference()


def test_the_jackknife_is_that_of_a_loop() -> None:
    table = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    weights, size = table.exp(), 7
    without = torch.stack([weights[torch.arange(7) != k].mean(0).log() for k in range(7)])  # (K, N)
    value, stderr = jackknife(table)
    torch.testing.assert_close(value, size * weights.mean(0).log() - (size - 1) * without.mean(0), rtol=0, atol=1e-12)
    spread = (without - without.mean(0)).square().sum(0) * (size - 1) / size
    torch.testing.assert_close(stderr, spread.sqrt(), rtol=0, atol=1e-12)


def test_the_jackknife_takes_out_the_leading_bias() -> None:
    """Exact expectations over two-point weights: the bias of K = 200 is v / 2 K, the jackknife's of the next order."""
    size = 200
    values, probabilities = log_means(size)
    mean = LOW + SHARE * (HIGH - LOW)
    found = []
    for count in range(size + 1):
        weights = torch.full((size, 1), LOW, dtype=torch.float64)
        weights[:count] = HIGH
        found.append(float(jackknife(weights.log())[0]))
    bias = float(values @ probabilities) - math.log(mean)
    assert bias == pytest.approx(-SHARE * (1 - SHARE) * (HIGH - LOW) ** 2 / mean**2 / 2 / size, rel=0.02)
    assert abs(float(torch.tensor(found, dtype=torch.float64) @ probabilities) - math.log(mean)) < 0.02 * abs(bias)


def test_equal_weights_have_no_bias_to_take_out() -> None:
    value, stderr = jackknife(torch.full((4, 1), 0.3, dtype=torch.float64))
    assert float(value) == pytest.approx(0.3, abs=1e-15)
    assert float(stderr) == 0


def test_one_weight_has_no_jackknife() -> None:
    with pytest.raises(ShapeError, match="2 or more, got 1"):
        jackknife(torch.zeros(1, 3))
