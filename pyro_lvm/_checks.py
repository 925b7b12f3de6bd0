"""Checks at the public edge: one wording for every refusal (argument, expected, got, cure), and warnings."""

import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_lvm.errors import DataTypeError, ShapeError

__all__ = ["check_positive_int", "data_tensor", "refuse", "shown", "warn_caller"]

_INTERNAL = (str(Path(__file__).parent), str(contextlib.__file__))


def refuse(argument: str, expected: str, got: Any, cure: str) -> str:
    """The one sentence pattern of all error messages."""
    return f"{argument}: expected {expected}, got {got}. {cure}"


def check_positive_int(argument: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer >= ``minimum``; raise naming ``argument`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        kind = f"{value!r} of type {type(value).__name__}"
        raise DataTypeError(refuse(argument, "an integer", kind, f"Pass an int, {minimum} or more."))
    if value < minimum:
        raise ShapeError(refuse(argument, f"{minimum} or more", value, f"Pass {argument}={minimum} or larger."))
    return int(value)


def data_tensor(argument: str, value: Any, device: torch.device | str | None = None) -> torch.Tensor:
    """``value`` as a tensor of at least one datum: tensors pass, NumPy arrays are converted.

    Raises:
        DataTypeError: neither a tensor nor a numeric array, or complex.
        ShapeError: no first dimension, no data, or nothing but NaN.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "buif":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, torch.Tensor):
        cure = "Pass a torch.Tensor or a numeric NumPy array of shape (N, ...)."
        raise DataTypeError(refuse(argument, "a tensor", type(value).__name__, cure))
    if value.is_complex():
        raise DataTypeError(refuse(argument, "a real dtype", value.dtype, "Pass real and imaginary parts apart."))
    if value.dim() == 0 or value.shape[0] == 0:
        cure = "The first dimension counts the data: pass at least one, e.g. x[None]."
        raise ShapeError(refuse(argument, "shape (N, ...) with N >= 1", tuple(value.shape), cure))
    if value.is_floating_point() and bool(value[0].isnan().all()) and bool(value.isnan().all()):
        raise ShapeError(refuse(argument, "finite numbers", "nothing but NaN", "Check how the data were read."))
    return value if device is None else value.to(device)


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line that called into the package, however deep the warning comes from."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def shown(progress: bool | None) -> bool:
    """Whether to draw a progress bar; by default in a terminal only."""
    return sys.stderr.isatty() if progress is None else progress
