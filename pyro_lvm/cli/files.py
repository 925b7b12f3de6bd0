"""Data from files: arrays, tensors and images, read without running anything of theirs."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from pyro_lvm._checks import data_tensor, refuse
from pyro_lvm.errors import DatasetError, PyroLVMError

__all__ = ["ENDINGS", "read_file", "read_images"]

_CURE = "Pass a file that np.save, np.savez or torch.save has written from an array of numbers."
_IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_file(path: Path) -> tuple[torch.Tensor, str]:
    """The numbers in a file as float32 ``(N, ...)``, and what was done to them, or an empty string.

    Args:
        path: ends with one of `ENDINGS`: an array of `np.save`, an archive of `np.savez` with one array or one called
            ``x``, or a tensor of `torch.save`. Pickled objects are refused: to read them would be to run them.

    Raises:
        DatasetError: the file cannot be read, or holds something else than finite or missing numbers.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> np.save(folder / "x.npy", np.zeros((5, 2)))
        >>> x, note = read_file(folder / "x.npy")
        >>> x.shape, x.dtype, note
        (torch.Size([5, 2]), torch.float32, 'float64 became float32')
    """
    with _told(path):
        found = _READERS[path.suffix.lower()](path)
        if found.ndim == 0:
            raise DatasetError(refuse("x", "shape (N, ...)", "a single number", "Save an array of all data."))
        found = data_tensor("x", found).detach().to("cpu")
    x = found.float()
    if bool(x.isinf().any()):
        raise DatasetError(refuse(str(path), "numbers within the range of float32", "infinity", "Leave them out."))
    name = str(found.dtype).removeprefix("torch.")
    return x, "" if found.dtype is torch.float32 else f"{name} became float32"


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file, and a damaged one may raise anything, say which file and what to do."""
    try:
        yield
    except PyroLVMError as error:
        raise DatasetError(f"{path}: {error}") from error
    except OSError as error:
        cure = "Pass the path of a file that is there and can be read."
        raise DatasetError(refuse(str(path), "a readable file", error.strerror or f"{error}", cure)) from error
    except Exception as error:
        got = f"one that is damaged, or that holds pickled objects ({type(error).__name__})"
        raise DatasetError(refuse(str(path), f"a {path.suffix} file with numbers", got, _CURE)) from error


def _read_npy(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        found = np.load(file, allow_pickle=False)
    if not isinstance(found, np.ndarray):  # an archive with another ending
        raise ValueError("not one array")
    return found


def _read_npz(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("not an archive")
        name = "x" if "x" in archive.files else archive.files[0] if len(archive.files) == 1 else None
        if name is None:
            cure = "Save it again with the data under that name: np.savez(path, x=data)."
            raise DatasetError(refuse("arrays", "one array, or one called 'x'", sorted(archive.files), cure))
        return np.asarray(archive[name])


def _read_pt(path: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of formats that torch.save once had
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, torch.Tensor):
        cure = "Save the tensor itself: torch.save(x, path)."
        raise DatasetError(refuse("content", "a tensor", f"a {type(found).__name__}", cure))
    return found


_READERS: dict[str, Callable[[Path], np.ndarray | torch.Tensor]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
}

#: Of the files that can be read.
ENDINGS = tuple(_READERS)


def read_images(folder: Path, size: int) -> torch.Tensor:
    """The images in a folder and those below it, in the order of their paths, as grey levels in [0, 1].

    Each is scaled to ``size`` pixels on its shorter side and cut to a square around its middle: ``(N, size * size)``.

    Raises:
        DatasetError: there is no image, or one cannot be read.
    """
    import torchvision
    from PIL import Image

    found = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    paths = sorted(path for path in found if path.suffix.lower() in _IMAGES)
    if not paths:
        cure = "Pass a folder with images in it, or in folders in it."
        raise DatasetError(refuse(str(folder), f"images ({', '.join(_IMAGES)})", "none", cure))
    square = torchvision.transforms.Compose(
        [
            torchvision.transforms.Grayscale(),
            torchvision.transforms.Resize(size),
            torchvision.transforms.CenterCrop(size),
            torchvision.transforms.ToTensor(),
        ]
    )
    rows = []
    for path in paths:
        try:
            with Image.open(path) as image:
                rows.append(square(image.convert("RGB")).flatten())  # (size * size,)
        except Exception as error:  # a damaged image may raise anything
            cure = "Delete the file, or save the image anew."
            raise DatasetError(refuse(str(path), "an image", f"{type(error).__name__}: {error}", cure)) from error
    return torch.stack(rows)
