r"""Guides of discrete latents: independent bits, bits in a chain, and one of C classes.

Draws of discrete latents have no pathwise gradient. Pyro's ELBOs use the score function, which is unbiased and noisy,

.. math:: \nabla E_q[f(z)] = E_q\big[f(z) \nabla \log q(z \mid x)\big] + E_q[\nabla f(z)]

or sum z out where it can be enumerated, which is exact. Each density here is exact at any z, also one that is replayed.
"""

from typing import Any, TypeAlias, cast

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_lvm._checks import check_positive_int
from pyro_lvm.guides.base import VariationalParameters, sample_latent
from pyro_lvm.nn import MaskedMLP

__all__ = ["AutoregressiveBernoulli", "Bernoulli", "Categorical"]

Shape: TypeAlias = torch.Size | list[int] | tuple[int, ...]


class Bernoulli(nn.Module):
    r"""Mean-field guide of L binary latents.

    .. math:: q(z \mid x) = \prod_l \sigma(a_l)^{z_l} (1 - \sigma(a_l))^{1 - z_l}

    At parameters of zero every bit is fair.

    Args:
        latent_dim: L.
        encoder: maps x to the logits a, ``(N, L)``.
        num_data: N, for local parameters, in the place of ``encoder``.
        shared: one phi for every datum, in the place of ``encoder``.
        site: the latent's name in the model.

    Raises:
        DataTypeError: not exactly one of ``encoder``, ``num_data`` and ``shared`` is given.
        ShapeError: (when used) the encoder's output has another size, or x has not ``num_data`` rows.

    Source: Mnih and Gregor (2014), Neural Variational Inference and Learning in Belief Networks.

    Example:
        >>> guide = Bernoulli(3, num_data=5)
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        latent_dim: int,
        encoder: nn.Module | None = None,
        *,
        num_data: int | None = None,
        shared: bool = False,
        site: str = "z",
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.phi = VariationalParameters(latent_dim, encoder, num_data, shared)
        self.site = site

    def distribution(self, x: torch.Tensor) -> dist.Independent:
        """q(z|x): batch shape ``(N,)``, event shape ``(L,)``."""
        return dist.Bernoulli(logits=self.phi(x)).to_event(1)

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N, L)``."""
        pyro.module("Bernoulli", self)
        return sample_latent(self.distribution(x), x, self.site)


class Categorical(nn.Module):
    r"""Guide of a scalar latent with C classes, which Pyro's ``TraceEnum_ELBO``, and so `fit`, sums out.

    .. math:: q(z = c \mid x) = \text{softmax}(a)_c

    It contains every posterior of such a latent. The site is marked for enumeration, so that the ELBO and its gradients
    are exact in z; ``Trace_ELBO`` heeds no marks and draws z. At parameters of zero all classes are equally likely.

    Args:
        num_classes: C.
        encoder: maps x to the logits a, ``(N, C)``.
        num_data: N, for local parameters, in the place of ``encoder``.
        shared: one phi for every datum, in the place of ``encoder``.
        site: the latent's name in the model.

    Raises:
        DataTypeError: not exactly one of ``encoder``, ``num_data`` and ``shared`` is given.
        ShapeError: (when used) the encoder's output has another size, or x has not ``num_data`` rows.

    Source: Kingma, Rezende, Mohamed and Welling (2014), Semi-supervised Learning with Deep Generative Models,
    for its q(y|x).

    Example:
        >>> guide = Categorical(10, num_data=5)
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        num_classes: int,
        encoder: nn.Module | None = None,
        *,
        num_data: int | None = None,
        shared: bool = False,
        site: str = "z",
    ) -> None:
        super().__init__()
        self.num_classes = check_positive_int("num_classes", num_classes, minimum=2)
        self.phi = VariationalParameters(num_classes, encoder, num_data, shared)
        self.site = site

    def distribution(self, x: torch.Tensor) -> dist.Categorical:
        """q(z|x): batch shape ``(N,)``, event shape ``()``."""
        return dist.Categorical(logits=self.phi(x))

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N,)``, or enumerated ``(C, 1)``."""
        pyro.module("Categorical", self)
        return sample_latent(self.distribution(x), x, self.site, infer={"enumerate": "parallel"})


class AutoregressiveBernoulli(nn.Module):
    r"""Guide of L binary latents, each given those before it by a masked network that sees x through a context.

    .. math:: q(z \mid x) = \prod_l \text{Bernoulli}\big(z_l; \sigma(a_l(x) + f_l(z_{<l}, h(x)))\big)

    It contains :class:`Bernoulli`, f = 0, and starts there: the last weights of f are zero. The density of any z costs
    one pass of the network, a draw L passes.

    Args:
        latent_dim: L.
        hidden_dim: width of the network's hidden layer. With fewer than L units, the conditionals of the last latents
            see less than all before them.
        encoder: maps x to ``(N, L + context_dim)``: the logits a, then the context h.
        num_data: N, for local logits and context, in the place of ``encoder``; the network belongs to all data.
        shared: one phi for every datum, in the place of ``encoder``.
        context_dim: size of h.
        site: the latent's name in the model.

    Raises:
        DataTypeError: not exactly one of ``encoder``, ``num_data`` and ``shared`` is given.
        ShapeError: a size is less than 1, or (when used) the encoder's output has another size, or x has not
            ``num_data`` rows.

    Source: Gregor et al. (2014), Deep AutoRegressive Networks, for dependent bits; Germain et al. (2015), MADE, for the
    masks.

    Example:
        >>> from pyro_lvm.nn import MLP
        >>> guide = AutoregressiveBernoulli(3, 16, encoder=MLP(64, [32], 3 + 32))
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        latent_dim: int,
        hidden_dim: int,
        encoder: nn.Module | None = None,
        *,
        num_data: int | None = None,
        shared: bool = False,
        context_dim: int = 32,
        site: str = "z",
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        check_positive_int("context_dim", context_dim)
        self.phi = VariationalParameters(latent_dim + context_dim, encoder, num_data, shared)
        self.network = MaskedMLP(latent_dim, [check_positive_int("hidden_dim", hidden_dim)], context_dim=context_dim)
        output = cast(nn.Linear, self.network.layers[-1])
        output.register_parameter("bias", None)  # the logits a are that already
        nn.init.zeros_(output.weight)
        self.site = site

    def distribution(self, x: torch.Tensor) -> "_Chain":
        """q(z|x): batch shape ``(N,)``, event shape ``(L,)``."""
        phi = self.phi(x)
        return _Chain(self.network, phi[..., : self.latent_dim], phi[..., self.latent_dim :])

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N, L)``."""
        pyro.module("AutoregressiveBernoulli", self)
        return sample_latent(self.distribution(x), x, self.site)


class _Chain(dist.TorchDistribution):
    """q(z|x) of `AutoregressiveBernoulli` for one batch of x."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.boolean, 1)

    def __init__(
        self, network: MaskedMLP, logits: torch.Tensor, context: torch.Tensor, batch_shape: Shape | None = None
    ) -> None:
        self.network = network
        self.logits = logits  # a, (N, L)
        self.context = context  # (N, C)
        batch = logits.shape[:-1] if batch_shape is None else torch.Size(batch_shape)
        super().__init__(batch, logits.shape[-1:])

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "_Chain":
        """The same densities in a batch ``(..., N)``, to which (N, ...) broadcasts."""
        expanded = _Chain(self.network, self.logits, self.context, batch_shape)
        expanded._validate_args = self._validate_args
        return expanded

    def conditional_logits(self, z: torch.Tensor) -> torch.Tensor:
        """The logits of q(z_l = 1 | z before l, x) for all l, shaped as z ``(..., N, L)``."""
        return self.logits + self.network(z, self.context)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """log q(z|x) in nats, ``(..., N)``, of z ``(..., N, L)``."""
        if self._validate_args:
            self._validate_sample(value)
        z = value.to(self.logits.dtype)
        return logsigmoid((2 * z - 1) * self.conditional_logits(z)).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> torch.Tensor:
        """Draws ``(..., N, L)``, one latent after the other."""
        z = self.logits.new_zeros(self._extended_shape(torch.Size(sample_shape)))
        for l in range(z.shape[-1]):
            z[..., l] = self.conditional_logits(z)[..., l].sigmoid().bernoulli()
        return z
