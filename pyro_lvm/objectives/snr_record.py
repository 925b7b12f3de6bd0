"""`GradientSNR`: mean and spread of a stochastic gradient, of each parameter and of model and guide as a whole."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from pyro_lvm.objectives.usage_record import LatentUsage
from pyro_lvm.table import TextTable

__all__ = ["GradientGroup", "GradientSNR", "Part"]

Part = Literal["model", "guide", "both"]


@dataclass(frozen=True, eq=False)
class GradientGroup:
    """The gradient of some parameters; P is how many numbers they are.

    Attributes:
        name: of the parameter; empty for all parameters of a part together.
        part: ``"model"``, ``"guide"``, or ``"both"`` for a parameter that the two share.
        mean: mean gradient of the loss, unconstrained, ``(P,)``, float64.
        std: standard deviation of each number over the repeats, ``(P,)``.
        num_repeats: R.
        rounding: a gradient of no larger norm is rounding error.
    """

    name: str
    part: Part
    mean: torch.Tensor
    std: torch.Tensor
    num_repeats: int
    rounding: float

    @property
    def noise(self) -> float:
        """Root of the total variance of one gradient."""
        return float(self.std.norm())

    @property
    def signal(self) -> float:
        """Norm of the expected gradient: of the mean, less what noise adds to its square, at least 0."""
        return math.sqrt(max(float(self.mean.square().sum()) - self.noise**2 / self.num_repeats, 0.0))

    @property
    def snr(self) -> float:
        """`signal` over `noise`; inf where nothing varies, NaN where there is no gradient at all."""
        if self.noise > self.rounding:
            return self.signal / self.noise
        return math.inf if float(self.mean.norm()) > self.rounding else math.nan

    @property
    def element_snr(self) -> torch.Tensor:
        """abs(mean) / std of each number, ``(P,)``; about 0.8 R^-1/2 for a number without signal; 0 / 0 is NaN."""
        return self.mean.abs() / self.std if self.noise > self.rounding else torch.full_like(self.mean, self.snr)

    @property
    def mean_element_snr(self) -> float:
        """Mean of the finite `element_snr`; NaN where there are none."""
        ratios = self.element_snr
        return float(ratios[ratios.isfinite()].mean())

    def row(self) -> tuple[str, ...]:
        """Words for the table."""
        numbers = (float(self.mean.norm()), self.noise, self.snr, self.mean_element_snr)
        name = self.name or f"all of the {self.part}"
        return name, self.part, str(self.mean.numel()), *(_word(number) for number in numbers)


@dataclass(frozen=True, eq=False)
class GradientSNR:
    """What one stochastic gradient is worth; prints as a table, with that of the latents below.

    Attributes:
        model: all parameters of the model together; None if it has none.
        guide: all parameters of the guide together; None if it has none.
        parameters: one group a parameter, by name.
        usage: active units and KL terms.
        loss: mean of the loss over the repeats, nats, of all data in x.
        loss_name: what was differentiated.
        num_repeats: R.
    """

    model: GradientGroup | None
    guide: GradientGroup | None
    parameters: dict[str, GradientGroup]
    usage: LatentUsage
    loss: float
    loss_name: str
    num_repeats: int

    @property
    def resolution(self) -> float:
        """Two standard errors of a squared ratio of zero, as a ratio: an SNR below it may as well be zero."""
        return (8.0**0.5 / self.num_repeats) ** 0.5

    def __str__(self) -> str:
        groups = [group for group in (self.model, self.guide) if group is not None] + list(self.parameters.values())
        header = ("gradient of", "part", "numbers", "norm of mean", "noise", "SNR", "mean SNR of a number")
        notes = [
            f"{self.loss_name}, {self.num_repeats} repeats, eval mode; loss {self.loss:.4f} nats",
            f"SNR: norm of the expected gradient over the root of its total variance; below {self.resolution:.2g} it "
            "cannot be told from 0",
        ]
        if any(math.isnan(group.snr) for group in groups):
            notes.append("none: no gradient in any repeat but rounding error, so neither signal nor noise")
        if any(math.isinf(group.snr) for group in groups):
            notes.append("inf: the same gradient in every repeat")
        return f"{TextTable(header, tuple(group.row() for group in groups), tuple(notes))}\n\n{self.usage}"


def _word(number: float) -> str:
    return "none" if math.isnan(number) else f"{number:.3g}"
