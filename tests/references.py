"""Pairs whose guide is the exact posterior, with log p(x) in closed form: every log-weight equals log p(x).

Nearly all are one fact in different clothes: with z ~ N(0, 1) and M observations x_m ~ N(z, SIGMA) that are
independent given z, `posterior` has the posterior of z and the marginal of x. A factory takes the number of data and
returns a `Pair`; the pairs are plain functions in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

__all__ = ["ENUMERATED", "ORACLES", "SIGMA", "Pair", "data", "images", "normal_guide", "normal_model", "posterior"]

SIGMA = 0.7
PIXELS = 4


@dataclass(frozen=True)
class Pair:
    """A model and its exact posterior, data, and log p(x) of each datum."""

    model: Any
    guide: Any  # None where every latent is summed out
    x: torch.Tensor
    log_px: torch.Tensor
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def data(n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal data, not symmetric about zero."""
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3


def posterior(x: torch.Tensor, observed: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of z given M observations in the last dimension, and the log-density of these."""
    seen = torch.ones_like(x) if observed is None else observed.to(x.dtype)
    x = torch.where(seen > 0, x, torch.zeros_like(x))
    count, total = seen.sum(-1), x.sum(-1)
    precision = 1 + count / SIGMA**2
    loc = total / SIGMA**2 / precision
    log_px = -0.5 * (
        count * math.log(2 * math.pi * SIGMA**2) + x.square().sum(-1) / SIGMA**2 - loc**2 * precision + precision.log()
    )
    return loc, precision.rsqrt(), log_px


def normal_model(x: torch.Tensor, *_: Any) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, SIGMA), obs=x)


def normal_guide(x: torch.Tensor, *_: Any) -> None:
    loc, scale, _log_px = posterior(x[:, None])
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


def plain(n: int) -> Pair:
    x = data(n)
    return Pair(normal_model, normal_guide, x, posterior(x[:, None])[2])


def event(n: int) -> Pair:
    """z and x of shape (N, 3), both declared as events."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, SIGMA).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[..., None])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    x = data(n, 3)
    return Pair(model, guide, x, posterior(x[..., None])[2].sum(-1))


def images(n: int) -> Pair:
    """x of shape (N, C, H, W)."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z[..., None, None, None].expand(*z.shape, *x.shape[-3:])
            pyro.sample("x", dist.Normal(loc, SIGMA).to_event(3), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x.flatten(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    x = data(n, 2, 3, 2)
    return Pair(model, guide, x, posterior(x.flatten(1))[2])


def chain(n: int) -> Pair:
    """z1 -> z2 -> x, with a guide that draws z2 first and z1 from z2."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            first = pyro.sample("z1", dist.Normal(0.0, 1.0))
            second = pyro.sample("z2", dist.Normal(first, SIGMA))
            pyro.sample("x", dist.Normal(second, 1.0), obs=x)

    variance = 1 + SIGMA**2

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            gain = variance / (variance + 1)
            second = pyro.sample("z2", dist.Normal(gain * x, gain**0.5))
            pyro.sample("z1", dist.Normal(second / variance, SIGMA / variance**0.5))

    x = data(n)
    return Pair(model, guide, x, dist.Normal(0.0, torch.tensor(variance + 1, dtype=torch.float64).sqrt()).log_prob(x))


def _arranged(x: torch.Tensor, data_dim: int, pixel_dim: int) -> torch.Tensor:
    """x (N, M) with its rows at one dimension and its columns at another."""
    shape = [1] * max(-data_dim, -pixel_dim)
    shape[data_dim], shape[pixel_dim] = x.shape
    return (x if data_dim < pixel_dim else x.T).reshape(shape)


def _column(v: torch.Tensor, data_dim: int) -> torch.Tensor:
    return v.reshape(-1, *[1] * (-data_dim - 1))


def pixel_plate(data_dim: int, pixel_dim: int) -> Callable[[int], Pair]:
    """One latent per datum; its pixels in a plate inside the data plate, at any two dimensions."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=data_dim):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", x.shape[1], dim=pixel_dim):
                pyro.sample("x", dist.Normal(z, SIGMA), obs=_arranged(x, data_dim, pixel_dim))

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x)
        with pyro.plate("data", len(x), dim=data_dim):
            pyro.sample("z", dist.Normal(_column(loc, data_dim), _column(scale, data_dim)))

    def pair(n: int) -> Pair:
        x = data(n, PIXELS)
        return Pair(model, guide, x, posterior(x)[2])

    return pair


def auto_dims(n: int) -> Pair:
    """Dimensions chosen by Pyro; the pixel plate, opened first, is to the right of the data plate."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("pixels", x.shape[1]), pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[..., None])
        with pyro.plate("pixels", x.shape[1]), pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    x = data(n, PIXELS)
    return Pair(model, guide, x, posterior(x[..., None])[2].sum(-1))


def either_side(n: int) -> Pair:
    """The data plate between two others; one latent in data and columns, one in data alone."""

    def model(x: torch.Tensor) -> None:  # (N, rows, columns + 1)
        rows, columns = pyro.plate("rows", 2, dim=-3), pyro.plate("columns", 3, dim=-1)
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with rows:
                pyro.sample("y", dist.Normal(z, SIGMA), obs=x[:, :, 3:].movedim(1, 0))
            with columns:
                u = pyro.sample("u", dist.Normal(0.0, 1.0))
                with rows:
                    pyro.sample("x", dist.Normal(u, SIGMA), obs=x[:, :, :3].movedim(1, 0))

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x.movedim(1, -1))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(loc[:, 3:], scale[:, 3:]))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("u", dist.Normal(loc[:, :3], scale[:, :3]))

    x = data(n, 2, 4)
    return Pair(model, guide, x, posterior(x.movedim(1, -1))[2].sum(-1))


def entered_twice(n: int) -> Pair:
    def model(x: torch.Tensor) -> None:
        plate = pyro.plate("data", len(x))
        with plate:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with plate:
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    return Pair(model, normal_guide, plain(n).x, plain(n).log_px)


def sequential_pixels(n: int) -> Pair:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for i in pyro.plate("pixels", x.shape[1]):
                pyro.sample(f"x{i}", dist.Normal(z, SIGMA), obs=x[:, i])

    return Pair(model, pixel_plate(-1, -2)(n).guide, data(n, PIXELS), posterior(data(n, PIXELS))[2])


def sequential_data(n: int) -> Pair:
    def model(x: torch.Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, SIGMA), obs=x[i])

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[:, None])
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(loc[i], scale[i]))

    return Pair(model, guide, plain(n).x, plain(n).log_px)


# --- masks and scales -------------------------------------------------------------------------------------------------


def _seen(*shape: int) -> torch.Tensor:
    """About two in three elements, the first of them missing."""
    seen = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.66
    seen.view(-1)[0] = False
    return seen


def mask_likelihood(n: int) -> Pair:
    def model(x: torch.Tensor, seen: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    def guide(x: torch.Tensor, seen: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[:, None], seen[:, None])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    x, seen = data(n), _seen(n)
    return Pair(model, guide, x, posterior(x[:, None], seen[:, None])[2], (seen,))


def mask_both(n: int) -> Pair:
    """A datum that both programs mask has log p = 0."""

    def model(x: torch.Tensor, seen: torch.Tensor) -> None:
        with poutine.mask(mask=seen):
            normal_model(x)

    def guide(x: torch.Tensor, seen: torch.Tensor) -> None:
        with poutine.mask(mask=seen):
            normal_guide(x)

    seen = _seen(n)
    return Pair(model, guide, plain(n).x, plain(n).log_px * seen, (seen,))


def mask_distributions(n: int) -> Pair:
    """The mask is part of each distribution, also of the guide's."""

    def model(x: torch.Tensor, seen: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(seen))
            pyro.sample("x", dist.Normal(z, SIGMA).mask(seen), obs=x)

    def guide(x: torch.Tensor, seen: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[:, None])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).mask(seen))

    seen = _seen(n)
    return Pair(model, guide, plain(n).x, plain(n).log_px * seen, (seen,))


def mask_pixels(n: int) -> Pair:
    def model(x: torch.Tensor, seen: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z[..., None].expand(*z.shape, x.shape[1])
            pyro.sample("x", dist.Normal(loc, SIGMA).mask(seen).to_event(1), obs=x)

    def guide(x: torch.Tensor, seen: torch.Tensor) -> None:
        loc, scale, _ = posterior(x, seen)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    x, seen = data(n, PIXELS), _seen(n, PIXELS)
    return Pair(model, guide, x, posterior(x, seen)[2], (seen,))


def obs_mask(n: int) -> Pair:
    """Missing pixels are NaN in x."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z, SIGMA), obs=x, obs_mask=~x.isnan())

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x, ~x.isnan())
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(loc[:, None], scale[:, None]))

    x = data(n, PIXELS).masked_fill(~_seen(n, PIXELS), torch.nan)
    return Pair(model, guide, x, posterior(x, ~x.isnan())[2])


def subsample(both: bool) -> Callable[[int], Pair]:
    """A plate of 1000 of which x is a part: its scale does not belong into a density."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[:, None])
        with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(loc, scale))

    return lambda n: Pair(model, guide if both else normal_guide, plain(n).x, plain(n).log_px)


def scale(n: int) -> Pair:
    """Annealing factors do not belong into a density either."""
    return Pair(poutine.scale(normal_model, 0.25), poutine.scale(normal_guide, 7.0), plain(n).x, plain(n).log_px)


# --- other statements -------------------------------------------------------------------------------------------------


def factor(n: int) -> Pair:
    """The likelihood of the second observation is a factor."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("second", dist.Normal(z, SIGMA).log_prob(x[:, 1]))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x[:, 0])

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    x = data(n, 2)
    return Pair(model, guide, x, posterior(x)[2])


def factor_alone(n: int) -> Pair:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", dist.Normal(z, SIGMA).log_prob(x))

    return Pair(model, normal_guide, plain(n).x, plain(n).log_px)


def deterministic(n: int) -> Pair:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = pyro.deterministic("mean", 2 * z)
            pyro.sample("x", dist.Normal(mean / 2, SIGMA), obs=x)
        pyro.deterministic("outside", torch.ones(5))

    def guide(x: torch.Tensor) -> None:
        normal_guide(x)
        pyro.deterministic("note", x)

    return Pair(model, guide, plain(n).x, plain(n).log_px)


def conditioned(n: int) -> Pair:
    """The data come through `poutine.condition`, not through `obs=`."""

    def generate(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA))

    def model(x: torch.Tensor) -> None:
        poutine.condition(generate, {"x": x})(x)

    return Pair(model, normal_guide, plain(n).x, plain(n).log_px)


def conditioned_whole(n: int) -> Pair:
    """`poutine.condition` on all of the data, so that the model runs on nothing less."""

    def generate(x: torch.Tensor) -> None:
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA))

    x = data(n)
    return Pair(poutine.condition(generate, {"x": x}), normal_guide, x, plain(n).log_px)


def renamed_plate(n: int) -> Pair:
    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[:, None])
        with pyro.plate("batch", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    return Pair(normal_model, guide, plain(n).x, plain(n).log_px)


def params(n: int) -> Pair:
    """Names and values in the param store, one of them constrained, on both sides."""

    def model(x: torch.Tensor) -> None:
        sigma = pyro.param("sigma", torch.tensor(SIGMA, dtype=torch.float64), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, sigma), obs=x)

    def guide(x: torch.Tensor) -> None:
        shrink = pyro.param("shrink", torch.tensor(1 / (1 + SIGMA**2), dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shrink * x, SIGMA * shrink**0.5))

    model(data(1))
    guide(data(1))
    return Pair(model, guide, plain(n).x, plain(n).log_px)


class Linear(torch.nn.Linear):
    """x -> x / (1 + SIGMA^2), the posterior mean."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False, dtype=torch.float64)
        torch.nn.init.constant_(self.weight, 1 / (1 + SIGMA**2))


class VAE(torch.nn.Module):
    """Shaped like Pyro's VAE example: model and guide are methods that register their networks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Linear(), torch.nn.Identity()

    def model(self, x: torch.Tensor) -> torch.Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], 1), x.new_ones(x.shape[0], 1)).to_event(1))
            loc = self.decoder.forward(z)
            pyro.sample("obs", dist.Normal(loc, SIGMA).to_event(1), obs=x.reshape(-1, 1))
        return loc

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc = self.encoder.forward(x)
            pyro.sample("latent", dist.Normal(loc, SIGMA / (1 + SIGMA**2) ** 0.5).to_event(1))


def methods(n: int) -> Pair:
    vae = VAE()
    return Pair(vae.model, vae.guide, plain(n).x[:, None], plain(n).log_px)


class Encoder(pyro.nn.PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = pyro.nn.PyroModule[torch.nn.Linear](1, 1, bias=False).double()
        torch.nn.init.constant_(self.linear.weight, 1 / (1 + SIGMA**2))
        self.scale = pyro.nn.PyroParam(
            torch.tensor(SIGMA / (1 + SIGMA**2) ** 0.5, dtype=torch.float64), dist.constraints.positive
        )

    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.linear(x[:, None])[:, 0], self.scale))


def pyro_module(n: int) -> Pair:
    return Pair(normal_model, Encoder(), plain(n).x, plain(n).log_px)


def delta_density(n: int) -> Pair:
    """A `Delta` in the model counts with its log-density, here that of a second observation."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            z = pyro.sample("again", dist.Delta(z, log_density=dist.Normal(z, SIGMA).log_prob(x[:, 1])))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x[:, 0])

    x = data(n, 2)
    return Pair(model, factor(n).guide, x, posterior(x)[2])


def labels(n: int) -> Pair:
    """Two further arguments, one a datum and one not."""

    def model(x: torch.Tensor, label: torch.Tensor, offsets: torch.Tensor) -> None:
        normal_model(x - offsets[label])

    def guide(x: torch.Tensor, label: torch.Tensor, offsets: torch.Tensor) -> None:
        normal_guide(x - offsets[label])

    label, offsets = torch.arange(n) % 3, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    x = plain(n).x + offsets[label]
    return Pair(model, guide, x, plain(n).log_px, (label, offsets), {"data_args": (0,)})


# --- discrete latents -------------------------------------------------------------------------------------------------

WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)


def _mixture(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(MEANS[c], SIGMA), obs=x)


def _joint_mixture(x: torch.Tensor) -> torch.Tensor:
    return dist.Normal(MEANS, SIGMA).log_prob(x[..., None]) + WEIGHTS.log()


def discrete_guide(n: int) -> Pair:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=_joint_mixture(x)))

    return Pair(_mixture, guide, data(n), _joint_mixture(data(n)).logsumexp(-1))


def mixed(n: int) -> Pair:
    """The guide samples z from its exact marginal posterior, a mixture, and leaves out the component."""
    spread = math.sqrt(1 + SIGMA**2)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Normal(MEANS[c], 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    def joint(x: torch.Tensor) -> torch.Tensor:
        return dist.Normal(MEANS, spread).log_prob(x[:, None]) + WEIGHTS.log()

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[:, None, None] - MEANS[:, None])
        parts = dist.Normal(MEANS + loc, scale)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=joint(x)), parts))

    return Pair(model, guide, data(n), joint(data(n)).logsumexp(-1))


def mixture(n: int) -> Pair:
    return Pair(_mixture, None, data(n), _joint_mixture(data(n)).logsumexp(-1))


def dependent(n: int) -> Pair:
    """c -> d -> x and c -> x."""
    table = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.4, 0.4, 0.2]], dtype=torch.float64)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            d = pyro.sample("d", dist.Categorical(table[c]))
            pyro.sample("x", dist.Normal(MEANS[d] + c, SIGMA), obs=x)

    x = data(n)
    log_px = dist.Normal(MEANS + torch.arange(3.0)[:, None], SIGMA).log_prob(x[:, None, None]) + table.log()
    return Pair(model, None, x, (log_px.logsumexp(-1) + WEIGHTS.log()).logsumexp(-1))


def inner_enumeration(n: int) -> Pair:
    """A component for each pixel under a switch for each datum: the pixels' sums come before their product."""
    weights = torch.stack([WEIGHTS, WEIGHTS.flip(0)])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
            with pyro.plate("pixels", x.shape[1], dim=-1):
                c = pyro.sample("c", dist.Categorical(weights[b.long()]))
                pyro.sample("x", dist.Normal(MEANS[c] + b, SIGMA), obs=x)

    x = data(n, PIXELS)
    switch = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    per_switch = [
        (dist.Normal(MEANS + b, SIGMA).log_prob(x[..., None]) + weights[b].log()).logsumexp(-1).sum(-1) for b in (0, 1)
    ]
    return Pair(model, None, x, (torch.stack(per_switch, -1) + switch).logsumexp(-1))


def no_latent(n: int) -> Pair:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return Pair(model, None, data(n), dist.Normal(0.0, 1.0).log_prob(data(n)))


#: Pairs with something to draw.
ORACLES: dict[str, Callable[[int], Pair]] = {
    "data -1, pixels -2": pixel_plate(-1, -2),
    "data -2, pixels -1": pixel_plate(-2, -1),
    "data -3, pixels -1": pixel_plate(-3, -1),
    "data -3, pixels -5": pixel_plate(-3, -5),
    "subsample": subsample(both=True),
    "subsample in the model": subsample(both=False),
} | {
    oracle.__name__: oracle
    for oracle in (
        plain,
        event,
        images,
        chain,
        auto_dims,
        either_side,
        entered_twice,
        sequential_pixels,
        sequential_data,
        mask_likelihood,
        mask_both,
        mask_distributions,
        mask_pixels,
        obs_mask,
        scale,
        factor,
        factor_alone,
        delta_density,
        deterministic,
        conditioned,
        conditioned_whole,
        renamed_plate,
        params,
        methods,
        pyro_module,
        labels,
        discrete_guide,
        mixed,
    )
}
#: Pairs without a guide: every latent is summed out.
ENUMERATED: dict[str, Callable[[int], Pair]] = {
    oracle.__name__: oracle for oracle in (mixture, dependent, inner_enumeration, no_latent)
}


def lognormal(scale: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """x ~ N(0, 1) whatever z is: log w is normal with standard deviation ``scale``, and p(x) is known."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_full((), scale), 1.0))

    return model, guide
