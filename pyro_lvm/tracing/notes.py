"""What is wrong with the arguments of a pair, said beside the error that Python or torch raised for it."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from pyro_lvm._typing import Guide, Model
from pyro_lvm.tracing.batch import Batch, Rows
from pyro_lvm.tracing.params import Fitted, module_parameters

__all__ = ["note_arguments", "note_dtypes", "noted"]

_OF_SHAPES = re.compile(r"\b(size|shape)s?\b", re.IGNORECASE)


@contextmanager
def noted(model: Model, guide: Guide, data: Rows) -> Iterator[None]:
    """Add `note_arguments` to an error from inside."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        note_arguments(error, model, guide, data)
        raise


def note_arguments(error: Exception, model: Model, guide: Guide, data: Rows) -> None:
    """Add to the error of a run what is wrong with its arguments: their number, rows or dtypes."""
    with suppress(Exception):  # data that cannot be read are their own error
        batch = data.rows(slice(0, 1))
        if isinstance(error, TypeError):
            _note_number(error, batch, {"model": model, "guide": guide})
            return
        if _OF_SHAPES.search(str(error)):
            _note_rows(error, batch, len(data), model)
        if isinstance(error, RuntimeError):
            note_dtypes(error, batch.args, model, guide)


def note_dtypes(error: RuntimeError, args: Sequence[Any], *programs: Any) -> None:
    """Add to torch's error that data and parameters have different dtypes, if they have."""
    given = {a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()}
    given = given or {a.dtype for a in args[:1] if isinstance(a, torch.Tensor) and "dtype" in str(error)}
    held = {p.dtype for program in programs for p in module_parameters(program) if p.is_floating_point()}
    if given and held and given != held:
        names = [", ".join(sorted(map(_dtype, dtypes))) for dtypes in (given, held)]
        other = ", or use module.double()" if "float64" in names[0] else ""
        _add(error, f"x is {names[0]} and the parameters are {names[1]}: pass x.float(){other}.")


def _note_number(error: TypeError, batch: Batch, programs: dict[str, Callable[..., Any]]) -> None:
    """A program cannot be called with so many arguments."""
    signatures = {name: _signature(program) for name, program in programs.items()}
    unfit = {name: s for name, s in signatures.items() if s is not None and not _binds(s.bind, batch.args)}
    if unfit:
        given = " and ".join(_shown(a, own) for a, own in zip(batch.args, batch.per_datum, strict=True))
        taken = ", ".join(f"the {name} takes ({', '.join(s.parameters)})" for name, s in unfit.items())
        lacking = all(_binds(s.bind_partial, batch.args) for s in unfit.values())
        more = "a second argument" if len(batch.args) == 2 else f"{len(batch.args)} arguments"
        surplus = f"Give both programs {more}, or wrap the data set so that it returns x alone."
        _add(error, f"The data give {given}; {taken}. {'Pass the rest beside x.' if lacking else surplus}")


def _note_rows(error: Exception, batch: Batch, num_data: int, model: Model) -> None:
    """A companion of x has not its rows, so that it was not taken for one."""
    signature = _signature(model)
    names = dict(enumerate(signature.parameters if signature else ()))
    for i, (a, own) in enumerate(zip(batch.args, batch.per_datum, strict=True)):
        if isinstance(a, torch.Tensor) and a.dim() > 0 and not own:
            rows = f"{names.get(i, f'argument {i}')} has {len(a)} rows and x has {num_data}"
            cure = f"If it belongs to the data, give it {num_data} rows."
            _add(error, f"{rows}: every batch is given all of it. {cure}")


def _signature(program: Callable[..., Any]) -> inspect.Signature | None:
    """How a program is called; None where nothing tells."""
    while isinstance(program, Fitted):
        program = program.program
    with suppress(TypeError, ValueError):
        return inspect.signature(program.forward if isinstance(program, torch.nn.Module) else program)
    return None


def _binds(bind: Callable[..., Any], args: Sequence[Any]) -> bool:
    try:
        bind(*args)
    except TypeError:
        return False
    return True


def _shown(argument: Any, own: bool) -> str:
    """The dtype and shape of an argument."""
    if not isinstance(argument, torch.Tensor):
        return type(argument).__name__
    sizes = ["N" if own else str(len(argument)), *map(str, argument.shape[1:])] if argument.dim() else []
    return f"{_dtype(argument.dtype)} ({', '.join(sizes)}{',' * (len(sizes) == 1)})"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _add(error: Exception, note: str) -> None:
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
