"""How the sites of a guide fit those of its model, and what is refused."""

import difflib
from dataclasses import dataclass

import torch
from pyro.distributions import Delta, Unit

from pyro_lvm.errors import SiteError, SupportError
from pyro_lvm.tracing.intercept import (
    Site,
    Trace,
    base_distribution,
    element_constraint,
    is_latent,
    is_observed,
    is_real,
    is_unobserved,
    outside_support,
    support,
)

__all__ = ["MAX_SUPPORT", "Match", "guide_sites", "has_bounded_data", "match_sites", "outside_data"]

#: Largest number of joint values of the latent sites that are enumerated because the guide lacks them.
MAX_SUPPORT = 4096


@dataclass(frozen=True)
class Match:
    """The roles of a pair's sites.

    Attributes:
        sampled: model latents that the guide samples.
        enumerated: discrete model latents that the guide lacks.
        free: sites whose density cancels: the unobserved half of an ``obs_mask``, and ``Delta`` latents of the model.
        check_support: sampled latents whose guide can leave the support of the model.
        cardinality: joint number of values of the enumerated sites.
    """

    sampled: tuple[str, ...]
    enumerated: tuple[str, ...]
    free: tuple[str, ...]
    check_support: frozenset[str]
    cardinality: int

    def model_sites(self, trace: Trace) -> list[str]:
        """Sites of a model trace whose density counts."""
        return [n for n, s in trace.items() if (is_latent(s) or is_observed(s)) and not self.is_free(n, s)]

    def is_free(self, name: str, site: Site) -> bool:
        """Whether a site is drawn from the model with its density left out."""
        return name in self.free or (is_latent(site) and _is_free(name, site) and name not in self.sampled)


def guide_sites(trace: Trace) -> list[str]:
    """Sites of a guide trace whose density counts: latents, auxiliary ones, factors."""
    return [n for n, s in trace.items() if is_latent(s) or is_observed(s)]


def match_sites(model: Trace, guide: Trace) -> Match:
    """Assign each site its role.

    Raises:
        SiteError: a latent is missing from the guide, or the guide has one that the model lacks.
        SupportError: the guide's support does not cover the prior's, so that every answer would be biased.
    """
    latents = {n: s for n, s in model.items() if is_latent(s)}
    proposals = {n: s for n, s in guide.items() if is_latent(s)}
    _check_guide_sites(model, latents, guide, proposals)
    free = tuple(n for n, s in latents.items() if n not in proposals and _is_free(n, s))
    missing = [n for n in latents if n not in proposals and n not in free]
    cardinality = 1
    for name in missing:
        cardinality *= _cardinality(name, latents[name], list(proposals))
    if cardinality > MAX_SUPPORT:
        raise SiteError(
            f"guide: expected the latent sites {missing} of the model, got {list(proposals)}; they have {cardinality} "
            f"joint values, more than the {MAX_SUPPORT} that are enumerated. Sample them in the guide."
        )
    sampled = tuple(n for n in latents if n in proposals)
    unlike = {n for n in sampled if not _covers(n, latents[n]["fn"], proposals[n]["fn"])}
    return Match(sampled, tuple(missing), free, frozenset(unlike), cardinality)


def _is_free(name: str, site: Site) -> bool:
    return is_unobserved(name) or isinstance(base_distribution(site["fn"]), Delta)


def _suggest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0 if len(names) == 1 else 0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _cardinality(name: str, site: Site, available: list[str]) -> int:
    fn = site["fn"]
    if getattr(fn, "has_enumerate_support", False):
        return int(fn.enumerate_support(expand=False).shape[0])
    raise SiteError(
        f"guide: expected every latent site of the model, got {available} without {name!r}."
        f"{_suggest(name, available)} Sample {name!r} in the guide; only discrete sites with a finite support may be "
        "left out, to be enumerated."
    )


def _check_guide_sites(model: Trace, latents: dict[str, Site], guide: Trace, proposals: dict[str, Site]) -> None:
    auxiliary = [n for n, s in proposals.items() if n not in latents and s["infer"].get("is_auxiliary")]
    for name, site in guide.items():
        if is_observed(site) and not isinstance(base_distribution(site["fn"]), Unit):
            raise SiteError(
                f"guide site {name!r}: expected no observed site, got obs=. Observe data in the model only."
            )
        if not is_latent(site) or name in latents or name in auxiliary:
            continue
        if name in model:
            raise SiteError(
                f"guide site {name!r}: expected latent sites of the model, got one that the model observes. Remove it."
            )
        without = [n for n in latents if n not in proposals]
        raise SiteError(
            f"guide site {name!r}: expected latent sites of the model {list(latents)}, got a site that the model lacks."
            f"{_suggest(name, without)} Rename or remove it."
        )
    deltas = [n for n in proposals if isinstance(base_distribution(proposals[n]["fn"]), Delta)]
    if auxiliary:
        _check_auxiliary(auxiliary, deltas, guide)
    elif deltas:
        raise SupportError(
            f"guide site {deltas[0]!r}: expected a density, got a point mass (Delta), which covers none of the prior's "
            "support. Use a guide with spread, e.g. AutoNormal."
        )


def _check_auxiliary(auxiliary: list[str], deltas: list[str], guide: Trace) -> None:
    """Auxiliary draws are a change of variables of the latents they feed, or the weight is not a weight."""
    points = [n for n in auxiliary if n in deltas]
    if points:
        raise SupportError(
            f"guide site {points[0]!r}: expected a density, got a point mass (Delta), which covers none of the prior's "
            "support. Use a guide with spread, e.g. AutoNormal."
        )
    sizes = [sum(guide[n]["value"].numel() for n in names) for names in (auxiliary, deltas)]
    if sizes[0] > sizes[1] or not deltas:
        raise SiteError(
            f"guide sites {auxiliary} are auxiliary: expected that each determines a latent site as a `Delta` with a "
            f"`log_density`, got {sizes[0]} auxiliary elements for {sizes[1]} determined ones. Without a density of "
            "the auxiliary draw given z, the weight p(x, z)/q(z) is not defined: make z itself the sampled site."
        )


def _covers(name: str, prior: torch.distributions.Distribution, proposal: torch.distributions.Distribution) -> bool:
    """Whether the guide's draws stay in the prior's support; raises where the guide leaves part of it out."""
    theirs, ours = support(prior), support(proposal)
    if ours is None or theirs is None:
        return theirs is None or is_real(theirs)
    kinds = [element_constraint(c) for c in (theirs, ours)]
    bounds = [(getattr(c, "lower_bound", None), getattr(c, "upper_bound", None)) for c in kinds]
    draws = prior.sample(torch.Size([64]))
    if not is_real(ours) and (_tighter(*bounds) or bool(outside_support(proposal, draws).any())):
        raise SupportError(
            f"guide site {name!r}: expected a support that covers the prior's, {theirs}, got {ours}. Whatever the "
            "guide cannot propose is missing from log p(x): use a family with the prior's support."
        )
    return is_real(theirs) or (type(kinds[0]) is type(kinds[1]) and not _tighter(*reversed(bounds)))


def _tighter(outer: tuple[object, object], inner: tuple[object, object]) -> bool:
    """Whether a bound of ``inner`` cuts into ``outer``."""

    def less(a: object, b: object) -> bool:
        return a is not None and b is not None and bool((torch.as_tensor(a) < torch.as_tensor(b)).any())

    return less(outer[0], inner[0]) or less(inner[1], outer[1])


def has_bounded_data(trace: Trace) -> bool:
    """Whether an observed site has a support that a value could lie outside of."""
    constraints = [support(s["fn"]) for s in trace.values() if is_observed(s)]
    return any(c is not None and not is_real(c) for c in constraints)


def outside_data(trace: Trace) -> dict[str, torch.Tensor]:
    """Observed sites whose value lies outside the likelihood's support, with where; masked elements do not count."""
    found = {}
    for name, site in trace.items():
        if is_observed(site):
            outside = outside_support(site["fn"], site["value"])
            mask = site["mask"]
            outside = outside if mask is None else outside & torch.as_tensor(mask, device=outside.device)
            if bool(outside.any()):
                found[name] = outside
    return found
