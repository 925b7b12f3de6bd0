"""Files that are written whole or not at all, carry a checksum, and are read without running anything of theirs.

Records are JSON. What holds tensors is written by ``torch.save`` from plain values only, and is read with
``weights_only=True``.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch

from pyro_lvm._checks import refuse
from pyro_lvm.errors import CheckpointError

__all__ = [
    "FORMAT",
    "in_place_of",
    "numbers",
    "read_json",
    "read_tensors",
    "tensor_bytes",
    "write_json",
    "write_tensors",
]

Record = TypeVar("Record")
PathLike = str | os.PathLike[str]

#: Of the files that are written; those of a newer one are refused.
FORMAT = 1


@contextmanager
def in_place_of(path: PathLike, mode: str) -> Iterator[IO[Any]]:
    """A new file that takes the name ``path`` once all of it is on disk; until then the old one keeps it."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _told(path: PathLike, kind: str) -> Iterator[None]:
    """Whatever is wrong with a file, and a damaged one may raise anything, say which and what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        cure = "Pass the path of a file that was saved as that, and write it anew if it is damaged."
        # Of a file that is not its own torch says how to run what is in there.
        why = "it holds none" if "weights_only" in str(error) else f"{type(error).__name__}: {error}"
        got = f"{os.fspath(path)}: {why}"
        raise CheckpointError(refuse("path", f"a file with a {kind}", got, cure)) from error


def _check(document: Mapping[str, Any], kind: str, path: PathLike, digest: Callable[[Any], str]) -> dict[str, Any]:
    """The content of a file that is of this kind, of a known format and undamaged."""
    if isinstance(document["format"], int) and document["format"] > FORMAT:
        cure = "Install a newer version of pyro_lvm."
        got = f"{document['format']} in {os.fspath(path)}"
        raise CheckpointError(refuse("path", f"format {FORMAT} or older", got, cure))
    content = {key: value for key, value in document.items() if key != "sha256"}
    if document["sha256"] != digest(content):
        raise ValueError("its content does not fit its checksum")
    if content["kind"] != kind:
        raise ValueError(f"it holds a {content['kind']}")
    return content


# ----------------------------------------------------------------------------------------------------------------------
# JSON.


def write_json(path: PathLike, kind: str, content: Mapping[str, Any]) -> None:
    """Write a record, one entry a line, over what was there.

    NaN becomes ``null`` and an infinity a string, for JSON has no word for them; what is no JSON, such as a dtype, is
    written as its text.
    """
    document = {"kind": kind, "format": FORMAT} | _worded(content)
    document["sha256"] = _json_digest(document)
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items())
    with in_place_of(path, "w") as file:
        file.write(f"{{\n{text}\n}}\n")


def read_json(path: PathLike, kind: str, build: Callable[[dict[str, Any]], Record]) -> Record:
    """What ``build`` makes of what `write_json` wrote.

    Raises:
        CheckpointError: there is no such file, it is damaged, of another kind, or of a newer format.
    """
    with _told(path, kind):
        return build(_check(json.loads(Path(path).read_text(encoding="utf-8")), kind, path, _json_digest))


def numbers(column: Sequence[Any]) -> list[float]:
    """A column of numbers as it was before it was written."""
    return [math.nan if value is None else float(value) for value in column]


def _worded(value: Any) -> Any:
    """A value in the words of JSON."""
    if isinstance(value, Mapping):
        return {str(key): _worded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_worded(item) for item in value]
    if isinstance(value, np.generic):
        return _worded(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _json_digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Tensors.


def write_tensors(path: PathLike, kind: str, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values, nested in dictionaries, lists and tuples, over what was there.

    Raises:
        CheckpointError: a value of another type, with where it stands.
        OSError: it cannot be written.
    """
    document = {"kind": kind, "format": FORMAT} | _plain(content, "")
    document["sha256"] = _tensor_digest(document)
    with in_place_of(path, "wb") as file:
        torch.save(document, file)


def read_tensors(path: PathLike, kind: str) -> dict[str, Any]:
    """What `write_tensors` wrote, on the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, of another kind, or of a newer format.
    """
    with _told(path, kind):
        return _check(torch.load(path, map_location="cpu", weights_only=True), kind, path, _tensor_digest)


def _plain(value: Any, where: str) -> Any:
    """A value in types that are read without running code."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        of_a_larger = tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes
        return tensor.clone() if of_a_larger else tensor
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(_plain(v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (type(None), bool, int, float, str):  # a subclass, such as an Enum, would need its class
        return value
    cure = "Keep what has no such form out of `state_dict` and of the history."
    raise CheckpointError(refuse(f"content{where}", "a tensor, a number or a string", repr(value), cure))


def _tensor_digest(document: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    _add(digest, document)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Values and how they are nested."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, dict | list | tuple):
        digest.update(f"{type(value).__name__} {len(value)}".encode())
        for item in value.items() if isinstance(value, dict) else value:
            _add(digest, item)
    else:
        digest.update(f"{type(value).__name__} {value!r} ".encode())


def tensor_bytes(value: torch.Tensor) -> bytes:
    """The numbers of a tensor, in the order of its elements."""
    dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
    dense = dense.cpu().clone(memory_format=torch.contiguous_format)
    return dense.flatten().view(torch.uint8).numpy().tobytes()
