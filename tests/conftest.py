"""Every test starts with an empty param store and must leave the process as it found it."""

from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch

import pyro_lvm.tracing.capture as capture

torch.set_num_threads(1)  # the tensors of tests are small, and cores are shared


def _global_state() -> dict[str, Any]:
    """What a library may not leave changed; random numbers move on as with any torch call."""
    return {
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro validation": pyro.poutine.util.is_validation_enabled(),
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "module hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
    }


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    pyro.clear_param_store()
    before = _global_state()
    yield
    pyro.clear_param_store()
    after = _global_state()
    assert after == before


@pytest.fixture
def captured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture however short a run is, and compile nothing."""

    def no_compiler(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(capture, "COMPILE_SECONDS", -1.0)
    monkeypatch.setattr(torch._inductor, "compile", no_compiler)
