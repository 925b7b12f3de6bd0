"""Decoders in half precision: matrix products and convolutions of the model in 16 bits, all else as it was.

Densities, sums and the guide keep the precision of the data: a log-density of a few hundred nats in bfloat16 would be
wrong by a nat. What the products cost is measured, by scoring the same draws both ways.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pyro_lvm._checks import refuse
from pyro_lvm._typing import Guide, Model
from pyro_lvm.errors import DataTypeError
from pyro_lvm.ops import log_mean_exp
from pyro_lvm.tracing.batch import Rows
from pyro_lvm.tracing.isolation import evaluation_rng, forked_rng, validation
from pyro_lvm.tracing.probe import Plan
from pyro_lvm.tracing.weights import Proposal, weight_table

__all__ = ["check_model_dtype", "in_half", "rounding"]

_ROWS, _PARTICLES = 32, 100  # scored both ways
_WIDE = (torch.float32, torch.float64)
_PRODUCTS = {
    functional.linear,
    functional.bilinear,
    functional.scaled_dot_product_attention,
    *(getattr(torch, f"conv{d}d") for d in (1, 2, 3)),
    *(getattr(torch, f"conv_transpose{d}d") for d in (1, 2, 3)),
    *(getattr(torch, name) for name in ("matmul", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "einsum")),
    *(getattr(torch.Tensor, name) for name in ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv")),
}


class _HalfProducts(TorchFunctionMode):
    """Inside, products are taken of arguments rounded to ``dtype``, and returned in the dtype of the arguments."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wide = {t.dtype for t in (*_tensors(args), *_tensors(kwargs.values())) if t.dtype in _WIDE}
        if func not in _PRODUCTS or len(wide) != 1:
            return func(*args, **kwargs)
        out = func(*map(self._round, args), **{name: self._round(value) for name, value in kwargs.items()})
        return out.to(wide.pop())

    def _round(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(self._round, value))
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.dtype in _WIDE else value


def _tensors(values: Any) -> list[torch.Tensor]:
    found = []
    for value in values:
        found += (
            [value] if isinstance(value, torch.Tensor) else _tensors(value) if isinstance(value, list | tuple) else []
        )
    return found


def check_model_dtype(dtype: Any) -> None:
    """Refuse what is no half precision.

    Raises:
        DataTypeError: neither ``torch.bfloat16`` nor ``torch.float16``.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        cure = "Leave it out for the precision of the data and the parameters."
        raise DataTypeError(refuse("model_dtype", "torch.bfloat16 or torch.float16", repr(dtype), cure))


def in_half(model: Model, dtype: torch.dtype) -> Callable[..., Any]:
    """``model`` with its matrix products and convolutions in ``dtype``."""

    @functools.wraps(model, updated=())
    def halved(*args: Any) -> Any:
        with _HalfProducts(dtype):
            return model(*args)

    return halved


def rounding(plan: Plan, model: Model, guide: Guide, source: Rows, dtype: torch.dtype) -> dict[str, Any]:
    """How far log-weights move in nats when the same draws are scored by the model in ``dtype``.

    Returns:
        For the log-weights and for log p-hat of a datum, half less full precision: the mean, which does not average out
        over data, the root mean square, and the largest absolute value.
    """
    with forked_rng(0):  # for a data set that draws its items anew
        batch = source.rows(slice(0, len(source) if plan.tied else min(len(source), _ROWS)))
    num_particles = 1 if plan.exact else _PARTICLES
    tables = []
    for program in (in_half(model, dtype), model):
        with evaluation_rng(0), validation(False):
            tables.append(weight_table(plan, program, Proposal(plan, guide, batch), num_particles).total.double())
    moved = {"log_weight": tables[0] - tables[1], "log_p": log_mean_exp(tables[0]) - log_mean_exp(tables[1])}
    found: dict[str, Any] = {"dtype": str(dtype), "data": len(batch), "particles": num_particles}
    for name, difference in moved.items():
        found[f"mean_{name}"] = float(difference.mean())
        found[f"rms_{name}"] = float(difference.square().mean().sqrt())
        found[f"largest_{name}"] = float(difference.abs().max())
    return found
