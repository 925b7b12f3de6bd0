"""Contenders of importance sampling in PyTorch, Pyro and pythae; a piece of work is one draw for one image.

Each finds the chunk that is best for it in its first turn, when no other is at work.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.importance import vectorized_importance_weights
from torch.utils.data import Dataset

import pyro_lvm as lvm
from benchmarks.rivals.problems import VAE, Problem, make
from benchmarks.rounds import Turn, growth

__all__ = [
    "call_plain",
    "compiled",
    "decoder",
    "hand_written",
    "hand_written_log_marginal",
    "peak",
    "pyro_traces",
    "pyro_vectorized",
    "pythae",
    "stream",
    "stream_compiled",
    "stream_half",
    "stream_plain",
    "stream_tf32",
]

CHUNKS = (1, 2, 5, 10, 20, 50, 100)  # particles at once, for all images
COMPILED_CHUNKS = (5, 20, 100)


def evaluate(problem: Problem, pair: VAE, x: Any = None, **options: Any) -> lvm.LogMarginal:
    """This package."""
    x = pair.x if x is None else x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lvm.UnreliableEstimateWarning)  # a guide that was never trained
        return lvm.log_marginal(
            pair.model, pair.guide, x, num_particles=problem.num_particles, progress=False, **options
        )


class Stream(Dataset[torch.Tensor]):
    """The images over and over, without end, which takes turns where an estimate reads them."""

    def __init__(self, problem: Problem, pair: VAE, turn: Turn) -> None:
        self.x, self.num_particles, self.turn = pair.x.cpu(), problem.num_particles, turn
        self.last, self.mark = 0, torch.zeros((), device=problem.device)  # whoever reads it waits for the device

    def __len__(self) -> int:
        return 1_000_000

    def __getitems__(self, rows: list[int]) -> list[torch.Tensor]:
        """Some images; those that were read before are done."""
        if self.last and not self.turn(self.mark, self.last * self.num_particles):
            raise KeyboardInterrupt
        self.last = len(rows)
        return list(self.x[torch.tensor(rows) % len(self.x)])


def stream(problem: Problem, turn: Turn, **options: Any) -> dict[str, Any]:
    """This package, with everything that `log_marginal` does, in the middle of one long call."""
    pair = make(problem)
    record = evaluate(problem, pair, Stream(problem, pair, turn), device=problem.device, **options)
    return {name: record.provenance[name] for name in ("tables", "chunks")}


def stream_plain(problem: Problem, turn: Turn) -> dict[str, Any]:
    """``log_marginal``."""
    return stream(problem, turn)


def stream_compiled(problem: Problem, turn: Turn) -> dict[str, Any]:
    """``log_marginal(..., compile=True)``."""
    return stream(problem, turn, compile=True)


def stream_tf32(problem: Problem, turn: Turn) -> dict[str, Any]:
    """The same with products in TF32."""
    torch.set_float32_matmul_precision("high")
    return stream(problem, turn, compile=True)


def stream_half(problem: Problem, turn: Turn) -> dict[str, Any]:
    """The same with the decoder's products in bfloat16."""
    return stream(problem, turn, compile=True, model_dtype=torch.bfloat16)


def call_plain(problem: Problem, turn: Turn) -> None:
    """``log_marginal``; a piece of work is the whole call."""
    pair = make(problem)
    while turn(evaluate(problem, pair).mean):
        pass


def peak(problem: Problem, turn: Turn) -> dict[str, float]:
    """Memory that one call takes above what the process held before, in 10^6 bytes."""
    pair = make(problem)
    with torch.no_grad():
        pair.decoder(torch.zeros(10, pair.latent_dim))  # threads and buffers of the first product
    megabytes = growth(lambda: evaluate(problem, pair))
    turn()
    return {"megabytes": megabytes}


def best(work: Callable[[int], object], sizes: Sequence[int]) -> int:
    """The size at which a unit of it takes least time."""

    def seconds(size: int) -> float:
        work(size)
        times = []
        for _ in range(3):
            before = time.perf_counter()
            work(size)
            times.append(time.perf_counter() - before)
        return min(times) / size

    return min(sizes, key=seconds)


@torch.no_grad()
def decoder(problem: Problem, turn: Turn) -> dict[str, int]:
    """The bare network, at draws that are there: no estimator that decodes each draw in float32 is faster than it."""
    pair = make(problem)

    def work(chunk: int) -> torch.Tensor:
        return pair.decoder(z[:chunk])

    z = torch.randn(max(CHUNKS), problem.num_data, pair.latent_dim)
    turn()
    chunk = best(work, CHUNKS)
    while turn(work(chunk)[0, 0, 0], chunk * problem.num_data):
        pass
    return {"particles at once": chunk}


Weights = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


@torch.no_grad()
def hand_written_log_marginal(pair: VAE, weights: Weights, num_particles: int, chunk: int) -> torch.Tensor:
    """log p-hat ``(N,)`` as one writes it: the encoder once, then particles in chunks."""
    loc, log_scale = pair.encoder(pair.x).chunk(2, -1)
    totals = [weights(pair.x, loc, log_scale, chunk).logsumexp(0) for _ in range(num_particles // chunk)]
    return torch.stack(totals).logsumexp(0) - math.log(num_particles)


def loop(problem: Problem, turn: Turn, pair: VAE, weights: Weights, chunks: Sequence[int]) -> dict[str, int]:
    """Whole estimates by weights of the best of some numbers of particles."""
    turn()
    sizes = [chunk for chunk in chunks if problem.num_particles % chunk == 0]
    chunk = best(lambda chunk: hand_written_log_marginal(pair, weights, chunk, chunk), sizes)
    going = True
    while going:
        value = hand_written_log_marginal(pair, weights, problem.num_particles, chunk).mean()
        going = turn(value, problem.num_data * problem.num_particles)
    return {"particles at once": chunk}


def hand_written(problem: Problem, turn: Turn) -> dict[str, int]:
    """PyTorch without Pyro."""
    pair = make(problem)
    return loop(problem, turn, pair, pair.log_weights, CHUNKS)


def compiled(problem: Problem, turn: Turn) -> dict[str, int]:
    """The same with the weights by Inductor, for each size anew."""
    pair = make(problem)
    return loop(problem, turn, pair, torch.compile(pair.log_weights, dynamic=False), COMPILED_CHUNKS)


@torch.no_grad()
def pyro_vectorized(problem: Problem, turn: Turn) -> dict[str, int]:
    """Pyro's own function, at its best number of draws a call; its weights are of all images together."""
    pyro.enable_validation(False)
    pair = make(problem)

    def work(chunk: int) -> torch.Tensor:
        return vectorized_importance_weights(pair.model, pair.guide, pair.x, num_samples=chunk, max_plate_nesting=1)[0]

    turn()
    chunk = best(work, CHUNKS[1:])
    while turn(work(chunk)[0], chunk * problem.num_data):
        pass
    return {"particles at once": chunk}


@torch.no_grad()
def pyro_traces(problem: Problem, turn: Turn) -> None:
    """A trace of the guide and a replayed trace of the model for each draw."""
    pyro.enable_validation(False)
    pair = make(problem)
    going = True
    while going:
        guide = poutine.trace(pair.guide).get_trace(pair.x)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(pair.x)
        guide.compute_log_prob()
        model.compute_log_prob()
        nodes = model.nodes
        weights = nodes["z"]["log_prob"] + nodes["x"]["log_prob"] - guide.nodes["z"]["log_prob"]  # (N,)
        going = turn(weights.mean(), problem.num_data)


@torch.no_grad()
def pythae(problem: Problem, turn: Turn, num_images: int = 5) -> dict[str, int]:
    """``get_nll`` of a few images, at its best ``batch_size``; K is a multiple of it, else fewer are drawn."""
    pair = make(problem)
    vae = as_pythae(pair)
    num_particles = problem.num_particles
    sizes = [size for size in (10, 50, 100, 200, 250, 500, 1000) if num_particles % size == 0]
    turn()
    size = best(lambda size: vae.get_nll(pair.x[:1], n_samples=size, batch_size=size), sizes)
    x = pair.x[:num_images]
    while turn(vae.get_nll(x, n_samples=num_particles, batch_size=size), len(x) * num_particles):
        pass
    return {"particles at once": size}


def as_pythae(pair: VAE) -> Any:
    """The networks as a model of pythae; its decoder returns probabilities."""
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = pair.encoder

        def forward(self, x: torch.Tensor) -> Any:
            loc, log_scale = self.net(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = pair.decoder

        def forward(self, z: torch.Tensor) -> Any:
            return ModelOutput(reconstruction=self.net(z).sigmoid())

    shape = tuple(pair.x.shape[1:])
    config = VAEConfig(input_dim=shape, latent_dim=pair.latent_dim, reconstruction_loss="bce")
    return PythaeVAE(config, encoder=Encoder(), decoder=Decoder()).eval()
