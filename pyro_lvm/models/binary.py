r"""Binary latents: the discrete model whose sum over all z is exact but exponential in their number.

z ~ Bernoulli(sigma(a)), x | z ~ Bernoulli(sigma(f(z))), so that p(x) is a mixture of 2^L products of Bernoullis. With a
linear f it is a sigmoid belief network with one hidden layer (Neal 1992, Connectionist learning of belief
networks).
"""

import time
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import ShapeError, SupportError

__all__ = ["BinaryLatent", "check_binary"]

_CHUNK = 2**22  # entries of the largest table at once: 32 MiB in float64


class BinaryLatent(nn.Module):
    r"""Model p(x, z) of binary data with L independent binary latents and decoder f.

    .. math:: z_l \sim \text{Bernoulli}(\sigma(a_l)), \qquad x_d \mid z \sim \text{Bernoulli}(\sigma(f_d(z)))

    Called with x it is a Pyro model with the latent ``z`` and the observed ``x`` in the plate ``data``.

    Args:
        latent_dim: L.
        data_dim: D.
        decoder: maps z ``(..., L)`` in {0, 1} to logits ``(..., D)``; None for a linear map.

    Attributes:
        logits: the prior's logits a, ``(L,)``.

    Raises:
        DataTypeError: a dimension is not an integer.
        ShapeError: a dimension is less than 1, or (when used) x is not ``(N, D)`` or the decoder's output not
            ``(..., D)``.
        SupportError: (when used) x holds other values than 0 and 1.

    Example:
        >>> model = BinaryLatent(latent_dim=3, data_dim=2)
        >>> everything = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> print(f"{model.log_prob(everything).exp().sum():.5f}")
        1.00000
    """

    def __init__(self, latent_dim: int, data_dim: int, decoder: nn.Module | None = None) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.data_dim = check_positive_int("data_dim", data_dim)
        self.logits = nn.Parameter(torch.zeros(latent_dim))  # (L,)
        self.decoder = nn.Linear(latent_dim, data_dim) if decoder is None else decoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro model; returns z, ``(N, L)``."""
        self._check(x)
        pyro.module("BinaryLatent", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.logits).to_event(1))  # (N, L)
            pyro.sample("x", dist.Bernoulli(logits=self._decode(z)).to_event(1), obs=x)
        return z

    def log_joint(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """log p(x, z) in nats of x ``(..., D)`` and z ``(..., L)``, whose leading dimensions broadcast."""
        logits = self._decode(z)  # (..., D)
        return self._log_prior(z) + logsigmoid((2 * x - 1) * logits).sum(-1)

    def log_prob(self, x: torch.Tensor, *, max_terms: int = 2**22) -> torch.Tensor:
        r"""Exact log p(x) in nats, ``(N,)``, of x ``(N, D)``, as the sum over all z.

        .. math::
            \log p(x) = \log \sum_{z \in \{0, 1\}^L} p(z) \exp \sum_d \big[ x_d f_d(z) - \log(1 + e^{f_d(z)}) \big]

        The terms are computed in chunks of z, each with one matrix product for all data, and added up in float64.
        Memory does not grow with 2^L; nor does that of gradients, which compute every chunk once more.

        Args:
            x: binary data.
            max_terms: the largest 2^L that is summed.

        Raises:
            ShapeError: there are more terms; the message estimates how long they take.
        """
        self._check(x)
        check_binary("x", x)
        terms = 2**self.latent_dim
        if terms > check_positive_int("max_terms", max_terms):
            got = f"2^{self.latent_dim} = {terms}, about {self._seconds(x):.0f} s for these data"
            cure = f"Call log_prob(x, max_terms={terms}) to wait for them, or estimate log p(x) with a guide."
            raise ShapeError(refuse("latent_dim", f"at most max_terms={max_terms} terms", got, cure))
        total = x.new_full((len(x),), -torch.inf, dtype=torch.float64)  # (N,)
        for indices in self._chunks(len(x)):
            # Without the checkpoint, gradients would keep every chunk.
            chunk = checkpoint(self._log_sum, x, indices, use_reentrant=False)
            total = torch.logaddexp(total, chunk)
        return total.to(self.logits.dtype)

    @torch.no_grad()
    def sample(self, num_samples: int) -> torch.Tensor:
        """Draws x ~ p(x), ``(num_samples, D)``."""
        shape = (check_positive_int("num_samples", num_samples),)
        z = dist.Bernoulli(logits=self.logits).sample(shape)  # (num_samples, L)
        return dist.Bernoulli(logits=self._decode(z)).sample()

    def _log_sum(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """log of the sum of p(x, z) over some z, given by the numbers whose binary digits they are: ``(N,)``."""
        digits = torch.arange(self.latent_dim, device=indices.device)
        z = (indices[:, None] >> digits & 1).to(self.logits.dtype)  # (C, L)
        logits = self._decode(z)  # (C, D)
        constant = self._log_prior(z) + logsigmoid(-logits).sum(-1)  # (C,)
        return (x.to(logits.dtype) @ logits.T + constant).double().logsumexp(1)

    def _chunks(self, num_data: int) -> Iterator[torch.Tensor]:
        rows = max(1, _CHUNK // max(num_data, self.data_dim))
        for start in range(0, 2**self.latent_dim, rows):
            yield torch.arange(start, min(start + rows, 2**self.latent_dim), device=self.logits.device)

    @torch.no_grad()
    def _seconds(self, x: torch.Tensor) -> float:
        """How long all terms take, from one chunk."""
        indices = next(self._chunks(len(x)))
        start = time.perf_counter()
        self._log_sum(x, indices).sum().item()  # item() waits for the device
        return (time.perf_counter() - start) * 2**self.latent_dim / len(indices)

    def _log_prior(self, z: torch.Tensor) -> torch.Tensor:
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


def check_binary(argument: str, x: torch.Tensor) -> None:
    """Refuse anything but 0 and 1: a Bernoulli has no density elsewhere.

    Raises:
        SupportError: shows the first such value.
    """
    other = x[(x != 0) & (x != 1)]
    if len(other):
        raise SupportError(refuse(argument, "values 0 and 1", other[0].item(), "Binarise the data."))
