"""How many particles a datum takes: the moments of a pilot against naive ones."""

import math

import pytest
import torch

from pyro_lvm.ops.allocation import PowerSums, on_grid, particles_needed


def table(size: int, num_data: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(size, num_data, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def naive(log_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v, and the standard deviation of what each weight adds to it over the root of their number."""
    d = log_weights.exp() / log_weights.exp().mean(0) - 1
    v = d.square().mean(0)
    moves = d.square() - v - 2 * v * d
    return d.var(0), moves.square().mean(0).sqrt() / math.sqrt(len(d))


def test_moments_are_those_of_a_loop() -> None:
    weights = table(50, 3)
    sums = PowerSums(3)
    for part in weights.split((20, 1, 29)):
        sums.update(part)
    v, error = naive(weights)
    torch.testing.assert_close(sums.relative_variance, v, rtol=1e-10, atol=0)
    torch.testing.assert_close(sums.relative_variance_stderr, error, rtol=1e-9, atol=0)
    assert sums.count.tolist() == [50.0] * 3


def test_data_have_their_own_numbers() -> None:
    weights, more = table(40, 3), table(25, 1, 2.0) + 5
    sums, other = PowerSums(3), PowerSums(1)
    sums.update(weights)
    other.update(more)
    sums.add(other, torch.tensor([1]))
    assert sums.count.tolist() == [40.0, 65.0, 40.0]
    expected = naive(weights)[0]
    expected[1] = naive(torch.cat([weights[:, 1:2], more]))[0]
    torch.testing.assert_close(sums.relative_variance, expected, rtol=1e-10, atol=0)


def test_scale_does_not_matter() -> None:
    one, other = PowerSums(2), PowerSums(2)
    one.update(table(30, 2))
    other.update(table(30, 2) + torch.tensor([900.0, -900.0]))
    torch.testing.assert_close(one.relative_variance, other.relative_variance, rtol=1e-9, atol=0)


def test_equal_weights_take_none_and_zeros_no_end_of_them() -> None:
    sums = PowerSums(4)
    odd = torch.tensor([0.0, -math.inf, math.nan, math.inf])
    sums.update(odd.repeat(10, 1))
    needed = particles_needed(sums, 0.1).tolist()
    assert needed == [0.0, math.inf, 0.0, 0.0]


def test_particles_go_with_the_square_of_the_target() -> None:
    sums = PowerSums(2)
    sums.update(table(100, 2))
    torch.testing.assert_close(particles_needed(sums, 0.05), 4 * particles_needed(sums, 0.1))
    v, error = naive(table(100, 2))
    torch.testing.assert_close(particles_needed(sums, 1.0), 1.5 * (v + 5 * error))


@pytest.mark.parametrize(
    ("needed", "granted"),
    [(0.0, 256), (256.0, 256), (256.1, 363), (512.0, 512), (513.0, 725), (4999.0, 5000), (math.inf, 5000)],
)
def test_the_grid(needed: float, granted: int) -> None:
    assert on_grid(torch.tensor([needed], dtype=torch.float64), 256, 5000).tolist() == [granted]
