"""`plots.images` and `plots.latents`."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import pyro_lvm as lvm
from pyro_lvm import plots


def both(draw, *args, **options):
    own = Figure().subplots()
    assert draw(*args, ax=own, **options) is own
    ax = draw(*args, **options)
    assert ax.figure is not own.figure
    return own, ax


def shown(ax):
    return np.asarray(ax.get_images()[0].get_array())


def test_images_stand_in_rows():
    pixels = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0))
    for ax in both(plots.images, pixels, columns=3):
        grid = shown(ax)
        assert grid.shape == (2 * 2 + 1, 3 * 3 + 2, 3)  # one pixel between images
        np.testing.assert_allclose(grid[:2, :3, 0], pixels[0])
        np.testing.assert_allclose(grid[:2, 8:11, 1], pixels[2])
        np.testing.assert_allclose(grid[3:5, 4:7, 2], pixels[4])
        assert (grid[2] == 1).all()
        assert (grid[3:5, 8:] == 1).all()  # no sixth image
        assert not ax.axison


def test_colours_rows_of_pixels_and_a_shape():
    colour = torch.rand(2, 3, 4, 5)
    np.testing.assert_allclose(shown(plots.images(colour))[:, :5], colour[0].movedim(0, -1))
    np.testing.assert_allclose(
        shown(plots.images(torch.arange(9.0)[None] / 9))[..., 0], torch.arange(9.0).reshape(3, 3) / 9
    )
    flat = torch.rand(2, 6)
    np.testing.assert_allclose(shown(plots.images(flat, shape=(2, 3)))[:, :3, 0], flat[0].reshape(2, 3))
    np.testing.assert_allclose(shown(plots.images(colour.flatten(1), shape=(3, 4, 5))), shown(plots.images(colour)))
    assert shown(plots.images(flat.numpy(), shape=(1, 2, 3))).shape == (2, 7, 3)


def test_one_image_has_no_frame():
    image = torch.rand(1, 4, 4)
    np.testing.assert_allclose(shown(plots.images(image))[..., 0], image[0])


def test_other_values_than_grey_are_stretched():
    grid = shown(plots.images(torch.tensor([[[-1.0, 0.0], [1.0, 3.0]]])))
    np.testing.assert_allclose(grid[..., 0], [[0.0, 0.25], [0.5, 1.0]])
    faint = shown(plots.images(torch.tensor([[[0.2, 0.3]]])))  # within 0 to 1 they stay
    np.testing.assert_allclose(faint[..., 0], [[0.2, 0.3]])
    assert (shown(plots.images(torch.full((1, 2, 2), 5.0))) == 0).all()


@pytest.mark.parametrize(
    ("images", "options", "error", "words"),
    [
        (torch.zeros(2, 4, 4, 3), {}, lvm.ShapeError, r"movedim\(-1, 1\)"),
        (torch.zeros(2, 7), {}, lvm.ShapeError, r"4 pixels, of \(2, 2\), got 7"),
        (torch.zeros(2, 6), {"shape": (2, 4)}, lvm.ShapeError, r"8 pixels, of \(2, 4\), got 6"),
        (torch.zeros(2, 6), {"shape": (6,)}, lvm.ShapeError, r"\(M, H, W\)"),
        (torch.zeros(4), {}, lvm.ShapeError, r"\(M, H, W\)"),
        (torch.zeros(2, 4, 4), {"columns": 0}, lvm.ShapeError, "columns: expected 1 or more"),
        ([1, 2], {}, lvm.DataTypeError, "images: expected a tensor"),
        (torch.zeros(2, 4, 4), {"ax": 0}, lvm.DataTypeError, "ax"),
    ],
)
def test_images_that_are_refused(images, options, error, words):
    with pytest.raises(error, match=words):
        plots.images(images, **options)


def test_latents_by_label():
    z = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    for ax in both(plots.latents, z, ["b", "a", "b"]):
        drawn = {part.get_label(): part.get_offsets().tolist() for part in ax.collections}
        assert drawn == {"a": [[2.0, 3.0]], "b": [[0.0, 1.0], [4.0, 5.0]]}
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    for ax in both(plots.latents, z):
        assert ax.collections[0].get_offsets().tolist() == z.tolist()
        assert ax.get_legend() is None


def test_ten_classes_are_told_apart():
    ax = plots.latents(torch.zeros(10, 2), torch.arange(10))
    kinds = {(tuple(part.get_facecolor()[0]), part.get_paths()[0].vertices.tobytes()) for part in ax.collections}
    assert len(kinds) == 10


@pytest.mark.parametrize(
    ("z", "labels", "error", "words"),
    [
        (torch.zeros(3, 5), None, lvm.ShapeError, r"z: expected shape \(N, 2\), got \(3, 5\).*z\[:, :2\]"),
        (torch.zeros(3), None, lvm.ShapeError, "z"),
        (torch.zeros(3, 2), torch.zeros(4), lvm.ShapeError, "labels: expected one for each of 3 points"),
        ("z", None, lvm.DataTypeError, "z: expected a tensor"),
    ],
)
def test_latents_that_are_refused(z, labels, error, words):
    with pytest.raises(error, match=words):
        plots.latents(z, labels)
