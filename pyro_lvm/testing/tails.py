"""One latent under tails that are heavier than a Gaussian guide expects, and under a corner."""

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_lvm._typing import Guide
from pyro_lvm.testing._line import Line
from pyro_lvm.testing.pair import ProvingPair

__all__ = ["tail_pairs"]

_NUM_DATA = 32


def tail_pairs() -> list[ProvingPair]:
    """Heavy tails of the prior, of both sides, and of the likelihood, where prior and datum quarrel; a corner."""
    rng = np.random.default_rng(41)
    cauchy = torch.from_numpy(np.clip(rng.standard_cauchy(_NUM_DATA), -20, 20) + rng.standard_normal(_NUM_DATA))
    both = torch.from_numpy(rng.standard_t(3, _NUM_DATA) + rng.standard_t(3, _NUM_DATA))
    outliers = torch.from_numpy(rng.standard_normal(_NUM_DATA) + 0.3 * rng.standard_t(2, _NUM_DATA))
    outliers[::4] = torch.linspace(4, 7, _NUM_DATA // 4).double()  # by choice, a quarter where the two sides quarrel
    zero = torch.zeros((), dtype=torch.float64)

    def trusting(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.3))

    return [
        _on_a_line("cauchy-prior", dist.Cauchy(zero, 1.0), lambda z: dist.Normal(z, 1.0), cauchy),
        _on_a_line("heavy-posterior", dist.StudentT(3.0, zero), lambda z: dist.StudentT(3.0, z), both),
        _on_a_line("outliers", dist.Normal(zero, 1.0), lambda z: dist.StudentT(2.0, z, 0.3), outliers, trusting),
        _corner(44),
    ]


def _on_a_line(
    name: str,
    prior: dist.TorchDistribution,
    likelihood: Callable[[torch.Tensor], dist.TorchDistribution],
    x: torch.Tensor,
    trusting: Guide | None = None,
) -> ProvingPair:
    """The guide trusts the datum, or is the Gaussian with the mean and the standard deviation of the posterior.

    Beyond 100 nothing is left: the heaviest posterior here falls like z^-8. The nearest pole is 0.4 away from the line,
    forty steps.
    """

    def line(x: torch.Tensor, num_nodes: int) -> Line:
        return Line(lambda z: prior.log_prob(z) + likelihood(z).log_prob(x), -100.0, 100.0, num_nodes)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", likelihood(z), obs=x)

    def matched(x: torch.Tensor) -> None:
        loc, scale = line(x, 2001).moments()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    found = line(x, 20_001)
    return ProvingPair(
        name=name,
        tags=("heavy tail", "missed mode") if trusting else ("heavy tail",),
        model=model,
        guide=trusting or matched,
        x=x,
        log_prob=found.log_integral,
        source="trapezoidal rule on 20,001 nodes, by formula",
        latent_dim=1,
        misled=trusting is not None,
        mean=found.mean(found.nodes),
        square=found.mean(found.nodes.square()),
    )


def _corner(seed: int) -> ProvingPair:
    """z ~ Laplace(0, b), x | z ~ N(z, s^2), with b = s = 0.5; the guide has the moments of the posterior.

    On each side of zero the posterior is a piece of a Gaussian around x -+ s^2 / b.
    """
    width, noise = 0.5, 0.5
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.laplace(0, width, _NUM_DATA) + noise * rng.standard_normal(_NUM_DATA))
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def sides(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log p(x, side) up to a constant, and where the Gaussian of the side would be, ``(N, 2)``."""
        center = x[:, None] - signs * noise**2 / width
        return -signs * x[:, None] / width + torch.special.log_ndtr(signs * center / noise), center

    def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_mass, center = sides(x)
        ratio = signs * center / noise
        hazard = (-ratio.square() / 2 - torch.special.log_ndtr(ratio)).exp() / math.sqrt(2 * math.pi)
        mean = center + signs * noise * hazard
        square = center.square() + noise**2 + signs * center * noise * hazard
        mass = log_mass.softmax(1)
        return (mass * mean).sum(1), (mass * square).sum(1)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(x.new_zeros(()), width))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def guide(x: torch.Tensor) -> None:
        mean, square = moments(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, (square - mean.square()).sqrt()))

    mean, square = moments(x)
    return ProvingPair(
        name="laplace-prior",
        tags=("easy",),
        model=model,
        guide=guide,
        x=x,
        log_prob=sides(x)[0].logsumexp(1) - math.log(2 * width) + noise**2 / (2 * width**2),
        source="closed form, two pieces of a Gaussian",
        latent_dim=1,
        mean=mean,
        square=square,
    )
