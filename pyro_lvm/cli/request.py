"""What a call asks for: a pair, with what was not said chosen from its data, and the data as the pair takes them."""

import argparse
from typing import Any

from pyro_lvm._checks import refuse
from pyro_lvm.cli.arguments import DATA, DEFAULTS, PAIR, given
from pyro_lvm.cli.data import Data, load_data
from pyro_lvm.cli.own import is_own
from pyro_lvm.cli.pairs import check_names, complete
from pyro_lvm.errors import DataTypeError

__all__ = ["begin", "described", "fitting", "largest"]


def begin(args: argparse.Namespace) -> tuple[dict[str, Any], Data]:
    """The options of a pair, completed from its data, and the data.

    Raises:
        PyroLVMError: an option that makes no sense, or data that are none.
    """
    if args.data is None:
        cure = "Pass the name of data, a file or a folder of images."
        raise DataTypeError(refuse("--data", "data", "none", cure))
    pair = {"model": DEFAULTS["model"]} | given(args, PAIR)
    check_names(pair["model"], pair.get("guide"))
    data = load_data({"split_seed": DEFAULTS["split_seed"]} | given(args, DATA))
    pair = complete(pair, data)
    return pair, fitting(pair, data)


def fitting(pair: dict[str, Any], data: Data) -> Data:
    """Data as a pair takes them: rows of numbers if its model is of the library, none missing if any part of it is."""
    data = data if is_own(pair["model"]) else data.as_rows()
    return data if is_own(pair["model"]) and (is_own(pair["guide"]) or pair["guide"] == "none") else data.complete()


def described(pair: dict[str, Any]) -> str:
    """The options of a pair in a line."""
    values = {name.replace("_", " "): value for name, value in pair.items() if name not in ("model", "guide")}
    lists = {name: ",".join(map(str, value)) or "none" for name, value in values.items() if isinstance(value, list)}
    return "; ".join([pair["model"], f"guide {pair['guide']}", *(f"{n} {v}" for n, v in (values | lists).items())])


def largest(data: Data) -> float:
    """The size of the largest value in the data, or 1 where that is larger."""
    return max(1.0, float(data.rows.abs().nan_to_num().max()))
