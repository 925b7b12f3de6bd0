"""Contenders in NumPyro: the networks of `problems.VAE`, with the same weights, as functions of JAX arrays."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from numpyro.optim import Adam
from torch import nn

from benchmarks.rivals.evidence import best
from benchmarks.rivals.problems import VAE, Problem, make
from benchmarks.rounds import Turn

__all__ = ["JaxVAE", "importance", "update", "whole_epoch"]

RATE = 1e-3
BLOCKS = (1, 2, 5, 10, 20)  # images at once


class JaxVAE:
    """The programs of `problems.VAE` for NumPyro."""

    def __init__(self, pair: VAE) -> None:
        self.latent_dim = pair.latent_dim
        self.encode, self.encoder = translated(pair.encoder)
        self.decode, self.decoder = translated(pair.decoder)
        self.x = jnp.asarray(pair.x.numpy())

    def model(self, x: jax.Array) -> None:
        """p(x, z)."""
        decoder = numpyro.param("decoder", self.decoder)
        with numpyro.plate("data", len(x)):
            zeros = jnp.zeros((len(x), self.latent_dim))
            z = numpyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            logits = self.decode(decoder, z)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(x.ndim - 1), obs=x)

    def guide(self, x: jax.Array) -> None:
        """q(z | x)."""
        encoder = numpyro.param("encoder", self.encoder)
        with numpyro.plate("data", len(x)):
            loc, log_scale = jnp.split(self.encode(encoder, x), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))


def update(problem: Problem, turn: Turn) -> None:
    """``jit(svi.update)``, a call a step."""
    pair, svi, state = start(problem)
    data, size, random = pair.x, problem.batch_size, np.random.default_rng(0)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, order: jax.Array, number: jax.Array) -> tuple[Any, jax.Array]:
        return svi.update(state, data[lax.dynamic_slice_in_dim(order, number * size, size)])

    going = True
    while going:
        order = jnp.asarray(random.permutation(len(data)))
        for number in range(problem.epoch):
            state, loss = step(state, order, number)
        going = turn(loss, problem.epoch)


def whole_epoch(problem: Problem, turn: Turn) -> None:
    """A call an epoch: a loop over its batches within one compiled function, as in NumPyro's example of a VAE."""
    pair, svi, state = start(problem)
    data, size, random = pair.x, problem.batch_size, np.random.default_rng(0)

    @partial(jax.jit, donate_argnums=0)
    def epoch(state: Any, order: jax.Array) -> tuple[Any, jax.Array]:
        def step(number: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            return svi.update(carry[0], data[lax.dynamic_slice_in_dim(order, number * size, size)])

        return lax.fori_loop(0, problem.epoch, step, (state, jnp.zeros(())))

    going = True
    while going:
        state, loss = epoch(state, jnp.asarray(random.permutation(len(data))))
        going = turn(loss, problem.epoch)


def start(problem: Problem) -> tuple[JaxVAE, SVI, Any]:
    """The pair, and `SVI` at the initial weights."""
    pair = JaxVAE(make(problem))
    svi = SVI(pair.model, pair.guide, Adam(RATE), Trace_ELBO())
    return pair, svi, svi.init(jax.random.key(0), pair.x[: problem.batch_size])


def importance(problem: Problem, turn: Turn) -> dict[str, int]:
    """``RenyiELBO(alpha=0)``, the importance-weighted bound for each datum, jitted, at its best number of images."""
    pair = JaxVAE(make(problem))
    params = {"encoder": pair.encoder, "decoder": pair.decoder}
    loss = RenyiELBO(alpha=0.0, num_particles=problem.num_particles).loss
    bound = jax.jit(lambda key, x: -loss(key, params, pair.model, pair.guide, x))

    def work(block: int) -> None:
        bound(jax.random.key(1), pair.x[:block]).block_until_ready()

    turn()
    block = best(work, [b for b in BLOCKS if problem.num_data % b == 0])
    number, going = 0, True
    while going:
        total = 0.0
        for first in range(0, problem.num_data, block):
            number += 1
            total += float(bound(jax.random.key(number), pair.x[first : first + block]))
        going = turn(total / problem.num_data, problem.num_data * problem.num_particles)
    return {"images at once": block}


Network = Callable[[Any, jax.Array], jax.Array]


def translated(net: nn.Module) -> tuple[Network, list[Any]]:
    """A network of ``pyro_lvm.nn`` as a function of its parameters and its input, and the parameters."""
    steps: list[Network] = []
    params: list[Any] = []
    for layer in net.layers:  # type: ignore[union-attr]
        params.append([jnp.asarray(p.detach().numpy()) for p in layer.parameters()])
        steps.append(step_of(layer))
    shape = getattr(net, "image_shape", None)

    def apply(params: list[Any], x: jax.Array) -> jax.Array:
        leading = x.shape[:1]
        if shape is not None and x.shape[1:] == shape:
            x = x.transpose(0, 2, 3, 1)  # channels last, the layout that XLA wants on a CPU
        for step, own in zip(steps, params, strict=True):
            x = step(own, x)
        return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x.reshape(*leading, -1)

    return apply, params


def step_of(layer: nn.Module) -> Network:
    """One layer; images have their channels last inside, and first where they are flattened, as in PyTorch."""
    match layer:
        case nn.Linear():
            return lambda own, x: x @ own[0].T + own[1]
        case nn.Tanh():
            return lambda own, x: jnp.tanh(x)
        case nn.ELU():
            return lambda own, x: jax.nn.elu(x)
        case nn.Flatten():
            return lambda own, x: x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        case nn.Unflatten():
            sizes = layer.unflattened_size
            return lambda own, x: x.reshape(len(x), *sizes).transpose(0, 2, 3, 1)
        case nn.Conv2d():
            return lambda own, x: (
                lax.conv_general_dilated(
                    x, own[0].transpose(2, 3, 1, 0), (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                + own[1]
            )
        case nn.ConvTranspose2d():
            return lambda own, x: (
                lax.conv_general_dilated(
                    x,
                    own[0][:, :, ::-1, ::-1].transpose(2, 3, 0, 1),
                    (1, 1),
                    [(2, 2)] * 2,  # kernel 4 less padding 1 less 1
                    lhs_dilation=(2, 2),
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
                + own[1]
            )
    raise ValueError(f"no translation of {layer}")


def loss_at(pair: JaxVAE, x: np.ndarray, z: np.ndarray) -> float:
    """NumPyro's loss with z handed in."""
    guide = numpyro.handlers.substitute(pair.guide, data={"z": jnp.asarray(z)})
    params = {"encoder": pair.encoder, "decoder": pair.decoder}
    return float(Trace_ELBO().loss(jax.random.key(0), params, pair.model, guide, jnp.asarray(x)))


def log_marginal(pair: JaxVAE, x: np.ndarray, num_particles: int) -> float:
    """Sum of log p-hat by NumPyro."""
    params = {"encoder": pair.encoder, "decoder": pair.decoder}
    loss = RenyiELBO(alpha=0.0, num_particles=num_particles).loss
    value = -float(loss(jax.random.key(0), params, pair.model, pair.guide, jnp.asarray(x)))
    assert math.isfinite(value)
    return value
