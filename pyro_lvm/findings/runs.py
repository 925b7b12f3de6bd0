"""What a pair must pass to be run at all."""

from collections.abc import Iterator

import torch

from pyro_lvm.findings.record import Finding, Subject, finding, quoted, told
from pyro_lvm.objectives.default import drawn_latents
from pyro_lvm.tracing.intercept import Site, in_words, is_latent, outside_support, run, support
from pyro_lvm.tracing.isolation import called_modules
from pyro_lvm.tracing.params import module_parameters
from pyro_lvm.tracing.probe import check_finite, run_or_explain
from pyro_lvm.tracing.questions import parameter_names
from pyro_lvm.tracing.sites import check_determined, has_log_density, is_delta, match_sites
from pyro_lvm.tracing.supports import outside_data, outside_error
from pyro_lvm.training.engine import check_one_tensor_a_name
from pyro_lvm.training.objective import check_summed_out

__all__ = ["PLAIN", "QUESTIONS"]


def _devices(subject: Subject) -> Iterator[Finding]:
    x = subject.batch.args[0]
    held = {str(p.device) for program in (subject.model, subject.guide) for p in module_parameters(program)}
    if held - {str(x.device)}:
        message = f"x: expected the device of the parameters, {quoted(held)}, got {str(x.device)!r}."
        yield finding("device", message, "Move both to one: module.to(device), and x.to(device) or fit(device=...).")


def _runs(subject: Subject) -> Iterator[Finding]:
    try:
        subject.pair = run_or_explain(subject.model, subject.guide, subject.batch)
    except RuntimeError as error:
        notes = getattr(error, "__notes__", [])
        if not notes:
            raise
        yield finding("dtype", f"{str(error).splitlines()[0]}.", f"Cast one of them: {notes[0]}")
        return
    check_one_tensor_a_name(subject.model, subject.guide)
    with called_modules(subject.model, subject.guide) as modules:
        subject.names = parameter_names(subject.model, subject.guide, *subject.batch.args)
    subject.modules = modules
    check_finite(subject.pair)


def _moved(subject: Subject) -> Iterator[Finding]:
    """Latents that are summed out over a dimension that is not theirs."""
    if not subject.needs_no_guide:
        pair = subject.pair
        check_summed_out(subject.model, subject.guide, subject.batch.args, pair.model, pair.guide, subject.loss)
    yield from ()


def _names(subject: Subject) -> Iterator[Finding]:
    """How the sites of the two programs fit together."""
    if subject.needs_no_guide:
        return
    match = match_sites(subject.pair.model, subject.pair.guide)
    drawn = drawn_latents(subject.pair.model, subject.pair.guide, subject.loss)
    for name in (n for n in match.enumerated if n not in drawn):
        message = f"latent {name!r}: the guide lacks it, and it is discrete: it is summed out exactly."
        yield finding("summed-out", message, "Nothing to do; sample it in the guide if it is to have a q.", name)
    for name in match.check_support:
        message, cure = _leaves_prior(name, subject.pair.model[name], subject.pair.guide[name])
        if message:
            yield finding("outside-prior", message, cure, name)


def _leaves_prior(name: str, prior: Site, proposal: Site) -> tuple[str, str]:
    outside = outside_support(prior["fn"], proposal["fn"].sample(torch.Size([64])))
    if not outside.any():
        return "", ""
    allowed, share = in_words(support(prior["fn"])), float(outside.double().mean())
    message = f"guide site {name!r}: expected draws in the prior's support, {allowed}, got {share:.0%} outside."
    return message, "Their weight is 0 and their loss infinite: use a family with the support of the prior."


def _sites(subject: Subject) -> Iterator[Finding]:
    """Guides that make a draw and its density together."""
    guide, args = subject.guide, subject.batch.args
    unknown = check_determined(guide, args, subject.pair.guide)
    values = {n: s["value"] for n, s in subject.pair.guide.items() if is_latent(s)}
    again = run(guide, args, values=values)
    for name, value in values.items():
        try:
            again[name]["fn"].log_prob(value)
        except (KeyError, NotImplementedError):  # a flow without an inverse
            unknown.add(name)
    unknown -= {name for name in unknown if is_delta(again[name]) and not has_log_density(again[name])}
    if unknown:
        message = f"guide sites {quoted(unknown)}: the density of a draw is known only while it is made."
        yield finding("unscorable-draws", message, "Nothing to do: draw and density are carried together.")


def _data(subject: Subject) -> Iterator[Finding]:
    for name, outside in outside_data(subject.pair.model).items():
        share = float(outside.double().mean())
        yield told(outside_error(subject.pair.model[name], f", and such in {share:.0%} of them"))


#: In the order in which they are asked.
QUESTIONS = (_devices, _runs, _moved, _names, _sites, _data)

#: Those that do no more than run the pair.
PLAIN = (_devices, _runs)
