"""Ctrl-C during long work: what is finished is returned, unless somebody has said that a part is of no use."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["kept_if", "whole_results"]

_whole = ContextVar("whole results only", default=False)


@contextmanager
def kept_if(done: Callable[[], object]) -> Iterator[None]:
    """Inside, Ctrl-C ends the work, and the caller goes on with what there is if ``done()`` says that there is some."""
    try:
        yield
    except KeyboardInterrupt:
        if _whole.get() or not done():
            raise


@contextmanager
def whole_results() -> Iterator[None]:
    """Inside, Ctrl-C is raised by all work: for whoever could not tell a part from the whole."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)
