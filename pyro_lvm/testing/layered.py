"""Latents above latents, a plate within a datum, and binary data."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_lvm.testing.pair import ProvingPair

__all__ = ["layered_pairs"]

_NUM_DATA = 32


def layered_pairs() -> list[ProvingPair]:
    """Two layers, groups within a datum, black and white pixels, one yes or no of ten latents."""
    return [_two_layers(), _groups(), _pixels(), _probit()]


def _two_layers() -> ProvingPair:
    """u ~ N(0, I), z | u ~ N(A u, 0.3^2 I), x | z ~ N(z, 0.5^2 I); the guide draws u and z apart from each other."""
    dim, link, noise = 3, 0.3, 0.5
    rng = np.random.default_rng(61)
    weight = torch.from_numpy(rng.standard_normal((dim, dim)))
    z = rng.standard_normal((_NUM_DATA, dim)) @ weight.numpy().T + link * rng.standard_normal((_NUM_DATA, dim))
    x = torch.from_numpy(z + noise * rng.standard_normal((_NUM_DATA, dim)))
    eye = torch.eye(dim).double()
    prior = weight @ weight.T + link**2 * eye  # covariance of z
    to_z = prior @ torch.linalg.inv(prior + noise**2 * eye)  # E[z | x] = to_z x
    to_u = weight.T @ torch.linalg.inv(prior + noise**2 * eye)
    of_z, of_u = prior - to_z @ prior, eye - to_u @ weight  # covariances given x
    sharpness = link**-2 + noise**-2  # of each z given u and x
    alone = (1 + weight.square().sum(0) / link**2).rsqrt()  # standard deviation of each u given all else

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(u @ weight.T, link).to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Normal(x @ to_u.T, alone).to_event(1))
            pyro.sample("z", dist.Normal(x @ to_z.T, sharpness**-0.5).to_event(1))

    def posterior(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.MultivariateNormal(x @ to_u.T, of_u))
            loc = (u @ weight.T / link**2 + x / noise**2) / sharpness
            pyro.sample("z", dist.Normal(loc, sharpness**-0.5).to_event(1))

    return ProvingPair(
        name="two-layers",
        tags=("hierarchical", "correlated"),
        model=model,
        guide=guide,
        x=x,
        log_prob=dist.MultivariateNormal(x.new_zeros(dim), prior + noise**2 * eye).log_prob(x),
        source="closed form, a Gaussian",
        latent_dim=2 * dim,
        misled=True,
        posterior=posterior,
        mean=x @ to_z.T,
        square=(x @ to_z.T).square() + of_z.diagonal(),
    )


def _groups() -> ProvingPair:
    """z ~ N(0, 1), five u | z ~ N(z, 0.5^2) in a plate within the datum, x | u ~ N(u, 0.5^2).

    The guide has the marginal of z, and each u as if z were its mean.
    """
    groups, noise = 5, 0.5
    rng = np.random.default_rng(62)
    u = rng.standard_normal((_NUM_DATA, 1)) + noise * rng.standard_normal((_NUM_DATA, groups))
    x = torch.from_numpy(u + noise * rng.standard_normal((_NUM_DATA, groups)))
    precision = 1 + groups / (2 * noise**2)

    def of_z(x: torch.Tensor) -> torch.Tensor:
        """E[z | x], ``(N,)``."""
        return x.sum(-1) / (2 * noise**2) / precision

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("groups", groups, dim=-1):
                u = pyro.sample("u", dist.Normal(z, noise))
                pyro.sample("x", dist.Normal(u, noise), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            loc = of_z(x)[:, None]
            pyro.sample("z", dist.Normal(loc, precision**-0.5))
            with pyro.plate("groups", groups, dim=-1):
                pyro.sample("u", dist.Normal((loc + x) / 2, noise * 0.5**0.5))

    def posterior(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(of_z(x)[:, None], precision**-0.5))
            with pyro.plate("groups", groups, dim=-1):
                pyro.sample("u", dist.Normal((z + x) / 2, noise * 0.5**0.5))

    covariance = torch.ones(groups, groups).double() + 2 * noise**2 * torch.eye(groups).double()
    return ProvingPair(
        name="groups",
        tags=("hierarchical", "easy"),
        model=model,
        guide=guide,
        x=x,
        log_prob=dist.MultivariateNormal(x.new_zeros(groups), covariance).log_prob(x),
        source="closed form, a Gaussian",
        latent_dim=1 + groups,
        posterior=posterior,
        mean=of_z(x),
        square=of_z(x).square() + 1 / precision,
    )


def _pixels() -> ProvingPair:
    """Sixteen pixels, x | z ~ Bernoulli(sigmoid(W z)), z in the plane; the guide has 0.6 of the standard deviations."""
    pixels, dim = 16, 2
    rng = np.random.default_rng(63)
    weight = torch.from_numpy(2 * rng.standard_normal((pixels, dim)))
    probs = 1 / (1 + np.exp(-rng.standard_normal((_NUM_DATA, dim)) @ weight.numpy().T))
    x = torch.from_numpy((rng.random((_NUM_DATA, pixels)) < probs).astype(float))
    step = 0.05
    line = torch.arange(-8, 8 + step, step).double()
    grid = torch.cartesian_prod(line, line)  # (G, 2)

    def log_terms(x: torch.Tensor) -> torch.Tensor:
        """log p(x, z) times the area of a cell, ``(N, G)``."""
        logits = grid @ weight.T
        log_likelihood = x @ logits.T - torch.nn.functional.softplus(logits).sum(1)
        return log_likelihood - grid.square().sum(1) / 2 - math.log(2 * math.pi) + 2 * math.log(step)

    def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        share = log_terms(x).softmax(1)
        return share @ grid, share @ grid.square()

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight.T).to_event(1), obs=x)

    mean, square = moments(x)
    scale = 0.6 * (square - mean.square()).sqrt()
    # An encoder of this model: the posterior moments follow from the sums W^T x alone, and are looked up by them.
    keys = x @ weight

    def guide(x: torch.Tensor) -> None:
        row = torch.cdist(x @ weight, keys).argmin(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean[row], scale[row]).to_event(1))

    return ProvingPair(
        name="pixels-2d",
        tags=("binary data", "wrong scale"),
        model=model,
        guide=guide,
        x=x,
        log_prob=log_terms(x).logsumexp(1),
        source="trapezoidal rule on 321 x 321 nodes, by formula",
        latent_dim=dim,
        misled=True,
        mean=mean,
        square=square,
    )


def _probit() -> ProvingPair:
    """One yes or no, p(x = 1 | z) = Phi(w z - 1) with z in ten dimensions; the guide is the prior."""
    dim, bias = 10, -1.0
    rng = np.random.default_rng(64)
    weight = torch.from_numpy(rng.standard_normal(dim) * 2 / dim**0.5)
    x = torch.from_numpy((rng.random(_NUM_DATA) < 0.5).astype(float))
    total = (1 + weight.square().sum()).sqrt()
    sign = 2 * x - 1
    ratio = sign * bias / total  # (N,)
    hazard = dist.Normal(0.0, 1.0).log_prob(ratio).exp() / torch.special.ndtr(ratio)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(torch.special.ndtr(z @ weight + bias)), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))

    return ProvingPair(
        name="probit-10d",
        tags=("binary data", "easy"),
        model=model,
        guide=guide,
        x=x,
        log_prob=torch.special.log_ndtr(ratio),
        source="closed form, Phi(b / sqrt(1 + w^2))",
        latent_dim=dim,
        mean=(sign * hazard)[:, None] * weight / total,
        square=1 - (ratio * hazard)[:, None] * weight.square() / total.square(),
    )
