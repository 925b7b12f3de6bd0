"""Which latents the distribution of a site depends on, found by changing one draw at a time."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from pyro_lvm.tracing.intercept import Site, Trace, Values, base_distribution, is_latent, run
from pyro_lvm.tracing.isolation import evaluation_rng
from pyro_lvm.tracing.sites import is_delta

__all__ = ["descendants", "moved", "parents", "rerun"]


def parents(
    program: Callable[..., Any], args: Sequence[Any], values: Values, redraws: Sequence[Values]
) -> dict[str, set[str]]:
    """For each latent of a program, those of ``values`` that its parameters change with while all others stay.

    A draw is replaced by those of ``redraws``, several, for one of a discrete latent may be the value that was there;
    and, if it is continuous, by NaN, which goes through weights that are still zero.
    """
    before = rerun(program, args, values)
    latents = [name for name, site in before.items() if is_latent(site)]
    found: dict[str, set[str]] = {name: set() for name in latents}
    for changed in (name for name in latents if name in values):
        for other in _others(values[changed], [draws[changed] for draws in redraws]):
            with suppress(Exception):  # NaN may be refused anywhere
                after = rerun(program, args, {**values, changed: other})
                for name in latents[latents.index(changed) + 1 :]:
                    if moved(before[name], after[name], values[name]):
                        found[name].add(changed)
    return found


def descendants(name: str, parents_of: Mapping[str, set[str]]) -> set[str]:
    """The latents that depend on ``name``, directly or through others; ``parents_of`` is in the order of the run."""
    below = {name}
    for child, above in parents_of.items():
        if above & below:
            below.add(child)
    return below - {name}


def rerun(program: Callable[..., Any], args: Sequence[Any], values: Values) -> Trace:
    """A run at these values; noise from outside of ``pyro.sample`` is the same in each."""
    with evaluation_rng(0):
        return run(program, args, values=values)


def _others(value: torch.Tensor, redraws: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*redraws, *([torch.full_like(value, torch.nan)] if value.is_floating_point() else [])]


def moved(before: Site, after: Site, value: torch.Tensor) -> bool:
    """Whether the distribution of a site is another one."""
    one, other = _fingerprint(before, value), _fingerprint(after, value)
    return one.shape != other.shape or not torch.allclose(one, other, equal_nan=True)


def _fingerprint(site: Site, value: torch.Tensor) -> torch.Tensor:
    """Numbers that change with the parameters of a site."""
    fn = site["fn"]
    if is_delta(site):
        return base_distribution(fn).v
    try:
        return fn.log_prob(value)
    except (KeyError, NotImplementedError):  # a flow that only knows the density of its last draw
        with evaluation_rng(0):
            return fn.sample()
