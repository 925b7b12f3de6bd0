"""Pictures as files, in a format that their ending names."""

from pathlib import Path
from typing import Any

from pyro_lvm._checks import refuse
from pyro_lvm._files import read_tensors
from pyro_lvm.comparison import Comparison
from pyro_lvm.errors import CheckpointError, DataTypeError
from pyro_lvm.evidence import LogMarginal
from pyro_lvm.tracing.probe import empty_guide
from pyro_lvm.training import FitResult
from pyro_lvm.training.history import Columns, History
from pyro_lvm.training.state import make_result

__all__ = ["check_format", "draw_comparison", "draw_history", "draw_khat", "read_history"]

_DPI = 120


def check_format(path: Path) -> None:
    """The ending of a picture is one that matplotlib can write.

    Raises:
        DataTypeError: it is not.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in known:
        raise DataTypeError(refuse("--out", f"an ending of {', '.join(known)}", str(path), "Pass e.g. picture.png."))


def draw_history(result: FitResult, path: Path) -> None:
    """The bound over training."""
    from pyro_lvm.plots import history

    _save(history(result).figure, path)


def draw_khat(record: LogMarginal, path: Path) -> None:
    """The k-hat of each datum.

    Raises:
        CheckpointError: the record has none, for its values are exact.
    """
    from pyro_lvm.plots import khat

    if bool(record.khat.isnan().all()):
        got = f"none, by {record.method} with K = {record.num_particles}"
        raise CheckpointError(refuse("FILE", "estimates with a k-hat", got, "There is nothing to be drawn."))
    _save(khat(record).figure, path)


def draw_comparison(result: Comparison, path: Path) -> None:
    """Bounds, differences, gaps and statuses of each row."""
    _save(result.plot(), path)


def read_history(path: Path) -> FitResult:
    """The history of a trained pair, without the pair, whose code is not needed to draw it.

    Raises:
        CheckpointError: there is no such file, or it is damaged or of another kind.
    """
    content = read_tensors(path, "FitResult")
    history = History(Columns.rows(content["history"]))
    rest = {name: content[name] for name in ("seconds", "stop_reason", "skipped", "notes", "captured", "provenance")}
    return make_result((empty_guide, empty_guide), ((), ()), {}, history, **rest)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=_DPI)
