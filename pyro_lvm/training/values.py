"""The tensors of a pair by name, to be written to files and put back."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from pyro_lvm.tracing.params import Params, current_params

__all__ = ["differences", "fill", "held_by", "listed", "live"]


def held_by(modules: Sequence[torch.nn.Module], params: Params) -> dict[str, torch.Tensor]:
    """What modules hold beside ``params`` of the store: buffers, and what does not require a gradient."""
    stored = {id(tensor) for tensor, _ in params.values()}
    tensors: dict[str, torch.Tensor] = {}
    for i, module in enumerate(modules):
        own = (*module.named_parameters(), *module.named_buffers())
        tensors |= {f"{type(module).__name__} {i}: {name}": t for name, t in own if id(t) not in stored}
    return tensors


def live(names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Unconstrained tensors of the current store."""
    here = current_params()
    return {name: here[name][0] for name in sorted(names) if name in here}


def differences(there: Mapping[str, torch.Tensor], here: Mapping[str, torch.Tensor]) -> list[str]:
    """In words: names that only one side has, and tensors of another shape or dtype."""
    found = [f"{name!r} {_form(tensor)} (not here)" for name, tensor in there.items() if name not in here]
    found += [f"no {name!r}" for name in here if name not in there]
    both = [(name, _form(there[name]), _form(here[name])) for name in there if name in here]
    return found + [f"{name!r} {one} (here {other})" for name, one, other in both if one != other]


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def fill(
    params: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor], modules: Sequence[torch.nn.Module]
) -> None:
    """Copy values into the tensors of these names in the store and in modules."""
    tensors = live(params) | held_by(modules, current_params())
    with torch.no_grad():
        for name, value in {**params, **held}.items():
            tensors[name].copy_(value)


def listed(found: Sequence[str]) -> str:
    """Differences as one line, of many only the first."""
    return "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "")
