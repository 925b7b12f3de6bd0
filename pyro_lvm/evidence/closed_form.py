"""A model's own exact density, in the record that every estimator returns."""

import math
from typing import Any

import numpy as np
import torch

from pyro_lvm._checks import refuse
from pyro_lvm._typing import Data
from pyro_lvm._version import __version__
from pyro_lvm.errors import DataTypeError
from pyro_lvm.evidence.data import data_provenance, data_source
from pyro_lvm.evidence.record import LogMarginal
from pyro_lvm.tracing.weights import evaluation

__all__ = ["closed_form"]

_ROWS = 1024  # data at once


def closed_form(model: Any, x: Data, *args: Any, device: torch.device | str | None = None) -> LogMarginal:
    """log p(x) of every datum from ``model.log_prob(x, *args)``, exact.

    Args:
        model: an object with a method ``log_prob`` that returns ``(N,)`` nats.
        x: data ``(N, ...)``, or a ``Dataset`` or ``DataLoader``.
        *args: further arguments of ``log_prob``; tensors with N rows go with x.
        device: where to compute; None stays on the device of x.

    Returns:
        `LogMarginal` with status ``exact`` (``nonfinite`` where the density is), no error and no bias.

    Raises:
        DataTypeError: the model has no ``log_prob``.

    Example:
        >>> import torch
        >>> closed_form(torch.distributions.Normal(0.0, 1.0), torch.zeros(3)).status.tolist()
        ['exact', 'exact', 'exact']
    """
    if not callable(getattr(model, "log_prob", None)):
        cure = "Give it a guide, or a method log_prob(x) that returns one number per datum."
        raise DataTypeError(refuse("model", "an object with an exact log_prob", type(model).__name__, cure))
    source = data_source(x, args, "auto", device)
    with evaluation(model, None), torch.no_grad():
        starts = range(0, len(source), _ROWS)
        value = torch.cat([model.log_prob(*source.rows(slice(i, i + _ROWS)).args) for i in starts]).double()
    zero, ones = torch.zeros_like(value), torch.ones_like(value)
    return LogMarginal(
        value=value,
        stderr=zero,
        bias=zero,
        elbo=value,
        ess=ones,
        khat=torch.full_like(value, math.nan),
        status=np.where(value.isfinite().cpu().numpy(), "exact", "nonfinite"),
        num_particles=1,
        method="closed form",
        provenance={
            "data": data_provenance(x),
            "model": type(model).__name__,
            "num_data": len(value),
            "device": str(value.device),
            "versions": {"pyro_lvm": __version__, "torch": torch.__version__},
        },
    )
