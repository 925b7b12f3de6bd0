r"""log p(x) by quadrature over a continuous latent of up to three dimensions.

In unconstrained coordinates u the integrand p(x, z(u)) |dz/du| decays on all sides, where the trapezoidal rule
converges faster than any power of the spacing (Trefethen & Weideman 2014). What it needs is a box that holds
the mass: each datum has its own, found by zooming in on, or out to, where the integrand lies within 45 nats of its
largest value, and turned along the axes of the posterior.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm._typing import Data, DataPlate, Model
from pyro_lvm.errors import DataTypeError, SupportError
from pyro_lvm.evidence.data import data_provenance, data_source, device_of
from pyro_lvm.evidence.record import LogMarginal, exact_record
from pyro_lvm.tracing.batch import Batch, DataArgs
from pyro_lvm.tracing.coordinates import Coordinates, make_axis
from pyro_lvm.tracing.digest import DataDigest, parameter_digest
from pyro_lvm.tracing.intercept import run, vectorised_frames
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.probe import Plan, probe_pair
from pyro_lvm.tracing.proposals import normal_guide
from pyro_lvm.tracing.weights import check_data, evaluation

__all__ = ["quadrature"]

_REACH = 45.0  # nats below the largest value: e^-45 of the mass is rounding error
_COARSE = {1: 129, 2: 33, 3: 17}  # nodes a dimension while the box is sought
_FINE = {1: 513, 2: 129, 3: 49}  # odd, so that every second node is the rule of twice the spacing
_FIRST = 10.0  # half width of the first box, in unconstrained coordinates
_ZOOMS = 40
_TURNS = 3


def quadrature(
    model: Model,
    x: Data,
    *args: Any,
    num_nodes: int | None = None,
    tolerance: float = 1e-6,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    device: torch.device | str | None = None,
) -> LogMarginal:
    r"""log p(x) of every datum by the trapezoidal rule, with its own error estimate.

    .. math:: \log p(x_n) = \log \int p(x_n, z) \, dz

    Args:
        model: generative program p(x, z) whose continuous latents have at most three dimensions a datum; scalar
            discrete ones are summed out.
        x: data ``(N, ...)``, or a ``Dataset`` or ``DataLoader``.
        *args: further arguments of the model; tensors with N rows go with x.
        num_nodes: nodes a dimension, odd; None is 513, 129 or 49 in one, two or three dimensions.
        tolerance: largest error in nats that counts as ``exact``.
        data_plate: the plate that holds the data, ``"auto"`` to find it, None for one joint result.
        data_args: positions among ``args`` of those with one row per datum.
        device: where to compute; None stays on the device of x.

    Returns:
        `LogMarginal`; ``stderr`` is the difference to the rule with twice the spacing, a bound on the error of the
        finer one where the integrand is smooth, and what nodes far around see outside of the box. Status ``exact`` up
        to ``tolerance``, else ``unreliable``. A mode that lies between all nodes far around is not seen.

    Raises:
        SupportError: a latent is discrete without being enumerable, has more than three dimensions, or lies in a plate
            of its own.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> result = quadrature(model, torch.zeros(1).double())
        >>> print(f"{result.mean:.6f}", result.status[0])  # log N(0; 0, 2)
        -1.265512 exact
    """
    if not isinstance(tolerance, float | int) or not tolerance > 0:
        raise DataTypeError(refuse("tolerance", "a positive number of nats", repr(tolerance), "Pass e.g. 1e-6."))
    source = data_source(x, args, data_args, device)
    guide = normal_guide(model, lambda fn: not fn.has_enumerate_support)
    values, errors, digest = [], [], DataDigest()
    with evaluation(model, guide), torch.no_grad(), evaluation_rng(0, [device_of(source)]):
        plan = probe_pair(model, guide, source, data_plate)
        with validation(False):
            rows, _ = plan.chunk_sizes(len(source), 1, device_of(source))
            for start in range(0, len(source), rows):
                batch = source.rows(slice(start, min(start + rows, len(source))))
                check_data(plan, model, guide, batch, start)
                digest.add(batch)
                integrand = _Integrand(plan, model, guide, batch)
                value, error = integrand.integrate(num_nodes)
                values.append(value)
                errors.append(error)
        parameters = parameter_digest(model, guide, batch)
    value, error = torch.cat(values), torch.cat(errors)
    provenance = {"data": data_provenance(x), "data_plate": plan.model_layout.plate, "tolerance": tolerance}
    provenance["sha256"] = {"parameters": parameters, "data": digest.hexdigest()}
    record = exact_record(value, "quadrature", integrand.num_nodes**integrand.dim, provenance)
    sure = (error <= tolerance).cpu().numpy()
    return replace(record, stderr=error, status=np.where(sure, record.status, "unreliable"))


class _Integrand:
    """log p(x, z(u)) |dz/du| of some data, as a function of nodes u ``(k, N, d)``."""

    def __init__(self, plan: Plan, model: Model, guide: Any, batch: Batch) -> None:
        self.plan, self.model, self.batch = plan, model, batch
        sites = {n: s for n, s in run(guide, batch.args).items() if n in plan.match.sampled}
        for name, site in sites.items():
            _check_plates(name, site, plan)
        layout = plan.model_layout
        axes = [make_axis(name, site, site["fn"].transforms[0], layout) for name, site in sites.items()]
        self.coordinates = Coordinates(layout, batch, axes)
        self.num_data, self.dim, self.num_nodes = self.coordinates.num_data, self.coordinates.dim, 0
        if not 1 <= self.dim <= 3:
            raise SupportError(
                f"latent sites {list(sites)}: expected one to three continuous dimensions a datum, got {self.dim}. The "
                "number of nodes grows exponentially with it: estimate log p(x) with a guide."
            )
        dtype = next(iter(sites.values()))["value"].dtype
        self.like = torch.empty(0, dtype=dtype, device=batch.args[0].device)

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """``(k, N)``, in chunks that fit the memory."""
        _, size = self.plan.chunk_sizes(len(self.batch), len(u), u.device)
        return torch.cat([self._log_joint(part) for part in u.split(size)])

    def _log_joint(self, u: torch.Tensor) -> torch.Tensor:
        draws, jacobian = self.coordinates.latents(u.to(self.like.dtype))
        table, _ = self.plan.model_runner(self.model).run(self.batch, self.plan.model_mode, len(u), draws)
        return table.total.double() + jacobian.double()

    def integrate(self, num_nodes: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log of the integral and its error, ``(N,)`` nats."""
        box = self._box()
        self.num_nodes = check_positive_int("num_nodes", num_nodes or _FINE[self.dim], 9) // 2 * 2 + 1
        nodes = _grid(self.num_nodes, self.dim, box.center)  # (G, d)
        values = self(box.at(nodes))  # (G, N)
        every_second = values.reshape(*(self.num_nodes,) * self.dim, -1)[(slice(None, None, 2),) * self.dim]
        log_cell = box.log_volume - self.dim * math.log(self.num_nodes - 1)  # (N,)
        fine = values.logsumexp(0) + log_cell
        coarse = every_second.flatten(0, self.dim - 1).logsumexp(0) + log_cell + self.dim * math.log(2)
        outside = self._outside(box, nodes, fine)
        # What few nodes see is known to a factor only.
        return fine + outside, (fine - coarse).abs() + 4 * outside

    def _outside(self, box: "_Box", nodes: torch.Tensor, log_total: torch.Tensor) -> torch.Tensor:
        """log(1 + r) with r what lies around the box, as a share of what lies inside: ``(N,)`` nats."""
        around = box.surroundings()
        u = around.at(nodes)  # (G, N, d)
        values = self(u).nan_to_num(nan=-torch.inf).masked_fill(box.holds(u), -torch.inf)
        log_cell = around.log_volume - self.dim * math.log(self.num_nodes - 1)
        return (values.logsumexp(0) + log_cell - log_total).exp().log1p()

    def _box(self) -> "_Box":
        """What holds the mass: zoomed to it, then turned along its principal axes and zoomed again."""
        like = self.like.double()
        center = like.new_zeros(self.num_data, self.dim)
        box = _Box(center, torch.diag_embed(torch.full_like(center, _FIRST)))
        nodes = _grid(_COARSE[self.dim], self.dim, like)  # (G, d)
        for _ in range(_TURNS if self.dim > 1 else 1):
            box, values = self._zoom(box, nodes)
            if self.dim > 1:
                box = box.turned(nodes, values.softmax(0))
        return self._zoom(box, nodes)[0]

    def _zoom(self, box: "_Box", nodes: torch.Tensor) -> tuple["_Box", torch.Tensor]:
        for _ in range(_ZOOMS):
            values = self(box.at(nodes)).nan_to_num(nan=-torch.inf)  # (G, N)
            inside = (values >= values.amax(0) - _REACH)[..., None]  # (G, N, 1)
            low = nodes[:, None].masked_fill(~inside, torch.inf).amin(0)  # (N, d)
            high = nodes[:, None].masked_fill(~inside, -torch.inf).amax(0)
            # One step beyond the last node that matters, and further where that is the edge of the box.
            step = 2 / (_COARSE[self.dim] - 1)
            low = torch.where(low <= -1, -3.0, low - step)
            high = torch.where(high >= 1, 3.0, high + step)
            settled = ((low + 1).abs() < max(0.1, step)) & (
                (high - 1).abs() < max(0.1, step)
            )  # both ends, not the size
            if bool(settled.all()):
                break
            box = box.cut(low, high)
        return box, values


@dataclass(frozen=True)
class _Box:
    """A parallelepiped for each datum: u = center + axes t with t in [-1, 1]^d; ``(N, d)`` and ``(N, d, d)``."""

    center: torch.Tensor
    axes: torch.Tensor

    def at(self, nodes: torch.Tensor) -> torch.Tensor:
        """The nodes t ``(G, d)`` as u, ``(G, N, d)``."""
        return self.center + torch.einsum("nij,gj->gni", self.axes, nodes)

    def cut(self, low: torch.Tensor, high: torch.Tensor) -> "_Box":
        """The part with t between ``low`` and ``high``, ``(N, d)``."""
        middle = torch.einsum("nij,nj->ni", self.axes, (low + high) / 2)
        return _Box(self.center + middle, self.axes * ((high - low) / 2)[:, None])

    @property
    def log_volume(self) -> torch.Tensor:
        """``(N,)``."""
        return (2 * self.axes).det().abs().log()

    def holds(self, u: torch.Tensor) -> torch.Tensor:
        """Whether u ``(G, N, d)`` lies inside, ``(G, N)``."""
        t = torch.linalg.solve(self.axes, (u - self.center).movedim(0, -1))  # (N, d, G)
        return (t.abs() <= 1).all(1).T

    def surroundings(self) -> "_Box":
        """The upright box about zero that holds the first one, and this one twice as wide."""
        reach = (self.center.abs() + 2 * self.axes.abs().sum(2)).clamp(min=_FIRST)  # (N, d)
        return _Box(torch.zeros_like(self.center), torch.diag_embed(reach))

    def turned(self, nodes: torch.Tensor, weights: torch.Tensor) -> "_Box":
        """Ten standard deviations each way along the covariance of nodes with ``weights (G, N)``."""
        mean = torch.einsum("gn,gj->nj", weights, nodes)
        centered = nodes[:, None] - mean  # (G, N, d)
        # Within its cell a node stands for a uniform density, whose variance is a twelfth of its square.
        within = torch.eye(nodes.shape[1], dtype=nodes.dtype) * (nodes[1] - nodes[0]).amax() ** 2 / 12
        covariance = torch.einsum("gn,gni,gnj->nij", weights, centered, centered) + within.to(nodes.device)
        center = self.center + torch.einsum("nij,nj->ni", self.axes, mean)
        return _Box(center, self.axes @ torch.linalg.cholesky(covariance) * 10.0)


def _grid(num_nodes: int, dim: int, like: torch.Tensor) -> torch.Tensor:
    """The nodes of a box [-1, 1]^d, ``(G, d)``."""
    line = torch.linspace(-1, 1, num_nodes, dtype=torch.float64, device=like.device)
    return torch.cartesian_prod(*[line] * dim).reshape(-1, dim)


def _check_plates(name: str, site: Any, plan: Plan) -> None:
    others = [f.name for f in vectorised_frames(site) if f.name != plan.model_layout.plate]
    if others:
        raise SupportError(
            f"latent site {name!r}: expected it inside the data plate only, got plates {others} around it. Declare "
            "their dimensions as the event, or estimate log p(x) with a guide."
        )
