"""The history of a run: a list of rows, and as columns of numbers where it is written to a file."""

import csv
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch

__all__ = ["Columns", "History"]


class History(list[dict[str, Any]]):
    """One row a step: ``step``, ``epoch``, ``loss`` (nats per datum), ``seconds``, and what callbacks recorded.

    Steps and epochs count from 1. A list of dictionaries goes into ``pandas.DataFrame(history)`` as it is.

    Example:
        >>> history = History([{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}])
        >>> history.record(score=-1.0)
        >>> history[-1]
        {'step': 2, 'loss': 1.5, 'score': -1.0}
    """

    def record(self, **values: Any) -> None:
        """Add columns to the row of the latest step."""
        self[-1].update(values)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write all rows to ``path``; a column that a row lacks stays empty."""
        columns = list(dict.fromkeys(name for row in self for name in row))
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self)


class Columns:
    """A history by columns, ``name -> (places, values)``: what has been packed before is not looked at again.

    Example:
        >>> history = History([{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5, "score": -1.0}])
        >>> Columns().of(history)["score"]
        (tensor([1]), tensor([-1.], dtype=torch.float64))
        >>> Columns.rows(Columns().of(history)) == history
        True
    """

    def __init__(self) -> None:
        self._packed: dict[str, tuple[torch.Tensor, Any]] = {}
        self._count = 0

    def of(self, history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[torch.Tensor, Any]]:
        """The columns of all rows; to the last row values may still be added."""
        self._packed = _added(self._packed, self._count, history[self._count : -1])
        self._count = max(len(history) - 1, 0)
        return _added(self._packed, self._count, history[self._count :])

    @staticmethod
    def rows(columns: Mapping[str, tuple[torch.Tensor, Any]]) -> list[dict[str, Any]]:
        """The rows that `of` was given."""
        count = 1 + max((int(places[-1]) for places, _ in columns.values()), default=-1)
        found: list[dict[str, Any]] = [{} for _ in range(count)]
        for name, (places, values) in columns.items():
            for place, value in zip(places.tolist(), _listed(values), strict=True):
                found[place][name] = value
        return found


def _added(
    columns: Mapping[str, tuple[torch.Tensor, Any]], start: int, rows: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[torch.Tensor, Any]]:
    """Columns with further rows."""
    result = dict(columns)
    for name in dict.fromkeys(name for row in rows for name in row):
        places, values = zip(*((start + i, row[name]) for i, row in enumerate(rows) if name in row), strict=True)
        new = torch.tensor(places), _numbers(values)
        if name in result:
            old = result[name]
            alike = (
                isinstance(old[1], torch.Tensor) and isinstance(new[1], torch.Tensor) and old[1].dtype == new[1].dtype
            )
            joined = torch.cat([old[1], new[1]]) if alike else _listed(old[1]) + _listed(new[1])
            new = torch.cat([old[0], new[0]]), joined
        result[name] = new
    return result


def _numbers(values: Sequence[Any]) -> Any:
    """One tensor of values that are all floats or all integers, else a list."""
    dtype = {float: torch.float64, int: torch.int64}.get(type(values[0]))
    same = dtype is not None and all(type(value) is type(values[0]) for value in values)
    return torch.tensor(values, dtype=dtype) if same else list(values)


def _listed(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, torch.Tensor) else values
