"""What every guide needs: a density q(z|x) as a Pyro site in the data plate, and its parameters phi(x).

Read ``normal.py`` next for the families; ``as_guide`` makes a guide of any density that a user writes.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import nn

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import DataTypeError, ShapeError

__all__ = ["DensityGuide", "VariationalParameters", "as_guide", "sample_latent"]


class DensityGuide(nn.Module):
    """The guide that :func:`as_guide` makes; called with x and whatever else ``q`` takes."""

    def __init__(
        self, q: Callable[..., torch.distributions.Distribution], site: str = "z", data_plate: str = "data"
    ) -> None:
        super().__init__()
        if not callable(q):
            cure = "Pass a function or a module q(x) that returns a distribution."
            raise DataTypeError(refuse("q", "a callable", type(q).__name__, cure))
        self.q = q
        self.site = site
        self.data_plate = data_plate

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        """Samples and returns the latent, ``(N, L)``."""
        if isinstance(self.q, nn.Module) and not isinstance(self.q, PyroModule):  # which registers itself
            pyro.module(type(self.q).__name__, self.q)
        return sample_latent(self.q(x, *args), x, self.site, self.data_plate)


def as_guide(
    q: Callable[..., torch.distributions.Distribution], site: str = "z", data_plate: str = "data"
) -> DensityGuide:
    """A Pyro guide from any density q(z|x), of torch or of Pyro.

    Args:
        q: maps x ``(N, ...)`` to a distribution with batch shape ``(N,)`` and event shape ``(L,)``. The parameters of
            an ``nn.Module`` are registered under its class name.
        site: the latent's name in the model.
        data_plate: the name of the model's plate over the data.

    Returns:
        A guide that takes the arguments of ``q``.

    Raises:
        DataTypeError: ``q`` is not callable, or (when used) returns no distribution.
        ShapeError: (when used) the batch shape of what ``q`` returns is not ``(N,)``.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> guide = as_guide(lambda x: Independent(Normal(x[:, :2], 1.0), 1))
        >>> guide(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    return DensityGuide(q, site, data_plate)


def sample_latent(
    distribution: torch.distributions.Distribution,
    x: torch.Tensor,
    site: str = "z",
    data_plate: str = "data",
    infer: Any = None,
) -> torch.Tensor:
    """Sample ``site`` from q(z|x), batch shape ``(N,)``, in the data plate: ``(N, L)`` or ``(K, N, L)``.

    ``infer`` is Pyro's dictionary of what the site asks of inference algorithms.
    """
    if not isinstance(distribution, torch.distributions.Distribution):
        cure = "Return e.g. dist.Normal(loc, scale).to_event(1)."
        raise DataTypeError(refuse("q(x)", "a distribution", type(distribution).__name__, cure))
    if distribution.batch_shape != (len(x),):
        got = f"batch shape {tuple(distribution.batch_shape)}, event shape {tuple(distribution.event_shape)}"
        cure = "Put one datum in each row, and declare the dimensions of z as event with .to_event(1)."
        raise ShapeError(refuse("q(x)", f"batch shape ({len(x)},), one a datum", got, cure))
    # pyro.sample calls its distribution, which one of plain torch does not allow.
    is_pyro = isinstance(distribution, TorchDistributionMixin)
    fn: Any = distribution if is_pyro else dist.TransformedDistribution(distribution, [])
    with pyro.plate(data_plate, len(x)):
        return pyro.sample(site, fn, infer=infer)


class VariationalParameters(nn.Module):
    """phi(x), ``(N, size)``: of an encoder (amortised), one row for each datum (local), or one for all (shared).

    Args:
        size: number of variational parameters of one datum.
        encoder: maps x ``(N, ...)`` to ``(N, size)``.
        num_data: N, for a table that starts at zero. Row n belongs to the n-th datum, so the guide then takes the whole
            data set in one order and nothing else.
        shared: one row that starts at zero and serves every datum: a q(z) that does not depend on x.

    Raises:
        DataTypeError: not exactly one of ``encoder``, ``num_data`` and ``shared`` is given.
        ShapeError: (when used) the encoder's output has another size, or x has not ``num_data`` rows.
    """

    def __init__(self, size: int, encoder: nn.Module | None, num_data: int | None, shared: bool = False) -> None:
        super().__init__()
        uses = {"encoder": encoder is not None, "num_data": num_data is not None, "shared": shared}
        given = [name for name, used in uses.items() if used]
        if len(given) != 1:
            cure = "Pass encoder= for an amortised guide, num_data= for local parameters, shared=True for one q(z)."
            got = " and ".join(given) or "none"
            raise DataTypeError(refuse(", ".join(uses), "exactly one of the three", got, cure))
        self.size = size
        self.encoder = encoder
        self.shared = shared
        rows = 1 if num_data is None else check_positive_int("num_data", num_data)
        self.table = nn.Parameter(torch.zeros(rows, size)) if encoder is None else None  # (N, size) or (1, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """phi(x): ``(N, size)``."""
        if self.encoder is not None:
            phi = self.encoder(x)  # (N, size)
            if phi.shape != (len(x), self.size):
                cure = f"Let its last layer put out {self.size} numbers a datum (flatten images first)."
                raise ShapeError(refuse("encoder", f"output of shape {(len(x), self.size)}", tuple(phi.shape), cure))
            return phi
        assert self.table is not None  # there is one wherever there is no encoder
        if self.shared:
            return self.table.expand(len(x), -1)
        if len(x) != len(self.table):
            cure = "Local parameters belong to the data they were made for: pass all of it, in one batch."
            raise ShapeError(refuse("x", f"num_data={len(self.table)} data", len(x), cure))
        return self.table
