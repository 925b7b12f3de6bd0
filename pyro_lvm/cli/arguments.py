"""The arguments of all commands, and what ``--help`` says of them."""

import argparse
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, NoReturn

from pyro_lvm._checks import refuse
from pyro_lvm._version import __version__, versions
from pyro_lvm.cli import likelihoods, texts
from pyro_lvm.cli.data import NAMES, nearest
from pyro_lvm.cli.files import ENDINGS
from pyro_lvm.cli.pairs import GUIDES

__all__ = ["DATA", "DEFAULTS", "PAIR", "TRAINING", "given", "parse"]

#: Options by what they are about, as they are called in ``run.json``.
DATA = ("data", "root", "size", "binarize", "test_share", "split_seed")
PAIR = ("model", "guide", "latent_dim", "hidden", "likelihood", "components")
TRAINING = ("loss", "steps", "epochs", "batch_size", "lr", "seed", "device", "compile", "checkpoint_every")

#: What is taken where nothing was given; what is chosen from the data is not here.
DEFAULTS: dict[str, Any] = {"model": "vae", "split_seed": 0, "steps": 2000, "batch_size": 128, "lr": 2e-3, "seed": 0}
DEFAULTS |= {"compile": False, "checkpoint_every": 500}

_LARGEST = 10**6  # of sizes: beyond, no machine holds the weights


class _Parser(argparse.ArgumentParser):
    """Errors are one sentence, and options are spelt out."""

    def __init__(self, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=layout, add_help=False, **options)
        self.add_argument("-h", "--help", action="help", help="show this page")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")

    def option(self, group: Any, *names: str, kind: Callable[[str], Any] = str, **rest: Any) -> None:
        """Add an option whose default is None, so that what was given can be told from what was not."""
        group.add_argument(*names, type=kind, default=None, **rest)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a call; ``command`` is the name of what is asked for.

    Raises:
        SystemExit: with 0 after ``--help`` and ``--version``; with 2, and a sentence on stderr, if they make no sense.

    Example:
        >>> args = parse(["evaluate", "run", "--particles", "100"])
        >>> args.command, args.run, args.particles
        ('evaluate', 'run', 100)
    """
    parser = _Parser(prog="pyro-lvm", usage=texts.USAGE, description=texts.PROGRAM, epilog=texts.EPILOG)
    named = ", ".join(f"{name} {version}" for name, version in versions().items() if name != "pyro_lvm")
    parser.add_argument("--version", action="version", version=f"pyro-lvm {__version__} ({named})", help="show it")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    makers = {"train": _train, "evaluate": _evaluate, "compare": _compare, "check": _check, "plot": _plot}
    made = {}
    for name, make in makers.items():
        text = texts.COMMANDS[name]
        made[name] = commands.add_parser(
            name, prog=f"pyro-lvm {name}", usage=text.usage, help=text.line, description=text.page, epilog=text.examples
        )
        make(made[name])
    if not argv:
        parser.error(f"expected a command: {', '.join(makers)}. `pyro-lvm --help` says what each does.")
    if not argv[0].startswith("-") and argv[0] not in makers:
        parser.error(refuse("COMMAND", f"one of {', '.join(makers)}", repr(argv[0]), nearest(argv[0], makers)))
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        asked = made.get(args.command, parser)
        options = [option for action in asked._actions for option in action.option_strings]
        if not unknown[0].startswith("-"):
            asked.error(f"expected no further argument, got {unknown[0]!r}. See `{asked.prog} --help`.")
        name = unknown[0].partition("=")[0].lstrip("-")
        found = nearest(name, [option.lstrip("-") for option in options])
        asked.error(refuse("options", f"those of `{asked.prog} --help`", f"--{name}", found))
    return args


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options that were given, of these."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of values.


def _number(minimum: int, maximum: int = _LARGEST) -> Callable[[str], int]:
    def kind(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"expected an integer from {minimum} to {maximum}, got {text}")
        return value

    return kind


def _real(above: float, below: float) -> Callable[[str], float]:
    def kind(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not (isfinite(value) and above < value < below):
            raise argparse.ArgumentTypeError(f"expected a number above {above:g} and below {below:g}, got {text}")
        return value

    return kind


def _widths(text: str) -> list[int]:
    return [] if text == "none" else [_number(1)(width) for width in text.split(",")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if "" in names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names with commas between them, got {text!r}")
    return names


def _loss(text: str) -> str:
    kind, _, number = text.partition(":")
    if text in ("elbo", "mean_field") or (kind == "iw" and number.isdecimal() and 1 < int(number) <= 10_000):
        return text
    expected = "elbo, mean_field or iw:K with K from 2 to 10000"
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


_seed = _number(0, 2**32 - 1)


# ----------------------------------------------------------------------------------------------------------------------
# The options of each command.


def _data(parser: _Parser) -> None:
    group = parser.add_argument_group("data")
    files = f"a file ({', '.join(ENDINGS)}) or a folder of images"
    parser.option(group, "--data", metavar="DATA", help=f"{', '.join(NAMES)}; {files}")
    parser.option(group, "--root", metavar="FOLDER", help="for mnist, fashion_mnist: the folder that holds them")
    binary = "threshold (of digits and MNIST if not given), dynamic, none (of a folder) or counts (digits only)"
    choices = ["threshold", "dynamic", "none", "counts"]
    parser.option(group, "--binarize", choices=choices, metavar="HOW", help=f"pixels to zeros and ones: {binary}")
    parser.option(group, "--size", kind=_number(1, 4096), metavar="PIXELS", help="of images in a folder (28)")
    share = "of a file or folder to hold out (0.2)"
    parser.option(group, "--test-share", kind=_real(0, 1), metavar="SHARE", help=share)
    parser.option(group, "--split-seed", kind=_seed, metavar="SEED", help="of what is held out (0)")


def _pair(parser: _Parser, guides: bool) -> None:
    group = parser.add_argument_group("pair")
    parser.option(group, "--model", metavar="MODEL", help=f"{', '.join(GUIDES)} or module:name (vae)")
    if guides:
        parser.option(
            group,
            "--guides",
            kind=_names,
            metavar="A,B,...",
            help="guides of the model, or module:name; commas between them",
        )
    else:
        parser.option(group, "--guide", metavar="GUIDE", help="a guide of the model (its first) or module:name")
    parser.option(group, "--latent-dim", kind=_number(1), metavar="L", help="size of z (8; for data of few numbers 2)")
    widths = (
        "hidden layers of the decoder, those of the encoder are twice as wide (64,64; for large data 200,200); none"
    )
    parser.option(group, "--hidden", kind=_widths, metavar="A,B,...", help=f"{widths} for linear maps")
    names = f"{', '.join(likelihoods.NAMES)} (one that fits the data)"
    parser.option(group, "--likelihood", metavar="NAME", help=f"of vae, hierarchical, mixture_vae: {names}")
    parser.option(group, "--components", kind=_number(1), metavar="C", help="of mixture, mixture_vae (10)")


def _training(parser: _Parser, compare: bool) -> Any:
    group = parser.add_argument_group("training")
    losses = "elbo, mean_field (KL in closed form) or iw:K (bound of K particles); (elbo, for binary latents iw:5)"
    parser.option(group, "--loss", kind=_loss, metavar="LOSS", help=losses)
    limit = group if compare else group.add_mutually_exclusive_group()
    steps = "updates of each guide, the model gets 3/4 of them (2000)" if compare else "updates (2000)"
    parser.option(limit, "--steps", kind=_number(1, 10**9), metavar="STEPS", help=steps)
    if not compare:
        parser.option(
            limit, "--epochs", kind=_number(1), metavar="EPOCHS", help="passes over the data, in the place of --steps"
        )
    parser.option(group, "--batch-size", kind=_number(1, 10**9), metavar="B", help="data a step (128)")
    rate = "of Adam for half of the steps, then down a line to 2 %% of it (0.002)"
    parser.option(group, "--lr", kind=_real(0, 1e6), metavar="RATE", help=rate)
    return group


def _machine(parser: _Parser, group: Any, seed: str) -> None:
    parser.option(group, "--seed", kind=_seed, metavar="SEED", help=f"of {seed} (0)")
    parser.option(group, "--device", metavar="DEVICE", help="where to compute, e.g. cuda (cpu)")
    compiled = "capture the pair as a graph, which needs a C++ compiler"
    group.add_argument("--compile", action="store_const", const=True, default=None, help=compiled)


def _particles(parser: _Parser, group: Any) -> None:
    parser.option(group, "--particles", kind=_number(1, 10**9), metavar="K", help="draws a datum (1000)")


def _out(parser: _Parser, group: Any, text: str, **rest: Any) -> None:
    parser.option(group, "--out", metavar=rest.pop("metavar", "FOLDER"), help=text, **rest)


def _train(parser: _Parser) -> None:
    _data(parser)
    _pair(parser, guides=False)
    group = _training(parser, compare=False)
    _machine(parser, group, "the initial values and of training")
    group = parser.add_argument_group("run")
    _out(parser, group, "where the run is kept; made if need be", required=True)
    group.add_argument("--resume", action="store_true", help="go on with the run in --out, or begin it")
    often = "steps from one checkpoint to the next (500)"
    parser.option(group, "--checkpoint-every", kind=_number(1, 10**9), metavar="STEPS", help=often)


def _evaluate(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.option(parser, "--data", metavar="DATA", help="other data than those that the run holds out")
    parser.option(parser, "--root", metavar="FOLDER", help="for mnist, fashion_mnist: the folder that holds them")
    _particles(parser, parser)
    _machine(parser, parser, "the draws")
    _out(parser, parser, "where the files go (RUN)")


def _compare(parser: _Parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", help="folders of runs; or, in their place, --data")
    _data(parser)
    _pair(parser, guides=True)
    _training(parser, compare=True)
    group = parser.add_argument_group("comparison")
    _particles(parser, group)
    _machine(parser, group, "training and of the draws")
    _out(
        parser, group, "keep comparison.json, .html and .png there; of the second table linear_gaussian.json and so on"
    )


def _check(parser: _Parser) -> None:
    _data(parser)
    _pair(parser, guides=False)
    group = parser.add_argument_group("training to be")
    parser.option(group, "--loss", kind=_loss, metavar="LOSS", help="as for train")
    parser.option(group, "--seed", kind=_seed, metavar="SEED", help="of the initial values (0)")


def _plot(parser: _Parser) -> None:
    parser.add_argument("source", metavar="FILE", help="log_marginal.json, comparison.json, or the folder of a run")
    _out(parser, parser, "the picture; its ending says the format (FILE with the ending .png)", metavar="PICTURE")
