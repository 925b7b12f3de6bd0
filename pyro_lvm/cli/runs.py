"""The folder of a run: what `train` writes, and how the pair and its data are made again from it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_lvm._checks import refuse
from pyro_lvm._files import read_json, write_json
from pyro_lvm._version import versions
from pyro_lvm.cli.data import Data, load_data
from pyro_lvm.cli.own import is_own
from pyro_lvm.cli.pairs import build_pair
from pyro_lvm.cli.request import fitting
from pyro_lvm.errors import CheckpointError
from pyro_lvm.tracing.isolation import forked_rng
from pyro_lvm.training import FitResult, load

__all__ = [
    "CHECKPOINT",
    "FILES",
    "PAIR",
    "Run",
    "make_pair",
    "open_pair",
    "open_run",
    "pair_file",
    "quiet",
    "write_run",
    "writing",
]

RUN, PAIR, CHECKPOINT = "run.json", "pair.pt", "checkpoint.pt"

#: All files of a run.
FILES = (RUN, PAIR, CHECKPOINT, "history.csv", "history.png")

_KIND = "run"


@dataclass(frozen=True)
class Run:
    """What a run was made of.

    Attributes:
        folder: where it is.
        pair: what `build_pair` takes.
        data: what `load_data` takes, with the shape, sizes and digests of the data.
        training: loss, steps or epochs, batch size, learning rate, seed and so on.
    """

    folder: Path
    pair: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]

    @property
    def is_own(self) -> bool:
        """Whether code of the user's own is part of the pair."""
        return is_own(self.pair["model"]) or is_own(self.pair["guide"])

    def load_data(self) -> Data:
        """The data of the run.

        Raises:
            CheckpointError: they have changed since.
        """
        data = fitting(self.pair, load_data(self.data))
        found = data.described()
        if found["sha256"] != self.data["sha256"]:
            cure = "Bring the old data back, or name those to measure on with --data."
            got = f"others of {found['num_train']} and {found['num_test']} rows of shape {tuple(found['shape'])}"
            raise CheckpointError(refuse(self.data["data"], f"the data of {self.folder}", got, cure))
        return data


@contextmanager
def quiet() -> Iterator[None]:
    """Say nothing of what is no news where many pairs are trained or loaded: that they have names in common."""
    logger = logging.getLogger("pyro_lvm")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """A path that cannot be written to is a refusal of the option that named it.

    Raises:
        CheckpointError: says which and why.
    """
    try:
        yield
    except OSError as error:
        cure = "Pass another path, or make room."
        got = f"{path}: {error.strerror or error}"
        raise CheckpointError(refuse(option, "a path that can be written to", got, cure)) from error


def write_run(run: Run) -> None:
    """Write ``run.json``, and make the folder."""
    with writing("--out", run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        content = {"pair": run.pair, "data": run.data, "training": run.training, "versions": versions()}
        write_json(run.folder / RUN, _KIND, content)


def open_run(folder: Path) -> Run:
    """Read ``run.json``.

    Raises:
        CheckpointError: it is not there, damaged, or of a newer format.
    """
    if not (folder / RUN).is_file():
        cure = "Make one with `pyro-lvm train --out FOLDER`."
        got = f"{folder} without one" if folder.is_dir() else f"{folder}, which is no folder"
        raise CheckpointError(refuse("RUN", f"the folder of a run, with a {RUN}", got, cure))

    def build(content: Mapping[str, Any]) -> Run:
        return Run(folder, content["pair"], content["data"], content["training"])

    return read_json(folder / RUN, _KIND, build)


def make_pair(run: Run, scale: float = 1.0, device: str | None = None) -> tuple[Any, Any]:
    """The pair of a run with its initial values, which depend on the seed alone."""
    with forked_rng(run.training["seed"]):
        pair = build_pair(run.pair, tuple(run.data["shape"]), scale)
    to_device(device, *pair)
    return pair


def to_device(device: str | None, *programs: Any) -> None:
    """Move what can be moved; functions see to themselves."""
    for program in programs if device else ():
        if hasattr(program, "to"):
            program.to(device)


def pair_file(run: Run) -> Path:
    """Where the parameters of a run are.

    Raises:
        CheckpointError: the run has not ended.
    """
    path = run.folder / PAIR
    if not path.is_file():
        cure = f"Let it come to its end: pyro-lvm train --resume --out {run.folder}"
        raise CheckpointError(refuse("RUN", "a run that has ended", f"{run.folder} without a {PAIR}", cure))
    return path


def open_pair(run: Run, data: Data, device: str | None = None) -> FitResult:
    """The pair of a run with the values that it was trained to.

    Raises:
        CheckpointError: the run has not ended, or the pair is not the one that was trained.
    """
    path = pair_file(run)
    model, guide = make_pair(run, device=device)
    # A pair of one's own may have parameters for each datum, and needs them all.
    rows = data.rows if run.is_own else data.test[:2]
    return load(path, model, guide, rows.to(device) if device else rows)
