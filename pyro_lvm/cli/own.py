"""A model or a guide of the user's own, by ``module:name``, importable from the current folder."""

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro_lvm._checks import refuse
from pyro_lvm.cli.data import nearest
from pyro_lvm.errors import DataTypeError

__all__ = ["current_folder_importable", "is_own", "own_program"]


def is_own(name: str) -> bool:
    """Whether a name is ``module:name``."""
    return ":" in name


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Modules in the current folder can be imported inside, before others of their name."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def own_program(option: str, name: str) -> Any:
    """The callable that ``module:name`` stands for; a class is called without arguments to make it.

    Raises:
        DataTypeError: there is no such module or name, it cannot be called, or the class needs arguments.
        Exception: what the user's own code raises passes as it is.

    Example:
        >>> own_program("--model", "pyro_lvm.datasets:two_moons").__name__
        'two_moons'
    """
    module_name, _, attribute = name.partition(":")
    module = _imported(option, module_name, name)
    if not hasattr(module, attribute):
        where = getattr(module, "__file__", None) or module_name
        public = [known for known in vars(module) if not known.startswith("_")]
        found = nearest(attribute, public) if public else "Define it there."
        raise DataTypeError(refuse(option, f"a name in {where}", repr(attribute), found))
    program = getattr(module, attribute)
    if isinstance(program, type):
        return _made(option, name, program)
    if not callable(program):
        cure = "Name a function of x with pyro.sample statements, a module, or a class of one."
        raise DataTypeError(refuse(option, "something that can be called", repr(program)[:80], cure))
    return program


def _imported(option: str, module_name: str, name: str) -> Any:
    cure = "Name a module without its ending, e.g. pairs:model for `model` in pairs.py of this folder."
    if module_name.endswith(".py") or not all(part.isidentifier() for part in module_name.split(".")):
        raise DataTypeError(refuse(option, "module:name", repr(name), cure))
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # of an import in the module
        got = f"none of the name {module_name!r}"
        raise DataTypeError(refuse(option, f"a module in {os.getcwd()} or installed", got, cure)) from error
    except SystemExit as error:
        cure = 'Put what it does as a program under `if __name__ == "__main__":`.'
        got = f"{module_name!r}, which ends the program"
        raise DataTypeError(refuse(option, "a module that can be imported", got, cure)) from error


def _made(option: str, name: str, made: type) -> Any:
    try:
        inspect.signature(made).bind()
    except TypeError as error:
        cure = "Give its arguments defaults, or name an instance or a function."
        raise DataTypeError(refuse(option, "a class that needs no arguments", f"{name}: {error}", cure)) from error
    except ValueError:  # no signature to be had, as of a class in C
        pass
    program = made()
    if not callable(program):
        cure = "Give it a method that takes x."
        raise DataTypeError(refuse(option, "a class whose instances can be called", name, cure))
    return program
