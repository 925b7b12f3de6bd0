"""The KL term of a latent in closed form, as torch has it, and when it is not the KL term that a bound needs."""

from typing import Any

import torch
from torch.distributions import HalfCauchy, HalfNormal, TransformedDistribution, kl_divergence
from torch.distributions.kl import _KL_REGISTRY  # what a class of a user's own was registered for

from pyro_lvm._checks import refuse
from pyro_lvm._typing import Guide, Model
from pyro_lvm.objectives.dependence import descendants, parents
from pyro_lvm.tracing.intercept import Site, Values, base_distribution, is_latent, run
from pyro_lvm.tracing.isolation import evaluation_rng
from pyro_lvm.tracing.probe import Run
from pyro_lvm.tracing.sites import has_log_density, is_delta, mask_of

__all__ = ["closed_forms", "factor_in_words", "family", "not_its_own", "scale_of"]

_TRACE = "or pass loss=Trace_ELBO()."


def closed_forms(model: Model, guide: Guide, pair: Run, names: list[str]) -> dict[str, tuple[torch.Tensor | None, str]]:
    """For each latent KL(q || p) of one run, None where torch has no closed form, and what is wrong with it.

    To be called without gradients and without validation; the pair may be run again.
    """
    found = {n: _closed_form(pair.guide[n], pair.model[n]) for n in names}
    feeding = _feeding(model, guide, pair, [n for n in names if found[n] is not None and not is_delta(pair.guide[n])])
    faults = {n: _fault(n, kl, pair, feeding.get(n, set())) for n, kl in found.items() if kl is not None}
    return {n: (kl, faults.get(n, "")) for n, kl in found.items()}


def family(fn: Any) -> str:
    """The name of a distribution under ``to_event``, ``expand`` and ``mask``."""
    return type(base_distribution(fn)).__name__


def _closed_form(guide: Site, model: Site) -> torch.Tensor | None:
    try:
        return torch.as_tensor(kl_divergence(guide["fn"], model["fn"]))
    except NotImplementedError:
        return None


def _fault(name: str, kl: torch.Tensor, pair: Run, feeding: set[str]) -> str:
    """The first thing that makes the closed form of a latent wrong in the loss."""
    guide, model = pair.guide[name], pair.model[name]
    site, fn = f"latent {name!r}", guide["fn"]
    if feeding:
        others = sorted(feeding)
        cure = f"Draw the latents of the guide in the order of the model, {_TRACE}"
        got = f"a prior given {others}, which the guide draws given {name!r}"
        return refuse(site, "a prior that depends on no latent that the guide draws from it", got, cure)
    if tuple(kl.shape) != tuple(fn.batch_shape):
        cure = "Put the site in the same plates, with the same event dimensions, in both programs."
        return refuse(site, f"a KL of the guide's batch shape {tuple(fn.batch_shape)}", tuple(kl.shape), cure)
    for word, factor in {"scale": scale_of, "mask": mask_of}.items():
        mine, theirs = factor(guide), factor(model)
        if not _same(mine, theirs, kl.shape):
            cure = f"TraceMeanField_ELBO takes the guide's for both: give both programs the same {word}, {_TRACE}"
            got = f"{factor_in_words(theirs)} in the model and {factor_in_words(mine)} in the guide"
            return refuse(site, f"one {word} in model and guide", got, cure)
    if wrong := not_its_own(fn, model["fn"]):
        register = f"Register one with torch.distributions.register_kl, {_TRACE}"
        cure = "Pass loss=Trace_ELBO()." if is_delta(guide) else register
        return refuse(site, "the KL of its own distributions", wrong, cure)
    return ""


def scale_of(site: Site) -> torch.Tensor:
    """The weight of a site's log-density in a loss."""
    return torch.as_tensor(site["scale"], dtype=torch.float64)


def _same(one: torch.Tensor, other: torch.Tensor, shape: torch.Size) -> bool:
    one, other = one.expand(shape), other.expand(shape)
    return torch.allclose(one, other) if one.is_floating_point() else torch.equal(one, other)


def factor_in_words(factor: torch.Tensor) -> str:
    """A scale or a mask, short."""
    values = factor.unique().tolist()
    return f"{values[0]:g}" if len(values) == 1 else f"{len(values)} values, mean {float(factor.double().mean()):.3g}"


def not_its_own(q: Any, p: Any) -> str:
    """Why the closed form that torch finds for two distributions is that of others; empty if it is not."""
    q, p = base_distribution(q), base_distribution(p)
    if is_delta({"fn": q}):
        return "a Delta whose log_density it leaves out" if has_log_density({"fn": q}) else ""
    for position, fn in enumerate((q, p)):
        if changed := _overriding(type(fn), position):
            return f"that of a base class of {changed}, which draws or scores in its own way"
    if isinstance(q, TransformedDistribution) and isinstance(p, TransformedDistribution):
        symmetric = any(isinstance(q, half) and isinstance(p, half) for half in (HalfNormal, HalfCauchy))
        if not symmetric and not all(t.bijective for t in q.transforms):
            return f"that of the {family(q.base_dist)} under transforms that are not one-to-one"
        return not_its_own(q.base_dist, p.base_dist)
    return ""


def _overriding(kind: type, position: int) -> str:
    """A class from outside of torch and Pyro that changes draws or densities of the class whose KL it gets."""
    registered = {types[position] for types in _KL_REGISTRY}
    for cls in kind.__mro__:
        if cls in registered or cls.__module__.startswith(("torch.", "pyro.")):
            return ""
        if {"log_prob", "rsample", "sample"} & vars(cls).keys():
            return cls.__name__
    return ""


def _feeding(model: Model, guide: Guide, pair: Run, exact: list[str]) -> dict[str, set[str]]:
    """For each latent with a closed form, those that its prior depends on and that the guide draws from it.

    That needs a pair of latents which the two programs draw in opposite orders; without one nothing is run.
    """
    mine, theirs = ({n: i for i, n in enumerate(t)} for t in (pair.guide, pair.model))
    shared = [n for n in mine if n in theirs]
    if not any(theirs[j] < theirs[i] and mine[i] < mine[j] for i in exact for j in shared):
        return {}
    values = _draws(guide, pair, 1)
    redraws = [_draws(guide, pair, seed) for seed in (2, 3, 4)]
    guide_parents = parents(guide, pair.batch.args, values, redraws)
    model_parents = parents(model, pair.batch.args, values, redraws)
    return {i: model_parents[i] & descendants(i, guide_parents) for i in exact}


def _draws(guide: Guide, pair: Run, seed: int) -> Values:
    with evaluation_rng(seed):
        return {n: s["value"] for n, s in run(guide, pair.batch.args).items() if is_latent(s)}
