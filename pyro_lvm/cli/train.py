"""``pyro-lvm train``: train a pair and keep it in a folder."""

import argparse
from dataclasses import replace
from os.path import abspath
from pathlib import Path
from typing import Any

from pyro_lvm._checks import check_device, refuse
from pyro_lvm.cli.arguments import DATA, DEFAULTS, PAIR, TRAINING, given
from pyro_lvm.cli.data import NAMES, Data
from pyro_lvm.cli.fitting import default_loss, few_threads, make_loss, prepare, train
from pyro_lvm.cli.pictures import draw_history
from pyro_lvm.cli.request import begin, described, largest
from pyro_lvm.cli.runs import CHECKPOINT, FILES, RUN, Run, make_pair, open_run, write_run, writing
from pyro_lvm.cli.runs import PAIR as PAIR_FILE
from pyro_lvm.errors import CheckpointError, DataTypeError
from pyro_lvm.training import FitResult, callbacks, save

__all__ = ["run"]

_MAY_CHANGE = ("steps", "epochs", "device", "compile", "checkpoint_every")


def run(args: argparse.Namespace) -> int:
    """Train, save, print the record of the run."""
    folder = Path(args.out)
    known = args.resume and (folder / RUN).is_file()
    here, data = _resumed(folder, args) if known else _begun(folder, args)
    device = here.training["device"]
    check_device(device)
    model, guide = make_pair(here, largest(data), device)
    loss = make_loss(here.training["loss"], here.pair["guide"])
    write_run(here)
    few_threads(data)
    print(f"data  {data}\npair  {described(here.pair)}", flush=True)
    result = _train(here, model, guide, data, loss)
    with writing("--out", folder):
        save(result, folder / PAIR_FILE)
        result.history.to_csv(folder / "history.csv")
        draw_history(result, folder / "history.png")
    print(f"{result}\nfiles in {folder}: {', '.join(FILES)}")
    return 1 if result.stop_reason == "nonfinite" else 0


def _train(here: Run, model: Any, guide: Any, data: Data, loss: Any) -> FitResult:
    """Train from the beginning or from the checkpoint; a run that could not begin leaves none behind."""
    checkpoint = here.folder / CHECKPOINT
    keep = callbacks.Checkpoint(checkpoint, here.training["checkpoint_every"])
    try:
        if not checkpoint.exists():
            prepare(model, guide, here.pair["model"], data, here.training)
        return train(model, guide, data, here.training, loss=loss, extra=[keep], resume=checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on with `pyro-lvm train --resume --out {here.folder}`") from None
    except Exception:
        if not (checkpoint.exists() or (here.folder / PAIR_FILE).exists()):
            (here.folder / RUN).unlink()
        raise


def _begun(folder: Path, args: argparse.Namespace) -> tuple[Run, Data]:
    """A new run."""
    there = [name for name in FILES if (folder / name).exists()]
    if there:
        cure = "Pass --resume to go on with it, or another folder."
        raise CheckpointError(refuse("--out", "a folder without a run", f"{folder} with {', '.join(there)}", cure))
    pair, data = begin(args)
    training = dict.fromkeys(TRAINING) | {name: DEFAULTS[name] for name in TRAINING if name in DEFAULTS}
    training |= {"loss": default_loss(pair["guide"])} | _limit(given(args, TRAINING))
    return Run(folder, pair, data.described(), training), data


def _resumed(folder: Path, args: argparse.Namespace) -> tuple[Run, Data]:
    """A run that has begun; of its options only some may change.

    Raises:
        DataTypeError: another was given, and differs.
    """
    kept = open_run(folder)
    known = kept.pair | kept.data | kept.training
    for name, value in given(args, (*DATA, *PAIR, *TRAINING)).items():
        value = abspath(value) if name == "root" or (name == "data" and value not in NAMES) else value
        if name not in _MAY_CHANGE and value != known.get(name):
            option = f"--{name.replace('_', '-')}"
            cure = "Leave the option out, or begin another run with another --out."
            there, here = (",".join(map(str, v)) if isinstance(v, list) else v for v in (known.get(name), value))
            raise DataTypeError(refuse(option, f"{there}, as in {folder}", here, cure))
    changed = _limit(given(args, _MAY_CHANGE))
    return replace(kept, training=kept.training | changed), kept.load_data()


def _limit(options: dict[str, Any]) -> dict[str, Any]:
    """Of steps and epochs the one that was given takes the place of the other."""
    pair = {"steps": "epochs", "epochs": "steps"}
    return {pair[name]: None for name in options if name in pair} | options
