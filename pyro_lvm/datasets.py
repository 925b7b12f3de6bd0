"""Data sets with a named binarisation, and two-dimensional toys.

A log-likelihood of binary images means nothing without the way in which they were made binary, so every
:class:`ImageData` carries it, with the sizes and the seed, in ``provenance``. Grey levels g are in [0, 1]:

=============  ========================================================================
"threshold"    x = 1 where g > 1/2, else 0
"dynamic"      x ~ Bernoulli(g): drawn anew at each access in training, once for the test
"none"         x = g (the only one of faces)
"counts"       x = 16 g in {0, ..., 16} (digits only): for Binomial or categorical pixels
=============  ========================================================================
"""

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import DatasetError, DataTypeError, ShapeError

__all__ = [
    "ImageData",
    "ImageDataset",
    "digits",
    "faces",
    "fashion_mnist",
    "gaussian_blobs",
    "mnist",
    "pinwheel",
    "two_moons",
]

Binarize: TypeAlias = Literal["threshold", "dynamic", "none", "counts"]

_ENVIRONMENT = "PYRO_LVM_DATA"
_CACHE = "~/.cache/pyro_lvm"
_PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class ImageDataset(Dataset[torch.Tensor]):
    """Single images of shape ``(D,)`` for a ``DataLoader``: as they are, or drawn anew from their grey levels.

    A draw takes torch's global random numbers, so ``torch.manual_seed`` repeats it and each worker has its own.

    Args:
        images: ``(N, D)``; with ``redraw``, Bernoulli probabilities.
        redraw: return x ~ Bernoulli(image) at each access, and not the image.
        provenance: what estimates on these data note in their own provenance.
    """

    def __init__(self, images: torch.Tensor, redraw: bool, provenance: dict[str, Any]) -> None:
        self.images = images  # (N, D)
        self.redraw = redraw
        self.provenance = provenance

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> torch.Tensor:
        image = self.images[index]  # (D,), or (B, D) where the index is a slice or a tensor
        return torch.bernoulli(image) if self.redraw else image


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images as rows, split into training and test data.

    Attributes:
        name: name of the data set.
        binarize: how pixels were made binary (see the module).
        seed: seed of the split and of the draws, whichever the data set has.
        train: ``(N, D)`` float32. With ``binarize="dynamic"`` these are the grey levels: train on ``train_dataset``.
        test: ``(N_test, D)`` float32, always binarised as named; one seeded draw with ``"dynamic"``.
        train_labels: ``(N,)`` int64.
        test_labels: ``(N_test,)`` int64.
        image_shape: (height, width), whose product is D.
    """

    name: str
    binarize: str
    seed: int
    train: torch.Tensor = field(repr=False)
    test: torch.Tensor = field(repr=False)
    train_labels: torch.Tensor = field(repr=False)
    test_labels: torch.Tensor = field(repr=False)
    image_shape: tuple[int, int]

    def __post_init__(self) -> None:
        # Estimates on these very tensors note where they come from; a slice of one is another tensor, and does not.
        for images in (self.train, self.test):
            images.provenance = self.provenance  # type: ignore[attr-defined]

    @property
    def train_dataset(self) -> ImageDataset:
        """The training images one by one, binarised anew at each access if ``binarize`` is ``"dynamic"``."""
        return ImageDataset(self.train, self.binarize == "dynamic", self.provenance)

    @property
    def provenance(self) -> dict[str, Any]:
        """What makes a number on these data quotable: name, binarisation, sizes and seed."""
        return {
            "name": self.name,
            "binarize": self.binarize,
            "num_train": len(self.train),
            "num_test": len(self.test),
            "image_shape": self.image_shape,
            "seed": self.seed,
        }


def digits(binarize: Binarize = "threshold", *, split: tuple[int, int] = (1437, 360), seed: int = 0) -> ImageData:
    """The 1797 handwritten digits of 8x8 pixels and 17 grey levels that scikit-learn contains: no download.

    Args:
        binarize: see the module.
        split: numbers of training and test images, drawn without replacement.
        seed: seed of the split, and of the test draw with ``"dynamic"``.

    Returns:
        ImageData with D = 64.

    Raises:
        DataTypeError: ``binarize`` is not one of the four names.
        ShapeError: ``split`` asks for more than 1797 images.

    Example:
        >>> data = digits()
        >>> data.train.shape, data.provenance["binarize"]
        (torch.Size([1437, 64]), 'threshold')
    """
    from sklearn.datasets import load_digits

    _check_binarize(binarize, ("threshold", "dynamic", "none", "counts"))
    bundle = load_digits()
    grey = torch.from_numpy(bundle.data).float() / 16  # (1797, 64)
    labels = torch.from_numpy(bundle.target).long()  # (1797,)
    generator = torch.Generator().manual_seed(seed)
    train, test = _split(len(grey), split, generator)
    return ImageData(
        name="digits",
        binarize=binarize,
        seed=seed,
        train=grey[train] if binarize == "dynamic" else _binarized(grey[train], binarize, generator),
        test=_binarized(grey[test], binarize, generator),
        train_labels=labels[train],
        test_labels=labels[test],
        image_shape=(8, 8),
    )


def faces(*, split: tuple[int, int] = (85, 15), seed: int = 0) -> ImageData:
    """The 100 faces of 25x25 grey pixels in scikit-image's part of Labeled Faces in the Wild: no download.

    They are the first half of ``skimage.data.lfw_subset()`` (the second is no faces), as they are: ``binarize`` is
    ``"none"``, and all labels are 0.

    Args:
        split: numbers of training and test images, drawn without replacement.
        seed: seed of the split.

    Returns:
        ImageData with D = 625.

    Raises:
        DatasetError: scikit-image, or its file of these images, is not there.
        ShapeError: ``split`` asks for more than 100 images.

    Source: Huang, Ramesh, Berg and Learned-Miller (2007), Labeled Faces in the Wild, University of Massachusetts,
    Technical Report 07-49.
    """
    try:
        from skimage.data import lfw_subset

        images = lfw_subset()[:100]  # (100, 25, 25)
    except (ImportError, OSError) as error:
        cure = 'Run `pip install "pyro_lvm[data]"`.'
        raise DatasetError(refuse("faces", "scikit-image with its lfw_subset", f"{error}", cure)) from error
    grey = torch.from_numpy(images).float().flatten(1)  # (100, 625)
    train, test = _split(len(grey), split, torch.Generator().manual_seed(seed))
    return ImageData(
        name="faces",
        binarize="none",
        seed=seed,
        train=grey[train],
        test=grey[test],
        train_labels=torch.zeros(len(train), dtype=torch.long),
        test_labels=torch.zeros(len(test), dtype=torch.long),
        image_shape=(25, 25),
    )


def mnist(
    binarize: Binarize = "threshold", *, root: str | Path | None = None, download: bool = False, seed: int = 0
) -> ImageData:
    """The MNIST handwritten digits, 28x28 pixels (LeCun et al. 1998): 60,000 for training, 10,000 for the test.

    The IDX files, plain or ``.gz``, are looked for in ``<place>/MNIST/raw``, where place is ``root``, then
    ``$PYRO_LVM_DATA``, then ``~/.cache/pyro_lvm``; torchvision uses the same layout.

    Args:
        binarize: ``"threshold"``, ``"dynamic"`` or ``"none"`` (see the module).
        root: the first place to look in, and the one to download to.
        download: fetch the files through torchvision if no place has them.
        seed: seed of the test draw with ``"dynamic"``.

    Returns:
        ImageData with D = 784.

    Raises:
        DataTypeError: ``binarize`` is not one of the three names.
        DatasetError: the files are nowhere, are damaged, or cannot be downloaded.
    """
    return _idx_data("MNIST", binarize, root, download, seed)


def fashion_mnist(
    binarize: Binarize = "threshold", *, root: str | Path | None = None, download: bool = False, seed: int = 0
) -> ImageData:
    """Fashion-MNIST (Xiao et al. 2017): as :func:`mnist`, with pictures of clothes, in ``<place>/FashionMNIST/raw``."""
    return _idx_data("FashionMNIST", binarize, root, download, seed)


def two_moons(num_data: int, *, noise: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two interleaved half circles of radius 1, with Gaussian noise of standard deviation ``noise``.

    Returns:
        x ``(num_data, 2)`` and the half circle of each datum ``(num_data,)``, in turn.

    Example:
        >>> x, labels = two_moons(100)
        >>> x.shape, labels[:4]
        (torch.Size([100, 2]), tensor([0, 1, 0, 1]))
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(check_positive_int("num_data", num_data)) % 2
    angle = math.pi * torch.rand(num_data, generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], -1)  # (num_data, 2)
    lower = torch.tensor([1.0, 0.5]) - upper
    return torch.where(labels[:, None] == 0, upper, lower) + noise * _normal(num_data, generator), labels


def pinwheel(num_data: int, *, num_arms: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian arms bent round the origin (Johnson et al. 2016, Section 6).

    Returns:
        x ``(num_data, 2)`` and the arm of each datum ``(num_data,)``, in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(check_positive_int("num_data", num_data)) % check_positive_int("num_arms", num_arms)
    along, across = (_normal(num_data, generator) * torch.tensor([0.3, 0.1]) + torch.tensor([1.0, 0.0])).unbind(-1)
    angle = 2 * math.pi * labels / num_arms + 0.25 * along.exp()
    rotated = [along * angle.cos() - across * angle.sin(), along * angle.sin() + across * angle.cos()]
    return torch.stack(rotated, -1), labels


def gaussian_blobs(
    num_data: int, *, num_components: int = 3, scale: float = 0.5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equal round Gaussians of standard deviation ``scale``, their means evenly spaced on a circle of radius 2.

    Returns:
        x ``(num_data, 2)`` and the component of each datum ``(num_data,)``, in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    check_positive_int("num_components", num_components)
    labels = torch.arange(check_positive_int("num_data", num_data)) % num_components
    angle = 2 * math.pi * labels / num_components
    means = 2 * torch.stack([angle.cos(), angle.sin()], -1)  # (num_data, 2)
    return means + scale * _normal(num_data, generator), labels


def _normal(num_data: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(num_data, 2, generator=generator)


def _split(num_images: int, split: tuple[int, int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of training and test images, in an order of their own."""
    num_train = check_positive_int("split", split[0])
    num_test = check_positive_int("split", split[1], minimum=0)
    if num_train + num_test > num_images:
        raise ShapeError(refuse("split", f"{num_images} images at most", split, "Ask for fewer."))
    order = torch.randperm(num_images, generator=generator)
    return order[:num_train], order[num_train : num_train + num_test]


def _check_binarize(binarize: str, names: tuple[str, ...]) -> None:
    if binarize not in names:
        raise DataTypeError(refuse("binarize", f"one of {names}", repr(binarize), "Pass one of these names."))


def _binarized(grey: torch.Tensor, binarize: str, generator: torch.Generator) -> torch.Tensor:
    if binarize == "threshold":
        return (grey > 0.5).float()
    if binarize == "dynamic":
        return torch.bernoulli(grey, generator=generator)
    return grey if binarize == "none" else (16 * grey).round()


def _idx_data(name: str, binarize: str, root: str | Path | None, download: bool, seed: int) -> ImageData:
    _check_binarize(binarize, ("threshold", "dynamic", "none"))
    folder = _find_folder(name, root, download)
    train, image_shape = _read_images(folder / _PARTS[0])
    test, _ = _read_images(folder / _PARTS[2])
    generator = torch.Generator().manual_seed(seed)
    return ImageData(
        name=name,
        binarize=binarize,
        seed=seed,
        train=train if binarize == "dynamic" else _binarized(train, binarize, generator),
        test=_binarized(test, binarize, generator),
        train_labels=_read_labels(folder / _PARTS[1], len(train)),
        test_labels=_read_labels(folder / _PARTS[3], len(test)),
        image_shape=image_shape,
    )


def _find_folder(name: str, root: str | Path | None, download: bool) -> Path:
    """The first ``<place>/<name>/raw`` that holds all four files."""
    variable = os.environ.get(_ENVIRONMENT)
    places = {"root": root, f"${_ENVIRONMENT}": variable, "the user's cache": _CACHE}
    roots = [Path(place).expanduser() for place in places.values() if place]
    for folder in (place / name / "raw" for place in roots):
        if all(_existing(folder / part) for part in _PARTS):
            return folder
    if download:
        return _download(name, roots[0]) / name / "raw"
    looked = ", ".join(
        f"{argument}={Path(place).expanduser()}" if place else f"{argument} (not given)"
        for argument, place in places.items()
    )
    cure = f"Pass root=, set ${_ENVIRONMENT} to the folder that holds {name}/, or pass download=True."
    raise DatasetError(refuse(name, f"<place>/{name}/raw/{{{', '.join(_PARTS)}}}[.gz]", f"none in {looked}", cure))


def _download(name: str, root: Path) -> Path:
    try:
        import torchvision

        source = getattr(torchvision.datasets, name)
        source(root, train=True, download=True)
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision that does not fit torch is a RuntimeError
        cure = f"Copy the files to {root / name / 'raw'} by hand."
        raise DatasetError(refuse(name, "a download through torchvision", f"{error}", cure)) from error
    return root


def _existing(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.is_file()), None)


def _read_images(path: Path) -> tuple[torch.Tensor, tuple[int, int]]:
    pixels = _read_idx(path, num_dims=3)  # (N, height, width)
    grey = torch.from_numpy(pixels.astype(np.float32)).div_(255)
    return grey.flatten(1), (pixels.shape[1], pixels.shape[2])


def _read_labels(path: Path, num_images: int) -> torch.Tensor:
    labels = torch.from_numpy(_read_idx(path, num_dims=1).astype(np.int64))
    if len(labels) != num_images:
        cure = "Take images and labels from the same source."
        raise DatasetError(refuse(str(path), f"{num_images} labels, one an image", len(labels), cure))
    return labels


def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """The unsigned bytes of an IDX file: 0, 0, type 8, number of dimensions, the sizes (big-endian), the data."""
    file = _existing(path) or path
    cure = "The file is damaged: delete it and copy it anew, or download it with download=True."
    header = 4 + 4 * num_dims
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(refuse(str(file), "a readable file", f"{error}", cure)) from error
    if len(content) < header or content[:4] != bytes([0, 0, 8, num_dims]):
        expected = f"an IDX header of {header} bytes that begins with {bytes([0, 0, 8, num_dims]).hex(' ')}"
        raise DatasetError(refuse(str(file), expected, f"{content[:4].hex(' ')} in {len(content)} bytes", cure))
    sizes = struct.unpack(f">{num_dims}I", content[4:header])
    if len(content) != header + math.prod(sizes):
        expected = f"{header + math.prod(sizes)} bytes for shape {sizes}"
        raise DatasetError(refuse(str(file), expected, f"{len(content)} bytes", cure))
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)
