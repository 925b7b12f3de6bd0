"""Contenders of the training step in PyTorch and Pyro. Every step takes a batch of a new permutation each epoch."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim

import pyro_lvm as lvm
from benchmarks.rivals.problems import Problem, make
from benchmarks.rounds import Turn

__all__ = ["compiled", "cuda_graph", "fit_captured", "fit_plain", "hand_written", "svi", "svi_unvalidated"]

RATE = 1e-3


def batches(x: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Batches without end."""
    while True:
        for rows in torch.randperm(len(x)).to(x.device).split(batch_size):
            yield x[rows]


def run(step: Callable[[torch.Tensor], Any], x: torch.Tensor, problem: Problem, turn: Turn) -> None:
    """Step until the turns are over; as in `fit`, a turn ends with an epoch."""
    stream = batches(x, problem.batch_size)
    going = True
    while going:
        for _ in range(problem.epoch):
            loss = step(next(stream))
        going = turn(loss, problem.epoch)


def fit(problem: Problem, turn: Turn, compile: bool) -> dict[str, Any]:
    """This package, with everything that `fit` does; turns are taken in a callback."""
    pair = make(problem)

    def on_epoch(state: Any) -> None:
        if not turn(state.loss, problem.epoch):
            state.stop("measured")

    result = lvm.fit(
        pair.model,
        pair.guide,
        pair.x,
        batch_size=problem.batch_size,
        num_steps=10**9,  # long enough for whatever a run has to earn back
        compile=compile,
        callbacks=[on_epoch],
        progress=False,
    )
    return {"steps": result.num_steps, "captured": result.captured, "notes": list(result.notes)}


def fit_captured(problem: Problem, turn: Turn) -> dict[str, Any]:
    """``fit(..., compile=True)``."""
    return fit(problem, turn, compile=True)


def fit_plain(problem: Problem, turn: Turn) -> dict[str, Any]:
    """``fit``."""
    return fit(problem, turn, compile=False)


def svi(problem: Problem, turn: Turn, validate: bool = True) -> None:
    """`SVI.step` as in Pyro's examples."""
    pyro.enable_validation(validate)
    pair = make(problem)
    guide = pair.guide or (lambda x: None)
    stepper = SVI(pair.model, guide, PyroOptim(torch.optim.Adam, {"lr": RATE}), pair.elbo)
    run(stepper.step, pair.x, problem, turn)


def svi_unvalidated(problem: Problem, turn: Turn) -> None:
    """`SVI.step` with ``pyro.enable_validation(False)``."""
    svi(problem, turn, validate=False)


def hand_written(problem: Problem, turn: Turn) -> None:
    """PyTorch without Pyro."""
    pair = make(problem)
    run(updates(pair.loss, pair.parameters()), pair.x, problem, turn)


def compiled(problem: Problem, turn: Turn) -> None:
    """The loss, its gradients and its random numbers by Inductor; Adam by its fused kernel."""
    pair = make(problem)
    run(updates(torch.compile(pair.loss), pair.parameters()), pair.x, problem, turn)


def updates(loss_fn: Callable[[torch.Tensor], torch.Tensor], params: Any) -> Callable[[torch.Tensor], float]:
    """One update by a loss; returns the loss, as `SVI.step` does."""
    optimizer = torch.optim.Adam(params, lr=RATE, fused=True)

    def step(x: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_fn(x)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def cuda_graph(problem: Problem, turn: Turn) -> None:
    """The whole step, Adam too, as one CUDA graph; losses stay on the device."""
    pair = make(problem)
    optimizer = torch.optim.Adam(pair.parameters(), lr=RATE, fused=True, capturable=True)
    x = pair.x[: problem.batch_size].clone()

    def update() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = pair.loss(x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            update()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = update()

    def step(batch: torch.Tensor) -> torch.Tensor:
        x.copy_(batch)
        graph.replay()
        return loss

    run(step, pair.x, problem, turn)
