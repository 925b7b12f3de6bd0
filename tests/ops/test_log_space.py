"""Sums in log space against plain sums."""

import math

import pytest
import torch

from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.ops import log_mean_exp, log_normalize, log_weight_table

INF, NAN = math.inf, math.nan


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("num_particles", [1, 2, 3, 50])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_mean_exp_is_the_log_of_the_mean(num_particles, dim):
    torch.manual_seed(0)
    log_weights = torch.randn(num_particles, 4, dtype=torch.float64)
    expected = log_weights.exp().mean(dim).log()
    torch.testing.assert_close(log_mean_exp(log_weights, dim), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_log_mean_exp_neither_under_nor_overflows(shift):
    log_weights = table([0.0], [1.0], [-2.0])
    expected = log_mean_exp(log_weights) + shift
    torch.testing.assert_close(log_mean_exp(log_weights + shift), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("column", "expected"),
    [([-INF, -INF], -INF), ([-INF, 0.0], -math.log(2)), ([INF, 0.0], INF), ([INF, -INF], INF), ([NAN, 0.0], NAN)],
)
def test_log_mean_exp_of_infinite_and_nan_weights(column, expected):
    result = log_mean_exp(table(*[[value, 0.0] for value in column]))
    torch.testing.assert_close(result, table([expected, 0.0])[0], equal_nan=True)


def test_log_mean_exp_keeps_the_dtype():
    assert log_mean_exp(torch.zeros(2, 3, dtype=torch.float32)).dtype == torch.float32


def test_log_mean_exp_has_the_normalised_weights_as_gradient():
    torch.manual_seed(1)
    log_weights = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    log_mean_exp(log_weights).sum().backward()
    torch.testing.assert_close(log_weights.grad, log_normalize(log_weights.detach()).exp(), rtol=1e-13, atol=1e-13)


def test_log_normalize_sums_to_one_and_keeps_ratios():
    torch.manual_seed(2)
    log_weights = torch.randn(5, 3, dtype=torch.float64) * 100
    normalized = log_normalize(log_weights)
    torch.testing.assert_close(normalized.exp().sum(0), torch.ones(3, dtype=torch.float64), rtol=1e-13, atol=0)
    torch.testing.assert_close(normalized - normalized[0], log_weights - log_weights[0], rtol=1e-12, atol=1e-12)


def test_log_normalize_without_support_is_nan_for_that_column_alone():
    normalized = log_normalize(table([-INF, 0.0], [-INF, -INF]))
    assert normalized[:, 0].isnan().all()
    assert normalized[:, 1].tolist() == [0.0, -INF]


@pytest.mark.parametrize("function", [log_mean_exp, log_normalize])
def test_no_particles_is_an_error(function):
    with pytest.raises(ShapeError, match=r"log_weights: expected K >= 1 along dim=0, got \(0, 3\)"):
        function(torch.zeros(0, 3))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 2), (2, 0), ()])
def test_a_table_has_two_dimensions(shape):
    with pytest.raises(ShapeError, match="log_weights: expected shape"):
        log_weight_table(torch.zeros(shape))


@pytest.mark.parametrize(("value", "got"), [(torch.zeros(2, 2).long(), "torch.int64"), ([[0.0]], "list")])
def test_a_table_is_a_floating_tensor(value, got):
    with pytest.raises(DataTypeError, match=f"tail: expected a floating tensor, got {got}"):
        log_weight_table(value, "tail")
