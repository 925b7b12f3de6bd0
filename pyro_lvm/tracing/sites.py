"""How the sites of a guide fit those of its model, and what is refused."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta

from pyro_lvm._checks import refuse
from pyro_lvm.errors import SiteError, SupportError
from pyro_lvm.tracing.intercept import (
    Site,
    Trace,
    base_distribution,
    bounds,
    element_constraint,
    is_factor,
    is_latent,
    is_observed,
    is_real,
    is_unobserved,
    outside_support,
    run,
    site_log_prob,
    support,
)
from pyro_lvm.tracing.isolation import evaluation_rng

__all__ = [
    "MAX_SUPPORT",
    "Match",
    "check_determined",
    "check_free",
    "check_observes",
    "check_shapes",
    "check_spread",
    "guide_sites",
    "has_log_density",
    "is_delta",
    "mask_of",
    "match_sites",
]

#: Largest number of joint values of the latent sites that are enumerated because the guide lacks them.
MAX_SUPPORT = 4096


@dataclass(frozen=True)
class Match:
    """The roles of a pair's sites.

    Attributes:
        sampled: model latents that the guide samples.
        enumerated: discrete model latents that the guide lacks.
        free: sites whose density cancels, for the model itself draws them: the unobserved half of an ``obs_mask``.
        determined: ``Delta`` sites that only the model has.
        check_support: sampled latents whose guide can leave the support of the model.
    """

    sampled: tuple[str, ...]
    enumerated: tuple[str, ...]
    free: tuple[str, ...]
    determined: tuple[str, ...]
    check_support: frozenset[str]

    def model_sites(self, trace: Trace) -> list[str]:
        """Sites of a model trace whose density counts; a ``Delta`` that only the model has counts with its own."""
        return [n for n, s in trace.items() if (is_latent(s) or is_observed(s)) and n not in self.free]


def is_delta(site: Site) -> bool:
    """A site whose value is determined by what came before."""
    return isinstance(base_distribution(site["fn"]), Delta)


def has_log_density(site: Site) -> bool:
    """A `Delta` whose draw was made elsewhere, and which carries the log-density of that draw."""
    return bool((base_distribution(site["fn"]).log_density != 0).any())


def guide_sites(trace: Trace) -> list[str]:
    """Sites of a guide trace whose density counts: latents, auxiliary ones, factors."""
    return [n for n, s in trace.items() if is_latent(s) or is_observed(s)]


def match_sites(model: Trace, guide: Trace) -> Match:
    """Assign each site its role.

    Raises:
        SiteError: a latent is missing from the guide, the guide has one that the model lacks, or a latent is missing
            and the model observes nothing.
        SupportError: the guide's support does not cover the prior's, so that every answer would be biased.
    """
    latents = {n: s for n, s in model.items() if is_latent(s)}
    proposals = {n: s for n, s in guide.items() if is_latent(s)}
    _check_guide_sites(model, latents, guide, proposals)
    lacking = {n: s for n, s in latents.items() if n not in proposals}
    free = tuple(n for n in lacking if is_unobserved(n))
    determined = tuple(n for n, s in lacking.items() if n not in free and is_delta(s))
    missing = [n for n in lacking if n not in free + determined]
    check_observes(model, missing)
    cardinality = 1
    for name in missing:
        cardinality *= _cardinality(name, latents[name], list(proposals))
    if cardinality > MAX_SUPPORT:
        raise SiteError(
            f"guide: expected the latent sites {missing} of the model, got {list(proposals)}; they have {cardinality} "
            f"joint values, more than the {MAX_SUPPORT} that are enumerated. Sample them in the guide.",
            finding="missing-site",
        )
    sampled = tuple(n for n in latents if n in proposals)
    for name in sampled:
        _check_masks(name, latents[name], proposals[name])
    unlike = {n for n in sampled if not _covers(n, latents[n]["fn"], proposals[n]["fn"])}
    return Match(sampled, tuple(missing), free, determined, frozenset(unlike))


def mask_of(site: Site) -> torch.Tensor:
    """The mask of a site together with that of its distribution."""
    device = site["value"].device
    mask = torch.as_tensor(True if site["mask"] is None else site["mask"], device=device)
    inner = getattr(site["fn"], "_mask", None)
    return mask if inner is None else mask & torch.as_tensor(inner, device=device)


def check_shapes(names: Sequence[str], model: Trace, guide: Trace) -> None:
    """Each element of a latent has a draw of its own; log_prob would broadcast one draw over several.

    Raises:
        SiteError: the guide's values of a site have another shape than the model's.
    """
    for name in names:
        value, fn = guide[name]["value"], model[name]["fn"]
        if _without_ones(value.shape) != _without_ones(fn.shape()):
            expected = f"values of shape {tuple(fn.shape())}, those of the model (plates and event)"
            cure = "Make its parameters as large, e.g. torch.zeros(D) for D dimensions, inside the same plates."
            raise SiteError(refuse(f"guide site {name!r}", expected, tuple(value.shape), cure), finding="event-dims")


def check_spread(names: Sequence[str], guide: Trace) -> None:
    """Draws of a real latent differ, in the precision that they are made in.

    Raises:
        SupportError: a standard deviation is lost beside its mean: all draws are one number.
    """
    for name in names:
        fn = guide[name]["fn"]
        if is_delta(guide[name]) or not is_real(support(fn)):
            continue
        try:
            mean, stddev = fn.mean, fn.stddev
        except (NotImplementedError, AttributeError):  # it has none in closed form
            continue
        mask = mask_of(guide[name])[(..., *[None] * fn.event_dim)]
        lost = (stddev < mean.abs() * torch.finfo(mean.dtype).eps / 2) & mask
        if bool(lost.any()):
            got = f"a standard deviation of {float(stddev[lost][0]):.1g} at {float(mean[lost][0]):.3g}"
            expected = f"a spread that {str(mean.dtype).removeprefix('torch.')} can show beside the mean"
            cure = "All draws are one number, and weights all alike: bound the scale from below, or compute in float64."
            raise SupportError(refuse(f"guide site {name!r}", expected, got, cure), finding="point-mass")


def check_observes(model: Trace, missing: Iterable[str]) -> None:
    """A latent that the guide lacks, in a model that observes nothing, is one whose data were forgotten.

    Raises:
        SiteError: there is one.
    """
    names = list(missing)
    if names and not any(is_observed(site) for site in model.values()):
        where = repr(names[0]) if len(names) == 1 else f"one of {names}"
        cure = f"Write obs=x at {where}, which the guide lacks."
        raise SiteError(refuse("model", "at least one observed site", "none", cure), finding="no-data")


def _without_ones(shape: torch.Size) -> torch.Size:
    """A shape without what stands for itself in front of it."""
    return shape[next((i for i, size in enumerate(shape) if size != 1), len(shape)) :]


def _check_masks(name: str, model: Site, guide: Site) -> None:
    """A latent that only one program masks leaves half of its weight."""
    if is_delta(guide) or is_delta(model):
        return
    ours, theirs = torch.broadcast_tensors(mask_of(guide), mask_of(model))
    if not torch.equal(ours, theirs):
        counts = [
            f"{int((~mask).sum())} of {mask.numel()} elements masked in the {of}"
            for mask, of in ((theirs, "model"), (ours, "guide"))
        ]
        cure = "Mask the site alike in both, `with poutine.mask(mask=...)`"
        cure += ": where the value is missing, `mask=~obs_mask`." if is_unobserved(name) else "."
        raise SiteError(
            f"latent site {name!r}: expected one mask in model and guide, got {' and '.join(counts)}: the weight "
            f"p(x, z)/q(z) would lack one of the two densities. {cure}",
            finding="masks",
        )


def check_free(model: Callable[..., Any], args: Sequence[Any], match: Match) -> None:
    """Nothing depends on the missing values that the model draws itself, so that they cancel in every sum.

    Raises:
        SiteError: an observed site, or another latent, depends on one.
    """
    if not match.free:
        return
    with torch.no_grad(), evaluation_rng(0):
        values = {n: s["value"] for n, s in run(model, args).items() if is_latent(s) and n not in match.free}
    totals = []
    for seed in range(1, 17):  # a single missing bit would often be drawn alike by two
        with torch.no_grad(), evaluation_rng(seed):
            trace = run(model, args, values=values)
        totals.append(torch.stack([site_log_prob(trace[n]).sum() for n in match.model_sites(trace)]).sum())
    if not torch.allclose(torch.stack(totals[:-1]), torch.stack(totals[1:]), equal_nan=True):
        raise SiteError(
            f"latent sites {list(match.free)}: expected missing values that nothing depends on, got log p(x, z) that "
            "changes with them. Only a guide can weigh them: use log_marginal, with guide=None if the prior is to draw "
            "them, or write the latent as a site of its own."
        )


def _suggest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _cardinality(name: str, site: Site, available: list[str]) -> int:
    fn = site["fn"]
    if getattr(fn, "has_enumerate_support", False):
        return int(fn.enumerate_support(expand=False).shape[0])
    raise SiteError(
        f"guide: expected every latent site of the model, got {available} without {name!r}."
        f"{_suggest(name, available)} Sample {name!r} in the guide; only discrete sites with a finite support may be "
        "left out, to be enumerated.",
        finding="missing-site",
    )


def _check_guide_sites(model: Trace, latents: dict[str, Site], guide: Trace, proposals: dict[str, Site]) -> None:
    auxiliary = [n for n, s in proposals.items() if n not in latents and s["infer"].get("is_auxiliary")]
    for name, site in guide.items():
        if is_observed(site) and not is_factor(site):
            raise SiteError(
                f"guide site {name!r}: expected no observed site, got obs=. Observe data in the model only.",
                finding="observed-in-guide",
            )
        if not is_latent(site) or name in latents or name in auxiliary:
            continue
        if name in model:
            raise SiteError(
                f"guide site {name!r}: expected latent sites of the model, got one that the model observes. Remove it.",
                finding="observed-in-guide",
            )
        without = [n for n in latents if n not in proposals]
        raise SiteError(
            f"guide site {name!r}: expected latent sites of the model {list(latents)}, got a site that the model lacks."
            f"{_suggest(name, without)} Rename or remove it.",
            finding="extra-site",
        )
    _check_auxiliary(auxiliary, proposals)


def _check_auxiliary(auxiliary: list[str], proposals: dict[str, Site]) -> None:
    """Auxiliary draws are a change of variables of the latents that they feed, or the weight is not a weight."""
    deltas = [n for n, s in proposals.items() if is_delta(s)]
    points = [n for n in deltas if n in auxiliary or not (auxiliary or has_log_density(proposals[n]))]
    if points:
        raise SupportError(
            f"guide site {points[0]!r}: expected a density, got a point mass (Delta), which covers none of the prior's "
            "support. Use a guide with spread, e.g. AutoNormal.",
            finding="point-mass",
        )
    sizes = [sum(proposals[n]["value"].numel() for n in names) for names in (auxiliary, deltas)]
    if sizes[0] > sizes[1] or (auxiliary and not deltas):
        raise SiteError(
            f"guide sites {auxiliary} are auxiliary: expected that each determines a latent site as a `Delta` with a "
            f"`log_density`, got {sizes[0]} auxiliary elements for {sizes[1]} determined ones. Without a density of "
            "the auxiliary draw given z, the weight p(x, z)/q(z) is not defined: make z itself the sampled site.",
            finding="auxiliary-draw",
        )


def check_determined(guide: Callable[..., Any], args: Sequence[Any], trace: Trace) -> set[str]:
    """Each `Delta` of a guide is a change of variables of its auxiliary draws, and nothing else depends on these.

    Returns:
        `Delta` sites whose noise no site of the guide draws: they carry draw and log-density from elsewhere.

    Raises:
        SupportError: a `Delta` without a log-density that no draw moves is a point mass.
        SiteError: an auxiliary draw moves no `Delta`, or a site that is not one, or one that ignores the Jacobian.
    """
    auxiliary = {n: s["value"] for n, s in trace.items() if is_latent(s) and s["infer"].get("is_auxiliary")}
    deltas = {n for n, s in trace.items() if is_latent(s) and is_delta(s)}
    if not auxiliary:
        return deltas
    with torch.enable_grad():
        leaves = {n: v.detach().clone().requires_grad_(v.is_floating_point()) for n, v in auxiliary.items()}
        rerun = run(guide, args, values=leaves)
        moved_by = {n: _moved_by(rerun[n], leaves) for n, s in rerun.items() if is_latent(s) and n not in leaves}
    for name, by in moved_by.items():
        if name in deltas and not by and not has_log_density(rerun[name]):
            raise SupportError(
                f"guide site {name!r}: expected a density, got a point mass (Delta) that no auxiliary draw moves. "
                "Use a guide with spread, e.g. AutoNormal.",
                finding="point-mass",
            )
        if by and name not in deltas:
            raise SiteError(
                f"guide site {name!r}: expected a `Delta` with a `log_density`, for it depends on the auxiliary draw "
                f"{sorted(by)}, got {type(rerun[name]['fn']).__name__}. Without a density of that draw given z the "
                "weight p(x, z)/q(z) is not defined.",
                finding="auxiliary-draw",
            )
    idle = set(leaves).difference(*moved_by.values())
    if idle:
        message = f"guide sites {sorted(idle)} are auxiliary: expected that each moves a `Delta`, got none."
        raise SiteError(message, finding="auxiliary-draw")
    return {n for n in deltas if not moved_by[n]}


def _moved_by(site: Site, leaves: dict[str, torch.Tensor]) -> set[str]:
    """The auxiliary draws that a site depends on."""
    delta = is_delta(site)
    output = site["value"] if delta else site["fn"].log_prob(site["value"].detach())
    inputs = {n: leaf for n, leaf in leaves.items() if leaf.requires_grad}
    if not (output.requires_grad and inputs):
        return set()
    # Unequal weights, for the elements of a simplex have a constant sum.
    weights = torch.linspace(1.0, 2.0, output.numel(), dtype=output.dtype, device=output.device).reshape(output.shape)
    slopes = _slopes((output * weights).sum(), inputs)
    moved = {n for n, slope in slopes.items() if bool((slope != 0).any())}
    if delta and moved and not has_log_density(site):
        units = [s[s != 0] for s in _slopes(output.sum(), inputs).values()]
        if not all(torch.allclose(s.abs(), torch.ones_like(s), atol=1e-4) for s in units):
            raise SiteError(
                f"guide site {site['name']!r}: expected a `Delta` with the `log_density` of its change of variables, "
                f"minus log |dz/da|, got none. Pass `log_density=`, or make {site['name']!r} itself the sampled site.",
                finding="auxiliary-draw",
            )
    return moved


def _slopes(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(output, list(inputs.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(inputs.items(), found, strict=True)}


def _covers(name: str, prior: Any, proposal: Any) -> bool:
    """Whether the guide's draws stay in the prior's support; raises where the guide leaves part of it out."""
    theirs, ours = support(prior), support(proposal)
    if ours is None or theirs is None:
        return theirs is None or is_real(theirs)
    outer, inner = bounds(theirs), bounds(ours)
    draws = prior.sample(torch.Size([64]))
    if _cuts(outer, inner) or bool(outside_support(proposal, draws).any()):
        raise SupportError(
            f"guide site {name!r}: expected a support that covers the prior's, {theirs}, got {ours}. Whatever the "
            "guide cannot propose is missing from log p(x): use a family with the prior's support.",
            finding="narrow-guide",
        )
    alike = type(element_constraint(theirs)) is type(element_constraint(ours))
    return is_real(theirs) or (alike and not _cuts(inner, outer))


Bounds = tuple[float | torch.Tensor, float | torch.Tensor] | None


def _cuts(outer: Bounds, inner: Bounds) -> bool:
    """Whether an interval ``inner`` lacks part of ``outer``; False where one of them is no interval."""
    if outer is None or inner is None:
        return False
    low, high = (torch.as_tensor(outer[i]) for i in (0, 1))
    return bool((torch.as_tensor(inner[0]) > low).any() or (torch.as_tensor(inner[1]) < high).any())
