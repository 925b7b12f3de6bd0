"""Running a program under Pyro's effect handlers, and the log-density of one site.

The only place that knows Pyro's messages. Everything above works on traces and on plain tensors.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution, Unit, constraints
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch.distributions import biject_to

__all__ = [
    "PARTICLES",
    "Site",
    "Trace",
    "Values",
    "base_distribution",
    "bijection",
    "bounds",
    "element_constraint",
    "indexed",
    "in_words",
    "is_factor",
    "is_latent",
    "is_observed",
    "is_real",
    "is_unobserved",
    "outside_support",
    "replaced",
    "run",
    "scaled_plate",
    "site_log_prob",
    "support",
    "vectorised_frames",
    "without",
]

#: Name of the plate that holds the particles.
PARTICLES = "_pyro_lvm_particles"

#: What Pyro knows of one statement: "fn", "value", "mask", "cond_indep_stack", "infer", ...
Site = Mapping[str, Any]
#: name -> site, in the order of the run
Trace = dict[str, Site]
#: name -> value of latent sites
Values = Mapping[str, torch.Tensor]


def is_latent(site: Site) -> bool:
    """A random variable that is not observed."""
    return site["type"] == "sample" and not site["is_observed"]


def is_observed(site: Site) -> bool:
    """An observed random variable or a factor; ``pyro.deterministic`` has no density and is neither."""
    return site["type"] == "sample" and site["is_observed"] and not site["infer"].get("_deterministic")


def is_factor(site: Site) -> bool:
    """A ``pyro.factor``, which is observed and holds no data."""
    return isinstance(base_distribution(site["fn"]), Unit)


def is_unobserved(name: str) -> bool:
    """The site that ``obs_mask=`` makes for the values that are missing."""
    return name.endswith("_unobserved")


def vectorised_frames(site: Site) -> list[Any]:
    """The plates around a site that have a tensor dimension."""
    return [frame for frame in site["cond_indep_stack"] if frame.dim is not None]


def base_distribution(fn: Any) -> Any:
    """The distribution under ``to_event``, ``expand`` and ``mask``."""
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn


class _Substitute(Messenger):
    """Gives latent sites the values that it is handed."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class _BatchShapes(Messenger):
    """Records the batch rank of each site before the plates outside of this handler expand it."""

    def __init__(self, ranks: dict[str, int]) -> None:
        super().__init__()
        self.ranks = ranks

    def _pyro_sample(self, msg: Any) -> None:
        self.ranks[msg["name"]] = len(getattr(msg["fn"], "batch_shape", ()))


class _ScalePlate(Messenger):
    """Multiplies the scale of every site inside one plate."""

    def __init__(self, plate: str, factor: float) -> None:
        super().__init__()
        self.plate, self.factor = plate, factor

    def _pyro_sample(self, msg: Any) -> None:
        if any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.factor


class _Indices(Messenger):
    """Gives a plate that would draw a subsample the indices of it."""

    def __init__(self, plate: str, indices: torch.Tensor) -> None:
        super().__init__()
        self.plate, self.indices = plate, indices

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.plate and msg["value"] is None:
            msg["value"], msg["done"] = self.indices, True


class _Replace(Messenger):
    """Hands the distribution of each latent to a function, and takes what that returns in its place."""

    def __init__(self, replace: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self.replace = replace

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg)):
            msg["fn"] = self.replace(msg["name"], msg["fn"])


def replaced(program: Callable[..., Any], replace: Callable[[str, Any], Any]) -> Callable[..., Any]:
    """``program`` whose latent ``name`` has the distribution ``replace(name, fn)`` in the place of ``fn``.

    ``fn`` has the shape of the program's own plates, not that of plates outside of it.
    """

    def other(*args: Any) -> Any:
        with _Replace(replace):
            return program(*args)

    return other


def indexed(program: Callable[..., Any], plate: str) -> Callable[..., Any]:
    """``program`` with a further first argument: the indices that ``plate`` would otherwise draw by itself."""

    def chosen(indices: torch.Tensor, *args: Any) -> Any:
        with _Indices(plate, indices):
            return program(*args)

    return chosen


def scaled_plate(program: Callable[..., Any], plate: str, factor: float) -> Callable[..., Any]:
    """``program`` with the log-densities of every site inside ``plate`` multiplied by ``factor``."""

    def scaled(*args: Any) -> Any:
        with _ScalePlate(plate, factor):
            return program(*args)

    return scaled


def without(program: Callable[..., Any], hidden: Callable[[str], bool]) -> Callable[..., Any]:
    """``program`` without the sites of which ``hidden(name)`` says so: drawn as before, and seen by nobody."""
    return poutine.block(program, hide_fn=lambda msg: hidden(str(msg["name"])))


def run(  # noqa: PLR0913
    program: Callable[..., Any],
    args: Sequence[Any],
    *,
    values: Values | None = None,
    num_particles: int | None = None,
    nesting: int = 0,
    enumerated: Iterable[str] = (),
    ranks: dict[str, int] | None = None,
) -> Trace:
    """Trace ``program(*args)``, hidden from handlers outside.

    Args:
        program: a model or a guide.
        args: its arguments.
        values: what latent sites are set to; the others are drawn.
        num_particles: run inside a particle plate of this size, to the left of all others.
        nesting: number of batch dimensions that the pair's own plates use.
        enumerated: names of discrete sites to enumerate in parallel, to the left of the particles.
        ranks: filled with the batch rank of each site before the particle plate expands it.
    """
    particle_dims = 0 if num_particles is None else 1
    names = frozenset(enumerated)
    trace = poutine.trace()
    with ExitStack() as stack:
        stack.enter_context(poutine.block(hide_fn=lambda msg: msg["type"] != "param"))
        stack.enter_context(trace)
        stack.enter_context(_Substitute(values or {}))
        if names:
            stack.enter_context(poutine.enum(first_available_dim=-nesting - particle_dims - 1))
            configure = poutine.infer_config(
                config_fn=lambda site: {"enumerate": "parallel"} if site["name"] in names else {}
            )
            stack.enter_context(configure)
        if num_particles is not None:
            stack.enter_context(pyro.plate(PARTICLES, num_particles, dim=-nesting - 1))
        if ranks is not None:
            stack.enter_context(_BatchShapes(ranks))
        program(*args)
    sites: Trace = dict(prune_subsample_sites(trace.trace).nodes)
    if hasattr(program, "get_traces"):  # a GuideMessenger runs its model, observations and all
        sites = {name: site for name, site in sites.items() if not is_observed(site)}
    return sites


def site_log_prob(site: Site, check_support: bool = False) -> torch.Tensor:
    """log-density of a site with its mask and without its scale; the batch shape of the site.

    A mask says which data there are, a scale how training weighs them; neither of the two log-densities that a Pyro
    trace computes makes that cut. A variable that is summed out keeps its density under a mask, so that its values
    count 1 together and not each (as in `TraceEnum_ELBO`). With ``check_support`` a value outside the support gets
    log-density ``-inf``, which distributions return only by chance.
    """
    fn, value, mask = site["fn"], site["value"], site["mask"]
    if site["infer"].get("_enumerate_dim") is not None and is_latent(site):
        fn, mask = fn.base_dist if isinstance(fn, MaskedDistribution) else fn, None
    log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
    if check_support:
        log_prob = log_prob.masked_fill(outside_support(fn, value), -torch.inf)
    return scale_and_mask(log_prob, 1.0, mask)


def support(fn: Any) -> Any:
    """The constraint that a distribution's values satisfy, or None where it does not say."""
    if isinstance(base_distribution(fn), Delta):
        return None
    try:
        return fn.support
    except (NotImplementedError, AttributeError):
        return None


def outside_support(fn: Any, value: torch.Tensor) -> torch.Tensor:
    """Where ``value`` has density zero under ``fn``; batch shape. NaN is unknown, and a mask counts."""
    constraint = support(fn)
    if constraint is None or is_real(constraint):
        return torch.zeros((), dtype=torch.bool, device=value.device)
    if isinstance(fn, MaskedDistribution):
        return outside_support(fn.base_dist, value) & torch.as_tensor(fn._mask, device=value.device)
    if isinstance(fn, torch.distributions.Independent):
        outside = outside_support(fn.base_dist, value)
        inner = min(fn.reinterpreted_batch_ndims, outside.dim())
        return outside.flatten(outside.dim() - inner).any(-1) if inner else outside
    outside = ~constraint.check(value)
    unknown = value.isnan()
    for _ in range(value.dim() - outside.dim()):
        unknown = unknown.any(-1)
    return outside & ~unknown


def bounds(constraint: Any) -> tuple[float | torch.Tensor, float | torch.Tensor] | None:
    """Least and largest value that satisfy a constraint on one element, or None where it is no interval."""
    constraint = element_constraint(constraint)
    if isinstance(constraint, type(constraints.boolean)):
        return 0.0, 1.0
    if is_real(constraint) or hasattr(constraint, "lower_bound") or hasattr(constraint, "upper_bound"):
        return getattr(constraint, "lower_bound", -torch.inf), getattr(constraint, "upper_bound", torch.inf)
    return None


def element_constraint(constraint: Any) -> Any:
    """The constraint on one element, under ``to_event``."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return constraint


def in_words(constraint: Any) -> str:
    """The constraint on one element, for a message; bounds that differ between elements by the widest."""
    constraint = element_constraint(constraint)
    low, high = getattr(constraint, "lower_bound", -torch.inf), getattr(constraint, "upper_bound", torch.inf)
    if not (isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor)):
        return str(constraint)
    least, most = float(torch.as_tensor(low).min()), float(torch.as_tensor(high).max())
    return f"{type(constraint).__name__.lstrip('_')} from {least:g} to {most:g}"


def bijection(constraint: Any) -> Any:
    """From the real numbers to a continuous support; None where torch knows none, as to a bounded mixture's."""
    try:
        return biject_to(constraints.real if is_real(constraint) else constraint)
    except NotImplementedError:
        return None


def is_real(constraint: Any) -> bool:
    """Whether the constraint is the whole real line or space."""
    return isinstance(element_constraint(constraint), type(constraints.real))
