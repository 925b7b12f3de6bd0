"""``pyro-lvm evaluate``: log p(x) of held-out data under a trained pair."""

import argparse
from pathlib import Path
from typing import Any

from pyro_lvm._checks import check_device, refuse
from pyro_lvm.cli.arguments import DATA, given
from pyro_lvm.cli.data import Data, load_data, options_of
from pyro_lvm.cli.fitting import few_threads, in_range
from pyro_lvm.cli.pictures import draw_khat
from pyro_lvm.cli.request import fitting
from pyro_lvm.cli.runs import Run, open_pair, open_run, quiet, writing
from pyro_lvm.errors import DatasetError
from pyro_lvm.evidence import LogMarginal, importance

__all__ = ["measure", "run"]


def run(args: argparse.Namespace) -> int:
    """Estimate, save, print the record."""
    check_device(args.device)
    here = open_run(Path(args.run))
    folder = Path(args.out or args.run)
    with writing("--out", folder):
        folder.mkdir(parents=True, exist_ok=True)
    record = measure(here, args)
    names = ["log_marginal.json"]
    with writing("--out", folder):
        record.save(folder / names[0])
        if not bool(record.khat.isnan().all()):  # of exact values there is none
            names.append("khat.png")
            draw_khat(record, folder / names[1])
    print(f"{record}\nfiles in {folder}: {', '.join(names)}")
    return 0


def measure(here: Run, args: argparse.Namespace) -> LogMarginal:
    """The estimate, on the data that the run holds out or on others.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    data = here.load_data() if args.data is None else _others(here, args)
    few_threads(data)
    with quiet():
        fitted = open_pair(here, data, args.device)
    with in_range(fitted.model, fitted.guide):
        record = importance(
            fitted.model,
            None if here.pair["guide"] == "none" else fitted.guide,
            data.test,
            num_particles=args.particles or 1000,
            seed=args.seed or 0,
            device=args.device,
            compile=bool(args.compile),
        )
    if not record.provenance.get("finished", True):
        raise KeyboardInterrupt
    return record


def _others(here: Run, args: argparse.Namespace) -> Data:
    """Data from elsewhere, made binary and scaled as those of the run.

    Raises:
        DatasetError: a datum has another shape.
    """
    kept = {name: here.data[name] for name in options_of(args.data) if name != "test_share" and name in here.data}
    options: dict[str, Any] = {"split_seed": here.data["split_seed"]} | kept | given(args, DATA)
    data = load_data(options, whole=True)
    data = fitting(here.pair, data)
    if list(data.shape) != here.data["shape"]:
        cure = "Measure a run on data of the kind that it was trained on."
        got = f"shape {data.shape} in {args.data}"
        raise DatasetError(refuse("--data", f"data of shape {tuple(here.data['shape'])}", got, cure))
    print(f"data  {data}")
    return data
