"""The command line: ``pyro-lvm``, or ``python -m pyro_lvm``.

`main` reads the arguments and runs a command; each command is a file. Results go to stdout and into files; what is
refused is one sentence on stderr.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pyro_lvm.cli import check, compare, evaluate, plot, train
from pyro_lvm.cli.arguments import parse
from pyro_lvm.cli.own import current_folder_importable
from pyro_lvm.errors import PyroLVMError, UnreliableEstimateWarning
from pyro_lvm.ops.memory import ran_out_of_memory

__all__ = ["main"]

_COMMANDS: dict[str, Callable[[Any], int]] = {
    "train": train.run,
    "evaluate": evaluate.run,
    "compare": compare.run,
    "check": check.run,
    "plot": plot.run,
}

_REFUSED, _INTERRUPTED, _CLOSED = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; None takes those of the process.

    Returns:
        The exit code: 0 fine; 1 `check` found errors, or the user's own code raised, whose traceback is printed; 2 an
        argument, a file or a pair was refused, by one sentence on stderr; 130 interrupted; 141 stdout was closed.

    Example:
        >>> main(["check", "--data", "two_moons", "--model", "mixture", "--components", "2"])
        check on 1000 data: nothing found
        0
    """
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as end:
        return int(end.code or 0)
    said = f"pyro-lvm {args.command}"
    try:
        with _notes_on_stdout(), _same_threads(), current_folder_importable():
            code = _COMMANDS[args.command](args)
            sys.stdout.flush()
            return code
    except PyroLVMError as error:
        print(f"{said}: error: {_one_line(error)}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt as interrupt:
        print(f"{said}: interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED
    except Exception as error:
        if ran_out_of_memory(error):
            print(f"{said}: error: memory: not enough for a pair or data as large as these.", file=sys.stderr)
            return _REFUSED
        traceback.print_exc()  # of code of the user's own
        return 1


@contextmanager
def _notes_on_stdout() -> Iterator[None]:
    """What the package logs, and warnings, become lines of the output; what the records say is not said twice."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logger = logging.getLogger("pyro_lvm")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)
        warnings.showwarning = _show
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.level, logger.propagate = before


@contextmanager
def _same_threads() -> Iterator[None]:
    """As many threads afterwards as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"note: {_one_line(message)}")


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
