"""``pyro-lvm plot``: a picture of what the other commands have written."""

import argparse
import json
from pathlib import Path

from pyro_lvm._checks import refuse
from pyro_lvm.cli.pictures import check_format, draw_comparison, draw_history, draw_khat, read_history
from pyro_lvm.cli.runs import open_run, pair_file, writing
from pyro_lvm.comparison import Comparison
from pyro_lvm.errors import CheckpointError
from pyro_lvm.evidence import LogMarginal

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Draw, and say where."""
    source = Path(args.source)
    picture = source / "history.png" if source.is_dir() else source.with_suffix(".png")
    picture = Path(args.out or picture)
    check_format(picture)
    if source.is_dir():
        result = read_history(pair_file(open_run(source)))
        with writing("--out", picture):
            draw_history(result, picture)
    elif _kind(source) == "Comparison":
        comparison = Comparison.load(source)
        with writing("--out", picture):
            draw_comparison(comparison, picture)
    else:
        record = LogMarginal.load(source)
        with writing("--out", picture):
            draw_khat(record, picture)
    print(f"picture {picture}")
    return 0


def _kind(path: Path) -> str:
    """What a file says that it holds.

    Raises:
        CheckpointError: it is not there, or none of the two records.
    """
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["kind"]
    except OSError as error:
        kind = error.strerror
    except (ValueError, KeyError, TypeError):
        kind = "something else"
    if kind not in ("Comparison", "LogMarginal"):
        expected = "the folder of a run, or a file with a LogMarginal or a Comparison"
        cure = "`pyro-lvm evaluate` and `pyro-lvm compare --out FOLDER` write such files."
        raise CheckpointError(refuse("FILE", expected, f"{path}: {kind}", cure))
    return str(kind)
