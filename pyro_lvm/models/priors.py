r"""Priors p(z) that may be learned: modules that, called without arguments, return one distribution over z.

Its batch shape is () and its event shape ``(L,)``: a mixture chooses one component for the whole of z. (One mixture for
each coordinate, which is easily written by accident, is another and poorer prior: a product of independent ones.)
``DeepGaussian(prior=...)`` takes such a module, or any callable like it.
"""

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints

from pyro_lvm._checks import check_positive_int, data_tensor, refuse
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError
from pyro_lvm.models.density import ExactDistribution
from pyro_lvm.models.flow import NormalizingFlow

__all__ = ["FlowPrior", "MixtureOfNormals", "StandardNormal", "VampPrior"]


class StandardNormal(nn.Module):
    """The prior N(0, I), on the device and in the dtype of the module.

    Args:
        latent_dim: L.

    Raises:
        DataTypeError: L is not an integer.
        ShapeError: L is less than 1.

    Example:
        >>> StandardNormal(2)().log_prob(torch.zeros(2))  # -log(2 pi)
        tensor(-1.8379)
    """

    loc: torch.Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(check_positive_int("latent_dim", latent_dim)), persistent=False)

    def forward(self) -> dist.Independent:
        """p(z)."""
        return dist.Normal(self.loc, 1.0).to_event(1)


class MixtureOfNormals(nn.Module):
    r"""Mixture of C diagonal Gaussians over the whole of z, all of it learned.

    .. math:: p(z) = \sum_c \pi_c N(z; \mu_c, \text{diag}(s_c)^2)

    Means start at draws from N(0, I), scales at one, weights equal.

    Args:
        num_components: C.
        latent_dim: L.

    Attributes:
        logits: log pi up to a constant, ``(C,)``.
        means: mu, ``(C, L)``.
        log_scales: log s, ``(C, L)``.

    Raises:
        DataTypeError: a count is not an integer.
        ShapeError: a count is less than 1.

    Source: Tomczak and Welling (2018), VAE with a VampPrior, which compares with it.

    Example:
        >>> p = MixtureOfNormals(10, latent_dim=2)()
        >>> p.batch_shape, p.event_shape
        (torch.Size([]), torch.Size([2]))
    """

    def __init__(self, num_components: int, latent_dim: int) -> None:
        super().__init__()
        shape = check_positive_int("num_components", num_components), check_positive_int("latent_dim", latent_dim)
        self.logits = nn.Parameter(torch.zeros(shape[0]))  # (C,)
        self.means = nn.Parameter(torch.randn(shape))  # (C, L)
        self.log_scales = nn.Parameter(torch.zeros(shape))  # (C, L)

    def forward(self) -> dist.MixtureSameFamily:
        """p(z)."""
        components = dist.Normal(self.means, self.log_scales.exp()).to_event(1)
        return _Mixture(dist.Categorical(logits=self.logits), components)


class VampPrior(nn.Module):
    r"""The guide itself, averaged over C learned pseudo-inputs.

    .. math:: p(z) = \frac1C \sum_c q(z \mid u_c)

    The prior that is best for the ELBO is the average of q(z|x) over the data; this is that average over fewer, learned
    ones, and it moves as the guide does.

    The encoder belongs to the model and to the guide: ``fit(model, guide, x)`` trains it, ``update="model"`` trains the
    pseudo-inputs and the decoder alone, and ``update="guide"`` has nothing to train, for it would move the model. The
    guide is held but is no submodule: ``parameters()``, ``state_dict()`` and ``to()`` of the model leave it out; save
    and move it beside the model. To train and compare other guides of the model, give it the prior as it is now, made
    by ``with torch.no_grad(): prior = vamp()``.

    Args:
        guide: a module with ``distribution(x)``, such as ``guides.DiagonalNormal`` with an encoder, which registers
            itself under its class name.
        pseudo_inputs: where u starts, ``(C, ...)`` in the shape of the guide's data; some rows of the data are good.
        bounds: (low, high) between which a sigmoid keeps u, such as (0, 1) for images; None leaves it free. The start
            is drawn in by 2% of the interval, for on a bound there is no gradient.

    Attributes:
        raw_inputs: the parameter, ``(C, ...)``: u, or with ``bounds`` what the sigmoid takes.

    Raises:
        DataTypeError: the guide is no module with a method ``distribution``, or ``pseudo_inputs`` no tensor.
        ShapeError: q(z|u) has not batch shape ``(C,)`` and event shape ``(L,)``.
        ParameterError: ``bounds`` are no interval, pseudo-inputs lie outside of them, or (in training) another guide
            has the class, and so the names, of this one.

    Source: Tomczak and Welling (2018), VAE with a VampPrior, Eq. (9).

    Example:
        >>> from pyro_lvm.guides import DiagonalNormal
        >>> from pyro_lvm.models import DeepGaussian
        >>> from pyro_lvm.nn import MLP
        >>> x, guide = torch.rand(100, 64).round(), DiagonalNormal(2, MLP(64, [32], 4))
        >>> model = DeepGaussian(MLP(2, [32], 64), 2, "bernoulli", prior=VampPrior(guide, x[:20], bounds=(0, 1)))
        >>> model.prior.component_distribution.batch_shape
        torch.Size([20])
    """

    def __init__(self, guide: Any, pseudo_inputs: torch.Tensor, *, bounds: tuple[float, float] | None = None) -> None:
        super().__init__()
        if not isinstance(guide, nn.Module) or not callable(getattr(guide, "distribution", None)):
            cure = "Pass e.g. guides.DiagonalNormal(latent_dim, encoder)."
            raise DataTypeError(refuse("guide", "a module with distribution(x)", type(guide).__name__, cure))
        start = data_tensor("pseudo_inputs", pseudo_inputs).detach()
        start = start.clone() if start.is_floating_point() else start.to(torch.get_default_dtype())
        self._held: tuple[Any] = (guide,)  # in a tuple, where torch does not take it for a submodule
        self.bounds = bounds
        self.raw_inputs = nn.Parameter(start if bounds is None else _drawn_in(start, *bounds).logit())  # (C, ...)
        with torch.no_grad():
            self()

    @property
    def guide(self) -> nn.Module:
        """The guide whose q(z|u) is averaged."""
        return self._held[0]

    @property
    def pseudo_inputs(self) -> torch.Tensor:
        """u, ``(C, ...)``."""
        if self.bounds is None:
            return self.raw_inputs
        low, high = self.bounds
        return low + (high - low) * self.raw_inputs.sigmoid()

    def forward(self) -> dist.MixtureSameFamily:
        """p(z)."""
        u = self.pseudo_inputs
        components = self._held[0].distribution(u)
        if components.batch_shape != (len(u),) or len(components.event_shape) != 1:
            got = f"batch shape {tuple(components.batch_shape)}, event shape {tuple(components.event_shape)}"
            cure = "Declare the dimensions of z as event with .to_event(1)."
            raise ShapeError(refuse("guide", f"q(z|u) with batch shape ({len(u)},), event shape (L,)", got, cure))
        return _Mixture(dist.Categorical(logits=u.new_zeros(len(u))), components)

    def register(self) -> None:
        """Tell Pyro that the model uses the guide's parameters too; a model with this prior calls it where it runs.

        They get the names that the guide itself gives them, so that each is one parameter, of model and guide.
        """
        pyro.module(type(self.guide).__name__, self.guide)


class FlowPrior(nn.Module):
    """A normalizing flow as p(z): a learned density of any shape, exact at every z.

    It starts at N(0, I).

    Args:
        latent_dim: L, two or more.
        num_layers: number of couplings.
        hidden_dims: widths of the hidden layers of each coupling's network.

    Attributes:
        flow: the ``NormalizingFlow``.

    Raises:
        DataTypeError: a size is not an integer.
        ShapeError: a size is too small.

    Source: Chen et al. (2017), Variational Lossy Autoencoder, for a flow as a prior; Dinh, Sohl-Dickstein and Bengio
    (2017) for the flow.

    Example:
        >>> print(f"{FlowPrior(2)().log_prob(torch.zeros(2)):.4f}")  # -log(2 pi)
        -1.8379
    """

    def __init__(self, latent_dim: int, num_layers: int = 6, hidden_dims: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        if check_positive_int("latent_dim", latent_dim) == 1:
            cure = "A coupling moves one coordinate by another: take MixtureOfNormals for one dimension."
            raise ShapeError(refuse("latent_dim", "2 or more", 1, cure))
        self.flow = NormalizingFlow(latent_dim, num_layers, hidden_dims)

    def forward(self) -> ExactDistribution:
        """p(z)."""
        return ExactDistribution(self.flow, constraints.real_vector)


def _drawn_in(start: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Where between the bounds each pseudo-input starts, from 0.02 to 0.98."""
    if not low < high:
        raise ParameterError(refuse("bounds", "(low, high) with low < high", (low, high), "Pass (0, 1) for images."))
    if not bool(((start >= low) & (start <= high)).all()):
        got = f"values from {float(start.min())} to {float(start.max())}"
        cure = "Pass the interval that the data fill."
        raise ParameterError(refuse("pseudo_inputs", f"values in bounds={(low, high)}", got, cure))
    return 0.02 + 0.96 * (start - low) / (high - low)


class _Mixture(dist.MixtureSameFamily):
    """A mixture of any components over ``(L,)``, whose latent can be transformed to where the components live.

    ``MixtureSameFamily`` has a constraint of its own, for which torch knows no transform, and components that must
    broadcast a value over them, which the inverse of an autoregressive flow does not.
    """

    @property
    def support(self) -> constraints.Constraint:
        """The support of the components."""
        return self.component_distribution.support

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """log p(z) in nats, ``(...)``, of z ``(..., L)``."""
        if self._validate_args:
            self._validate_sample(value)
        log_weights = self.mixture_distribution.logits.log_softmax(-1)  # (C,)
        each = value[..., None, :].expand(*value.shape[:-1], log_weights.shape[-1], -1)  # (..., C, L)
        return (log_weights + self.component_distribution.log_prob(each)).logsumexp(-1)
