"""log q(z|x) of any guide at latents that come from anywhere: stored draws, another guide's, a true z."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pyro_lvm._checks import data_tensor, refuse
from pyro_lvm._typing import DataPlate, Guide, TensorLike, Vectorize
from pyro_lvm.errors import DataTypeError, PlateError, ShapeError, SiteError
from pyro_lvm.tracing.batch import Batch, DataArgs, make_batch
from pyro_lvm.tracing.intercept import Site, Trace, is_latent, run
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.particles import Draws, Latent, Layout, Runner
from pyro_lvm.tracing.plates import common_plates, nesting
from pyro_lvm.tracing.sites import guide_sites, is_delta
from pyro_lvm.tracing.tables import agree
from pyro_lvm.tracing.weights import evaluation

__all__ = ["log_prob"]

_NUM_CHECKED = 3  # particles, by which running all of them at once is judged


def log_prob(
    guide: Guide,
    values: Mapping[str, TensorLike],
    x: TensorLike,
    *args: Any,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
) -> torch.Tensor:
    r"""log q(z | x) of given latents under any guide; differentiable.

    .. math:: \log q(z_n \mid x_n) = \sum_s \log q(z_{ns} \mid z_{n, <s}, x_n), \qquad \text{sites } s

    Args:
        guide: variational program q(z | x). It runs in eval mode, with the parameters that it learned.
        values: latent site -> value, ``(N, ...)`` as the guide draws it, or ``(K, N, ...)`` at all sites. A ``Delta``
            follows from the others and may be left out.
        x: data ``(N, ...)``.
        *args: further arguments of the guide; tensors with N rows go with x.
        data_plate: the plate that holds the data, ``"auto"`` for the one around all sites that has the size of x, None
            for one joint result.
        data_args: positions among ``args`` of those with one row per datum.
        vectorize: ``False`` runs one particle at a time, for guides whose Python control flow looks at latents.

    Returns:
        Nats, ``(N,)`` or ``(K, N)``; ``(1,)`` or ``(K, 1)`` with ``data_plate=None``. -inf outside the support; of a
        class that a ``Categorical`` does not have, torch knows no probability and raises.

    Raises:
        DataTypeError: ``values`` is no mapping from names to tensors or arrays.
        SiteError: a latent site of the guide has no value, or a value no site.
        ShapeError: a value has not the shape of its site.
        PlateError: no single plate of the size of x is around all sites.

    Example:
        >>> from pyro_lvm.guides import DiagonalNormal
        >>> guide = DiagonalNormal(2, shared=True)  # N(0, I)
        >>> log_prob(guide, {"z": torch.zeros(3, 2)}, torch.ones(3, 64))  # -log(2 pi)
        tensor([-1.8379, -1.8379, -1.8379], grad_fn=<SelectBackward0>)
    """
    batch = make_batch(data_tensor("x", x), args, data_args)
    tensors = _tensors(values)
    with evaluation(guide, None), validation(False):
        with evaluation_rng(0), torch.no_grad():
            trace = run(guide, batch.args)
        _check_sites(trace, tensors)
        layout = _layout(trace, len(batch), data_plate)
        single, draws = _canonical(trace, tensors, layout)
        runner = Runner(guide, layout, guide_sites, check_support=frozenset(draws))
        total = _score(runner, batch, draws, vectorize)
    return total[0] if single else total


def _tensors(values: Any) -> dict[str, torch.Tensor]:
    """The values by name, arrays as tensors."""
    if not isinstance(values, Mapping):
        cure = "Pass a dictionary from the names of the guide's latent sites to tensors."
        raise DataTypeError(refuse("values", "a mapping", type(values).__name__, cure))
    tensors = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in values.items()}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            cure = "Pass latents as the guide draws them, or K of them."
            raise DataTypeError(refuse(f"values[{name!r}]", "a tensor or an array", type(value).__name__, cure))
    return tensors


def _check_sites(trace: Trace, values: Mapping[str, torch.Tensor]) -> None:
    latents = [name for name, site in trace.items() if is_latent(site)]
    missing = [name for name in latents if name not in values and not is_delta(trace[name])]
    unknown = [name for name in values if name not in latents]
    if missing or unknown:
        got = f"no {missing}" if missing else f"{unknown}, which the guide does not sample"
        cure = "Pass a dictionary from the names of the guide's latent sites to tensors."
        raise SiteError(refuse("values", f"values of the latent sites {latents}", got, cure))


def _layout(trace: Trace, num_data: int, data_plate: DataPlate) -> Layout:
    """Where the guide keeps its data."""
    sites = [trace[name] for name in guide_sites(trace)]
    depth = nesting(trace)
    if data_plate is None:
        return Layout(None, None, depth)
    plates = [n for n in common_plates(sites) if {f.size for s in sites for f in _frames(s, n)} == {num_data}]
    chosen = [name for name in plates if data_plate in ("auto", name)]
    if len(chosen) != 1:
        cure = 'Name it with data_plate="...", put every site inside it, or pass data_plate=None for one joint result.'
        raise PlateError(refuse("guide", f"one plate of size {num_data} around all its sites", plates, cure))
    return Layout(chosen[0], _frames(sites[0], chosen[0])[0].dim, depth)


def _frames(site: Site, plate: str) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.name == plate]


def _canonical(trace: Trace, values: Mapping[str, torch.Tensor], layout: Layout) -> tuple[bool, Draws]:
    """Whether there are no particles, and the values as `Runner` takes them, ``(K, *batch, *event)``."""
    ranks = {name: values[name].dim() - trace[name]["value"].dim() for name in values}
    single = all(rank == 0 for rank in ranks.values())
    sizes = {len(value) for value in values.values()} if not single else {1}
    draws = {}
    for name, value in values.items():
        site, shape = trace[name], tuple(trace[name]["value"].shape)
        if ranks[name] != int(not single) or tuple(value.shape[ranks[name] :]) != shape or len(sizes) > 1:
            cure = "Pass values as the guide draws them, or at all sites one dimension more, of one size, at the left."
            expected = f"shape {shape} or (K, {', '.join(map(str, shape))})"
            raise ShapeError(refuse(f"values[{name!r}]", expected, tuple(value.shape), cure))
        rank = max((-frame.dim for frame in site["cond_indep_stack"] if frame.dim is not None), default=0)
        many = value[None] if single else value
        draws[name] = Latent(many.reshape(len(many), *(1,) * (layout.nesting - rank), *shape), rank)
    return single, draws


def _score(runner: Runner, batch: Batch, draws: Draws, vectorize: Vectorize) -> torch.Tensor:
    """``(K, N)``, of all particles at once where the guide gives the same numbers as one by one."""
    num_particles = max((len(latent.value) for latent in draws.values()), default=1)
    if vectorize is False or num_particles <= _NUM_CHECKED:
        return runner.run(batch, "looped", num_particles, draws)[0].total
    few = {name: Latent(latent.value[:_NUM_CHECKED], latent.rank) for name, latent in draws.items()}
    try:
        with torch.no_grad():
            expected = runner.run(batch, "looped", _NUM_CHECKED, few)[0]
            together = agree(expected, runner.run(batch, "vectorised", _NUM_CHECKED, few)[0])
    except Exception:  # noqa: BLE001 - a guide that was not written for a batch of particles may raise anything
        together = False
    return runner.run(batch, "vectorised" if together else "looped", num_particles, draws)[0].total
