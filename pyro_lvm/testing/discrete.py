"""Latents that are bits and labels, with answers by adding up all of their values, by formula."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_lvm.testing.pair import ProvingPair

__all__ = ["discrete_pairs"]

_NUM_DATA = 32


def discrete_pairs() -> list[ProvingPair]:
    """Bits that explain each other away, or of which nothing is known; labels missed, left out, under a Gaussian."""
    return [_bits("explaining-away", 8, 51), _bits("flat-bits", 12, 52), _missed_class(), _left_out(), _switching()]


def _bits(name: str, dim: int, seed: int) -> ProvingPair:
    """Rare causes z, x | z ~ N(W z, 0.5^2 I) in half as many effects, so that one cause explains another away.

    The guide is factorised: of eight bits with the exact marginals, of twelve with even chances.
    """
    chance, noise = 0.2, 0.5
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.choice([0.5, 1.0, 2.0], size=(dim // 2, dim)))
    z = (rng.random((_NUM_DATA, dim)) < chance).astype(float)
    x = torch.from_numpy(z @ weight.numpy().T + noise * rng.standard_normal((_NUM_DATA, dim // 2)))
    grid = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * dim).double()  # (2^d, d)

    def log_terms(x: torch.Tensor) -> torch.Tensor:
        """log p(x, z) of all z, ``(N, 2^d)``."""
        misfit = x.square().sum(1, keepdim=True) - 2 * x @ (grid @ weight.T).T + (grid @ weight.T).square().sum(1)
        log_prior = grid.sum(1) * math.log(chance) + (dim - grid.sum(1)) * math.log(1 - chance)
        return log_prior - misfit / (2 * noise**2) - dim // 2 * math.log(noise * math.sqrt(2 * math.pi))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((dim,), chance)).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, noise).to_event(1), obs=x)

    def marginals(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            probs = (log_terms(x).softmax(1) @ grid).clamp(1e-3, 1 - 1e-3)
            pyro.sample("z", dist.Bernoulli(probs).to_event(1))

    def even(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(x.new_full((dim,), 0.5)).to_event(1))

    mean = log_terms(x).softmax(1) @ grid
    return ProvingPair(
        name=name,
        tags=("discrete", "correlated" if name == "explaining-away" else "wrong scale"),
        model=model,
        guide=marginals if name == "explaining-away" else even,
        x=x,
        log_prob=log_terms(x).logsumexp(1),
        source=f"sum of 2^{dim} terms, by formula",
        latent_dim=dim,
        continuous=False,
        misled=name == "flat-bits",
        mean=mean,
        square=mean,  # of a bit
    )


_CENTERS = torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=torch.float64)
_MASSES = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def _labelled(seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Data of a mixture on a line, and log p(x, label), ``(N, 4)``."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(
        rng.choice(_CENTERS.numpy(), _NUM_DATA, p=_MASSES.numpy()) + noise * rng.standard_normal(_NUM_DATA)
    )
    return x, _joint(x, noise)


def _joint(x: torch.Tensor, noise: float) -> torch.Tensor:
    log_density: torch.Tensor = dist.Normal(_CENTERS, noise).log_prob(x[:, None])
    return _MASSES.log() + log_density


def _missed_class() -> ProvingPair:
    """The guide knows the posterior but gives its most probable label a chance of 1e-6."""
    x, joint = _labelled(53, 1.0)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(_MASSES))
            pyro.sample("x", dist.Normal(_CENTERS[z], 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        probs = _joint(x, 1.0).softmax(1)
        probs = probs.scatter(1, probs.argmax(1, keepdim=True), 1e-6)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(probs))

    def posterior(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=_joint(x, 1.0)))

    return ProvingPair(
        name="missed-class",
        tags=("discrete", "missed mode"),
        model=model,
        guide=guide,
        x=x,
        log_prob=joint.logsumexp(1),
        source="sum of four terms, by formula",
        latent_dim=1,
        continuous=False,
        misled=True,
        posterior=posterior,
    )


def _left_out() -> ProvingPair:
    """The label of a mixture, which the guide leaves to be summed out."""
    x, joint = _labelled(54, 0.7)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(_MASSES))
            pyro.sample("x", dist.Normal(_CENTERS[z], 0.7), obs=x)

    def guide(x: torch.Tensor) -> None:
        """Nothing is drawn."""

    return ProvingPair(
        name="left-out",
        tags=("easy", "discrete"),
        model=model,
        guide=guide,
        x=x,
        log_prob=joint.logsumexp(1),
        source="sum of four terms, by formula",
        latent_dim=1,
        continuous=False,
    )


def _switching() -> ProvingPair:
    """A label c, z | c ~ N(center, 0.5^2), x | z ~ N(z, 1); c is summed out, one Gaussian is to do for all modes."""
    spread, noise = 0.5, 1.0
    total = math.hypot(spread, noise)
    precision = spread**-2 + noise**-2
    x, joint = _labelled(55, total)

    def components(x: torch.Tensor) -> torch.Tensor:
        """E[z | x, c], ``(N, 4)``."""
        return (_CENTERS / spread**2 + x[:, None] / noise**2) / precision

    def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mass = _joint(x, total).softmax(1)
        return (mass * components(x)).sum(1), (mass * (components(x).square() + 1 / precision)).sum(1)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(_MASSES))
            z = pyro.sample("z", dist.Normal(_CENTERS[c], spread))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def guide(x: torch.Tensor) -> None:
        mean, square = moments(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, (square - mean.square()).sqrt()))

    def posterior(x: torch.Tensor) -> None:
        each = dist.Normal(components(x), precision**-0.5)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=_joint(x, total)), each))

    mean, square = moments(x)
    return ProvingPair(
        name="switching",
        tags=("easy", "discrete"),
        model=model,
        guide=guide,
        x=x,
        log_prob=joint.logsumexp(1),
        source="sum of four Gaussians, by formula",
        latent_dim=1,
        posterior=posterior,
        mean=mean,
        square=square,
    )
