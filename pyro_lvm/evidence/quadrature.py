r"""log p(x) by quadrature over a continuous latent of up to three dimensions.

In unconstrained coordinates u the integrand p(x, z(u)) |dz/du| decays on all sides, where the trapezoidal rule
converges faster than any power of the spacing (Trefethen & Weideman 2014). What it needs is a box that holds
the mass: each datum has its own, found by zooming in on, or out to, where the integrand lies within 45 nats of its
largest value, and turned along the axes of the posterior.

Towards the edge of a support log p(x, z(u)) |dz/du| becomes a straight line in u, as does that of a density z^(a-1).
Where z(u) is closer to the edge than floating-point numbers tell apart, that line is continued.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from pyro_lvm._checks import check_positive_int, check_program, refuse, shown
from pyro_lvm._interrupts import kept_if
from pyro_lvm._typing import Data, DataPlate, Model
from pyro_lvm.errors import DataTypeError, SiteError, SupportError
from pyro_lvm.evidence.data import data_provenance, data_source, device_of
from pyro_lvm.evidence.record import LogMarginal, exact_record
from pyro_lvm.tracing.batch import Batch, DataArgs
from pyro_lvm.tracing.coordinates import Axis, Coordinates, check_fixed, make_axis
from pyro_lvm.tracing.digest import DataDigest, parameter_digest
from pyro_lvm.tracing.intercept import Trace, is_unobserved, run, vectorised_frames, without
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.probe import PROBE_ROWS, Plan, probe_pair
from pyro_lvm.tracing.proposals import normal_guide
from pyro_lvm.tracing.sites import check_free, mask_of
from pyro_lvm.tracing.weights import check_data, evaluation

__all__ = ["quadrature"]

_REACH = 45.0  # nats below the largest value: e^-45 of the mass is rounding error
_COARSE = {1: 129, 2: 33, 3: 17}  # nodes a dimension while the box is sought
_FINE = {1: 513, 2: 129, 3: 49}  # odd, so that every second node is the rule of twice the spacing
_FIRST = 10.0  # half width of the first box, in unconstrained coordinates
_ZOOMS = 40
_TURNS = 3
_LINES = (1.0, 3.0)  # lengths of u on which the slope at the edge of a support is taken, the second for its error
_LEAST = 4.0  # least reach of u in which both have room
_RERUNS = 16  # runs that a support stays the same in: two would often draw a single class alike
_ROUNDING = 16  # rounding error in units of eps times the terms


def quadrature(
    model: Model,
    x: Data,
    *args: Any,
    num_nodes: int | None = None,
    tolerance: float = 1e-6,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LogMarginal:
    r"""log p(x) of every datum by the trapezoidal rule, with its own error estimate.

    .. math:: \log p(x_n) = \log \int p(x_n, z) \, dz

    Args:
        model: generative program p(x, z) whose continuous latents have at most three dimensions a datum; scalar
            discrete ones are summed out.
        x: data ``(N, ...)``, or a ``Dataset`` or ``DataLoader``.
        *args: further arguments of the model; tensors with N rows go with x.
        num_nodes: nodes a dimension, odd; None is 513, 129 or 49 in one, two or three dimensions.
        tolerance: largest error in nats, beside rounding, that counts as ``exact``.
        data_plate: the plate that holds the data, ``"auto"`` to find it, None for one joint result.
        data_args: positions among ``args`` of those with one row per datum.
        device: where to compute; None stays on the device of x.
        progress: show a bar; None shows it in a terminal.

    Returns:
        `LogMarginal`; ``stderr`` adds up estimates of four errors in nats: how rules of twice and three times the
        spacing differ, which for a smooth integrand is more than the error; what nodes far around see outside of the
        box; how far two slopes at the edge of a support, beyond the reach of the dtype, lead apart; and rounding, 16
        eps times the terms of log p(x, z) where that is largest. Status ``exact`` if all but the last, which more
        nodes cannot lower, are up to ``tolerance`` together, else ``unreliable``; ``no_support`` at -inf and
        ``nonfinite`` at NaN and infinity. A mode that lies between all nodes far around is not seen. Interrupted with
        Ctrl-C it holds the data that are finished.

    Raises:
        SupportError: a latent is discrete without being enumerable, has more than three dimensions, lies in a plate of
            its own, or has a support that moves with other latents.
        SiteError: something depends on a missing value (``obs_mask``), which the model draws itself, or a latent is
            masked.

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
    check_program("model", model)
    guide = normal_guide(without(model, is_unobserved), lambda fn: not fn.has_enumerate_support)
    parts: list[tuple[torch.Tensor, ...]] = []
    digest = DataDigest()
    with evaluation(model, guide), torch.no_grad(), evaluation_rng(0):
        plan = probe_pair(model, guide, source, data_plate)
        with validation(False):
            rows, _ = plan.chunk_sizes(len(source), 1, device_of(source))
            few = source.rows(slice(0, rows if plan.tied else PROBE_ROWS))
            check_free(model, few.args, plan.match)
            parameters = parameter_digest(model, guide, few)
            bar = tqdm(total=len(source), unit=" data", unit_scale=True, disable=not shown(progress))
            with bar, kept_if(lambda: parts):
                for start in range(0, len(source), rows):
                    batch = source.rows(slice(start, min(start + rows, len(source))))
                    check_data(plan, model, guide, batch, start)
                    integrand = _Integrand(plan, model, guide, batch)
                    if start == 0:
                        integrand.check_supports(guide)
                    found = integrand.integrate(num_nodes)
                    digest.add(batch)
                    parts.append(found)
                    num_terms = integrand.num_nodes**integrand.dim
                    bar.update(len(batch))
    value, error, rounding = map(torch.cat, zip(*parts, strict=True))
    provenance = {"data": data_provenance(x), "data_plate": plan.model_layout.plate, "tolerance": tolerance}
    provenance["sha256"] = {"parameters": parameters, "data": digest.hexdigest()}
    provenance |= {"num_data": len(source), "finished": len(value) == plan.model_layout.num_data(source)}
    record = exact_record(value, "quadrature", num_terms, provenance)
    unsure = (value.isfinite() & ~(error <= tolerance)).cpu().numpy()
    status = np.where(unsure, "unreliable", record.status)
    return replace(record, stderr=error + rounding, status=status)


class _Integrand:
    """log p(x, z(u)) |dz/du| of some data, as a function of nodes u ``(k, N, d)``."""

    def __init__(self, plan: Plan, model: Model, guide: Any, batch: Batch) -> None:
        self.plan, self.model, self.batch = plan, model, batch
        sites = self._latents(guide)
        for name, site in sites.items():
            _check_site(name, site, plan)
        self.coordinates = Coordinates(plan.model_layout, batch, self._axes(sites))
        self.num_data, self.dim, self.num_nodes = self.coordinates.num_data, self.coordinates.dim, 0
        if not 1 <= self.dim <= 3:
            raise SupportError(
                f"latent sites {list(sites)}: expected one to three continuous dimensions a datum, got {self.dim}. The "
                "number of nodes grows exponentially with it: estimate log p(x) with a guide."
            )
        dtype = next(iter(sites.values()))["value"].dtype
        self.like = torch.empty(0, dtype=dtype, device=batch.args[0].device)
        self.low, self.high = -self._reach(-1), self._reach(1)  # (N, d)
        self.fine = (self.high.minimum(-self.low) >= _LEAST).all(-1)  # (N,), the dtype tells enough of the values

    def _latents(self, guide: Any) -> Trace:
        return {n: s for n, s in run(guide, self.batch.args).items() if n in self.plan.match.sampled}

    def _axes(self, sites: Trace) -> list[Axis]:
        layout = self.plan.model_layout
        return [make_axis(name, site, site["fn"].transforms[0], layout) for name, site in sites.items()]

    def check_supports(self, guide: Any) -> None:
        """The supports are the same whatever other latents are drawn, labels that are summed out among them."""
        for _ in range(_RERUNS):
            sites = self._latents(guide)
            check_fixed(self.coordinates.axes, self._axes(sites), sites)

    def _reach(self, sign: int) -> torch.Tensor:
        """How far from 0 each coordinate, alone, can be told from its value: ``(N, d)``, inf on the real line.

        To the square root of the precision, where slopes are as much in error from rounding as from being taken
        within the support; and no further than where squares of values would underflow.
        """
        info = torch.finfo(self.like.dtype)
        most = -math.log(info.tiny) / 2
        line = torch.linspace(0, most, 129, dtype=self.like.dtype, device=self.like.device)
        line = torch.cat([line, line.new_tensor([1e4])])
        reach = []
        for i in range(self.dim):
            u = line.new_zeros(len(line), self.num_data, self.dim)
            u[..., i] = sign * line[:, None]
            back = self.coordinates.vector(self.coordinates.latents(u)[0])
            lost = ~((back - u)[..., i].abs() <= math.sqrt(info.eps))  # NaN is lost too
            first = torch.where(lost, line[:, None], torch.inf).amin(0).double()  # (N,)
            reach.append(torch.where(first.isinf(), first, (first - most / 128).clamp(0, most)))
        return torch.stack(reach, -1)

    def __call__(self, u: torch.Tensor, length: float = _LINES[0]) -> torch.Tensor:
        """``(k, N)``; beyond the reach of the dtype on the straight line through what lies ``length`` within it."""
        within = u.clamp(self.low, self.high).where(self.fine[:, None], u)
        distance = (u - within).abs().amax(-1)  # (k, N)
        values = self._chunked(within)
        some = (distance > 0).any(1).nonzero()[:, 0]
        if not len(some):
            return values
        distance, edge = distance[some], within[some]
        inwards = (edge - u[some]) / distance.where(distance > 0, 1.0)[..., None]
        slope = (values[some] - self._chunked(edge + length * inwards)) / length
        line = values[some] + slope * distance
        values[some] = line.where((distance > 0) & values[some].isfinite(), values[some])
        return values

    def _chunked(self, u: torch.Tensor) -> torch.Tensor:
        """log p(x, z(u)) |dz/du|, ``(k, N)``, in chunks that fit the memory."""
        _, size = self.plan.chunk_sizes(len(self.batch), len(u), u.device)
        return torch.cat([self._log_joint(part)[0] for part in u.split(size)])

    def _log_joint(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log p(x, z(u)) |dz/du|, ``(k, N)``, and its rounding error, ``(N,)`` nats, the largest of all nodes."""
        draws, jacobian = self.coordinates.latents(u.to(self.like.dtype))
        table, _ = self.plan.model_runner(self.model).run(self.batch, self.plan.model_mode, len(u), draws)
        eps = max(torch.finfo(dtype).eps for dtype in (self.like.dtype, table.total.dtype))
        size = (table.magnitude.double() + jacobian.double().abs().amax(0)).clamp(min=1.0)
        return table.total.double() + jacobian.double(), _ROUNDING * eps * size

    def integrate(self, num_nodes: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log of the integral, its error and that from rounding, each ``(N,)`` nats."""
        box = self._box()
        self.num_nodes = check_positive_int("num_nodes", num_nodes or _FINE[self.dim], 9) // 2 * 2 + 1
        nodes = _grid(self.num_nodes, self.dim, box.center)  # (G, d)
        u = box.at(nodes)  # (G, N, d)
        values = self(u)  # (G, N)
        log_cell = box.log_volume - self.dim * math.log(self.num_nodes - 1)  # (N,)
        fine = values.logsumexp(0) + log_cell
        value = torch.logaddexp(fine, self._outside(box, nodes))
        # What few nodes see is known to a factor only.
        error = self._spacing_error(values) + 4 * (value - fine) + self._beyond(u, values)
        best = u[_known(values).argmax(0), torch.arange(self.num_data, device=u.device)]  # (N, d)
        return value, error, self._log_joint(best.clamp(self.low, self.high)[None])[1]

    def _spacing_error(self, values: torch.Tensor) -> torch.Tensor:
        r"""Error of the rule from its ``values (G, N)``, ``(N,)`` nats.

        With spacing h it is :math:`F(2 \pi / h)`, F the spectrum of the integrand. The rule of spacing 2h errs by
        :math:`F(\pi / h)`, but at some phases by nothing. Those of spacing 3h cannot all do so, each on its third of
        the nodes; where F decays exponentially the square of their error, :math:`F(4 \pi / 3h)`, is still the larger.
        """
        table = values.reshape(*(self.num_nodes,) * self.dim, -1)  # (n, ..., n, N)
        total = values.logsumexp(0)
        second = table[(slice(None, None, 2),) * self.dim].flatten(0, self.dim - 1).logsumexp(0)
        error = (second + self.dim * math.log(2) - total).abs()
        for i in range(self.dim):
            lines = table.movedim(i, 0).reshape(self.num_nodes, -1, self.num_data).logsumexp(1)  # (n, N)
            thirds = [lines[start::3].logsumexp(0) + math.log(3) - total for start in range(3)]
            error = error.maximum(torch.stack(thirds).abs().amax(0) ** 2)
        return error

    def _beyond(self, u: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """By how much the integral is uncertain since it goes beyond the reach of the dtype, ``(N,)`` nats."""
        beyond = ((u < self.low) | (u > self.high)).any(-1)  # (G, N)
        some = beyond.any(1)
        if not bool(some.any()):
            return torch.zeros_like(values[0])
        others = values.clone()
        others[some] = self(u[some], _LINES[1])
        others = others.masked_fill(beyond & ~self.fine, -torch.inf)
        return torch.maximum(values, others).logsumexp(0) - torch.minimum(values, others).logsumexp(0)

    def _outside(self, box: "_Box", nodes: torch.Tensor) -> torch.Tensor:
        """Log of the integral around the box, as far as few nodes see it: ``(N,)`` nats."""
        around = box.surroundings()
        u = around.at(nodes)  # (G, N, d)
        values = _known(self(u)).masked_fill(box.holds(u), -torch.inf)
        return values.logsumexp(0) + around.log_volume - self.dim * math.log(self.num_nodes - 1)

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
            values = self(box.at(nodes))  # (G, N)
            lost = values.isnan().all(0)  # (N,)
            values = _known(values)
            inside = (values >= values.amax(0) - _REACH)[..., None]  # (G, N, 1)
            low = nodes[:, None].masked_fill(~inside, torch.inf).amin(0)  # (N, d)
            high = nodes[:, None].masked_fill(~inside, -torch.inf).amax(0)
            # One step beyond the last node that matters, and further where that is the edge of the box.
            step = 2 / (_COARSE[self.dim] - 1)
            low = torch.where(low <= -1, -3.0, low - step)
            high = torch.where(high >= 1, 3.0, high + step)
            # Both ends, not the size.
            settled = ((low + 1).abs() < max(0.1, step)) & ((high - 1).abs() < max(0.1, step))
            if bool((settled | lost[:, None]).all()):
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
        within = torch.eye(nodes.shape[1], dtype=nodes.dtype, device=nodes.device)
        within = within * (nodes[1] - nodes[0]).amax() ** 2 / 12
        covariance = torch.einsum("gn,gni,gnj->nij", weights, centered, centered) + within
        factor, failed = torch.linalg.cholesky_ex(covariance)
        turned = _Box(self.center + torch.einsum("nij,nj->ni", self.axes, mean), self.axes @ factor * 10.0)
        sound = (failed == 0) & turned.axes.isfinite().all(-1).all(-1)  # not where the weights are NaN
        center = turned.center.where(sound[:, None], self.center)
        return _Box(center, turned.axes.where(sound[:, None, None], self.axes))


def _grid(num_nodes: int, dim: int, like: torch.Tensor) -> torch.Tensor:
    """The nodes of a box [-1, 1]^d, ``(G, d)``."""
    line = torch.linspace(-1, 1, num_nodes, dtype=torch.float64, device=like.device)
    return torch.cartesian_prod(*[line] * dim).reshape(-1, dim)


def _known(values: torch.Tensor) -> torch.Tensor:
    """Log-densities with zero density in the place of NaN."""
    return values.masked_fill(values.isnan(), -torch.inf)


def _check_site(name: str, site: Any, plan: Plan) -> None:
    others = [f.name for f in vectorised_frames(site) if f.name != plan.model_layout.plate]
    if others:
        raise SupportError(
            f"latent site {name!r}: expected it inside the data plate only, got plates {others} around it. Declare "
            "their dimensions as the event, or estimate log p(x) with a guide."
        )
    mask = mask_of(site)
    if not bool(mask.all()):
        got = f"{int((~mask).sum())} of {mask.numel()} masked"
        cure = "A masked latent has no integral: unmask it, leave these data out, or estimate log p(x) with a guide."
        raise SiteError(refuse(f"latent site {name!r}", "a density for every element", got, cure))
