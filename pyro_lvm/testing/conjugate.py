"""Conjugate pairs: latents that are positive, or shares of a whole, with posteriors from the textbook."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_lvm.testing.pair import ProvingPair

__all__ = ["conjugate_pairs"]

_NUM_DATA = 32


def conjugate_pairs() -> list[ProvingPair]:
    """Rates of counts, chances, shares, a variance, a product of positive factors."""
    return [_gamma_poisson(), _beta_binomial(), _dirichlet_multinomial(), _inverse_gamma(), _lognormal()]


def _gamma_poisson() -> ProvingPair:
    """Three counts of one rate; the guide is the posterior."""
    shape, rate, counts = 2.0, 0.5, 3
    rng = np.random.default_rng(31)
    true_rate = rng.gamma(shape, 1 / rate, size=(_NUM_DATA, 1))
    x = torch.from_numpy(rng.poisson(true_rate, size=(_NUM_DATA, counts)).astype(float))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(shape), rate))
            pyro.sample("x", dist.Poisson(z[..., None].expand(*z.shape, counts)).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(shape + x.sum(1), rate + counts))

    total, log_rate = shape + x.sum(1), math.log(rate + counts)
    prior = shape * math.log(rate) - math.lgamma(shape)
    return ProvingPair(
        name="gamma-poisson",
        tags=("easy", "constrained"),
        model=model,
        guide=guide,
        x=x,
        log_prob=prior + total.lgamma() - total * log_rate - (x + 1).lgamma().sum(1),
        source="closed form, Gamma-Poisson",
        latent_dim=1,
        posterior=guide,
        mean=total / (rate + counts),
        square=total * (total + 1) / (rate + counts) ** 2,
    )


def _beta_binomial() -> ProvingPair:
    """Successes of 20; the guide has seen half of them, and is too wide."""
    half, trials = 0.5, 20
    rng = np.random.default_rng(32)
    x = torch.from_numpy(rng.binomial(20, rng.beta(half, half, size=_NUM_DATA)).astype(float))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(x.new_tensor(half), x.new_tensor(half)))
            pyro.sample("x", dist.Binomial(trials, z), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Beta(half + x / 2, half + (trials - x) / 2))

    def posterior(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Beta(half + x, half + trials - x))

    def log_beta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.lgamma() + b.lgamma() - (a + b).lgamma()

    ways = math.lgamma(trials + 1) - (x + 1).lgamma() - (trials - x + 1).lgamma()
    prior = log_beta(x.new_tensor(half), x.new_tensor(half))
    a, total = half + x, 2 * half + trials
    return ProvingPair(
        name="beta-binomial",
        tags=("easy", "constrained", "wrong scale"),
        model=model,
        guide=guide,
        x=x,
        log_prob=ways + log_beta(half + x, half + trials - x) - prior,
        source="closed form, Beta-Binomial",
        latent_dim=1,
        posterior=posterior,
        mean=a / total,
        square=a * (a + 1) / (total * (total + 1)),
    )


def _dirichlet_multinomial() -> ProvingPair:
    """Shares of five kinds by 20 counts; the guide has seen all counts three times, and is too narrow."""
    kinds, trials = 5, 20
    rng = np.random.default_rng(33)
    shares = rng.dirichlet(np.ones(kinds), size=_NUM_DATA)
    x = torch.from_numpy(np.stack([rng.multinomial(trials, p) for p in shares]).astype(float))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(x.new_ones(kinds)))
            pyro.sample("x", dist.Multinomial(trials, z), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(1 + 3 * x))

    def posterior(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(1 + x))

    ways = math.lgamma(trials + 1) - (x + 1).lgamma().sum(1)
    gammas = (1 + x).lgamma().sum(1) + math.lgamma(kinds) - math.lgamma(kinds + trials)
    total = kinds + trials
    return ProvingPair(
        name="dirichlet-multinomial",
        tags=("constrained", "wrong scale"),
        model=model,
        guide=guide,
        x=x,
        log_prob=ways + gammas,
        source="closed form, Dirichlet-multinomial",
        latent_dim=kinds - 1,
        misled=True,
        posterior=posterior,
        mean=(1 + x) / total,
        square=(1 + x) * (2 + x) / (total * (total + 1)),
    )


def _inverse_gamma() -> ProvingPair:
    """A variance by one draw; the guide is the log-normal of the same log-moments, whose upper tail is lighter."""
    shape, scale = 5.0, 4.0
    rng = np.random.default_rng(34)
    x = torch.from_numpy(rng.standard_normal(_NUM_DATA) * np.sqrt(scale / rng.gamma(shape, size=_NUM_DATA)))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.InverseGamma(x.new_tensor(shape), x.new_tensor(scale)))
            pyro.sample("x", dist.Normal(0.0, z.sqrt()), obs=x)

    def guide(x: torch.Tensor) -> None:
        a, b = x.new_tensor(shape + 0.5), scale + x.square() / 2
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(b.log() - a.digamma(), torch.polygamma(1, a).sqrt()))

    def posterior(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.InverseGamma(x.new_tensor(shape + 0.5), scale + x.square() / 2))

    a, b = shape + 0.5, scale + x.square() / 2
    return ProvingPair(
        name="inverse-gamma",
        tags=("constrained", "heavy tail"),
        model=model,
        guide=guide,
        x=x,
        log_prob=dist.StudentT(2 * shape, torch.zeros_like(x), math.sqrt(scale / shape)).log_prob(x),
        source="closed form, Student's t",
        latent_dim=1,
        posterior=posterior,
        mean=b / (a - 1),
        square=b.square() / ((a - 1) * (a - 2)),
    )


def _lognormal() -> ProvingPair:
    """A positive size seen with a relative error; the guide is the Gamma of the same two moments."""
    noise = 0.5
    rng = np.random.default_rng(35)
    x = torch.from_numpy(np.exp(rng.standard_normal(_NUM_DATA) + noise * rng.standard_normal(_NUM_DATA)))
    shrunk = 1 / (1 + noise**2)
    variance = noise**2 * shrunk

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.LogNormal(z.log(), noise), obs=x)

    def guide(x: torch.Tensor) -> None:
        mean = (x.log() * shrunk + variance / 2).exp()
        a = 1 / math.expm1(variance)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(x.new_tensor(a), a / mean))

    def posterior(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x.log() * shrunk, math.sqrt(variance)))

    return ProvingPair(
        name="log-normal",
        tags=("constrained", "heavy tail"),
        model=model,
        guide=guide,
        x=x,
        log_prob=dist.LogNormal(torch.zeros_like(x), math.sqrt(1 + noise**2)).log_prob(x),
        source="closed form, log-normal",
        latent_dim=1,
        posterior=posterior,
        mean=(x.log() * shrunk + variance / 2).exp(),
        square=(2 * x.log() * shrunk + 2 * variance).exp(),
    )
