"""Data by name or from a file, split into what is trained on and what is held out."""

import difflib
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyro_lvm import datasets
from pyro_lvm._checks import refuse
from pyro_lvm._files import tensor_bytes
from pyro_lvm.cli.files import ENDINGS, read_file, read_images
from pyro_lvm.errors import DatasetError, DataTypeError

__all__ = ["NAMES", "Data", "load_data", "nearest", "options_of"]

_IMAGES = {
    "digits": ("binarize",),
    "mnist": ("binarize", "root"),
    "fashion_mnist": ("binarize", "root"),
    "faces": (),
}
_TOYS = ("two_moons", "pinwheel", "gaussian_blobs")
_NUM_TOYS = 1000, 200  # to train on, held out

#: What needs no file.
NAMES = (*_IMAGES, *_TOYS)

_DEFAULTS = {"size": 28, "test_share": 0.2}


@dataclass(frozen=True, eq=False)
class Data:
    """What a pair is trained on, and what it is measured on.

    Attributes:
        train: ``(N, ...)``, or a data set whose images are made binary anew at each access.
        test: ``(N_test, ...)``.
        images: whether a datum is an image.
        levels: what the values are if that is known beforehand: ``"counts"`` for 0 to 16, ``"bytes"`` for pixels of 0
            to 255, else empty.
        options: those that the data were loaded with, for another process to load them again.
        note: what was done to the numbers of a file, or empty.
    """

    train: torch.Tensor | datasets.ImageDataset
    test: torch.Tensor
    images: bool
    levels: str
    options: dict[str, Any]
    note: str

    @property
    def rows(self) -> torch.Tensor:
        """Training data as they go into the pair; those that are held out where training draws them anew."""
        return self.train if isinstance(self.train, torch.Tensor) else self.test

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return tuple(self.test.shape[1:])

    def as_rows(self) -> "Data":
        """The same with each datum as one row of numbers, as library models take them."""
        if self.test.dim() == 2 or not isinstance(self.train, torch.Tensor):
            return self
        train, test = (_like(x.flatten(1), x) for x in (self.train, self.test))
        return Data(train, test, self.images, self.levels, self.options, self.note)

    def complete(self) -> "Data":
        """The same, if no number is missing, as library models and guides need it.

        Raises:
            DatasetError: some rows have NaN.
        """
        for x in (self.rows, self.test):
            missing = sum(bool(row.isnan().any()) for row in x) if bool(x.isnan().any()) else 0
            if missing:
                cure = "Leave these rows out, or take a model and a guide of your own that know what to do with them."
                raise DatasetError(
                    refuse(self.options["data"], "numbers only", f"NaN in {missing} of {len(x)} rows", cure)
                )
        return self

    def described(self) -> dict[str, Any]:
        """The options with what they led to, to be written to a file."""
        train = self.train if isinstance(self.train, torch.Tensor) else self.train.images
        return self.options | {
            "shape": list(self.shape),
            "num_train": len(train),
            "num_test": len(self.test),
            "sha256": {"train": _digest(train), "test": _digest(self.test)},
        }

    def __str__(self) -> str:
        datum = " x ".join(map(str, self.shape)) or "1"
        note = f" ({self.note})" if self.note else ""
        name, sizes = Path(self.options["data"]).name, f"{len(self.train)} to train on, {len(self.test)} held out"
        return f"{name}: {sizes}, each {datum}{note}"


def load_data(options: Mapping[str, Any], *, whole: bool = False) -> Data:
    """The data that the options name.

    Args:
        options: ``data``, a name, a file or a folder; ``root``, ``size``, ``binarize`` and ``test_share``, None where
            they were not given; ``split_seed``.
        whole: hold all of a file or a folder out, and train on none of it.

    Raises:
        DataTypeError: an unknown name, or an option that these data do not have.
        DatasetError: the data are not there, or are no data.

    Example:
        >>> data = load_data({"data": "two_moons", "split_seed": 0})
        >>> data.train.shape, data.test.shape, data.shape
        (torch.Size([1000, 2]), torch.Size([200, 2]), (2,))
    """
    name = options["data"]
    if name in _IMAGES:
        return _named_images(name, options)
    if name in _TOYS:
        return _toy(name, options)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, options, whole)
    if path.suffix.lower() in ENDINGS:
        return _file(path, options, whole)
    if path.exists():
        cure = "A folder of images is data too."
        raise DatasetError(refuse("--data", f"a file that ends with {', '.join(ENDINGS)}", str(path), cure))
    expected = f"one of {', '.join(NAMES)}, a file ({', '.join(ENDINGS)}) or a folder of images"
    raise DataTypeError(refuse("--data", expected, repr(name), nearest(name, NAMES)))


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that was probably meant, as a question, or the advice to choose."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"Did you mean {found[0]!r}?" if found else "Choose one of these."


def options_of(name: str) -> tuple[str, ...]:
    """The options that these data have."""
    if name in _IMAGES:
        return _IMAGES[name]
    if name in _TOYS:
        return ()
    return ("size", "binarize", "test_share") if Path(name).expanduser().is_dir() else ("test_share",)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given; those that the data do not have are refused."""
    names = ("root", "size", "binarize", "test_share")
    given = {name: options[name] for name in names if options.get(name) is not None}
    for name in given.keys() - set(options_of(options["data"])):
        option = f"--{name.replace('_', '-')}"
        raise DataTypeError(refuse(option, "data that have it", options["data"], "Leave the option out."))
    return given


def _named_images(name: str, options: Mapping[str, Any]) -> Data:
    given = _given(options)
    if "root" in given:
        given["root"] = os.path.abspath(given["root"])
    try:
        found = getattr(datasets, name)(**given, seed=options["split_seed"])
    except DatasetError as error:
        raise DatasetError(f"{error} Here root is --root." if "root" in _IMAGES[name] else str(error)) from error
    given = {"data": name, **given, "binarize": found.binarize, "split_seed": options["split_seed"]}
    if name == "faces":
        del given["binarize"]
    train = found.train_dataset if found.binarize == "dynamic" else found.train
    return Data(train, found.test, True, "counts" if found.binarize == "counts" else "", given, "")


def _toy(name: str, options: Mapping[str, Any]) -> Data:
    _given(options)
    seed, make = options["split_seed"], getattr(datasets, name)
    train, test = (make(count, seed=2 * seed + i)[0] for i, count in enumerate(_NUM_TOYS))
    kept = {"data": name, "split_seed": seed}
    return Data(_noted(train, kept), _noted(test, kept), False, "", kept, "")


def _file(path: Path, options: Mapping[str, Any], whole: bool) -> Data:
    given = _given(options)
    x, note = read_file(path)
    levels = "bytes" if x.dim() > 2 and note.startswith("uint8") else ""
    return _split(x, path, given, options["split_seed"], whole, images=bool(levels), levels=levels, note=note)


def _folder(path: Path, options: Mapping[str, Any], whole: bool) -> Data:
    given = {"size": _DEFAULTS["size"]} | _given(options)
    binarize = given.setdefault("binarize", "none")
    if binarize not in ("none", "threshold"):
        cure = "Pass one of the two, or a file that holds the pixels as they are to be."
        raise DataTypeError(refuse("--binarize", "none or threshold for a folder of images", binarize, cure))
    x = read_images(path, given["size"])
    x = (x > 0.5).float() if binarize == "threshold" else x
    return _split(x, path, given, options["split_seed"], whole, images=True, levels="", note="")


def _split(
    x: torch.Tensor, path: Path, given: dict[str, Any], seed: int, whole: bool, *, images: bool, levels: str, note: str
) -> Data:
    """Data in a random order, cut in two."""
    kept: dict[str, Any] = {"data": os.path.abspath(path), **given, "split_seed": seed}
    if whole:
        return Data(x[:0], _noted(x, kept), images, levels, kept, note)
    kept["test_share"] = share = given.get("test_share", _DEFAULTS["test_share"])
    num_test = round(share * len(x))
    if not 0 < num_test < len(x):
        cure = "Pass more data, or another --test-share."
        got = f"{num_test} of {len(x)}"
        raise DatasetError(refuse(str(path), "data to train on and data to hold out", f"{got} held out", cure))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = x[order[num_test:]], x[order[:num_test]]
    return Data(_noted(train, kept), _noted(test, kept), images, levels, kept, note)


def _noted(x: torch.Tensor, kept: Mapping[str, Any]) -> torch.Tensor:
    """Data that say where they come from, so that estimates on them do."""
    x.provenance = {"name": Path(kept["data"]).name} | {k: v for k, v in kept.items() if k != "data"}  # type: ignore[attr-defined]
    return x


def _like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    x.provenance = getattr(other, "provenance", None)  # type: ignore[attr-defined]
    return x


def _digest(x: torch.Tensor) -> str:
    return hashlib.sha256(f"{tuple(x.shape)}".encode() + tensor_bytes(x)).hexdigest()
