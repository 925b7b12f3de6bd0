"""``pyro-lvm compare``: guides of one frozen model, or trained runs, in one table."""

import argparse
from pathlib import Path
from typing import Any

from pyro_lvm._checks import check_device, refuse
from pyro_lvm.cli.arguments import DATA, PAIR, TRAINING, given
from pyro_lvm.cli.data import Data
from pyro_lvm.cli.fitting import few_threads, in_range
from pyro_lvm.cli.frozen import exact_check, train_guides
from pyro_lvm.cli.pictures import draw_comparison
from pyro_lvm.cli.runs import Run, open_pair, open_run, quiet, writing
from pyro_lvm.compare import compare
from pyro_lvm.comparison import Comparison
from pyro_lvm.errors import CheckpointError, DataTypeError, ShapeError
from pyro_lvm.evidence import LogMarginal

__all__ = ["run"]

_OF_BOTH = ("seed", "device", "compile")


def run(args: argparse.Namespace) -> int:
    """Measure, keep, print the table; of a vae a second one, where log p(x) is known."""
    check_device(args.device)
    folder = None if args.out is None else Path(args.out)
    if folder:
        with writing("--out", folder):
            folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        if args.runs:
            _compare_runs(args, folder)
        else:
            _compare_guides(args, folder)
    return 0


def _compare_guides(args: argparse.Namespace, folder: Path | None) -> None:
    frozen = train_guides(args)
    print(f"\nlog p(x) of held-out data, one frozen {frozen.pair['model']}")
    _measure(args, frozen.rows, frozen.data, frozen.reference, folder, "comparison")
    if frozen.pair["model"] != "vae":
        return
    check = exact_check(args, frozen)
    if isinstance(check, str):
        print(f"\nno check by a linear-Gaussian model: {check}")
        return
    print("\nwhere log p(x) is known: a linear-Gaussian density of the same data, not to be set against the above")
    _measure(args, check.rows, check.data, check.reference, folder, "linear_gaussian")


def _compare_runs(args: argparse.Namespace, folder: Path | None) -> None:
    """Trained runs on the data that all of them hold out.

    Raises:
        DataTypeError: options of training were given.
        ShapeError: one run.
        CheckpointError: runs of different data.
    """
    own = [name for name in given(args, (*DATA, *PAIR, "guides", *TRAINING)) if name not in _OF_BOTH]
    if own:
        cure = "Leave it out, or the runs: with --data a model is trained here."
        option = f"--{own[0].replace('_', '-')}"
        raise DataTypeError(refuse(option, "RUN RUN ... or --data with --guides", "both", cure))
    if len(args.runs) < 2:
        cure = f"Of one run: pyro-lvm evaluate {args.runs[0]}"
        raise ShapeError(refuse("RUN", "two runs or more", 1, cure))
    runs = [open_run(Path(name)) for name in args.runs]
    for other in runs[1:]:
        if other.data["sha256"]["test"] != runs[0].data["sha256"]["test"]:
            cure = "Differences are paired over data: train both on the same, with the same --split-seed."
            got = f"others in {runs[0].folder} and {other.folder}"
            raise CheckpointError(refuse("RUN", "runs that hold out the same data", got, cure))
    data, rows = runs[0].load_data(), {}
    few_threads(data)
    for name, here in zip(_row_names(runs), runs, strict=True):
        fitted = open_pair(here, here.load_data(), args.device)
        rows[name] = fitted.model, None if here.pair["guide"] == "none" else fitted.guide
    print(f"log p(x) of held-out data, {data}")
    _measure(args, rows, data, None, folder, "comparison")


def _row_names(runs: list[Run]) -> list[str]:
    """The names of the folders, or their whole paths where these are alike."""
    names = [here.folder.resolve().name for here in runs]
    names = names if len(set(names)) == len(names) else [str(here.folder) for here in runs]
    if len(set(names)) < len(names):
        raise DataTypeError(refuse("RUN", "different runs", ", ".join(names), "Name each run once."))
    return names


def _measure(
    args: argparse.Namespace,
    rows: dict[str, Any],
    data: Data,
    reference: LogMarginal | None,
    folder: Path | None,
    name: str,
) -> Comparison:
    """The table: kept, then printed.

    Raises:
        KeyboardInterrupt: after the rows that had been measured by then.
    """
    with in_range(*(program for pair in rows.values() for program in pair)):
        result = compare(
            rows,
            data.test,
            reference=reference,
            seed=args.seed or 0,
            num_particles=args.particles or 1000,
            device=args.device,
            compile=bool(args.compile),
        )
    names = [f"{name}{ending}" for ending in (".json", ".html", ".png")]
    if folder:
        with writing("--out", folder):
            result.save(folder / names[0])
            result.to_html(folder / names[1])
            draw_comparison(result, folder / names[2])
    print(result)
    if folder:
        print(f"files in {folder}: {', '.join(names)}")
    if len(result.rows) < len(rows):
        raise KeyboardInterrupt
    return result
