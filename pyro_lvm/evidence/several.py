"""The guides that draw: one, or several of one model, its prior beside them, ready to be run together."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyro_lvm._checks import check_program, refuse
from pyro_lvm._typing import DataPlate, Guide, Model, Vectorize
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.evidence.job import look
from pyro_lvm.tracing.batch import Rows
from pyro_lvm.tracing.captured_weights import Tables
from pyro_lvm.tracing.coordinates import check_prior
from pyro_lvm.tracing.isolation import eval_mode, evaluation_rng, validation
from pyro_lvm.tracing.mixture import Member, fit_together
from pyro_lvm.tracing.params import Fitted, current_params
from pyro_lvm.tracing.proposals import finite_left_out, prior_guide
from pyro_lvm.tracing.weights import evaluation

__all__ = ["Proposing", "joined", "named", "prior_of_the_rest", "proposing"]


@dataclass(frozen=True)
class Proposing:
    """What draws.

    Attributes:
        names: of several guides.
        tables: how the model and the first guide run.
        pair: what they are, see `look`.
        members: several guides; none where there is one.
    """

    names: tuple[str, ...]
    tables: Tables
    pair: dict[str, Any]
    members: tuple[Member, ...]


@contextmanager
def proposing(
    model: Model, guide: Any, source: Rows, data_plate: DataPlate, vectorize: Vectorize
) -> Iterator[Proposing]:
    """A guide, or several in a sequence or a dictionary, ready to be run."""
    if isinstance(guide, Sequence | Mapping):
        pairs = {name: (model, each) for name, each in named(guide).items()}
        with joined(pairs, source, data_plate, vectorize) as start:
            yield start
    else:
        check_program("guide", guide)
        with evaluation(model, guide), torch.no_grad():
            plan, pair = look(model, guide, source, data_plate, vectorize)
            yield Proposing((), Tables(plan, model, guide), pair, ())


def named(guides: Any) -> dict[str, Guide | None]:
    """Guides by name, those of a sequence by their number, and the prior."""
    if not isinstance(guides, Sequence | Mapping) or isinstance(guides, str):
        cure = 'Pass [guide, other] or {"name": guide, ...}.'
        raise DataTypeError(refuse("guides", "a sequence or a dictionary of guides", type(guides).__name__, cure))
    numbered = (("prior" if guide is None else f"guide {i + 1}", guide) for i, guide in enumerate(guides))
    found = dict(guides if isinstance(guides, Mapping) else numbered)
    if len(found) < 2:
        cure = "Pass a single guide as it is, not in a list, to what takes one. None is the prior, as a second one."
        raise ShapeError(refuse("guides", "at least two", len(found), cure))
    return found


@contextmanager
def joined(
    pairs: Mapping[str, tuple[Model, Guide | None]], source: Rows, data_plate: DataPlate, vectorize: Vectorize
) -> Iterator[Proposing]:
    """Guides as one mixture, ready to be run."""
    with torch.no_grad():
        looks = _looks(pairs, source, data_plate, vectorize)
        programs = [program for member, _ in looks for program in (member.model, member.guide)]
        digests = {member.name: pair["parameters"] for member, pair in looks}
        about = looks[0][1] | {"guide": [pair["guide"] for _, pair in looks], "parameters": digests}
        with eval_mode(*programs), validation(False):
            with evaluation_rng(0):
                members = fit_together([member for member, _ in looks], source)
            first = members[0]
            yield Proposing(tuple(pairs), Tables(first.plan, first.model, first.guide), about, members)


def _looks(
    pairs: Mapping[str, tuple[Model, Guide | None]], source: Rows, data_plate: DataPlate, vectorize: Vectorize
) -> list[tuple[Member, dict[str, str]]]:
    """Each guide with its model, and what they are. The prior leaves out what the others leave to be summed."""
    found = {
        name: _member(name, model, guide, source, data_plate, vectorize)
        for name, (model, guide) in pairs.items()
        if guide is not None
    }
    summed = any(member.plan.match.enumerated for member, _ in found.values())
    for name, (model, guide) in pairs.items():
        if guide is None:
            program = prior_of_the_rest(model, source, data_plate) if summed else prior_guide(model)
            member, pair = _member(name, model, program, source, data_plate, vectorize)
            found[name] = replace(member, is_prior=True), pair
    return [found[name] for name in pairs]


def prior_of_the_rest(model: Model, source: Rows, data_plate: DataPlate) -> Guide:
    """The prior on all latents but the finite ones, which are left to be summed out.

    Raises:
        SupportError: it has no density that is known without them.
    """
    check_program("model", model)
    prior = finite_left_out(model)
    with evaluation(model, prior), evaluation_rng(0), torch.no_grad():
        check_prior(model, prior, source.rows(slice(0, len(source) if data_plate is None else 1)))
    return prior


def _member(
    name: str, model: Model, program: Guide, source: Rows, data_plate: DataPlate, vectorize: Vectorize
) -> tuple[Member, dict[str, str]]:
    """A guide that finds its own parameters, also while those of the others are in their places; and what it is."""
    try:
        with evaluation(model, program):
            plan, pair = look(model, program, source, data_plate, vectorize)
            params = current_params()
    except Exception as error:
        error.add_note(f"of guide {name!r}")
        raise
    return Member(name, Fitted(model, params), Fitted(program, params), plan, {}, False), pair
