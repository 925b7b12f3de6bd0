"""A model's own exact density, in the record that every estimator returns."""

from typing import Any

import torch

from pyro_lvm._checks import refuse
from pyro_lvm._typing import Data, DataPlate
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.evidence.data import data_provenance, data_source
from pyro_lvm.evidence.record import LogMarginal, exact_record
from pyro_lvm.tracing.batch import DataArgs
from pyro_lvm.tracing.digest import DataDigest, parameter_digest
from pyro_lvm.tracing.weights import evaluation

__all__ = ["closed_form"]

_ROWS = 1024  # data at once


def closed_form(
    model: Any,
    x: Data,
    *args: Any,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    device: torch.device | str | None = None,
) -> LogMarginal:
    """log p(x) of every datum from ``model.log_prob(x, *args)``, exact.

    Args:
        model: an object with a method ``log_prob`` that returns ``(N,)`` nats.
        x: data ``(N, ...)``, or a ``Dataset`` or ``DataLoader``.
        *args: further arguments of ``log_prob``; tensors with N rows go with x.
        data_plate: None adds up all data to one joint result.
        data_args: positions among ``args`` of those with one row per datum; ``"auto"`` is all with N rows.
        device: where to compute; None stays on the device of x.

    Returns:
        `LogMarginal` with status ``exact``, no error and no bias.

    Raises:
        DataTypeError: the model has no ``log_prob``.
        ShapeError: it returns something else than one number per datum.

    Example:
        >>> import torch
        >>> closed_form(torch.distributions.Normal(0.0, 1.0), torch.zeros(3)).status.tolist()
        ['exact', 'exact', 'exact']
    """
    if not callable(getattr(model, "log_prob", None)):
        cure = "Give it a guide, or a method log_prob(x) that returns one number per datum."
        raise DataTypeError(refuse("model", "an object with an exact log_prob", type(model).__name__, cure))
    source = data_source(x, args, data_args, device)
    parts = []
    digest = DataDigest()
    with evaluation(model, None), torch.no_grad():
        for start in range(0, len(source), _ROWS):
            batch = source.rows(slice(start, start + _ROWS))
            digest.add(batch)
            parts.append(model.log_prob(*batch.args))
            if parts[-1].shape != (len(batch),):
                cure = "Declare the dimensions of a datum as its event, e.g. with to_event(1)."
                got = tuple(parts[-1].shape)
                raise ShapeError(refuse("model.log_prob", f"one number per datum, shape ({len(batch)},)", got, cure))
    value = torch.cat(parts).double()
    if data_plate is None:
        value = value.sum(0, keepdim=True)
    sha256 = {"parameters": parameter_digest(model, None, None), "data": digest.hexdigest()}
    provenance = {"data": data_provenance(x), "data_plate": data_plate, "model": type(model).__name__, "sha256": sha256}
    return exact_record(value, "closed form", 1, provenance | {"num_data": len(source)})
