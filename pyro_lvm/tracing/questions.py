"""What training and comparison ask of a pair, each answered by one small run."""

from contextlib import suppress
from typing import Any

import torch

from pyro_lvm._checks import refuse
from pyro_lvm._typing import Guide, Model
from pyro_lvm.errors import ParameterError
from pyro_lvm.tracing.batch import Batch, Rows, make_batch
from pyro_lvm.tracing.intercept import Trace, is_latent, is_observed, run, support
from pyro_lvm.tracing.isolation import eval_mode, evaluation_rng, validation
from pyro_lvm.tracing.params import evaluation_store, module_parameters, own_store, same_program
from pyro_lvm.tracing.plates import common_plates, find_plate, nesting
from pyro_lvm.tracing.probe import PROBE_ROWS, empty_guide, run_pair
from pyro_lvm.tracing.tables import Table, agree, tabulate

__all__ = ["batch_plate", "count_parameters", "holds_probabilities", "parameter_names", "same_model"]


def parameter_names(model: Model, guide: Guide, *args: Any) -> tuple[set[str], set[str]]:
    """Names of the parameters that the model and the guide use, from one run of each.

    Raises:
        ParameterError: two modules of the pair register different tensors under one name.
    """
    with torch.no_grad():
        pair = run_pair(model, guide, Batch(args, (True,) * len(args)))
    for trace in (pair.model, pair.guide):
        _check_own_tensors(trace)
    model_names, guide_names = (
        {n for n, s in trace.items() if s["type"] == "param"} for trace in (pair.model, pair.guide)
    )
    return model_names, guide_names


def _check_own_tensors(trace: Trace) -> None:
    """`pyro.module` leaves a module its own tensors where the store has others of its names: Pyro would train those."""
    others = []
    for name, site in trace.items():
        given = site["args"][1] if site["type"] == "param" and len(site["args"]) > 1 else None
        held = getattr(site["value"], "unconstrained", lambda site=site: site["value"])()
        if isinstance(given, torch.nn.Parameter) and held is not given:
            others.append(name)
    if others:
        cure = (
            "Two modules of one class share names: train one of them in the pair, or register it under another name. "
            "A guide that differs from that of a VampPrior needs the prior as it is now, "
            "`with torch.no_grad(): prior = vamp()`. After loading a param store, load state_dicts instead."
        )
        message = refuse("parameters", "those of the module that registers them", others[:3], cure)
        raise ParameterError(message, finding="shared-name")


def holds_probabilities(model: Model, guide: Guide | None, data: Rows) -> bool | None:
    """Whether p(x) is a probability, of discrete data, or a density; None where both are, or nothing can be told."""
    with own_store(model, guide), torch.no_grad(), evaluation_rng(0), eval_mode(model, guide), suppress(Exception):
        trace = run_pair(model, guide or empty_guide, data.rows(slice(0, PROBE_ROWS))).model
        found = [support(s["fn"]) for s in trace.values() if is_observed(s)]
        kinds = {bool(constraint.is_discrete) for constraint in found if constraint is not None}
        return kinds.pop() if len(kinds) == 1 else None
    return None


def batch_plate(model: Model, guide: Guide, *args: Any) -> str | None:
    """The data plate, where the sites of a mini-batch must be scaled up because a latent lies outside of it.

    None if all latents are inside (a constant factor does not move the optimum), or if the plate, made with the size of
    the whole data set, scales by itself.
    """
    batch = make_batch(args[0], args[1:])
    with torch.no_grad():
        runs = [run_pair(model, guide, batch)]
        with suppress(Exception):  # local parameters run on all of their data only
            runs += [run_pair(model, guide, batch.rows(slice(1, None)))]
    sites = [s for s in runs[0].model.values() if is_latent(s) or is_observed(s)]
    if common_plates(sites):
        return None
    plate = find_plate([(r.model, len(r.batch)) for r in runs], "auto")
    frames = [f for s in sites for f in s["cond_indep_stack"] if f.name == plate]
    return plate if all(f.full_size == f.size for f in frames) else None


def count_parameters(model: Model, guide: Guide | None, data: Rows) -> int:
    """Number of scalars in the parameters that a pair uses, and in those of the modules that its callables are."""
    guide = guide or empty_guide
    parameters = {id(p): p.numel() for program in (model, guide) for p in module_parameters(program)}
    with own_store(model, guide), torch.no_grad(), evaluation_rng(0):
        for size in (PROBE_ROWS, len(data)):  # some pairs only run on all of their data
            with suppress(Exception):  # and a model with a log_prob need not be a Pyro program
                pair = run_pair(model, guide, data.rows(slice(0, size)))
                sites = (s for t in (pair.model, pair.guide) for s in t.values() if s["type"] == "param")
                leaves = [getattr(s["value"], "unconstrained", lambda s=s: s["value"])() for s in sites]
                parameters |= {id(leaf): leaf.numel() for leaf in leaves}
                break
    return sum(parameters.values())


def same_model(one: tuple[Model, Guide | None], other: tuple[Model, Guide | None], data: Rows) -> bool | None:
    """Whether two pairs have one model: the same callable, or the same log p(x, z) at shared latents.

    Returns None where no latents could be drawn that both models run on.
    """
    if same_program(one, other):
        return True
    for size in (PROBE_ROWS, len(data)):  # some pairs only run on all of their data
        with suppress(Exception):  # a model with a log_prob need not be a Pyro program
            return _same_density(one, other, data.rows(slice(0, size)))
    return None


def _same_density(one: tuple[Model, Guide | None], other: tuple[Model, Guide | None], batch: Batch) -> bool:
    values: dict[str, torch.Tensor] = {}
    tables: list[tuple[list[str], Table]] = []
    for model, guide in (one, other):
        with evaluation_store(model, guide), eval_mode(model), evaluation_rng(0), validation(False), torch.no_grad():
            if not tables:  # every latent, also those that the guide leaves to enumeration
                proposed = run(guide or empty_guide, batch.args)
                values = {n: s["value"] for n, s in proposed.items() if is_latent(s)}
                values |= {n: s["value"] for n, s in run(model, batch.args, values=values).items() if is_latent(s)}
            trace = run(model, batch.args, values=values)
        sites = sorted(n for n, s in trace.items() if is_latent(s) or is_observed(s))
        if not {n for n, s in trace.items() if is_latent(s)} <= values.keys():
            return False
        tables.append((sites, tabulate(trace, sites, None, 1, batch_dims=nesting(trace))))
    return tables[0][0] == tables[1][0] and agree(tables[0][1], tables[1][1])
