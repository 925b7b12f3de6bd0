"""Self-normalised means against the formulas written out, in any chunks."""

import math

import pytest
import torch

from pyro_lvm.errors import ShapeError
from pyro_lvm.ops import RatioAccumulator


def by_hand(log_weights, values):
    """Value and standard error as the module's docstring has them."""
    size = len(log_weights)
    shape = (*log_weights.shape, *(1,) * (values.dim() - 2))
    weights = (log_weights - log_weights.amax(0)).exp().reshape(shape)
    mean = (weights * values).sum(0) / weights.sum(0)
    scatter = (weights**2 * (values - mean) ** 2).sum(0) / weights.sum(0) ** 2
    return mean, (scatter * size / (size - 1)).sqrt()


def table(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [0.0, -800.0, 800.0])  # exp() of it under- or overflows
@pytest.mark.parametrize("event", [(), (3,), (2, 4)])
@pytest.mark.parametrize("sizes", [(50,), (1, 49), (20, 20, 10)])
def test_the_formulas_in_any_chunks(shift, event, sizes):
    weights, values = table(50, 4, scale=2.0) + shift, table(50, 4, *event, seed=1) + 1e6
    ratio = RatioAccumulator()
    for part, value in zip(weights.split(sizes), values.split(sizes), strict=True):
        ratio.update(part, value)
    found, (mean, stderr) = ratio.summary(), by_hand(weights, values)
    torch.testing.assert_close(found.value, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.stderr, stderr, rtol=1e-7, atol=0)
    torch.testing.assert_close(found.unweighted, values.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.unweighted_stderr, values.std(0) / math.sqrt(50), rtol=1e-7, atol=0)


def test_equal_weights_give_the_plain_mean_and_its_error():
    values, ratio = table(20, 3), RatioAccumulator()
    ratio.update(torch.full((20, 3), -7.0), values)
    found = ratio.summary()
    torch.testing.assert_close(found.value, found.unweighted)
    torch.testing.assert_close(found.stderr, found.unweighted_stderr)


def test_a_first_chunk_without_weight_and_values_that_no_weight_reaches():
    """A value of infinite size counts nothing where its weight is zero; rows without any weight are NaN."""
    nothing = torch.tensor([[-math.inf, -math.inf]])
    ratio = RatioAccumulator()
    ratio.update(nothing, torch.tensor([[math.inf, 1.0]]))
    ratio.update(torch.tensor([[0.0, -math.inf], [0.0, -math.inf]]), torch.tensor([[1.0, 1.0], [2.0, 1.0]]))
    found = ratio.summary()
    assert found.value[0] == 1.5
    assert found.value[1].isnan()


def test_one_particle_has_no_error():
    ratio = RatioAccumulator()
    ratio.update(torch.zeros(1, 1), torch.ones(1, 1))
    assert ratio.summary().value.item() == 1.0
    assert ratio.summary().stderr.isnan().all()


def test_values_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match=r"values: expected shape \(5, 2\)"):
        RatioAccumulator().update(torch.zeros(5, 2), torch.zeros(5))
