"""Records as JSON files: written whole or not at all, with a checksum; read without running anything of theirs."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pyro_lvm._checks import refuse
from pyro_lvm.errors import CheckpointError

__all__ = ["FORMAT", "numbers", "read_json", "write_json"]

Record = TypeVar("Record")

#: Of the files that are written; those of a newer one are refused.
FORMAT = 1


def write_json(path: str | os.PathLike[str], kind: str, content: Mapping[str, Any]) -> None:
    """Write a record, one entry a line, over what was there.

    NaN becomes ``null`` and an infinity a string, for JSON has no word for them; what is no JSON, such as a dtype, is
    written as its text.
    """
    document = {"kind": kind, "format": FORMAT} | _plain(content)
    document["sha256"] = _digest(document)
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items())
    temporary = Path(f"{os.fspath(path)}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(f"{{\n{text}\n}}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: str | os.PathLike[str], kind: str, build: Callable[[dict[str, Any]], Record]) -> Record:
    """What ``build`` makes of what `write_json` wrote.

    Raises:
        CheckpointError: there is no such file, it is damaged, of another kind, or of a newer format.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        found, digest = document["kind"], document.pop("sha256")
        if isinstance(document["format"], int) and document["format"] > FORMAT:
            cure = "Install a newer version of pyro_lvm."
            raise CheckpointError(refuse("path", f"format {FORMAT} or older", f"{document['format']} in {path}", cure))
        if digest != _digest(document):
            raise ValueError("its content does not fit its checksum")
        if found != kind:
            raise ValueError(f"it holds a {found}")
        return build(document)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        cure = "Pass the path of a file that `save` wrote, and write it anew if it is damaged."
        got = f"{path}: {type(error).__name__}: {error}"
        raise CheckpointError(refuse("path", f"a file with a {kind}", got, cure)) from error


def numbers(column: Sequence[Any]) -> list[float]:
    """A column of numbers as it was before it was written."""
    return [math.nan if value is None else float(value) for value in column]


def _plain(value: Any) -> Any:
    """A value in the words of JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
