"""Contexts that leave no trace: random numbers, module modes and validation flags return to what they were."""

import copy
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_lvm._checks import check_seed, refuse
from pyro_lvm.errors import ShapeError
from pyro_lvm.tracing.params import anchor

__all__ = [
    "called_modules",
    "eval_mode",
    "evaluation_rng",
    "forked_rng",
    "generator_states",
    "set_generators",
    "uncalled_copy",
    "validation",
]


@contextmanager
def forked_rng(seed: int | None) -> Iterator[None]:
    """Seed torch, NumPy and Python inside, and restore their states afterwards; with ``seed=None`` do nothing.

    Of torch these are the generators of the CPU and, once CUDA is in use, of all its devices.
    """
    if seed is None:
        yield
        return
    if not 0 <= seed < 2**32:
        raise ShapeError(refuse("seed", "0 to 2^32 - 1, as NumPy does", seed, "Pass e.g. seed=0."))
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would have CUDA start with this seed later on
            if cuda:
                torch.cuda.manual_seed_all(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def evaluation_rng(seed: int | None) -> AbstractContextManager[None]:
    """`forked_rng` with a stream of its own for each seed.

    A script that makes its data after ``torch.manual_seed(0)`` and estimates with ``seed=0`` must not draw latents that
    are the noise in the data.
    """
    seed = check_seed(seed)
    return forked_rng(None if seed is None else (seed * 0x9E3779B1 + 0x7F4A7C15) % 2**32)


def generator_states(devices: Sequence[torch.device] = ()) -> dict[str, Any]:
    """The states of the generators of torch, NumPy and Python, as tensors and plain values."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    _, keys, *rest = legacy
    cuda = {str(device): torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
    numpy = (torch.from_numpy(keys.astype(np.int64)), *rest)
    version, words, gauss = random.getstate()
    python = (version, torch.tensor(words), gauss)
    return {"torch": torch.get_rng_state(), "python": python, "numpy": numpy, "cuda": cuda}


def set_generators(states: Mapping[str, Any]) -> None:
    """Put the generators back to what `generator_states` returned."""
    torch.set_rng_state(states["torch"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    for device, state in states["cuda"].items():
        torch.cuda.set_rng_state(state, device)


@contextmanager
def called_modules(*programs: Callable[..., Any] | None) -> Iterator[list[torch.nn.Module]]:
    """The modules of a pair: behind ``programs``, and called or registered inside; in order, none part of another."""
    owners = [owner for owner in map(anchor, programs) if isinstance(owner, torch.nn.Module)]
    found = {id(owner): owner for owner in owners}
    modules: list[torch.nn.Module] = []

    def meet(module: torch.nn.Module, *_: Any) -> None:
        found.setdefault(id(module), module)

    def registering(name: str, module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        meet(module)
        return register(name, module, *args, **kwargs)

    hook, register = register_module_forward_pre_hook(meet), pyro.module
    pyro.module = registering  # type: ignore[assignment]  # of which Pyro sends no message
    try:
        yield modules
    finally:
        pyro.module = register
        hook.remove()
        parts = {id(part) for module in found.values() for part in list(module.modules())[1:]}
        modules += [module for key, module in found.items() if key not in parts]


def uncalled_copy(guide: Any) -> Any:
    """An AutoGuide takes the size of its first data for good: of one that has not been called a copy."""
    if getattr(guide, "prototype_trace", ...) is not None:
        return guide
    held = [
        (part, vars(part)["_model"], vars(part).get("master")) for part in guide.modules() if "_model" in vars(part)
    ]
    copied = copy.deepcopy(guide)  # which takes both from the original as well
    twins = dict(zip(guide.modules(), copied.modules(), strict=True))
    for part, model, master in held:
        part._model = twins[part]._model = model
        if master is not None:
            part.master, twins[part].master = master, weakref.ref(twins[master()])
    return copied


@contextmanager
def eval_mode(*programs: Callable[..., Any] | None) -> Iterator[list[torch.nn.Module]]:
    """Run modules in eval mode and restore their modes: those of ``programs``, and any other that is called inside.

    Yields the modules that were in train mode, so far.

    A plain function may call modules that nothing else knows of, so each module is switched at its first call.
    """
    switched: list[torch.nn.Module] = []

    def switch(module: torch.nn.Module, *_: Any) -> None:
        for part in module.modules() if module.training else ():
            if part.training:
                switched.append(part)
                part.training = False

    for program in programs:
        if isinstance(owner := anchor(program), torch.nn.Module):
            for part in owner.modules():
                switch(part)
    hook = register_module_forward_pre_hook(switch)
    try:
        yield switched
    finally:
        hook.remove()
        for module in switched:
            module.training = True


@contextmanager
def validation(enabled: bool) -> Iterator[None]:
    """Switch Pyro's and torch's validation; both flags are restored, also where they disagreed."""
    flag = torch.distributions.Distribution._validate_args
    try:
        with pyro.validation_enabled(enabled):
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(flag)
