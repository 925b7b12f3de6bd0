"""What is wrong with a pair on a batch: parameters for each datum under mini-batches, and Pyro's errors in named ones.

An error is only renamed where it is sure what it means; any other passes as it came.
"""

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from pyro_lvm._checks import refuse
from pyro_lvm.errors import NonFiniteError, PlateError, PyroLVMError, SiteError
from pyro_lvm.tracing.batch import Batch, make_batch
from pyro_lvm.tracing.intercept import (
    Trace,
    is_latent,
    is_observed,
    run,
    site_log_prob,
    vectorised_frames,
)
from pyro_lvm.tracing.isolation import validation
from pyro_lvm.tracing.plates import find_guide_plate, find_plate
from pyro_lvm.tracing.probe import MISMATCH, Run, run_or_explain, run_pair
from pyro_lvm.tracing.supports import outside_data, outside_error

__all__ = ["check_follows_batches", "explained", "outside_sites", "why_nonfinite"]

logger = logging.getLogger("pyro_lvm")

Program = Callable[..., Any]
Args = tuple[Any, ...]

_SCORE = re.compile(r"Error while computing log_prob at site '(?P<site>.+)':\n(?P<reason>.*)")
_RANK = re.compile(
    r'at site "(?P<site>.+)", invalid log_prob shape\s+Expected (?P<expected>\[.*\]), actual (?P<got>\[.*\])'
)
_EVENT = re.compile(r"Model and guide event_dims disagree at site '(?P<site>.+)': (?P<model>\d+) vs (?P<guide>\d+)")
_PARAM = re.compile(
    r"Inside pyro\.plate\((?P<plate>.+), (?P<size>\d+), dim=\S+\) invalid shape of "
    r"pyro\.param\((?P<param>.+), \.\.\., event_dim=\d+\): torch\.Size\(\[(?P<shape>.*)\]\)"
)
_OUTSIDE = "to be within the support"
_CURE = (
    "Parameters for each datum: pass batch_size=len(x) (all data in each step), to a guide made anew if this one is an "
    "AutoGuide, for it has taken the size of a batch for good. Or make the guide a function of the data."
)


def check_follows_batches(model: Program, guide: Program, batch: Args, num_data: int | None) -> None:
    """A guide that keeps the size of its first batch has parameters for each datum, which mini-batches would mix up.

    Raises:
        PlateError: it has, and a step sees part of the data; where N is not known this is a warning in the log.
    """
    if num_data is not None and num_data <= len(batch[0]):
        return
    whole = make_batch(batch[0], batch[1:])
    fewer = whole.rows(slice(1, None)) if len(whole) > 1 else whole.repeat(2)
    held = None
    with torch.no_grad(), suppress(Exception):  # a program that does not run on other rows may raise anything
        held = _held_site(model, guide, run_pair(model, guide, whole), fewer)
    if held is None:
        return
    site, plate = held
    expected = f"draws for the data of each batch in plate {plate!r}"
    got = f"draws for {len(whole)} data from parameters that stay with them, in batches of other data"
    message = refuse(f"guide site {site!r}", expected, got, _CURE)
    if num_data is not None:
        raise PlateError(message)
    logger.warning("unless every batch holds the same data in the same order: %s", message)


def _held_site(model: Program, guide: Program, pair: Run, fewer: Batch) -> tuple[str, str] | None:
    """Latent and plate of the guide that keep the size of the first batch on ``fewer`` rows, which the model follows.

    The model draws its own latents, for those of such a guide do not fit it.
    """
    size = len(pair.batch)
    model_plate = find_plate([(pair.model, size), (run(model, fewer.args), len(fewer))], "auto")
    plate = find_guide_plate(model_plate, pair.model, pair.guide, [n for n, s in pair.guide.items() if is_latent(s)])
    try:
        with validation(True):  # else some parameters are not compared with their plate
            trace = run(guide, fewer.args)
    except ValueError as error:
        misfit = _misfit(str(error), plate, len(fewer), size)
        return (misfit, plate) if misfit is not None and _same_event(pair, misfit) else None
    latents = {n: s for n, s in trace.items() if is_latent(s) and not s["infer"].get("is_auxiliary")}
    held = [n for n, s in latents.items() if any((f.name, f.size) == (plate, size) for f in vectorised_frames(s))]
    return (held[0], plate) if held else None


def _misfit(message: str, plate: str, size: int, held: int) -> str | None:
    """The site or parameter with ``held`` rows that Pyro refuses in a plate of ``size``."""
    if found := MISMATCH.search(message):
        return found["site"] if (found["plate"], int(found["size"]), int(found[4])) == (plate, size, held) else None
    if found := _PARAM.search(message):
        fits = (found["plate"], int(found["size"])) == (plate, size) and str(held) in found["shape"].split(", ")
        return found["param"] if fits else None
    return None


def _same_event(pair: Run, name: str) -> bool:
    """Whether a site's event is the same in both programs; if not, a ``to_event`` is missing in one of them."""
    sites = [trace[name] for trace in (pair.model, pair.guide) if name in trace]
    return len({site["fn"].event_dim for site in sites if site["type"] == "sample"}) <= 1


def explained(
    error: ValueError, model: Program, guide: Program, batch: Args, num_data: int | None
) -> PyroLVMError | None:
    """The named error for what Pyro or torch raised on a batch, with its cure; None where it is not sure."""
    if isinstance(error, PyroLVMError):
        return None
    if found := MISMATCH.search(str(error)):
        held = int(found[4])
        if held == num_data and held > len(batch[0]) and held not in batch[0].shape[1:]:  # not the width of a datum
            expected, got = f"the {len(batch[0])} data of a batch in plate {found['plate']!r}", f"all {num_data} data"
            return PlateError(refuse(f"site {found['site']!r}", expected, got, _CURE), "plate-size")
        return _explained_mismatch(model, guide, batch)
    if found := _RANK.search(str(error)):
        cure = "Declare all other dimensions as the event, `.to_event(1)`, or put the site in a plate of size len(x)."
        expected = f"one log-density per element of its plates, {found['expected']}"
        return SiteError(refuse(f"site {found['site']!r}", expected, found["got"], cure), "event-dims")
    if found := _EVENT.search(str(error)):
        expected = f"{found['model']} event dimensions, as in the model"
        cure = "Declare them alike in both programs, e.g. `dist.Normal(...).to_event(1)`."
        return SiteError(refuse(f"guide site {found['site']!r}", expected, found["guide"], cure), "event-dims")
    if found := _SCORE.search(str(error)):
        with torch.no_grad(), suppress(Exception):  # the message must stand on a run of the pair that can be had again
            trace = run_pair(model, guide, make_batch(batch[0], batch[1:])).model
            return _explained_score(trace, found["site"], found["reason"], len(batch[0]))
    if _OUTSIDE in str(error):  # from a loss without Pyro's traces, torch's own words, which name no site
        with torch.no_grad(), suppress(Exception):
            trace = run_pair(model, guide, make_batch(batch[0], batch[1:])).model
            return _explained_score(trace, next(iter(outside_data(trace))), str(error), len(batch[0]))
    return None


def _explained_mismatch(model: Program, guide: Program, batch: Args) -> PyroLVMError | None:
    try:
        with torch.no_grad():
            run_or_explain(model, guide, make_batch(batch[0], batch[1:]))
    except PyroLVMError as named:
        return named
    except Exception:  # noqa: BLE001 - then the error that came first says more
        return None
    return None


def _explained_score(trace: Trace, name: str, reason: str, num_data: int) -> PyroLVMError | None:
    """What keeps an observed site from having a log-density."""
    site = trace[name]
    if not is_observed(site):
        return None
    fn, value, argument = site["fn"], site["value"], f"observed site {name!r}"
    if _OUTSIDE in reason and name in outside_data(trace):
        return outside_error(site)
    if "not broadcastable with" not in reason:
        return None
    plates = {f.name: f.size for f in vectorised_frames(site)}
    if plates and num_data not in plates.values() and num_data in value.shape:
        cure = "Give the plate the size len(x), or pass `subsample=` the indices of the rows of x."
        return PlateError(
            refuse(argument, f"a plate of size {num_data}, the length of x", f"plates {plates}", cure), "plate-size"
        )
    expected = f"values that fit batch shape {tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}"
    cure = "Give the distribution the shape of the data; dimensions to the right of the plates: `.to_event(1)`."
    return SiteError(refuse(argument, expected, f"shape {tuple(value.shape)}", cure), "event-dims")


def outside_sites(trace: Trace) -> list[str]:
    """Observed sites with values outside of their support."""
    with suppress(Exception):  # shapes that do not fit are found out where densities are taken
        return list(outside_data(trace))
    return []


def why_nonfinite(model: Program, guide: Program, batch: Args) -> NonFiniteError:
    """The error for a run without a finite loss: what is not finite on a batch of it."""
    found = ["x"] if make_batch(batch[0], batch[1:]).has_nan() else []
    with torch.no_grad(), suppress(Exception):  # the pair may not run on what is not finite
        pair = run_pair(model, guide, make_batch(batch[0], batch[1:]))
        for program, trace in (("guide", pair.guide), ("model", pair.model)):
            for name, site in trace.items():
                values = site_log_prob(site) if is_latent(site) or is_observed(site) else site["value"]
                if isinstance(values, torch.Tensor) and not values.isfinite().all():
                    kind = "parameter" if site["type"] == "param" else "log-density of site"
                    found.append(f"{kind} {name!r} of the {program}")
    where = f"Not finite on the latest batch: {', '.join(found)}." if found else "The densities are finite: look at it."
    return NonFiniteError(refuse("loss", "a finite number in at least one step", "NaN or an infinity in each", where))
