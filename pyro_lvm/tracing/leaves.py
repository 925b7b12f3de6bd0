"""Tensors that require a gradient and are in no param store: nothing trains them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.intercept import Trace, is_latent, is_observed, run, site_log_prob
from pyro_lvm.tracing.isolation import called_modules, validation
from pyro_lvm.tracing.params import current_params
from pyro_lvm.tracing.probe import run_pair

__all__ = ["meets_strays", "stray_names", "stray_tensors"]

Program = Callable[..., Any]
Leaves = dict[int, torch.Tensor]


def stray_tensors(model: Program, guide: Program, args: Sequence[Any], update: str) -> list[torch.Tensor]:
    """What the densities of the halves that are trained depend on, and no param store holds."""
    found: Leaves = {}
    with torch.enable_grad(), validation(False):
        values = {n: s["value"].detach() for n, s in run(guide, args).items() if is_latent(s)}
        if update != "model":
            found |= _strays(guide, args, {})
        if update != "guide":
            found |= _strays(model, args, values)
    return list(found.values())


def stray_names(model: Program, guide: Program, args: Sequence[Any], update: str = "both") -> dict[str, list[str]]:
    """Names of `stray_tensors` in the modules that own them, by the kind of module; under ``""`` shapes of the rest."""
    with called_modules(model, guide) as modules:
        found = {id(t): t for t in stray_tensors(model, guide, args, update)}
    named: dict[str, list[str]] = {}
    for module in modules if found else ():
        own = [name for name, p in module.named_parameters() if found.pop(id(p), None) is not None]
        if own:
            named.setdefault(type(module).__name__, []).extend(own)
    return named | ({"": [str(tuple(t.shape)) for t in found.values()]} if found else {})


def meets_strays(model: Program, guide: Program, args: Sequence[Any]) -> bool:
    """Whether the pair computes with a tensor that may be a stray one: told without gradients, by one run."""
    with torch.no_grad(), _Meeting() as meeting:
        run_pair(model, guide, Batch(tuple(args), (True,) * len(args)))
    return bool(meeting.met.keys() - _stored().keys())


class _Meeting(TorchFunctionMode):
    """Notes each tensor that requires a gradient and is handed to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.met: Leaves = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        self.met |= {id(t): t for t in tensors if t.requires_grad and t.is_leaf}
        return func(*args, **(kwargs or {}))


def _strays(program: Program, args: Sequence[Any], values: dict[str, torch.Tensor]) -> Leaves:
    """Those of one program; what it makes anew in each run, to differentiate a density by it, is not among them."""
    known = _leaves(a for a in args if isinstance(a, torch.Tensor))
    found = _leaves(_outputs(run(program, args, values=values)))
    found = {key: t for key, t in found.items() if key not in known | _stored()}
    if not found:
        return {}
    again = _leaves(_outputs(run(program, args, values=values)))  # while `found` keeps its tensors alive
    return {key: t for key, t in found.items() if key in again}


def _stored() -> Leaves:
    return {id(t): t for t, _ in current_params().values()}


def _outputs(trace: Trace) -> Iterator[torch.Tensor]:
    for site in trace.values():
        if is_latent(site) or is_observed(site):
            yield site["value"]
            with suppress(Exception):  # a density that cannot be taken has no gradient either
                yield site_log_prob(site)


def _leaves(outputs: Iterable[torch.Tensor]) -> Leaves:
    """The tensors that autograd would give a gradient of these to, by their identity."""
    found: Leaves = {}
    todo: list[Any] = []
    for output in outputs:
        if output.grad_fn is not None:
            todo.append(output.grad_fn)
        elif output.requires_grad:
            found[id(output)] = output
    seen = set(todo)
    while todo:
        node = todo.pop()
        if type(node).__name__ == "AccumulateGrad":
            found[id(node.variable)] = node.variable
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        todo += new
    return found
