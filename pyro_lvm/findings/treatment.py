"""How a pair is going to be treated."""

from collections.abc import Iterator

import torch
from pyro.distributions import GaussianMRF, IndependentHMM
from pyro.distributions.hmm import HiddenMarkovModel

from pyro_lvm.findings.record import Finding, Subject, finding, quoted
from pyro_lvm.objectives.closed_form_kl import factor_in_words, scale_of
from pyro_lvm.tracing.intercept import Site, base_distribution, is_latent, is_observed, run
from pyro_lvm.tracing.isolation import evaluation_rng
from pyro_lvm.tracing.leaves import stray_names
from pyro_lvm.tracing.params import current_params

__all__ = ["QUESTIONS"]

_OF_ANY_LENGTH = (HiddenMarkovModel, IndependentHMM, GaussianMRF)  # whose event may be of 1 step and their data of many


def _notes(subject: Subject) -> Iterator[Finding]:
    sites = [s for t in (subject.pair.model, subject.pair.guide) for s in t.values() if is_latent(s) or is_observed(s)]
    scaled = {s["name"] for s in sites if (scale_of(s) != 1).any()}
    if scaled:
        message = f"sites {quoted(scaled)}: the loss weighs their log-densities, by a scale or a subsampled plate."
        yield finding("scaled", message, "Reported numbers are without these weights.", sorted(scaled)[0])
    x = subject.batch.args[0]
    held = {t.dtype for n, (t, _) in current_params().items() if n in subject.names[0] | subject.names[1]}
    held = {dtype for dtype in held if dtype.is_floating_point}
    if x.is_floating_point() and held - {x.dtype}:
        dtypes = quoted(str(dtype).removeprefix("torch.") for dtype in held | {x.dtype})
        message = f"parameters and x: expected one dtype, got {dtypes}."
        yield finding("mixed-dtypes", message, "Results have the larger one, at its cost: cast x or the modules.")


def _unregistered(subject: Subject) -> Iterator[Finding]:
    """Networks and tensors that the densities depend on, and that Pyro does not know of."""
    stays = "or it stays as it is; requires_grad_(False) says so."
    for kind, names in stray_names(subject.model, subject.guide, subject.batch.args).items():
        if kind:
            message = f"module {kind!r}: expected its parameters in the param store, got none of {quoted(names)}."
            yield finding("unregistered", message, f'Register it, pyro.module("name", module), {stays}', kind)
        else:
            shapes = ", ".join(names)
            message = f"tensors that require a gradient: expected in the param store, got none of shape {shapes}."
            yield finding("unregistered", message, f'Declare it, pyro.param("name", tensor), {stays}')


def _shared_params(subject: Subject) -> Iterator[Finding]:
    """One name of `pyro.param` in both halves is one parameter, which begins as the guide says, for it runs first."""
    model, guide = subject.pair.model, subject.pair.guide
    for name in (n for n, site in guide.items() if site["type"] == "param" and n in model):
        first, second = _initial_value(guide[name]), _initial_value(model[name])
        if first is None or second is None or _alike(first, second) or _random(subject, name):
            continue
        got = f"a pyro.param of both halves with {_apart(first, second)}"
        cure = "It is one parameter, which begins as the guide has it: rename one, or begin both at one value."
        yield finding("shared-param", f"parameter {name!r}: expected one initial value, got {got}.", cure, name)


def _initial_value(site: Site) -> torch.Tensor | None:
    """What `pyro.param` was given; a function is asked, always with the same random numbers."""
    given = site["args"][1] if len(site["args"]) > 1 else None
    with torch.no_grad(), evaluation_rng(0):
        value = given() if callable(given) and not isinstance(given, torch.Tensor) else given
    return None if value is None else torch.as_tensor(value).detach().cpu().double()


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other)


def _random(subject: Subject, name: str) -> bool:
    """Whether an initial value changes from run to run, so that two that differ may be meant to be one."""
    for program, trace in ((subject.model, subject.pair.model), (subject.guide, subject.pair.guide)):
        value, again = _initial_value(trace[name]), _initial_value(run(program, subject.batch.args)[name])
        if value is not None and again is not None and not _alike(value, again):
            return True
    return False


def _apart(guide: torch.Tensor, model: torch.Tensor) -> str:
    """In what two initial values differ."""
    if guide.shape != model.shape:
        return f"shape {tuple(guide.shape)} in the guide and {tuple(model.shape)} in the model"
    i = int((guide - model).abs().argmax())
    numbers = f"{float(guide.flatten()[i]):g} in the guide and {float(model.flatten()[i]):g} in the model"
    return f"initial value {numbers}" + (f", element {i}" if guide.numel() > 1 else "")


def _broadcast_events(subject: Subject) -> Iterator[Finding]:
    """An observed value and its distribution of unlike event shapes, of which torch repeats the smaller one."""
    for name, site in subject.pair.model.items():
        if not is_observed(site) or isinstance(base_distribution(site["fn"]), _OF_ANY_LENGTH):
            continue
        ours, rank = tuple(site["fn"].event_shape), site["value"].dim()
        theirs = tuple(site["value"].shape[rank - len(ours) :])
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a != b]
        if len(ours) <= rank and pairs and all(1 in pair for pair in pairs):
            which = "the distribution" if 1 in ours else "the data"
            message = (
                f"observed site {name!r}: expected the event shape of the data, {theirs}, got {ours}: one number of "
                f"{which} stands for {max(pairs[0])}."
            )
            cure = "Make the layer that puts out its parameters as wide as a datum, if they are to differ."
            yield finding("broadcast-event", message, cure, name)


def _scales(subject: Subject) -> Iterator[Finding]:
    """A latent whose log p and log q have different weights in the loss."""
    model, guide = subject.pair.model, subject.pair.guide
    for name in (n for n, s in guide.items() if is_latent(s) and n in model):
        ours, theirs = torch.broadcast_tensors(scale_of(guide[name]), scale_of(model[name]))
        if not torch.allclose(ours, theirs):
            got = f"{factor_in_words(theirs)} in the model and {factor_in_words(ours)} in the guide"
            message = f"latent {name!r}: expected one scale in model and guide, got {got}."
            cure = "The loss is no bound: give both programs the same plate, subsample and scale."
            yield finding("scales", message, cure, name)


def _names_of_others(subject: Subject) -> Iterator[Finding]:
    taken = subject.foreign & (subject.names[0] | subject.names[1])
    if taken:
        message = f"parameters {quoted(taken)}: the param store holds values of another pair under these names."
        cure = "fit() trains this pair in a store of its own; Pyro's SVI would train the other's values."
        yield finding("name-taken", message, cure, sorted(taken)[0])


def _train_mode(subject: Subject) -> Iterator[Finding]:
    noisy = (torch.nn.modules.batchnorm._NormBase, torch.nn.modules.dropout._DropoutNd, torch.nn.RReLU)
    kinds = {type(module).__name__ for module in subject.in_train_mode if isinstance(module, noisy)}
    if kinds:
        message = f"modules {quoted(kinds)}: in train mode, where draws of a datum depend on chance or on its batch."
        cure = "fit() trains in this mode, and evaluators switch to eval mode; with Pyro alone call module.eval()."
        yield finding("train-mode", message, cure)


#: In the order in which they are asked.
QUESTIONS = (_unregistered, _shared_params, _broadcast_events, _scales, _notes, _names_of_others, _train_mode)
