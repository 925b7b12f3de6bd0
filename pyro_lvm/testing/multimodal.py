"""Posteriors of several modes, and guides that sit on one of them: nothing in their weights shows what they miss."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_lvm._typing import Guide
from pyro_lvm.testing.pair import ProvingPair

__all__ = ["multimodal_pairs"]

_NUM_DATA = 32


def multimodal_pairs() -> list[ProvingPair]:
    """Two, four and 32 mirrored modes; mixtures near and far; a needle in a haystack, from both ends."""
    return [
        _mirrored(1, 21),
        _mirrored(2, 22),
        _mirrored(5, 28),
        _mixture("light-mode-2d", 2, 1.5, 1.0, 2.0, light=True, seed=23),
        _mixture("heavy-mode-2d", 2, 1.5, 1.0, 2.0, light=False, seed=24),
        _mixture("light-mode-10d", 10, 1.0, 0.5, 3.0, light=True, seed=25),
        _needle("haystack-2d", on_needle=False, seed=26),
        _needle("needle-2d", on_needle=True, seed=27),
    ]


def _mirrored(dim: int, seed: int) -> ProvingPair:
    """The sign of z is lost, z ~ N(0, I), x | z ~ N(|z|, 0.2^2): 2^d modes of equal mass, which touch where x is small.

    Of each coordinate p(x) = 2 N(x; 0, 1 + s^2) Phi(m / t), with N(z; m, t^2) the posterior if z were all of x.
    """
    noise = 0.2
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((_NUM_DATA, dim))
    x = torch.from_numpy(np.abs(z) + noise * rng.standard_normal((_NUM_DATA, dim)))
    tail, scale = 1 + noise**2, noise / math.sqrt(1 + noise**2)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.abs(), noise).to_event(1), obs=x)

    def on_mode(*signs: float) -> Guide:
        def guide(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / tail * x.new_tensor(signs), scale).to_event(1))

        return guide

    all_signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * dim).reshape(-1, dim).tolist()
    ratio = x / tail / scale  # (N, d)
    log_phi = torch.special.log_ndtr(ratio)
    hazard = (-ratio.square() / 2 - log_phi).exp() / math.sqrt(2 * math.pi)
    total = math.log(2) + dist.Normal(torch.zeros_like(x), math.sqrt(tail)).log_prob(x) + log_phi
    return ProvingPair(
        name=f"mirrored-{dim}d",
        tags=("missed mode",),
        model=model,
        guide=on_mode(*all_signs[0]),
        guides=tuple(on_mode(*signs) for signs in all_signs[1:4]),  # of five dimensions three more of 31
        x=x,
        log_prob=total.sum(1),
        source="closed form, two half-lines of a Gaussian integral in each coordinate",
        latent_dim=dim,
        misled=True,
        mean=torch.zeros_like(x),
        square=scale**2 * (1 + ratio.square() + ratio * hazard),
    )


def _mixture(name: str, dim: int, center: float, spread: float, noise: float, light: bool, seed: int) -> ProvingPair:
    """The prior has modes at +-center with masses 0.2 and 0.8, of which x | z ~ N(z, noise^2 I) says little.

    Everything is a mixture of two Gaussians. The guide is the posterior of one component.
    """
    masses = torch.tensor([0.8, 0.2], dtype=torch.float64)
    centers = torch.tensor([[-center], [center]], dtype=torch.float64).expand(2, dim)
    rng = np.random.default_rng(seed)
    label = (rng.random(_NUM_DATA) < 0.2).astype(int)
    z = centers.numpy()[label] + spread * rng.standard_normal((_NUM_DATA, dim))
    x = torch.from_numpy(z + noise * rng.standard_normal((_NUM_DATA, dim)))
    precision = spread**-2 + noise**-2

    def components(x: torch.Tensor) -> torch.Tensor:
        """Means of the two components of the posterior, ``(N, 2, d)``."""
        return (centers / spread**2 + x[:, None] / noise**2) / precision

    def responsibilities(x: torch.Tensor) -> torch.Tensor:
        """log of mass times density of x, ``(N, 2)``."""
        total = math.sqrt(spread**2 + noise**2)
        log_density: torch.Tensor = dist.Normal(centers, total).log_prob(x[:, None]).sum(-1)
        return masses.log() + log_density

    def model(x: torch.Tensor) -> None:
        prior = dist.MixtureSameFamily(dist.Categorical(masses), dist.Normal(centers, spread).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    def on_mode(component: int) -> Guide:
        def guide(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(components(x)[:, component], precision**-0.5).to_event(1))

        return guide

    def posterior(x: torch.Tensor) -> None:
        each = dist.Normal(components(x), precision**-0.5).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=responsibilities(x)), each))

    mass = responsibilities(x).softmax(1)[..., None]  # (N, 2, 1)
    return ProvingPair(
        name=name,
        tags=("missed mode",),
        model=model,
        guide=on_mode(int(light)),
        guides=(on_mode(1 - int(light)),),
        x=x,
        log_prob=responsibilities(x).logsumexp(1),
        source="closed form, a mixture of two Gaussians",
        latent_dim=dim,
        misled=True,
        posterior=posterior,
        mean=(mass * components(x)).sum(1),
        square=(mass * (components(x).square() + 1 / precision)).sum(1),
    )


def _needle(name: str, on_needle: bool, seed: int) -> ProvingPair:
    """x is z to 0.03, or an outlier that says nothing: x | z ~ (1 - e) N(z, 0.03^2 I) + e N(0, 2^2 I), z ~ N(0, I).

    The posterior is a needle at x on the prior as a haystack; each guide knows one of them.
    """
    dim, width, reach = 2, 0.03, 2.0
    outliers = 0.3 if not on_needle else 0.9
    rng = np.random.default_rng(seed)
    shrunk = 1 / (1 + width**2)
    x = torch.from_numpy(rng.standard_normal((_NUM_DATA, dim)) * math.sqrt(1 + width**2))

    def parts(x: torch.Tensor) -> torch.Tensor:
        """log p(x, needle) and log p(x, haystack), ``(N, 2)``."""
        zero = torch.zeros_like(x)
        needle = dist.Normal(zero, math.sqrt(1 + width**2)).log_prob(x).sum(-1) + math.log(1 - outliers)
        return torch.stack([needle, dist.Normal(zero, reach).log_prob(x).sum(-1) + math.log(outliers)], -1)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            centers = torch.stack([z, torch.zeros_like(z)], -2)
            scales = x.new_tensor([[width], [reach]])
            which = dist.Categorical(x.new_tensor([1 - outliers, outliers]))
            pyro.sample("x", dist.MixtureSameFamily(which, dist.Normal(centers, scales).to_event(1)), obs=x)

    def needle(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * shrunk, width * math.sqrt(shrunk)).to_event(1))

    def haystack(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))

    def posterior(x: torch.Tensor) -> None:
        centers = torch.stack([x * shrunk, torch.zeros_like(x)], -2)
        scales = x.new_tensor([[width * math.sqrt(shrunk)], [1.0]])
        with pyro.plate("data", len(x)):
            each = dist.Normal(centers, scales).to_event(1)
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=parts(x)), each))

    mass = parts(x).softmax(1)[:, :1]  # (N, 1), of the needle
    return ProvingPair(
        name=name,
        tags=("missed mode", "near-deterministic"),
        model=model,
        guide=needle if on_needle else haystack,
        guides=(haystack if on_needle else needle,),
        x=x,
        log_prob=parts(x).logsumexp(1),
        source="closed form, a mixture of two Gaussians",
        latent_dim=dim,
        misled=True,
        posterior=posterior,
        mean=mass * x * shrunk,
        square=mass * ((x * shrunk).square() + width**2 * shrunk) + (1 - mass),
    )
