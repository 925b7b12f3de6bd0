"""`plots.density` and `plots.responsibilities`."""

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import pyro_lvm as lvm
from pyro_lvm import plots


def normal(x):
    return torch.distributions.Normal(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5])).log_prob(x).sum(-1)


@pytest.mark.parametrize("given", [False, True])
def test_density_has_its_peak_and_its_mass(given):
    own = Figure().subplots() if given else None
    ax = plots.density(normal, ((-5, 5), (-2, 1)), ax=own, num_points=201)
    assert not given or ax is own
    assert ax.get_title() == "50% of the mass"  # up to the mean of the second coordinate
    filled = ax.collections[0]
    inner = np.concatenate([path.vertices for path in filled.get_paths()[-2:] if len(path.vertices)])
    assert np.abs(inner - [0, 1]).max() < 0.75  # the highest level is around the mean, at (0, 1)
    assert filled.get_array().max() <= 1 / (2 * math.pi * 0.5) * 1.1
    assert ax.figure.axes[-1].get_ylabel() == "p(x), per unit area"


def test_density_of_a_model():
    model = lvm.models.DeepGaussian(lvm.nn.MLP(1, [4], 4), 1, lvm.models.likelihoods.Normal())
    x = lambda points: lvm.evidence.quadrature(model, points, num_nodes=49, tolerance=1e-2).value  # noqa: E731
    share = float(plots.density(x, ((-12, 12), (-12, 12)), num_points=41).get_title().split("%")[0])
    assert share == pytest.approx(100, abs=2)


@pytest.mark.parametrize(
    ("fn", "limits", "options", "error", "words"),
    [
        (3, ((0, 1), (0, 1)), {}, lvm.DataTypeError, "log_density: expected a Pyro program|log_density"),
        (normal, (0, 1), {}, lvm.ShapeError, "limits: expected .*low < high"),
        (normal, ((0, 1), (1, 0)), {}, lvm.ShapeError, "limits"),
        (normal, ((0, math.inf), (0, 1)), {}, lvm.ShapeError, "limits"),
        (
            lambda x: x,
            ((0, 1), (0, 1)),
            {},
            lvm.ShapeError,
            r"log_density: expected shape \(10201,\), got \(10201, 2\)",
        ),
        (lambda x: 0.0, ((0, 1), (0, 1)), {}, lvm.ShapeError, "got float"),
        (lambda x: x[:, 0] * math.nan, ((0, 1), (0, 1)), {}, lvm.SupportError, "a finite density"),
        (lambda x: x[:, 0] - 1e6, ((0, 1), (0, 1)), {}, lvm.SupportError, "zero, NaN or infinity"),
        (normal, ((0, 1), (0, 1)), {"num_points": 3}, lvm.ShapeError, "num_points"),
        (normal, ((0, 1), (0, 1)), {"ax": 1}, lvm.DataTypeError, "ax"),
    ],
)
def test_densities_that_are_refused(fn, limits, options, error, words):
    with pytest.raises(error, match=words):
        plots.density(fn, limits, **options)


@pytest.mark.parametrize("given", [False, True])
def test_responsibilities_mix_the_colours(given):
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    own = Figure().subplots() if given else None
    ax = plots.responsibilities(x, probs, ax=own)
    assert not given or ax is own
    parts = [part for part in ax.collections if len(part.get_offsets())]
    drawn = {
        tuple(p): c[:3]
        for part in parts
        for p, c in zip(part.get_offsets().tolist(), part.get_facecolor(), strict=True)
    }
    blue, orange = np.array([0x00, 0x72, 0xB2]) / 255, np.array([0xE6, 0x9F, 0x00]) / 255
    np.testing.assert_allclose(drawn[0.0, 0.0], blue)
    np.testing.assert_allclose(drawn[1.0, 2.0], orange)
    np.testing.assert_allclose(drawn[3.0, 1.0], (blue + orange) / 2)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["k = 0: 50%", "k = 1: 50%"]


def test_more_components_than_colours_have_other_markers():
    probs = torch.eye(10)
    ax = plots.responsibilities(torch.arange(20.0).reshape(10, 2), probs)
    parts = [part for part in ax.collections if len(part.get_offsets())]
    assert len(parts) == 10
    first, ninth = parts[0], parts[8]
    np.testing.assert_allclose(first.get_facecolor(), ninth.get_facecolor())
    assert not np.array_equal(first.get_paths()[0].vertices, ninth.get_paths()[0].vertices)


@pytest.mark.parametrize(
    ("x", "probs", "words"),
    [
        (torch.zeros(3, 3), torch.full((3, 2), 0.5), r"x: expected shape \(N, 2\), got \(3, 3\).*x\[:, :2\]"),
        (torch.zeros(3, 2), torch.full((2, 2), 0.5), "probs: expected one row for each of 3 data, got 2"),
        (torch.zeros(3, 2), torch.full((3, 2), 0.7), "probs: .* sum to one"),
    ],
)
def test_responsibilities_that_are_refused(x, probs, words):
    with pytest.raises(lvm.ShapeError, match=words):
        plots.responsibilities(x, probs)
