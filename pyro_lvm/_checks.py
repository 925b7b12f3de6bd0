"""Checks at the public edge: one wording for every refusal (argument, expected, got, cure), and warnings."""

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_lvm.errors import DataTypeError, ShapeError

__all__ = [
    "check_chunks",
    "check_device",
    "check_path",
    "check_positive_int",
    "check_program",
    "check_seed",
    "data_tensor",
    "from_array",
    "refuse",
    "shown",
    "warn_caller",
]

_INTERNAL = (str(Path(__file__).parent), str(contextlib.__file__))


def refuse(argument: str, expected: str, got: Any, cure: str) -> str:
    """The one sentence pattern of all error messages."""
    return f"{argument}: expected {expected}, got {got}. {cure}"


def check_path(argument: str, path: Any) -> Path:
    """Return ``path`` if it is one."""
    if not isinstance(path, str | os.PathLike):
        raise DataTypeError(refuse(argument, "the path of a file", repr(path), 'Pass e.g. "run.pt".'))
    return Path(path)


def check_positive_int(argument: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer >= ``minimum``; raise naming ``argument`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        kind = f"{value!r} of type {type(value).__name__}"
        raise DataTypeError(refuse(argument, "an integer", kind, f"Pass an int, {minimum} or more."))
    if value < minimum:
        raise ShapeError(refuse(argument, f"{minimum} or more", value, f"Pass {argument}={minimum} or larger."))
    return int(value)


def check_seed(seed: Any) -> int | None:
    """Return a seed that is None or an integer."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise DataTypeError(refuse("seed", "an integer or None", repr(seed), "Pass e.g. seed=0."))
    return int(seed)


def check_chunks(chunks: Any) -> tuple[int, int] | None:
    """Return ``(data, particles)`` to run at once, or None."""
    if chunks is None:
        return None
    if not isinstance(chunks, tuple | list) or len(chunks) != 2:
        cure = "Pass the numbers of data and of particles to run at once, e.g. chunks=(100, 1000)."
        raise DataTypeError(refuse("chunks", "two integers", repr(chunks), cure))
    return check_positive_int("chunks[0]", chunks[0]), check_positive_int("chunks[1]", chunks[1])


def check_device(device: Any) -> torch.device | None:
    """Return a device that is there, or None."""
    try:
        found = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        cure = 'Pass e.g. "cpu" or "cuda:0".'
        raise DataTypeError(refuse("device", "a torch device", repr(device), cure)) from error
    count = torch.cuda.device_count()
    if found is not None and found.type == "cuda" and (found.index or 0) >= count:
        cure = 'Pass "cpu", or look why torch.cuda does not see the device.'
        raise DataTypeError(refuse("device", f"one of {count} CUDA devices", repr(device), cure))
    return found


def check_program(argument: str, program: Any) -> None:
    """A model or a guide can be called."""
    if not callable(program) or isinstance(program, type):
        cure = "Pass a function of x with pyro.sample statements, or an instance of a module."
        raise DataTypeError(refuse(argument, "a Pyro program", repr(program), cure))


def from_array(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor, with the same memory where that is possible: nobody here writes into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)  # as of a memory map
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))  # the first makes a number a row


def data_tensor(argument: str, value: Any, device: torch.device | str | None = None) -> torch.Tensor:
    """``value`` as a tensor of at least one datum: tensors pass, NumPy arrays are converted.

    Raises:
        DataTypeError: neither a tensor nor a numeric array, sparse, or complex; there is no such device.
        ShapeError: no first dimension, no data, or nothing but NaN.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "buif":
        value = from_array(value)
    if not isinstance(value, torch.Tensor):
        cure = "Pass a torch.Tensor or a numeric NumPy array of shape (N, ...)."
        raise DataTypeError(refuse(argument, "a tensor", type(value).__name__, cure))
    if value.layout is not torch.strided:
        raise DataTypeError(refuse(argument, "a dense tensor", value.layout, f"Pass {argument}.to_dense()."))
    if value.is_complex():
        raise DataTypeError(refuse(argument, "a real dtype", value.dtype, "Pass real and imaginary parts apart."))
    if value.dim() == 0 or value.shape[0] == 0:
        cure = "The first dimension counts the data: pass at least one, e.g. x[None]."
        raise ShapeError(refuse(argument, "shape (N, ...) with N >= 1", tuple(value.shape), cure))
    if value.is_floating_point() and bool(value[0].isnan().all()) and bool(value.isnan().all()):
        raise ShapeError(refuse(argument, "finite numbers", "nothing but NaN", "Check how the data were read."))
    return value.to(check_device(device))


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line that called into the package, however deep the warning comes from."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def shown(progress: bool | None) -> bool:
    """Whether to draw a progress bar; by default in a terminal only."""
    if progress is not None and not isinstance(progress, bool | int):
        raise DataTypeError(refuse("progress", "True, False or None", repr(progress), "None asks the terminal."))
    return sys.stderr.isatty() if progress is None else bool(progress)
