"""A finding, and the pair that is looked at."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pyro_lvm._typing import DataPlate, Guide, Model
from pyro_lvm.errors import PyroLVMError
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.params import anchor
from pyro_lvm.tracing.probe import Plan, Run, empty_guide

__all__ = ["LEVELS", "Finding", "Subject", "finding", "quoted", "told"]

Level = Literal["error", "warning", "note"]

#: Every finding, in the order of the pages.
LEVELS: dict[str, Level] = {
    "missing-site": "error",
    "extra-site": "error",
    "observed-in-guide": "error",
    "no-data": "error",
    "event-dims": "error",
    "moved-values": "error",
    "plate-size": "error",
    "masks": "error",
    "data-outside-support": "error",
    "outside-prior": "error",
    "not-finite": "error",
    "shared-name": "error",
    "auxiliary-draw": "error",
    "coupled-data": "error",
    "redrawn-subsample": "error",
    "mean-field": "error",
    "plate-nesting": "error",
    "vectorised-particles": "error",
    "dtype": "error",
    "device": "error",
    "fails": "error",
    "refused": "error",
    "unregistered": "warning",
    "shared-param": "warning",
    "broadcast-event": "warning",
    "scales": "warning",
    "no-gradient": "warning",
    "guide-ignores-x": "warning",
    "narrow-guide": "warning",
    "point-mass": "warning",
    "data-plate": "warning",
    "outside-plate": "warning",
    "mixed-dtypes": "warning",
    "name-taken": "warning",
    "drawn-from-prior": "warning",
    "nothing-to-train": "warning",
    "summed-out": "note",
    "score-function": "note",
    "kl-from-draws": "note",
    "train-mode": "note",
    "scaled": "note",
    "whole-data": "note",
    "particles": "note",
    "unscorable-draws": "note",
    "unanswered": "note",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: ``"error"``, ``"warning"`` or ``"note"``.
        code: its name, and that of its page in ``docs/findings.md``.
        site: the site, parameter or module that it is about; empty if it is the pair.
        message: what was expected, and what was measured.
        cure: what to do.
    """

    level: Level
    code: str
    site: str
    message: str
    cure: str


@dataclass
class Subject:
    """A pair under examination, and what earlier questions have come to.

    Attributes:
        model: the model.
        guide: the guide.
        batch: x and the other arguments.
        loss: what `fit` would be given.
        in_train_mode: modules that were called in train mode, so far.
        foreign: names in the param store that belong to other pairs.
        data_plate: as evaluators are given it.
        pair: one run on all of x.
        names: of the parameters of model and guide.
        modules: those that the pair calls or registers.
        plan: how it is evaluated, or None if it cannot be, datum by datum.
    """

    model: Model
    guide: Guide
    batch: Batch
    loss: Any
    in_train_mode: list[torch.nn.Module]
    foreign: set[str]
    data_plate: DataPlate
    pair: Run = field(init=False)
    names: tuple[set[str], set[str]] = field(init=False)
    modules: list[torch.nn.Module] = field(default_factory=list)
    plan: Plan | None = None

    @property
    def needs_no_guide(self) -> bool:
        """It is trained and evaluated by the model's own exact density."""
        return self.guide is empty_guide and self.loss is None and hasattr(anchor(self.model), "log_prob")


def told(error: PyroLVMError) -> Finding:
    """An error of the package as a finding: its first sentence says what was found, the others what to do."""
    message, _, cure = str(error).partition(". ")
    return finding(error.finding or "refused", message + ".", cure, message.split("'")[1] if "'" in message else "")


def finding(code: str, message: str, cure: str, site: str = "") -> Finding:
    """A finding with the level of its name."""
    return Finding(LEVELS[code], code, site, message, cure)


def quoted(names: Iterable[str]) -> str:
    """The first few names."""
    listed = sorted(names)
    return ", ".join(map(repr, listed[:4])) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
