"""What `SVI` minimises: the loss object, and the programs as the loss sees them.

A mini-batch of B data is scaled to the N of the data set where a latent lies outside the data plate, as
L = -(N/B) sum_n log p(x_n, z_n | w) / q(z_n) - log p(w) / q(w): otherwise the prior of w counts N/B times too much.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO

from pyro_lvm._checks import refuse
from pyro_lvm.errors import PlateError, SiteError
from pyro_lvm.objectives.default import drawn_latents, model_and_loss, summed_latents
from pyro_lvm.objectives.mean_field import check_mean_field, uses_mean_field
from pyro_lvm.tracing.enumerated import check_enumerated
from pyro_lvm.tracing.intercept import Trace, is_factor, is_latent, is_observed, is_unobserved, run, scaled_plate
from pyro_lvm.tracing.isolation import eval_mode, evaluation_rng, validation
from pyro_lvm.tracing.leaves import meets_strays, stray_names
from pyro_lvm.tracing.plates import nesting
from pyro_lvm.tracing.questions import batch_plate
from pyro_lvm.training.diagnosis import check_follows_batches, outside_sites

__all__ = ["Objective", "check_summed_out", "make_objective"]

logger = logging.getLogger("pyro_lvm")

Program = Callable[..., Any]
Args = tuple[Any, ...]


@dataclass(frozen=True)
class Objective:
    """The arguments of `SVI`, and by what a loss is divided.

    Attributes:
        model: the model, where needed with scaled sites, enumerated latents, or in eval mode (frozen).
        guide: the guide, likewise.
        loss: a Pyro loss object or a function ``loss(model, guide, *args)``.
        total: the number of data that a loss stands for; None where it is that of the batch.
        outside: observed sites with values outside of their support in the first batch.
        notes: what a user should know of the loss on this pair.
    """

    model: Program
    guide: Program
    loss: Any
    total: int | None
    outside: list[str]
    notes: tuple[str, ...] = ()

    def num_data(self, batch: Args) -> int:
        """The number of data that the loss of this batch stands for."""
        return self.total or len(batch[0])


def make_objective(
    model: Program, guide: Program, batch: Args, loss: Any, update: str, num_data: int | None
) -> Objective:
    """Look at one run of the pair on ``batch`` and decide; runs both programs.

    Raises:
        SiteError: the guide samples what the model does not have; no loss is given and the guide lacks a latent that
            cannot be enumerated; the guide lacks a latent and the model observes nothing; or the loss is a
            ``TraceMeanField_ELBO``, which would be wrong on this pair; or values of a latent that is summed out have
            moved to another dimension.
        PlateError: the guide has parameters for each datum and a batch is not all data, or the loss must be scaled to
            the data set, and cannot be.
    """
    check_follows_batches(model, guide, batch, num_data)
    guide_trace, model_trace = _run_pair(model, guide, batch)
    _check_not_swapped(model_trace, guide_trace)
    _check_no_surplus(model_trace, guide_trace)
    programs = {"model": model, "guide": guide}
    total = _scaled_by_itself(model_trace, len(batch[0]), num_data)
    if total is None and num_data != len(batch[0]):
        plate = _plate_to_scale(model, guide, batch)
        if plate is not None:
            if num_data is None:
                cure = "Use a data set with a length, or give the plate the size of the data set and `subsample=`."
                raise PlateError(refuse("data", f"a known size, for plate {plate!r}", "a stream without one", cure))
            if _is_messenger(guide):
                cure = "Give the plate the size of the data set and `subsample=`, or use all data in each step."
                raise PlateError(refuse("guide", f"a function, to scale plate {plate!r}", "a GuideMessenger", cure))
            total = num_data
            programs = {name: _scaled(program, plate, num_data) for name, program in programs.items()}
    frozen = {"model": "guide", "guide": "model"}.get(update)
    if frozen and not _is_messenger(programs[frozen]):
        programs[frozen] = _in_eval_mode(programs[frozen])
    notes = _drawn_notes(model_trace, guide_trace, loss)
    check_summed_out(model, guide, batch, model_trace, guide_trace, loss)
    programs["model"], loss = model_and_loss(programs["model"], model, model_trace, guide_trace, loss)
    if isinstance(loss, ELBO):  # a function may see to parameters of its own
        notes += _stray_notes(model, guide, batch, update)
    if uses_mean_field(loss):
        notes += _mean_field_notes(programs["model"], programs["guide"], batch)
    return Objective(programs["model"], programs["guide"], loss, total, outside_sites(model_trace), notes)


def check_summed_out(model: Program, guide: Program, batch: Args, seen: Trace, drawn: Trace, loss: Any) -> None:
    """Latents that a Pyro loss sums out, or that are left to `fit`, keep to dimensions of their own.

    Raises:
        SiteError: one does not.
    """
    names = summed_latents(seen, drawn, loss)
    free = [name for name in seen if is_unobserved(name)]
    values = {name: site["value"] for name, site in drawn.items() if is_latent(site)}
    with eval_mode(model, guide), torch.no_grad(), evaluation_rng(0), validation(False):
        check_enumerated(model, batch, values, names, free, nesting(seen, drawn))


def _mean_field_notes(model: Program, guide: Program, batch: Args) -> tuple[str, ...]:
    """Refuse a pair on which ``TraceMeanField_ELBO`` is wrong; say which of its KL terms are estimates."""
    sites = check_mean_field(model, guide, batch).sites
    sampled = [f"{site.name!r} ({site.families})" for site in sites if site.method != "analytic"]
    if not sampled:
        return ()
    return (f"TraceMeanField_ELBO takes the KL term from one draw, not in closed form, at {', '.join(sampled)}",)


def _drawn_notes(model: Trace, guide: Trace, loss: Any) -> tuple[str, ...]:
    """Say which discrete latents a loss draws from the prior, because the guide lacks them."""
    drawn = drawn_latents(model, guide, loss)
    if not drawn:
        return ()
    kind = type(getattr(loss, "wrapped", loss)).__name__
    return (
        f"the guide lacks the discrete latents {drawn}, which {kind} draws from the model's prior: its "
        "bound is looser than with these summed out. loss=None sums them out, as does TraceEnum_ELBO of a model under "
        "config_enumerate; for KLAnnealing sample them in the guide",
    )


def _stray_notes(model: Program, guide: Program, batch: Args, update: str) -> tuple[str, ...]:
    """Say which tensors of the half that is trained require a gradient and are left as they are."""
    found: dict[str, list[str]] = {}
    with suppress(Exception):  # a pair that does not run with gradients fails at its first step, in its own words
        found = stray_names(model, guide, batch, update) if meets_strays(model, guide, batch) else {}
    names = [f"{', '.join(map(repr, sorted(own)))} of a {kind}" for kind, own in found.items() if kind]
    names += [f"a tensor of shape {shape}" for shape in found.get("", ())]
    if not names:
        return ()
    return (
        f"what requires a gradient is in no param store, so that nothing trains it: {', '.join(names)}. Register a "
        'network by pyro.module("name", module) and a tensor by pyro.param("name", tensor); requires_grad_(False) says '
        "that it is to stay as it is",
    )


def _check_no_surplus(model: Trace, guide: Trace) -> None:
    """A latent that only the guide has adds its entropy to the loss, which then is no bound."""
    mine = [n for n, s in guide.items() if is_latent(s) and not s["infer"].get("is_auxiliary")]
    surplus = [n for n in mine if n not in model]
    if surplus:
        latents = [n for n, s in model.items() if is_latent(s)]
        cure = 'Give both the same name, or mark an auxiliary one with infer={"is_auxiliary": True}.'
        message = refuse("guide", f"no more than the latent sites {latents} of the model", surplus, cure)
        raise SiteError(message, finding="extra-site")


def _check_not_swapped(model: Trace, guide: Trace) -> None:
    """Data are observed by the model; a guide alone with data would be pulled away from them."""
    data = [n for n, s in guide.items() if is_observed(s) and not is_factor(s)]
    if data and not any(is_observed(site) for site in model.values()):
        message = refuse("model", "an observed site", f"none, and {data} in the guide", "Pass fit(model, guide, data).")
        raise SiteError(message, finding="no-data")


def _is_messenger(program: Program) -> bool:
    """A guide that runs its own model, which Pyro knows by its class: it cannot be wrapped."""
    return hasattr(program, "get_traces")


def _run_pair(model: Program, guide: Program, batch: Args) -> tuple[Trace, Trace]:
    with torch.no_grad():
        guide_trace = run(guide, batch)
        values = {name: site["value"] for name, site in guide_trace.items() if is_latent(site)}
        return guide_trace, run(model, batch, values=values)


def _scaled_by_itself(model: Trace, batch_size: int, num_data: int | None) -> int | None:
    """Size of the data plate, where the model declares it with ``subsample=`` or ``subsample_size=``."""
    frames = {f for s in model.values() if is_observed(s) for f in s["cond_indep_stack"]}
    sizes = {f.full_size for f in frames if f.full_size not in (None, f.size)}
    own = {f.full_size for f in frames if f.full_size in sizes and (f.size == batch_size or f.full_size == num_data)}
    return max(own, default=None)


def _plate_to_scale(model: Program, guide: Program, batch: Args) -> str | None:
    """The data plate, where a latent lies outside of it."""
    try:
        return batch_plate(model, guide, *batch)
    except Exception as error:  # noqa: BLE001 - the pair runs on fewer rows than it may ever see
        logger.warning("no data plate found, the loss of a mini-batch is taken as it is: %s", str(error).split("\n")[0])
        return None


def _scaled(program: Program, plate: str, num_data: int) -> Program:
    """``program`` with the sites in ``plate`` scaled from the size of the batch to ``num_data``."""

    def scaled(*args: Any) -> Any:
        return scaled_plate(program, plate, num_data / len(args[0]))(*args)

    return scaled


def _in_eval_mode(program: Program) -> Program:
    """A frozen program: neither its parameters nor its batch statistics change."""

    def frozen(*args: Any) -> Any:
        with eval_mode(program):
            return program(*args)

    return frozen
