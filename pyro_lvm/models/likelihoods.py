"""What a decoder's output means: callables ``(output, batch_ndim) -> p(x|z)`` with all data dimensions in the event.

``batch_ndim`` counts the leading dimensions of ``output`` that are particles and data; the rest belongs to one datum.
Any function of these two arguments is a likelihood too, and a module of them may have parameters of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import softplus

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError
from pyro_lvm.models.density import LogisticLevels, LogPoisson

__all__ = [
    "Bernoulli",
    "Binomial",
    "Categorical",
    "DiscretizedLogistic",
    "Likelihood",
    "Normal",
    "Poisson",
    "SharedNormal",
    "SigmoidNormal",
    "as_likelihood",
    "observe",
]

#: (decoder output, number of batch dimensions) -> p(x|z).
Likelihood: TypeAlias = Callable[[torch.Tensor, int], dist.TorchDistribution]


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
        loc, raw = _halves(output, batch_ndim)
        return dist.Normal(loc, self.min_scale + softplus(raw)).to_event(output.dim() - batch_ndim)


class SharedNormal(nn.Module):
    r"""Real x around the decoder's output, with one learned standard deviation for all dimensions and data.

    .. math:: x \mid z \sim N(f(z), s^2 I), \qquad s = \text{min\_scale} + \log(1 + e^{raw})

    For data in an interval end the decoder with what maps there, such as ``nn.Sigmoid``.

    Args:
        initial_scale: where s starts, in the units of x.
        min_scale: floor of s, in the units of x.

    Attributes:
        raw_scale: the parameter, ``()``.

    Raises:
        ParameterError: not 0 <= ``min_scale`` < ``initial_scale`` < infinity.

    Example:
        >>> likelihood = SharedNormal(initial_scale=0.1)
        >>> p = likelihood(torch.zeros(5, 3, 25, 25), batch_ndim=1)
        >>> print(p.event_shape, f"{p.base_dist.scale.max():.4f}")
        torch.Size([3, 25, 25]) 0.1000
    """

    def __init__(self, initial_scale: float = 1.0, min_scale: float = 1e-3) -> None:
        super().__init__()
        if not 0 <= min_scale < initial_scale < math.inf:
            got = f"min_scale={min_scale}, initial_scale={initial_scale}"
            cure = "Both are standard deviations in the units of x."
            raise ParameterError(refuse("initial_scale", "a finite number above min_scale >= 0", got, cure))
        self.min_scale = min_scale
        excess = initial_scale - min_scale
        self.raw_scale = nn.Parameter(torch.tensor(excess + math.log(-math.expm1(-excess))))  # softplus^-1(excess)

    @property
    def scale(self) -> torch.Tensor:
        """s, ``()``."""
        return self.min_scale + softplus(self.raw_scale)

    def forward(self, output: torch.Tensor, batch_ndim: int) -> dist.Independent:
        """p(x|z): event shape as the output of one datum."""
        return dist.Normal(output, self.scale).to_event(output.dim() - batch_ndim)


@dataclass(frozen=True)
class SigmoidNormal:
    r"""Real x whose mean and variance are held in intervals by sigmoids.

    .. math:: x \mid z \sim N(\sigma(a), \text{diag}(e^{\sigma(b)}))

    The output ``(..., 2 D)`` is a, then b. Means lie in (0, 1), variances in (1, e), whatever the decoder is: p(x) is a
    mixture of Gaussians that are wider than the space in which their means can differ. The decoder
    ``nn.Linear(L, 2 * D)``, whose rows are A, then B, makes it the smallest deep Gaussian model:
    :math:`\mu = \sigma(A z + c), \Sigma = \text{diag}(\exp(\sigma(B z + d)))`.

    Raises:
        ShapeError: the first dimension of a datum's output is odd.

    Example:
        >>> p = SigmoidNormal()(torch.zeros(5, 4), batch_ndim=1)
        >>> print(p.base_dist.loc[0], p.base_dist.variance[0])  # 1/2, and e^(1/2)
        tensor([0.5000, 0.5000]) tensor([1.6487, 1.6487])
    """

    def __call__(self, output: torch.Tensor, batch_ndim: int) -> dist.Independent:
        """p(x|z): event shape as half the output of one datum."""
        a, b = _halves(output, batch_ndim)
        return dist.Normal(a.sigmoid(), (0.5 * b.sigmoid()).exp()).to_event(output.dim() - batch_ndim)


@dataclass(frozen=True)
class Binomial:
    """Counts x in {0, ..., n}, such as grey levels: the output ``(..., D)`` holds logits of one of n trials.

    Args:
        total_count: n.

    Raises:
        DataTypeError: n is not an integer.
        ShapeError: n is less than 1.

    Example:
        >>> p = Binomial(16)(torch.zeros(5, 64), batch_ndim=1)
        >>> p.base_dist.mean[0, 0]
        tensor(8.)
    """

    total_count: int

    def __post_init__(self) -> None:
        check_positive_int("total_count", self.total_count)

    def __call__(self, output: torch.Tensor, batch_ndim: int) -> dist.Independent:
        """p(x|z): event shape as the output of one datum."""
        return dist.Binomial(self.total_count, logits=output).to_event(output.dim() - batch_ndim)


@dataclass(frozen=True)
class Poisson:
    """Counts x in {0, 1, ...}: the output ``(..., D)`` holds log-rates.

    Example:
        >>> p = Poisson()(torch.zeros(5, 3), batch_ndim=1)
        >>> p.log_prob(torch.zeros(3))[0]  # three counts of rate 1 that are 0
        tensor(-3.)
    """

    def __call__(self, output: torch.Tensor, batch_ndim: int) -> dist.Independent:
        """p(x|z): event shape as the output of one datum."""
        return LogPoisson(output).to_event(output.dim() - batch_ndim)


@dataclass(frozen=True)
class Categorical:
    """Discrete x in {0, ..., C-1}, such as grey levels: the output ``(..., D, C)`` holds logits over classes.

    Args:
        num_classes: C. With it a flat output ``(..., D * C)``, as an ``MLP`` gives, is split into ``(..., D, C)``.
        channels_first: the classes are among the channels of an image, as a ``ConvDecoder`` puts them out: the output
            ``(..., channels * C, H, W)`` holds the C logits of the first channel, then those of the next.

    Raises:
        ShapeError: the output is flat and C is not given or does not divide it, or its last dimension is not C; with
            ``channels_first`` its first dimension is not a multiple of C.

    Example:
        >>> Categorical(17)(torch.zeros(5, 64 * 17), batch_ndim=1).event_shape
        torch.Size([64])
    """

    num_classes: int | None = None
    channels_first: bool = False

    def __call__(self, output: torch.Tensor, batch_ndim: int) -> dist.Independent:
        """p(x|z): event shape as the output of one datum without the classes."""
        classes, shape = self.num_classes, tuple(output.shape[batch_ndim:])
        if self.channels_first:
            if not classes or len(shape) != 3 or shape[0] % classes:
                wanted = f"({classes or 'C'} * channels, H, W)"
                cure = "Pass Categorical(C, channels_first=True), and outputs_per_value=C to the ConvDecoder."
                raise ShapeError(refuse("decoder output", f"{wanted} a datum", shape, cure))
            output = output.unflatten(batch_ndim, (-1, classes)).movedim(batch_ndim + 1, -1)  # (..., channels, H, W, C)
        elif classes and len(shape) == 1 and shape[0] % classes == 0:
            output = output.unflatten(-1, (-1, classes))  # (..., D, C)
        elif len(shape) < 2 or (classes and shape[-1] != classes):
            wanted = f"(D, {classes or 'C'}) or (D * C,) with Categorical(C)"
            cure = "Let the decoder put out logits over the classes for every dimension."
            raise ShapeError(refuse("decoder output", f"{wanted} a datum", shape, cure))
        return dist.Categorical(logits=output).to_event(output.dim() - batch_ndim - 1)


@dataclass(frozen=True)
class DiscretizedLogistic:
    r"""Ordered levels x in {0, ..., n-1}: a logistic with mean and log-scale from the decoder, rounded to a level.

    .. math:: y \mid z \sim \text{Logistic}(m, s), \qquad x = \text{the level closest to } (n - 1) (1 + y) / 2

    The output ``(..., 2 D)`` is m, then log s; for images ``(..., 2 C, H, W)``. Both are in units in which the levels
    span [-1, 1], x itself is in levels. What lies beyond the first or the last level counts as that level.

    Args:
        num_levels: n.
        min_log_scale: smaller log-scales are raised to this one, since gradients grow like 1 / s.

    Raises:
        DataTypeError: n is not an integer.
        ShapeError: n is less than 2, or (when used) the first dimension of a datum's output is odd.

    Source: Salimans et al. (2017), PixelCNN++, Eqs. (1) and (2), with one component.

    Example:
        >>> p = DiscretizedLogistic(256)(torch.zeros(5, 6), batch_ndim=1)
        >>> p.event_shape, p.support.base_constraint
        (torch.Size([3]), IntegerInterval(lower_bound=0, upper_bound=255))
    """

    num_levels: int = 256
    min_log_scale: float = -7.0

    def __post_init__(self) -> None:
        check_positive_int("num_levels", self.num_levels, minimum=2)

    def __call__(self, output: torch.Tensor, batch_ndim: int) -> dist.Independent:
        """p(x|z): event shape as half the output of one datum."""
        mean, log_scale = _halves(output, batch_ndim)
        half = (self.num_levels - 1) / 2  # levels in one unit of y
        scale = half * log_scale.clamp(min=self.min_log_scale).exp()
        return LogisticLevels(half * (1 + mean), scale, self.num_levels).to_event(output.dim() - batch_ndim)


def _halves(output: torch.Tensor, batch_ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tuple(output.shape[batch_ndim:])
    if not shape or shape[0] % 2:
        cure = "Such a decoder puts out two numbers for each value: first all the means, then all the raw scales."
        raise ShapeError(refuse("decoder output", "2 * D values a datum", shape, cure))
    first, second = output.chunk(2, dim=batch_ndim)
    return first, second


#: Those that need no argument.
_BY_NAME: dict[str, Callable[[], Likelihood]] = {
    "bernoulli": Bernoulli,
    "normal": Normal,
    "categorical": Categorical,
    "poisson": Poisson,
}


def as_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood that a name stands for, or the one that was given.

    Raises:
        DataTypeError: it is neither a known name nor callable.
    """
    if callable(likelihood) and not isinstance(likelihood, type):
        return likelihood
    if not isinstance(likelihood, str) or likelihood not in _BY_NAME:
        expected = f"one of {tuple(_BY_NAME)} or an object of models.likelihoods"
        raise DataTypeError(refuse("likelihood", expected, repr(likelihood), "Pass e.g. likelihoods.Binomial(16)."))
    return _BY_NAME[likelihood]()


def observe(likelihood: dist.TorchDistribution, x: torch.Tensor) -> None:
    """The site ``x``, inside the data plate, of a model with p(x|z).

    Raises:
        ShapeError: a datum has not the event shape of p(x|z).
    """
    if likelihood.event_shape != x.shape[1:]:
        got, wanted = tuple(likelihood.event_shape), tuple(x.shape[1:])
        cure = "Change the decoder's last layer, or reshape x or the output (nn.Unflatten)."
        raise ShapeError(refuse("decoder", f"p(x|z) over data of shape {wanted}", got, cure))
    pyro.sample("x", likelihood, obs=x)
