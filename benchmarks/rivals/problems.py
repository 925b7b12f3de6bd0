r"""What all contenders train and evaluate: the same data, networks, initial weights and loss.

    loss(x)  =  sum_n  log q(z_n | x_n) - log p(z_n) - log p(x_n | z_n),      z_n ~ q(z | x_n)

with z ~ N(0, I), x | z ~ Bernoulli(sigmoid(f(z))) and q(z | x) = N(loc(x), exp(log_scale(x))^2); or the exact
-log p(x) of a Gaussian mixture. Pyro programs are written as in Pyro's own examples.
"""

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_lvm as lvm
from pyro_lvm.models import GaussianMixture
from pyro_lvm.nn import MLP, ConvDecoder, ConvEncoder

__all__ = ["EVIDENCE", "NETWORKS", "SMALL", "SMALL_EVIDENCE", "TRAINING", "VAE", "Mixture", "Problem", "curved", "make"]

#: Network -> size of a datum, size of the latent.
NETWORKS = {"toy": ((64,), 2), "IWAE": ((784,), 50), "conv": ((1, 28, 28), 20)}


@dataclass(frozen=True)
class Problem:
    """One training or evaluation.

    Attributes:
        network: a key of `NETWORKS`, or ``"mixture"``.
        num_data: N.
        batch_size: of a training step; it divides N, so that every step does the same work.
        num_particles: K of an evaluation.
        device: where all is.
    """

    network: str
    num_data: int
    batch_size: int = 1
    num_particles: int = 1
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Of a training, in tables."""
        return f"{self.network}, {self.batch_size}"

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        return self.num_data // self.batch_size


TRAINING = [
    Problem("toy", 1400, 20),
    Problem("toy", 1400, 100),
    Problem("IWAE", 2000, 20),
    Problem("IWAE", 2000, 100),
    Problem("IWAE", 2000, 1000),
    Problem("conv", 1000, 100),
    Problem("mixture", 2000, 100),
]
EVIDENCE = Problem("IWAE", 100, num_particles=1000)
SMALL = [Problem("toy", 40, 20)]
SMALL_EVIDENCE = Problem("toy", 10, num_particles=20)


def images(problem: Problem) -> torch.Tensor:
    """Handwritten digits of 64 pixels, or random black and white images: times do not depend on what they show."""
    shape, _ = NETWORKS[problem.network]
    if problem.network == "toy":
        return lvm.datasets.digits("threshold").train[: problem.num_data]
    return (torch.rand(problem.num_data, *shape) < 0.2).float()


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder."""
    shape, latent_dim = NETWORKS[name]
    if name == "conv":
        image = (shape[0], shape[1], shape[2])
        encoder = ConvEncoder(image, 2 * latent_dim, channels=(16, 32))
        return encoder, ConvDecoder(latent_dim, image, channels=(32, 16))
    hidden = [32] if name == "toy" else [200, 200]
    return MLP(shape[0], hidden, 2 * latent_dim, nn.Tanh), MLP(latent_dim, hidden, shape[0], nn.Tanh)


class VAE:
    """Data and networks, as Pyro programs and as a loss written by hand."""

    def __init__(self, problem: Problem) -> None:
        torch.manual_seed(0)
        self.latent_dim = NETWORKS[problem.network][1]
        self.encoder, self.decoder = (net.to(problem.device) for net in networks(problem.network))
        self.x = images(problem).to(problem.device)
        self.elbo = Trace_ELBO()

    def model(self, x: torch.Tensor) -> None:
        """p(x, z)."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), self.latent_dim)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(x.dim() - 1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        """q(z | x)."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def parameters(self) -> list[nn.Parameter]:
        """Of both."""
        return [*self.encoder.parameters(), *self.decoder.parameters()]

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """Written by hand: constants cancel, and the quadratic form of q is that of its noise."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        misfit = binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return misfit + 0.5 * (z.square() - noise.square()).sum() - log_scale.sum()

    def log_weights(self, x: torch.Tensor, loc: torch.Tensor, log_scale: torch.Tensor, num: int) -> torch.Tensor:
        """log p(x, z) - log q(z | x), ``(num, N)``, of that many draws from q; written by hand."""
        noise = torch.randn(num, *loc.shape, dtype=x.dtype, device=x.device)
        z = loc + log_scale.exp() * noise  # (num, N, L)
        logits = self.decoder(z)
        misfit = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        return 0.5 * (noise.square() - z.square()).sum(-1) + log_scale.sum(-1) - misfit.flatten(2).sum(-1)


class Mixture:
    """Curved data in the plane and a mixture of Gaussians; its latent is summed out."""

    def __init__(self, problem: Problem, num_components: int = 6) -> None:
        torch.manual_seed(0)
        self.x = curved(problem.num_data)
        self.model = GaussianMixture(num_components, 2).initialize(self.x)
        self.guide = None
        self.elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def parameters(self) -> list[nn.Parameter]:
        """Of the mixture."""
        return list(self.model.parameters())

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """Written by hand: the exact -log p(x)."""
        return -self.model.log_prob(x).sum()


def curved(num_data: int) -> torch.Tensor:
    """Two half moons with noise, ``(N, 2)``, of about unit scale: no mixture fits exactly, and k-means is far off."""
    from sklearn.datasets import make_moons

    points, _ = make_moons(num_data, noise=0.1, random_state=0)
    x = torch.tensor(points, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0)


def make(problem: Problem) -> Any:
    """`VAE` or `Mixture`, the same in every process."""
    return Mixture(problem) if problem.network == "mixture" else VAE(problem)
