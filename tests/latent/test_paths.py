"""Paths in the latent space: what their points are, to rounding."""

import pytest
import torch

from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError
from pyro_lvm.latent import attribute_vector, interpolate, traverse


def table(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_linear():
    start, stop = table(4, 3), table(4, 3, seed=1)
    found = interpolate(start, stop, 5)
    assert found.shape == (5, 4, 3)
    torch.testing.assert_close(found[1], 0.75 * start + 0.25 * stop)
    assert torch.equal(found[0], start)
    assert torch.equal(found[-1], stop)


def test_spherical_turns_and_grows_evenly():
    start, stop = table(50), 3 * table(50, seed=1)
    found = interpolate(start, stop, 11, "spherical")
    torch.testing.assert_close(found[0], start)
    torch.testing.assert_close(found[-1], stop)
    lengths = found.norm(dim=-1)
    torch.testing.assert_close(lengths.diff(), lengths.diff()[:1].expand(10))
    unit = found / lengths[:, None]
    angles = (unit[1:] * unit[:-1]).sum(-1).acos()
    torch.testing.assert_close(angles, angles[:1].expand(10))


def test_the_middle_of_a_straight_line_is_shorter_than_both_ends():
    """What the spherical path is for: the length of draws of N(0, I) in 1000 dimensions."""
    start, stop = table(1000), table(1000, seed=1)
    ends = (start.norm() + stop.norm()) / 2
    assert interpolate(start, stop, 3)[1].norm() < 0.8 * ends
    torch.testing.assert_close(interpolate(start, stop, 3, "spherical")[1].norm(), ends)


def test_a_spherical_path_between_the_same_points_stays():
    z = table(2, 4)
    torch.testing.assert_close(interpolate(z, z, 4, "spherical"), z.expand(4, 2, 4))
    torch.testing.assert_close(interpolate(z, 2 * z, 3, "spherical")[1], 1.5 * z)


def test_traverse_changes_one_dimension_at_a_time():
    z = table(3)
    found = traverse(z, dims=[2, 0], values=[-1, 0.5])
    assert found.shape == (2, 2, 3)
    assert found[0, 1].tolist() == [z[0], z[1], 0.5]
    assert found[1, 0].tolist() == [-1.0, z[1], z[2]]
    assert traverse(z).shape == (3, 7, 3)


def test_attribute_vector_is_a_difference_of_means():
    z, has = table(6, 2), torch.tensor([1, 0, 0, 1, 1, 0])
    torch.testing.assert_close(attribute_vector(z, has), z[[0, 3, 4]].mean(0) - z[[1, 2, 5]].mean(0))


ZERO, ONE = torch.zeros(2), torch.tensor([1.0, 0.0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: interpolate(ZERO, torch.zeros(3)), ShapeError, r"stop: expected shape \(2,\)"),
        (lambda: interpolate(ZERO, ONE, 1), ShapeError, "num_steps: expected 2 or more"),
        (lambda: interpolate(ZERO, ONE, 5, "cubic"), ParameterError, "path: expected"),
        (lambda: interpolate(ZERO, ONE, 5, "spherical"), ParameterError, "one way between them"),
        (lambda: interpolate(ONE, -ONE, 5, "spherical"), ParameterError, "zero or opposite"),
        (lambda: interpolate([0.0], ONE), DataTypeError, "start"),
        (lambda: traverse(torch.zeros(2, 2)), ShapeError, r"z: expected shape \(L,\)"),
        (lambda: traverse(ZERO, dims=[2]), ShapeError, "dims: expected dimensions from 0 to 1"),
        (lambda: traverse(ZERO, dims=[]), ShapeError, "dims"),
        (lambda: attribute_vector(torch.zeros(3, 2), torch.ones(2)), ShapeError, r"has: expected shape \(3,\)"),
        (lambda: attribute_vector(torch.zeros(3, 2), torch.ones(3)), ParameterError, "both kinds"),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
