r"""A flow of its own for each datum on top of any distribution; at first the identity.

.. math:: z' = c + r \odot \big(m + S \, C\big(g((z - c) / r)\big)\big)

with c and r the mean and the standard deviation of z, a spline g of each coordinate, affine couplings C with a small
network for each datum, and a lower triangular S. A Gaussian becomes any Gaussian by m and S alone, so that the family
contains what it starts from and the full-rank Gaussian.
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import Transform, biject_to
from torch.distributions.transforms import ReshapeTransform

from pyro_lvm.tracing.intercept import is_real, support
from pyro_lvm.transforms import AffineCoupling, LocationScale, SplineCoupling, per_datum

__all__ = ["with_flow"]

#: name, how it starts -> leaf ``(*batch, ...)``
Leaf = Callable[[str, Callable[[], torch.Tensor]], torch.Tensor]

_NUM_COUPLINGS = 4
_NUM_HIDDEN = 16
_NUM_PIECES = 8
_NUM_DRAWS = 256  # from which c and r are taken


def with_flow(fn: Any, leaf: Leaf, name: str) -> dist.TransformedDistribution:
    """``fn`` pushed through a flow with the parameters ``leaf("name.flow...", initial)``.

    Raises:
        NotImplementedError: its draws are not continuous.
    """
    constraint = support(fn)
    if constraint is None or constraint.is_discrete or not fn.has_rsample:
        raise NotImplementedError(f"{type(fn).__name__} has no continuous draws with a gradient")
    shape, to_vector = fn.event_shape, []
    if not is_real(constraint):
        to_vector.append(biject_to(constraint).inv)
        shape = to_vector[0].forward_shape(fn.batch_shape + shape)[len(fn.batch_shape) :]
    if len(shape) != 1:
        to_vector.append(ReshapeTransform(shape, torch.Size([shape.numel()])))
    steps = _steps(fn, to_vector, shape.numel(), lambda part, start: leaf(f"{name}.flow.{part}", start))
    return dist.TransformedDistribution(fn, [*to_vector, *steps, *(t.inv for t in reversed(to_vector))])


def _steps(fn: Any, to_vector: list[Transform], size: int, leaf: Leaf) -> list[Transform]:
    """The flow on vectors ``(..., *batch, L)`` of ``size`` numbers."""

    def draws() -> torch.Tensor:
        z = fn.sample(torch.Size([_NUM_DRAWS]))
        for transform in to_vector:
            z = transform(z)
        return z  # (draws, *batch, L)

    center = leaf("center", lambda: draws().mean(0))  # (*batch, L)
    spread = leaf("spread", lambda: draws().std(0).log()).exp()

    def zeros(part: str, *shape: int) -> torch.Tensor:
        return leaf(part, lambda: center.new_zeros(*center.shape[:-1], *shape))

    def normal(part: str, *shape: int) -> torch.Tensor:
        return leaf(part, lambda: (center.new_empty(shape).normal_() / size**0.5).expand(*center.shape[:-1], *shape))

    raw = zeros("triangle", size, size)
    triangle = raw.tril(-1) + raw.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
    couplings: list[Transform] = []
    for i in range(_NUM_COUPLINGS if size > 1 else 0):
        weights = normal(f"in{i}", _NUM_HIDDEN, size), normal(f"bias{i}", _NUM_HIDDEN)
        couplings.append(AffineCoupling(_Network(i % 2, *weights, zeros(f"out{i}", 2 * size, _NUM_HIDDEN))))
    return [
        LocationScale(center, spread).inv,
        SplineCoupling(_Constant(zeros("spline", 3 * _NUM_PIECES - 1, size))),
        *couplings,
        LocationScale(zeros("shift", size), triangle),
        LocationScale(center, spread),
    ]


class _Constant:
    """Numbers of a coupling that keeps no coordinate."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers  # (*batch, P, L)
        self.kept = torch.zeros(numbers.shape[-1], dtype=torch.bool, device=numbers.device)

    def __call__(self, u: torch.Tensor, _context: torch.Tensor | None, /) -> torch.Tensor:
        return self.numbers.expand(*u.shape[:-1], *self.numbers.shape[-2:])


class _Network:
    """Network of a coupling with weights of its own for each datum; it keeps every other coordinate."""

    def __init__(self, parity: int, weight: torch.Tensor, bias: torch.Tensor, output: torch.Tensor) -> None:
        self.weight, self.bias, self.output = weight, bias, output  # (*batch, H, L), (*batch, H), (*batch, 2 L, H)
        self.kept = torch.arange(weight.shape[-1], device=weight.device) % 2 == parity

    def __call__(self, u: torch.Tensor, _context: torch.Tensor | None, /) -> torch.Tensor:
        hidden = torch.tanh(per_datum(torch.matmul, self.weight, u * self.kept) + self.bias)  # (..., *batch, H)
        out = per_datum(torch.matmul, self.output, hidden).unflatten(-1, (2, -1))  # (..., *batch, 2, L)
        return out * ~self.kept
