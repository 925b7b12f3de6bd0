"""Posteriors that no Gaussian resembles: funnels, a banana, an edge; a line integral knows their answers."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_lvm.testing._line import Line
from pyro_lvm.testing.pair import ProvingPair

__all__ = ["shape_pairs"]

_NUM_DATA = 32
_SOURCE = "trapezoidal rule along one line, the rest in closed form"
_GUIDE_NODES = 801  # a guide need not be exact


def shape_pairs() -> list[ProvingPair]:
    """Funnels in two and ten dimensions, a banana, and a guide that vanishes at an edge."""
    return [_funnel(1, 1.5, 42), _funnel(9, 3.0, 43), _banana(44), _edge(45)]


def _funnel(dim: int, spread: float, seed: int) -> ProvingPair:
    """v ~ N(0, spread^2), z_i | v ~ N(0, e^v), x_i | z ~ N(z_i, 0.5^2); the guide is factorised, of equal moments.

    Given v all is Gaussian; v itself is a line.
    """
    noise = 0.5
    rng = np.random.default_rng(seed)
    v = spread * rng.standard_normal((_NUM_DATA, 1))
    z = np.exp(v / 2) * rng.standard_normal((_NUM_DATA, dim))
    x = torch.from_numpy(z + noise * rng.standard_normal((_NUM_DATA, dim)))

    def line(x: torch.Tensor, num_nodes: int) -> Line:
        def log_density(v: torch.Tensor) -> torch.Tensor:
            given_v = dist.Normal(0.0, (v[..., None].exp() + noise**2).sqrt()).log_prob(x).sum(-1)
            total: torch.Tensor = dist.Normal(0.0, spread).log_prob(v) + given_v
            return total

        return Line(log_density, -10 * spread, 10 * spread, num_nodes)

    def moments(line: Line, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E[z | x] and E[z^2 | x], ``(N, d)``."""
        share = line.nodes.exp() / (line.nodes.exp() + noise**2)  # (G, 1), of x in z given v
        square = x.square() * line.mean(share.square())[:, None] + noise**2 * line.mean(share)[:, None]
        return x * line.mean(share)[:, None], square

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(x.new_zeros(()), spread))
            z = pyro.sample("z", dist.Normal(0.0, (v / 2).exp()[..., None].expand(*v.shape, dim)).to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        rough = line(x, _GUIDE_NODES)
        loc, scale = rough.moments()
        mean, square = moments(rough, x)
        with pyro.plate("data", len(x)):
            pyro.sample("v", dist.Normal(loc, scale))
            pyro.sample("z", dist.Normal(mean, (square - mean.square()).sqrt()).to_event(1))

    exact = line(x, 8001)
    mean, square = moments(exact, x)
    return ProvingPair(
        name=f"funnel-{dim + 1}d",
        tags=("funnel",),
        model=model,
        guide=guide,
        x=x,
        log_prob=exact.log_integral,
        source=_SOURCE,
        latent_dim=dim + 1,
        misled=dim > 1,
        mean=mean,
        square=square,
    )


def _banana(seed: int) -> ProvingPair:
    """u ~ N(0, 1.5^2), z | u ~ N(u^2, 0.3^2), x | z ~ N(z, 1); the guide is factorised, of equal moments.

    Given u all is Gaussian; u itself is a line.
    """
    width, bend, noise = 1.5, 0.3, 1.0
    rng = np.random.default_rng(seed)
    z = (width * rng.standard_normal(_NUM_DATA)) ** 2 + bend * rng.standard_normal(_NUM_DATA)
    x = torch.from_numpy(z + noise * rng.standard_normal(_NUM_DATA))
    total, gain = math.hypot(bend, noise), bend**2 / (bend**2 + noise**2)

    def line(x: torch.Tensor, num_nodes: int) -> Line:
        def log_density(u: torch.Tensor) -> torch.Tensor:
            of_u: torch.Tensor = dist.Normal(0.0, width).log_prob(u) + dist.Normal(u.square(), total).log_prob(x)
            return of_u

        return Line(log_density, -10 * width, 10 * width, num_nodes)

    def moments(line: Line, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E[z | x] and E[z^2 | x], ``(N,)``."""
        given_u = line.nodes.square() + gain * (x - line.nodes.square())  # (G, N)
        return line.mean(given_u), line.mean(given_u.square()) + gain * noise**2

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), width))
            z = pyro.sample("z", dist.Normal(u.square(), bend))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def guide(x: torch.Tensor) -> None:
        rough = line(x, _GUIDE_NODES)
        loc, scale = rough.moments()
        mean, square = moments(rough, x)
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Normal(loc, scale))
            pyro.sample("z", dist.Normal(mean, (square - mean.square()).sqrt()))

    exact = line(x, 8001)
    mean, square = moments(exact, x)
    return ProvingPair(
        name="banana-2d",
        tags=("banana",),
        model=model,
        guide=guide,
        x=x,
        log_prob=exact.log_integral,
        source=_SOURCE,
        latent_dim=2,
        mean=mean,
        square=square,
    )


def _edge(seed: int) -> ProvingPair:
    """z ~ U(0, 1), x | z ~ N(z, 0.5^2); the guide Beta(1, 6) vanishes at the upper edge, where the posterior does not.

    Near it the weights are (1 - z)^-5: their tail index is 5/6.
    """
    noise = 0.5
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.random(_NUM_DATA) + noise * rng.standard_normal(_NUM_DATA))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Beta(x.new_tensor(1.0), 6.0))

    def other_edge(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Beta(x.new_tensor(6.0), 1.0))

    inside = torch.special.ndtr((1 - x) / noise) - torch.special.ndtr(-x / noise)
    exact = Line(lambda z: dist.Normal(z, noise).log_prob(x), 0.0, 1.0, 10_001)
    return ProvingPair(
        name="edge-1d",
        tags=("heavy tail", "constrained"),
        model=model,
        guide=guide,
        guides=(other_edge,),
        x=x,
        log_prob=inside.log(),
        source="closed form, a piece of a Gaussian",
        latent_dim=1,
        misled=True,
        mean=exact.mean(exact.nodes),
        square=exact.mean(exact.nodes.square()),
    )
