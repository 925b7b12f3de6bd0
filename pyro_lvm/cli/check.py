"""``pyro-lvm check``: what is wrong with a pair, before it is trained."""

import argparse

from pyro_lvm.check import check
from pyro_lvm.cli.arguments import DEFAULTS
from pyro_lvm.cli.fitting import default_loss, make_loss
from pyro_lvm.cli.pairs import build_pair
from pyro_lvm.cli.request import begin, largest
from pyro_lvm.tracing.isolation import forked_rng

__all__ = ["run"]

_ROWS = 1000


def run(args: argparse.Namespace) -> int:
    """Print the page; 1 if there are errors."""
    pair, data = begin(args)
    loss = make_loss(args.loss or default_loss(pair["guide"]), pair["guide"])
    with forked_rng(args.seed or DEFAULTS["seed"]):
        model, guide = build_pair(pair, data.shape, largest(data))
    report = check(model, guide, data.rows[:_ROWS], loss=loss)
    print(report)
    return 0 if report.ok else 1
