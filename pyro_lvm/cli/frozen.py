"""Guides of one frozen model: the model is trained once, then each guide on it."""

import argparse
from dataclasses import dataclass
from math import prod
from typing import Any

import pyro
import torch

from pyro_lvm._checks import refuse
from pyro_lvm.cli.arguments import DEFAULTS, TRAINING, given
from pyro_lvm.cli.data import Data, load_data
from pyro_lvm.cli.fitting import default_loss, few_threads, make_loss, prepare, train
from pyro_lvm.cli.own import is_own
from pyro_lvm.cli.pairs import GUIDES, build_guide, build_pair, check_names
from pyro_lvm.cli.request import begin, described, largest
from pyro_lvm.cli.runs import to_device
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError
from pyro_lvm.evidence import LogMarginal, importance
from pyro_lvm.guides import DiagonalNormal
from pyro_lvm.models import LinearGaussian
from pyro_lvm.tracing.isolation import forked_rng

__all__ = ["Frozen", "exact_check", "train_guides"]

_OF_THE_MODEL = 0.75  # of the steps of each guide


@dataclass(frozen=True)
class Frozen:
    """Rows of a comparison on one model.

    Attributes:
        rows: name -> ``(model, guide)``.
        data: what they were trained on, and are measured on.
        pair: the options of the model.
        reference: exact log p(x) of the held-out data, or None.
    """

    rows: dict[str, Any]
    data: Data
    pair: dict[str, Any]
    reference: LogMarginal | None


def train_guides(args: argparse.Namespace) -> Frozen:
    """A model of ``--data``, and on it each of ``--guides``.

    Raises:
        DataTypeError: no data or no guides, or guides that do not fit the model.
    """
    names = _checked(args)
    pair, data = begin(args)
    data = data if all(map(is_own, (pair["model"], *names))) else data.complete()
    options = _options(args)
    with forked_rng(options["seed"]):
        model, _ = build_pair(pair | {"guide": "none"}, data.shape)

    def make(name: str) -> Any:
        with forked_rng(options["seed"]):  # a row does not depend on the others
            return build_guide(pair | {"guide": name}, model, prod(data.shape), largest(data))

    guides = {name: make(name) for name in names}
    teacher = _teacher(pair["model"], names)
    first = guides[teacher] if is_own(teacher) else make(teacher)
    to_device(options["device"], model, first, *guides.values())
    losses = {name: make_loss(args.loss or default_loss(name), name) for name in names if name != "none"}
    few_threads(data)
    print(f"data  {data}\nmodel {described(pair | {'guide': ','.join(names)})}", flush=True)
    _train_model(model, first, teacher, pair["model"], data, options)
    for name, loss in losses.items():
        print(f"train {name}", flush=True)
        train(model, guides[name], data, options, loss=loss, update="guide")
    known = pair["model"] == "linear_gaussian" or "none" in names
    reference = importance(model, None, data.test, device=options["device"]) if known else None
    return Frozen({name: (model, guide) for name, guide in guides.items()}, data, pair, reference)


def _checked(args: argparse.Namespace) -> list[str]:
    """The names of the guides; of the arguments ``guide`` becomes one that has all the options which any of them has.

    Raises:
        DataTypeError: no data or no guides, or one that does not fit the model.
    """
    names: list[str] = args.guides or []
    if not names or args.data is None:
        missing = "--guides" if args.data is not None else "--data"
        cure = "Pass folders of runs, or e.g. --data digits --guides diagonal,full_rank,flow."
        raise DataTypeError(refuse(missing, "RUN RUN ... or --data with --guides", "neither", cure))
    model = args.model or DEFAULTS["model"]
    for name in names:
        check_names(model, name, "--guides")
    args.guide = min(names, key=lambda name: (is_own(name), name == "none")) if is_own(model) else GUIDES[model][0]
    return names


def exact_check(args: argparse.Namespace, frozen: Frozen) -> Frozen | str:
    """Two guides of a linear-Gaussian model of the same data, whose log p(x) is known; or why there is none.

    Its parameters are those of maximum likelihood, and one of the guides is its exact posterior.
    """
    kept = dict(frozen.data.options)
    if "binarize" in kept:
        kept["binarize"] = "none"
    data = load_data(kept).as_rows()
    size = data.test.shape[1]
    options = _options(args)
    try:
        latent_dim = min(frozen.pair["latent_dim"], size - 1)
        model = LinearGaussian(latent_dim, size).fit_closed_form(data.rows)
    except (ShapeError, ParameterError) as error:
        return str(error)
    with forked_rng(options["seed"]):
        guide = DiagonalNormal(latent_dim, torch.nn.Linear(size, 2 * latent_dim))
    to_device(options["device"], model, guide)
    train(model, guide, data, options, update="guide")
    rows = {"exact": (model, model.posterior_guide), "diagonal": (model, guide)}
    return Frozen(rows, data, frozen.pair, importance(model, None, data.test, device=options["device"]))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    kept = dict.fromkeys(TRAINING) | {name: DEFAULTS[name] for name in TRAINING if name in DEFAULTS}
    return kept | given(args, TRAINING)


def _teacher(model: str, names: list[str]) -> str:
    """The guide that the model is trained with: one of its own; of a user's model one that was named, else theirs."""
    if not is_own(model):
        return GUIDES[model][0]
    return next((name for name in names if not is_own(name)), names[0])


def _train_model(model: Any, guide: Any, teacher: str, name: str, data: Data, options: dict[str, Any]) -> None:
    """Train a model, with a guide that is not measured unless it is the user's own."""
    if name == "linear_gaussian":
        model.fit_closed_form(data.rows)
        return
    if is_own(teacher):
        print(f"note: {teacher} is trained with the model first, and goes on from there")
    print(f"train {name}", flush=True)
    options = options | {"steps": max(1, round(_OF_THE_MODEL * options["steps"]))}
    if is_own(name):
        train(model, guide, data, options)
        return
    with pyro.get_param_store().scope():  # the guide is not needed any more, and others have its names
        prepare(model, guide, name, data, options)
        train(model, guide, data, options, loss=None if teacher == "none" else make_loss("iw:5", teacher))
