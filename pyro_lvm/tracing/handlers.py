"""Handlers that a loss puts around the programs of a pair: terms of latents weighed, rows of a subsample noted."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

__all__ = ["noted_rows", "weighed_latents"]

Program = Callable[..., Any]


class _WeighGuide(Messenger):
    """Multiplies the scale of every site of a guide, and notes the names of its latents."""

    def __init__(self, factor: float | torch.Tensor, names: set[str]) -> None:
        super().__init__()
        self.factor, self.names = factor, names

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.factor
            self.names.add(msg["name"])


class _WeighModel(Messenger):
    """Multiplies the scale of the latents of a model that the guide has sampled."""

    def __init__(self, factor: float | torch.Tensor, names: set[str]) -> None:
        super().__init__()
        self.factor, self.names = factor, names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.factor


class _NoteRows(Messenger):
    """Notes the rows that a plate takes, whoever has chosen them."""

    def __init__(self, plate: str, seen: list[torch.Tensor]) -> None:
        super().__init__()
        self.plate, self.seen = plate, seen

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self.plate and site_is_subsample(msg):
            self.seen.append(msg["value"])


def weighed_latents(model: Program, guide: Program, factor: float | torch.Tensor) -> tuple[Program, Program]:
    """The pair with log p(z) and log q(z | x) multiplied by ``factor``; the guide is to run first.

    A latent that the guide lacks is summed out or drawn by the loss: it belongs to the likelihood, which stays.
    """
    names: set[str] = set()
    return _under(_WeighModel(factor, names), model), _under(_WeighGuide(factor, names), guide)


def noted_rows(program: Program, plate: str) -> tuple[Program, list[torch.Tensor]]:
    """``program``, and the list to which each run of it adds the rows that ``plate`` takes."""
    seen: list[torch.Tensor] = []
    return _under(_NoteRows(plate, seen), program), seen


def _under(handler: Messenger, program: Program) -> Program:
    def handled(*args: Any, **kwargs: Any) -> Any:
        with handler:
            return program(*args, **kwargs)

    return handled
