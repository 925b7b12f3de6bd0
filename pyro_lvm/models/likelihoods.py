"""What a decoder's output means: callables ``(output, batch_ndim) -> p(x|z)`` with all data dimensions in the event.

``batch_ndim`` counts the leading dimensions of ``output`` that are particles and data; the rest belongs to one datum.
Any function of these two arguments is a likelihood too.
"""

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch.nn.functional import softplus

from pyro_lvm._checks import refuse
from pyro_lvm.errors import ShapeError

__all__ = ["Bernoulli", "Categorical", "Normal"]


@dataclass(frozen=True)
class Bernoulli:
    """Binary x: the output ``(..., D)`` holds the logits of x = 1.

    Example:
        >>> Bernoulli()(torch.zeros(5, 3, 8, 8), batch_ndim=1).event_shape
        torch.Size([3, 8, 8])
    """

    def __call__(self, output: torch.Tensor, batch_ndim: int) -> dist.Independent:
        """p(x|z): event shape as the output of one datum."""
        return dist.Bernoulli(logits=output).to_event(output.dim() - batch_ndim)


@dataclass(frozen=True)
class Normal:
    r"""Real x with a mean and a standard deviation for every dimension, both from the decoder.

    .. math:: x \mid z \sim N(m(z), diag(s(z))^2), \qquad s = \text{min\_scale} + \log(1 + e^{raw})

    The output ``(..., 2 D)`` is m, then raw; for images ``(..., 2 C, H, W)``. Without the floor the likelihood is
    unbounded: it grows without limit where one datum is met exactly.

    Args:
        min_scale: smallest standard deviation, in the units of x.

    Raises:
        ShapeError: the first dimension of a datum's output is odd.

    Example:
        >>> Normal()(torch.zeros(5, 6), batch_ndim=1).event_shape
        torch.Size([3])
    """

    min_scale: float = 1e-3

    def __call__(self, output: torch.Tensor, batch_ndim: int) -> dist.Independent:
        """p(x|z): event shape as half the output of one datum."""
        shape = tuple(output.shape[batch_ndim:])
        if not shape or shape[0] % 2:
            cure = "A decoder for Normal puts out the means and then the raw scales."
            raise ShapeError(refuse("decoder output", "2 * D values a datum", shape, cure))
        loc, raw = output.chunk(2, dim=batch_ndim)
        return dist.Normal(loc, self.min_scale + softplus(raw)).to_event(len(shape))


@dataclass(frozen=True)
class Categorical:
    """Discrete x in {0, ..., C-1}, such as grey levels: the output ``(..., D, C)`` holds logits over classes.

    Args:
        num_classes: C. With it a flat output ``(..., D * C)``, as an ``MLP`` gives, is split into ``(..., D, C)``.

    Raises:
        ShapeError: the output is flat and C is not given or does not divide it, or its last dimension is not C.

    Example:
        >>> Categorical(17)(torch.zeros(5, 64 * 17), batch_ndim=1).event_shape
        torch.Size([64])
    """

    num_classes: int | None = None

    def __call__(self, output: torch.Tensor, batch_ndim: int) -> dist.Independent:
        """p(x|z): event shape as the output of one datum without its last dimension."""
        classes, shape = self.num_classes, tuple(output.shape[batch_ndim:])
        if classes and len(shape) == 1 and shape[0] % classes == 0:
            output = output.unflatten(-1, (-1, classes))  # (..., D, C)
        elif len(shape) < 2 or (classes and shape[-1] != classes):
            wanted = f"(D, {classes or 'C'}) or (D * C,) with Categorical(C)"
            cure = "Let the decoder put out logits over the classes for every dimension."
            raise ShapeError(refuse("decoder output", f"{wanted} a datum", shape, cure))
        return dist.Categorical(logits=output).to_event(output.dim() - batch_ndim - 1)
