r"""Binary latents: the discrete model whose sum over all z is exact but exponential in their number.

z ~ Bernoulli(sigma(a)), x | z ~ Bernoulli(sigma(f(z))), so that p(x) is a mixture of 2^L products of Bernoullis. With a
linear f it is a sigmoid belief network with one hidden layer (Neal 1992, Connectionist learning of belief
networks). A second such model as the prior over z makes it one with two hidden layers.
"""

import time
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import DataTypeError, ShapeError, SupportError

__all__ = ["BinaryLatent", "check_binary"]

_CHUNK = 2**17  # entries of the largest table at once: half a MiB in float32, which stays in a core's cache


class BinaryLatent(nn.Module):
    r"""Model p(x, z) of binary data with L binary latents and decoder f.

    .. math:: z_l \sim \text{Bernoulli}(\sigma(a_l)), \qquad x_d \mid z \sim \text{Bernoulli}(\sigma(f_d(z)))

    With ``prior=BinaryLatent(T, L)`` there is a layer of T latents above z, a sigmoid belief network of two layers:

    .. math:: z_2 \sim \text{Bernoulli}(\sigma(a)), \qquad z \mid z_2 \sim \text{Bernoulli}(\sigma(W z_2 + b))

    Called with x it is a Pyro model with the latent ``z``, those above it ``z2``, ``z3`` and so on, and the observed
    ``x``, all in the plate ``data``.

    Args:
        latent_dim: L.
        data_dim: D.
        decoder: maps z ``(..., L)`` in {0, 1} to logits ``(..., D)``; None for a linear map.
        prior: a model of z as its data, with a prior of its own if there are more layers; None for independent z.

    Attributes:
        logits: the logits a of independent z, ``(L,)``; None if there is a ``prior``.

    Raises:
        DataTypeError: a dimension is not an integer, or ``prior`` is no such model.
        ShapeError: a dimension is less than 1, ``prior`` has other data than z, or (when used) x is not ``(N, D)`` or
            the decoder's output not ``(..., D)``.
        SupportError: (when used) x holds other values than 0 and 1.

    Example:
        >>> model = BinaryLatent(latent_dim=3, data_dim=2)
        >>> everything = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> print(f"{model.log_prob(everything).exp().sum():.5f}")
        1.00000
        >>> deep = BinaryLatent(latent_dim=3, data_dim=2, prior=BinaryLatent(latent_dim=4, data_dim=3))
        >>> print(f"{deep.log_prob(everything).exp().sum():.5f}")
        1.00000
    """

    logits: nn.Parameter | None

    def __init__(
        self, latent_dim: int, data_dim: int, decoder: nn.Module | None = None, *, prior: "BinaryLatent | None" = None
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.data_dim = check_positive_int("data_dim", data_dim)
        self.prior = None if prior is None else _checked_prior(prior, latent_dim)
        self.logits = nn.Parameter(torch.zeros(latent_dim)) if prior is None else None  # (L,)
        self.decoder = nn.Linear(latent_dim, data_dim) if decoder is None else decoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro model; returns z, ``(N, L)``."""
        self._check(x)
        pyro.module("BinaryLatent", self)
        with pyro.plate("data", len(x)):
            z = self._pyro_sample_z()  # (N, L)
            likelihood = dist.Bernoulli(logits=self._decode(z)).to_event(1)
            pyro.sample("x", likelihood, obs=x if x.is_floating_point() else x.to(self._like.dtype))
        return z

    def log_joint(self, x: torch.Tensor, z: torch.Tensor, *above: torch.Tensor) -> torch.Tensor:
        """log p(x, z, z2, ...) in nats of x ``(..., D)``, z ``(..., L)`` and each layer above, if there are any.

        Leading dimensions broadcast.

        Raises:
            ShapeError: there are more or fewer latents than layers.
        """
        if bool(above) != (self.prior is not None):
            expected = "none" if self.prior is None else "z2 and so on"
            raise ShapeError(refuse("above", expected, f"{len(above)} tensors", "Pass z, then one a layer above it."))
        log_likelihood = logsigmoid((2 * x - 1) * self._decode(z)).sum(-1)
        return log_likelihood + (self.prior.log_joint(z, *above) if self.prior else self._log_prior(z))

    def log_prob(self, x: torch.Tensor, *, max_terms: int = 2**22) -> torch.Tensor:
        r"""Exact log p(x) in nats, ``(N,)``, of x ``(N, D)``, as the sum over all latents.

        .. math::
            \log p(x) = \log \sum_{z \in \{0, 1\}^L} p(z) \exp \sum_d \big[ x_d f_d(z) - \log(1 + e^{f_d(z)}) \big]

        The terms are computed in chunks of z, each with one matrix product for all data, and added up in float64.
        Memory does not grow with 2^L; nor does that of gradients, which compute every chunk once more and flow to the
        ``parameters()``: a decoder must read no other tensor that is trained, and draw nothing (no dropout). With a
        ``prior``, p(z) is the same kind of sum over z2 with z as its data: 2^(L + T) terms, shared by all x.

        Args:
            x: binary data.
            max_terms: the largest 2^L, or 2^(L + T), that is summed.

        Raises:
            ShapeError: there are more terms; the message estimates how long they take.
        """
        self._check(x)
        check_binary("x", x)
        terms = 2**self._num_bits
        if terms > check_positive_int("max_terms", max_terms):
            got = f"2^{self._num_bits}, about {self._seconds(x):.3g} s for these data"
            cure = (
                f"Call log_prob(x, max_terms=2**{self._num_bits}) to wait for them, or estimate log p(x) with a guide."
            )
            raise ShapeError(refuse("latent_dim", f"at most max_terms={max_terms} terms", got, cure))
        return self._log_marginal(x)

    @torch.no_grad()
    def sample(self, num_samples: int) -> torch.Tensor:
        """Draws x ~ p(x), ``(num_samples, D)``."""
        if self.prior is None:
            shape = (check_positive_int("num_samples", num_samples),)
            z = dist.Bernoulli(logits=self.logits).sample(shape)  # (num_samples, L)
        else:
            z = self.prior.sample(num_samples)  # (num_samples, L)
        return dist.Bernoulli(logits=self._decode(z)).sample()

    @property
    def _num_bits(self) -> int:
        """Latents in all layers."""
        return self.latent_dim + (self.prior._num_bits if self.prior else 0)

    @property
    def _like(self) -> torch.Tensor:
        """Has the dtype and the device of the model: the logits a of the topmost layer."""
        return next(self.parameters())

    def _pyro_sample_z(self, layer: int = 1) -> torch.Tensor:
        """Sites of this model's latents, topmost first; returns those of this layer, ``(..., L)``."""
        logits = self.logits if self.prior is None else self.prior._decode(self.prior._pyro_sample_z(layer + 1))
        return pyro.sample("z" if layer == 1 else f"z{layer}", dist.Bernoulli(logits=logits).to_event(1))

    def _log_marginal(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x), ``(N,)``, however many terms that takes."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return _ChunkedSum.apply(self, x, *parameters).to(self._like.dtype)  # type: ignore[no-any-return]

    def _log_sum(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """log of the sum of p(x, z) over some z, given by their numbers ``(C,)``: ``(N,)``."""
        z = self._digits(indices)
        return self._log_mixture(x, z, self._log_prior(z))

    def _log_mixture(self, x: torch.Tensor, z: torch.Tensor, log_prior: torch.Tensor) -> torch.Tensor:
        """log of the sum over z ``(C, L)`` of p(x | z) times a prior ``(C,)``: ``(N,)``."""
        logits = self._decode(z)  # (C, D)
        constant = log_prior + _log_prob_of_zeros(logits)  # (C,)
        return (x.to(logits.dtype) @ logits.T + constant).logsumexp(1).double()

    def _chunks(self, num_data: int) -> Iterator[torch.Tensor]:
        entries = _CHUNK if self._like.device.type == "cpu" else 32 * _CHUNK  # which an accelerator takes at once
        rows = max(1, entries // max(num_data, self.data_dim))
        for start in range(0, 2**self.latent_dim, rows):
            yield torch.arange(start, min(start + rows, 2**self.latent_dim), device=self._like.device)

    def _digits(self, indices: torch.Tensor) -> torch.Tensor:
        """The z whose binary digits these numbers have, ``(C, L)``."""
        return (indices[:, None] >> torch.arange(self.latent_dim, device=indices.device) & 1).to(self._like.dtype)

    @torch.no_grad()
    def _seconds(self, x: torch.Tensor) -> float:
        """How long all terms take, from one chunk of each layer."""
        z = self._digits(next(self._chunks(len(x))))
        for _ in range(2):  # the first run pays for what is done once
            start = time.perf_counter()
            self._log_mixture(x, z, z.new_zeros(len(z))).sum().item()  # item() waits for the device
        seconds = time.perf_counter() - start + (self.prior._seconds(z) if self.prior else 0.0)
        return seconds * 2.0 ** min(self.latent_dim, 500) / len(z)  # beyond, no float holds it

    def _log_prior(self, z: torch.Tensor) -> torch.Tensor:
        if self.logits is None:
            assert self.prior is not None  # one of the two is there
            return self.prior._log_marginal(z)
        return logsigmoid(-self.logits).sum() + z @ self.logits

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        logits = self.decoder(z)
        if logits.shape != (*z.shape[:-1], self.data_dim):
            wanted = f"logits of shape {(*z.shape[:-1], self.data_dim)}"
            cure = "Let its last layer put out one logit a data dimension."
            raise ShapeError(refuse("decoder", wanted, tuple(logits.shape), cure))
        return logits

    def _check(self, x: torch.Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.data_dim:
            cure = "Flatten each datum, x.flatten(1), or make the model with the data's dimension."
            raise ShapeError(refuse("x", f"shape (N, {self.data_dim})", tuple(x.shape), cure))


class _ChunkedSum(torch.autograd.Function):
    r"""log p(x), ``(N,)`` float64, and its gradient, each in one pass over chunks of z that keeps none of them.

    .. math:: \nabla \log p(x) = \sum_z p(z \mid x) \nabla \log p(x, z)
    """

    @staticmethod
    def forward(ctx: Any, model: BinaryLatent, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        total = x.new_full((len(x),), -torch.inf, dtype=torch.float64)  # (N,)
        for indices in model._chunks(len(x)):
            total = torch.logaddexp(total, model._log_sum(x, indices))
        ctx.model = model
        ctx.save_for_backward(x, total, *parameters)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, total, *parameters = ctx.saved_tensors
        sums = [torch.zeros_like(p) for p in parameters]
        for indices in ctx.model._chunks(len(x)):
            with torch.enable_grad():
                chunk = ctx.model._log_sum(x, indices)  # (N,)
            share = (chunk.detach() - total).exp()  # of p(x), (N,)
            found = torch.autograd.grad(chunk, parameters, grad * share, allow_unused=True)
            if all(part is None for part in found):
                raise RuntimeError("log_prob: the parameters were replaced between the forward and the backward pass")
            for sum_, part in zip(sums, found, strict=True):
                if part is not None:
                    sum_.add_(part)
        return None, None, *sums


def _log_prob_of_zeros(logits: torch.Tensor) -> torch.Tensor:
    """log p(x = 0 | z) = -sum_d log(1 + e^f_d) of logits f ``(C, D)``: ``(C,)``.

    log(1 + e^f) = (f + |f|) / 2 + log(1 + e^-|f|), with one logarithm for 64 factors between 1 and 2, whose product no
    dtype overflows: a logarithm costs more than everything else in the sum over z.
    """
    size = logits.abs()  # (C, D)
    logs = [part.prod(-1).log() for part in (1 + (-size).exp()).split(64, dim=-1)]  # of (C,)
    return -0.5 * (logits + size).sum(-1) - torch.stack(logs).sum(0)


def _checked_prior(prior: BinaryLatent, latent_dim: int) -> BinaryLatent:
    if not isinstance(prior, BinaryLatent):
        cure = f"Pass BinaryLatent(T, {latent_dim}) for T more latents above z."
        raise DataTypeError(refuse("prior", "a BinaryLatent", type(prior).__name__, cure))
    if prior.data_dim != latent_dim:
        cure = "Its data are the latents z: make the two numbers equal."
        raise ShapeError(refuse("prior", f"data_dim={latent_dim}, this model's latent_dim", prior.data_dim, cure))
    return prior


def check_binary(argument: str, x: torch.Tensor) -> None:
    """Refuse anything but 0 and 1: a Bernoulli has no density elsewhere.

    Raises:
        SupportError: shows the first such value.
    """
    other = x[(x != 0) & (x != 1)]
    if len(other):
        raise SupportError(refuse(argument, "values 0 and 1", other[0].item(), "Binarise the data."))
