"""How a pair is going to be treated."""

from collections.abc import Iterator

import torch

from pyro_lvm.findings.record import Finding, Subject, finding, quoted
from pyro_lvm.objectives.closed_form_kl import factor_in_words, scale_of
from pyro_lvm.tracing.intercept import is_latent, is_observed
from pyro_lvm.tracing.params import current_params

__all__ = ["QUESTIONS"]


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
    """Networks that the pair calls, and that Pyro does not know of."""
    stored = {id(tensor) for tensor, _ in current_params().values()}
    for module in subject.modules:
        missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in stored]
        if missing:
            kind = type(module).__name__
            message = f"module {kind!r}: expected its parameters in the param store, got none of {quoted(missing)}."
            cure = 'Register it, pyro.module("name", module), or it stays as it is; requires_grad_(False) says so.'
            yield finding("unregistered", message, cure, kind)


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
QUESTIONS = (_unregistered, _scales, _notes, _names_of_others, _train_mode)
