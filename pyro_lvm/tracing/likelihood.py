"""log p(x | z) at given latents, per datum."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from pyro_lvm._typing import Model
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.intercept import Trace, is_observed, run
from pyro_lvm.tracing.isolation import evaluation_rng
from pyro_lvm.tracing.particles import Draws, Latent, Layout
from pyro_lvm.tracing.probe import Plan
from pyro_lvm.tracing.sites import Match

__all__ = ["log_likelihood"]


def log_likelihood(plan: Plan, model: Model, batch: Batch, draws: Draws, num_draws: int, at_once: int) -> torch.Tensor:
    """log p(x | z) in nats at M draws, ``(M, N)`` float64; what the guide lacks is summed out.

    Where the pair has one joint result, and no latent is summed out, it is one a datum if one plate of that size holds
    every observed site, else ``(M, 1)``.
    """
    parts = []
    for start in range(0, num_draws, at_once):
        size = min(at_once, num_draws - start)
        some = {n: Latent(d.value[start : start + size], d.rank) for n, d in draws.items()}
        parts.append(_some(plan, model, batch, some, size))
    return torch.cat(parts)


def _some(plan: Plan, model: Model, batch: Batch, draws: Draws, size: int) -> torch.Tensor:
    runner, mode = plan.model_runner(model), plan.model_mode

    def total(names: Callable[[Trace], list[str]]) -> torch.Tensor:
        of = replace(runner, names=names)
        return of.run(batch, mode, size, draws)[0].total.double().expand(size, -1)  # (k, N)

    if plan.match.enumerated:  # log p(x, z) - log p(z), for z may hang on what is summed out
        return total(plan.match.model_sites) - total(partial(_latent_sites, plan.match))
    if plan.model_layout.plate is None:
        runner = replace(runner, layout=_layout(plan.model_layout, model, batch))
    return total(partial(_observed))


def _latent_sites(match: Match, trace: Trace) -> list[str]:
    return [name for name in match.model_sites(trace) if not is_observed(trace[name])]


def _observed(trace: Trace) -> list[str]:
    return [name for name, site in trace.items() if is_observed(site)]


def _layout(joint: Layout, model: Model, batch: Batch) -> Layout:
    """That of the one plate which holds every observed site, if there is one of the size of x."""
    with evaluation_rng(0):
        trace = run(model, batch.args)
    frames = [{f.name: f for f in trace[n]["cond_indep_stack"] if f.size == len(batch)} for n in _observed(trace)]
    shared = [name for name in (frames[0] if frames else {}) if all(name in each for each in frames)]
    return Layout(shared[0], frames[0][shared[0]].dim, joint.nesting) if len(shared) == 1 else joint
