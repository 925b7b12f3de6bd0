"""What an objective finds out about a pair, once for each shape of its arguments, from a few runs without a trace."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pyro_lvm._checks import data_tensor, refuse
from pyro_lvm._typing import DataPlate, Guide, Model
from pyro_lvm.errors import PlateError, SiteError
from pyro_lvm.tracing.batch import Batch, make_batch
from pyro_lvm.tracing.intercept import Site, Trace, indexed, is_latent, is_observed
from pyro_lvm.tracing.isolation import eval_mode
from pyro_lvm.tracing.params import anchor
from pyro_lvm.tracing.plates import common_plates
from pyro_lvm.tracing.probe import Plan, probe_pair, run_or_explain

__all__ = ["Setting", "look", "modes", "needs_score", "own_subsample", "scale_of", "signature"]


@dataclass
class Setting:
    """How a pair is run on arguments of some shapes.

    Attributes:
        plan: modes, data plate, roles of the sites.
        per_datum: which arguments have one row per datum.
        scale: what multiplies the bound, N / B in a plate that subsamples.
        subsample: name, N and B of a plate that draws its own subsample; x is all data then, and the indices that it
            draws take the place of the data.
        not_reparameterized: guide sites whose draws carry no gradient to the parameters that they depend on.
        checked: the estimator of the gradient has been tried.
    """

    plan: Plan
    per_datum: tuple[bool, ...]
    scale: float
    subsample: tuple[str, int, int] | None
    not_reparameterized: list[str]
    checked: bool = False

    def batch(self, args: tuple[Any, ...]) -> Batch:
        """The arguments of a step, with fresh indices where the plate would draw them."""
        if self.subsample is None:
            return Batch(args, self.per_datum)
        _, full_size, size = self.subsample
        return Batch((torch.randperm(full_size)[:size], *args), self.per_datum)

    def program(self, program: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """The model or the guide as a function of what `batch` returns."""
        return _program(program, kwargs, self.subsample)


def _program(
    program: Callable[..., Any], kwargs: dict[str, Any], subsample: tuple[str, int, int] | None
) -> Callable[..., Any]:
    program = partial(program, **kwargs) if kwargs else program
    return indexed(program, subsample[0]) if subsample else program


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What two calls must share to be run in the same way."""

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.shape, value.dtype, value.device
        return (type(value), value) if isinstance(value, bool | int | float | str) else type(value)

    return tuple(map(of, args)), tuple((name, of(value)) for name, value in sorted(kwargs.items()))


def modes(model: Model, guide: Guide) -> tuple[bool, ...]:
    """Whether each module behind the pair is in training mode: dropout gives a guide another density at each run."""
    owners = [owner for owner in map(anchor, (model, guide)) if isinstance(owner, torch.nn.Module)]
    return tuple(part.training for owner in owners for part in owner.modules())


def look(
    model: Model, guide: Guide, args: tuple[Any, ...], kwargs: dict[str, Any], data_plate: DataPlate, vectorize: bool
) -> Setting:
    """Run the pair in eval mode, and return random numbers to where they were.

    Raises:
        DataTypeError, ShapeError: the first argument is no data.
        PlateError: no single plate holds the data, or another plate, or a joint weight, is subsampled.
        SiteError: the sites do not fit together, or are scaled unlike one another.
    """
    x = data_tensor("x, the first argument", args[0] if args else None)
    batch = make_batch(x, args[1:])
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), eval_mode(model, guide):
        with torch.enable_grad():
            pair = run_or_explain(_program(model, kwargs, None), _program(guide, kwargs, None), batch)
            not_reparameterized = [n for n, site in pair.guide.items() if is_latent(site) and needs_score(site)]
        subsample = None if data_plate is None else own_subsample(pair.model, len(x), data_plate)
        if subsample:
            name, full_size, size = subsample
            batch = Batch((torch.randperm(full_size)[:size], *args), (True, *(False for _ in args)))
        model, guide = (_program(program, kwargs, subsample) for program in (model, guide))
        plan = probe_pair(model, guide, batch, data_plate, "auto" if vectorize else False)
    scale = _common_scale(pair.model, plan.model_layout.plate, "model", ())
    _common_scale(pair.guide, plan.guide_layout.plate, "guide", (1.0, scale))
    return Setting(plan, batch.per_datum, scale, subsample, not_reparameterized)


def needs_score(site: Site) -> bool:
    """Whether draws depend on a parameter, and their gradient does not know."""
    if site["fn"].has_rsample:
        return False
    return bool(site["fn"].log_prob(site["value"].detach()).requires_grad)


def own_subsample(trace: Trace, num_data: int, requested: str) -> tuple[str, int, int] | None:
    """Name, N and B of the plate around every observed site that draws B of the N rows of x."""
    observed = [site for site in trace.values() if is_observed(site)]
    names = [name for name in common_plates(observed) if requested in ("auto", name)]
    frames = {f.name: f for site in observed for f in site["cond_indep_stack"] if f.name in names and f.dim is not None}
    if any(f.size == num_data for f in frames.values()):
        return None
    found = [(f.name, f.full_size, f.size) for f in frames.values() if f.full_size == num_data]
    return found[0] if len(found) == 1 else None


def _common_scale(trace: Trace, plate: str | None, program: str, allowed: tuple[float, ...]) -> float:
    """The scale of all sites of a program, which the data plate alone may have by subsampling.

    ``allowed`` are the scales that the guide may have: the model's, or none.
    """
    sites = {n: s for n, s in trace.items() if is_latent(s) or is_observed(s)}
    inner = {f.name for s in sites.values() for f in s["cond_indep_stack"] if _subsamples(f) and f.name != plate}
    if inner:
        cure = (
            "The log-mean-exp of log-weights that are scaled up from a subsample is too high on average, and no bound: "
            "subsample the data plate alone, with every latent inside of it, or use Trace_ELBO."
        )
        raise PlateError(refuse(f"{program} plates {sorted(inner)}", "plates of full size", "a subsample", cure))
    scales = {name: scale_of(name, site["scale"]) for name, site in sites.items()}
    expected = next(iter(scales.values()), 1.0)
    same = all(math.isclose(scale, expected, rel_tol=1e-6) for scale in scales.values())
    if not same or (allowed and not any(math.isclose(expected, a, rel_tol=1e-6) for a in allowed)):
        cure = (
            "A weight p(x, z) / q(z | x) has no scales: scale model and guide alike, which multiplies the loss. To "
            "anneal, use KLAnnealing; for mini-batches beside a latent outside the data plate, use Trace_ELBO."
        )
        raise SiteError(refuse(f"scales of the {program}'s sites", "one for all sites of the pair", scales, cure))
    return expected


def _subsamples(frame: Any) -> bool:
    return frame.full_size is not None and frame.full_size != frame.size


def scale_of(name: str, scale: Any) -> float:
    """The scale of a site as a number."""
    if torch.as_tensor(scale).numel() != 1:
        cure = "Weight the data by drawing them, or use Trace_ELBO."
        raise SiteError(refuse(f"site {name!r}", "a scale that is one number", tuple(scale.shape), cure))
    return float(scale)
