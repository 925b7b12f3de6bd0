"""Linear-Gaussian pairs: the posterior is a Gaussian, and each guide is that Gaussian with one thing wrong."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_lvm._typing import Guide, Model
from pyro_lvm.testing.pair import ProvingPair

__all__ = ["gaussian_pairs"]

_NUM_DATA = 32  # half of them where the dimension is high
_SOURCE = "closed form, N(x; 0, W W^T + sigma^2 I)"


@dataclass(frozen=True)
class _Linear:
    """z ~ N(0, I), x | z ~ N(W z, sigma^2 I), and its posterior N(A x, L L^T)."""

    weight: torch.Tensor
    noise: float

    @property
    def dim(self) -> int:
        return self.weight.shape[1]

    @property
    def precision(self) -> torch.Tensor:
        return torch.eye(self.dim).double() + self.weight.T @ self.weight / self.noise**2

    def posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Its mean ``(N, L)`` and the triangle of its covariance ``(L, L)``."""
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(self.precision))
        return x @ self.weight @ covariance / self.noise**2, torch.linalg.cholesky(covariance)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x), ``(N,)``."""
        covariance = self.weight @ self.weight.T + self.noise**2 * torch.eye(len(self.weight)).double()
        exact: torch.Tensor = dist.MultivariateNormal(torch.zeros(len(self.weight)).double(), covariance).log_prob(x)
        return exact

    def model(self) -> Model:
        """The generative program."""
        weight, noise = self.weight, self.noise

        def model(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(weight.shape[1]), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ weight.T, noise).to_event(1), obs=x)

        return model

    def scaled(self, scale: float = 1.0, shift: float = 0.0) -> Guide:
        """The posterior with its standard deviations scaled, and moved by some of them along each axis."""

        def guide(x: torch.Tensor) -> None:
            mean, tril = self.posterior(x)
            moved = mean + tril.sum(1) * shift
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.MultivariateNormal(moved, scale_tril=tril * scale))

        return guide

    def first_axis(self, shift: float) -> Guide:
        """The posterior, moved by some of its standard deviations along one axis."""

        def guide(x: torch.Tensor) -> None:
            mean, tril = self.posterior(x)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.MultivariateNormal(mean + tril[:, 0] * shift, scale_tril=tril))

        return guide

    def mean_field(self) -> Guide:
        """The factorised Gaussian that is nearest in KL(q || p): its precisions are those of each z given the rest."""

        def guide(x: torch.Tensor) -> None:
            mean, _ = self.posterior(x)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(mean, self.precision.diagonal().rsqrt()).to_event(1))

        return guide


def _linear(latent_dim: int, data_dim: int, noise: float, seed: int) -> tuple[_Linear, torch.Tensor]:
    """A model with random weights of about unit signal, and data of it."""
    rng = np.random.default_rng(seed)
    num_data = _NUM_DATA if latent_dim < 50 else _NUM_DATA // 2
    weight = rng.standard_normal((data_dim, latent_dim)) / latent_dim**0.5
    z = rng.standard_normal((num_data, latent_dim))
    x = z @ weight.T + noise * rng.standard_normal((num_data, data_dim))
    return _Linear(torch.from_numpy(weight), noise), torch.from_numpy(x)


# name: tags, (latent dim, data dim, noise, seed), guide, misled
_PAIRS: dict[str, tuple[tuple[str, ...], tuple[int, int, float, int], Callable[[_Linear], Guide], bool]] = {
    "exact-2d": (("easy",), (2, 4, 0.5, 1), lambda m: m.scaled(), False),
    "exact-50d": (("easy", "high dimension"), (50, 60, 0.5, 2), lambda m: m.scaled(), False),
    "wide-2d": (("easy", "wrong scale"), (2, 4, 0.5, 3), lambda m: m.scaled(2.0), False),
    "narrow-2d": (("wrong scale",), (2, 4, 0.5, 4), lambda m: m.scaled(0.3), True),
    "narrow-10d": (("wrong scale",), (10, 15, 0.5, 5), lambda m: m.scaled(0.5), True),
    "wide-10d": (("wrong scale",), (10, 15, 0.5, 6), lambda m: m.scaled(5.0), True),
    "shifted-2d": (("shifted",), (2, 4, 0.5, 7), lambda m: m.first_axis(2.0), True),
    "shifted-10d": (("shifted",), (10, 15, 0.5, 8), lambda m: m.scaled(shift=1.0), True),
    "mean-field-10d": (("correlated",), (10, 15, 0.3, 9), lambda m: m.mean_field(), True),
    "narrow-50d": (("high dimension", "wrong scale"), (50, 60, 0.5, 10), lambda m: m.scaled(0.8), True),
    "wide-100d": (("high dimension", "wrong scale"), (100, 120, 0.5, 11), lambda m: m.scaled(1.1), False),
    "sharp-5d": (("near-deterministic", "shifted"), (5, 8, 1e-3, 12), lambda m: m.scaled(1.2, 0.5), False),
}


def gaussian_pairs() -> list[ProvingPair]:
    """One a row of the table above."""
    pairs = []
    for name, (tags, settings, guide, misled) in _PAIRS.items():
        linear, x = _linear(*settings)
        mean, tril = linear.posterior(x)
        pairs.append(
            ProvingPair(
                name=name,
                tags=tags,
                model=linear.model(),
                guide=guide(linear),
                x=x,
                log_prob=linear.log_prob(x),
                source=_SOURCE,
                latent_dim=linear.dim,
                misled=misled,
                posterior=linear.scaled(),
                mean=mean,
                square=mean.square() + tril.square().sum(1),
            )
        )
    return pairs
