"""Whether data lie in the support of their likelihood; a density elsewhere is none."""

import torch

from pyro_lvm.errors import SupportError
from pyro_lvm.tracing.intercept import (
    Site,
    Trace,
    bounds,
    element_constraint,
    in_words,
    is_observed,
    is_real,
    outside_support,
    support,
)

__all__ = ["has_bounded_data", "outside_data", "outside_error", "support_moves"]


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


def outside_error(site: Site, where: str = "") -> SupportError:
    """The error for an observed site that `outside_data` has named."""
    constraint, value = element_constraint(support(site["fn"])), site["value"]
    outside = value[~constraint.check(value)]  # numbers, or vectors where a constraint is of a whole vector
    example = next((each for each in outside if not each.isnan().any()), outside[0]).tolist()
    return SupportError(
        f"observed site {site['name']!r}: expected values in {in_words(constraint)}, got {example}{where}. Transform "
        "the data (grey pixels under a Bernoulli: binarise them) or take another likelihood: no density is there.",
        finding="data-outside-support",
    )


def support_moves(one: Site, other: Site) -> bool:
    """Whether the support of a site is another in another run: then it is latents that are out of place."""
    ends, others = (bounds(support(site["fn"])) or () for site in (one, other))
    return any(not torch.equal(*map(torch.as_tensor, pair)) for pair in zip(ends, others, strict=True))
