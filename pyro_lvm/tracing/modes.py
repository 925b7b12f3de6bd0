"""Which ways of running particles a pair can take.

The same latents go through every way: a program that mixes particles with data (a reshape by ``len(x)``) or couples the
data (a batch mean) gives other numbers, and is folded, looped, or refused.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch

from pyro_lvm._typing import Vectorize
from pyro_lvm.errors import PlateError
from pyro_lvm.tracing.batch import Batch
from pyro_lvm.tracing.intercept import is_latent, run
from pyro_lvm.tracing.particles import Draws, Mode, Runner
from pyro_lvm.tracing.sites import Match
from pyro_lvm.tracing.tables import Table, agree

__all__ = ["Modes", "find_modes"]

_PARTICLES = 3
_ALONE = 8  # of a single result: a branch on all particles at once would else be seen as one that couples data


class Modes(NamedTuple):
    """How the programs of a pair run particles.

    Attributes:
        model: how the model does.
        guide: how the guide does; ``"once"`` means that one run gives the distributions of all draws.
        bytes_per_particle: memory that one particle of one datum needs while the model runs, an upper bound.
    """

    model: Mode
    guide: Mode | Literal["once"]
    bytes_per_particle: int


def find_modes(
    models: Runner, guides: Runner, batch: Batch, match: Match, vectorize: Vectorize, tied: bool, hidden: bool
) -> Modes:
    """The fastest ways that give the numbers of a loop.

    Args:
        models: the model.
        guides: the guide.
        batch: some data.
        match: the roles of the sites.
        vectorize: ``False`` allows the loop alone.
        tied: the pair runs on all data only, which then are not asked to be independent.
        hidden: the guide draws noise outside of Pyro.

    Raises:
        PlateError: the data are coupled.
    """
    num_data = models.layout.num_data(batch)
    size = _PARTICLES if num_data > 1 else _ALONE
    guide_table, proposed = guides.run(batch, "looped", size)
    model_table, drawn = models.run(batch, "looped", size, proposed)
    everything = {n: drawn[n] for n in match.free} | proposed  # with the draws that only the model makes
    model_table = _with_rounding(models, batch, size, model_table, everything)
    if scorable := _scores_given_draws(guides, batch, size, proposed):
        guide_table = _with_rounding(guides, batch, size, guide_table, proposed)
    if not tied and len(batch) > 1:
        if scorable:
            _check_uncoupled("guide", guides, batch, size, guide_table, proposed)
        _check_uncoupled("model", models, batch, size, model_table, everything)
    guide_mode: Mode | Literal["once"] = "looped"
    if vectorize is not False:
        once = not hidden and _draws_are_independent(guides, batch)
        # A particle plate does not multiply noise that is drawn outside of Pyro.
        guide_mode = "once" if once else _mode(guides, batch, size, guide_table, proposed, plate=not hidden)
    model_mode: Mode = "looped" if vectorize is False else _mode(models, batch, size, model_table, everything)
    with _Allocated() as allocated:
        models.run(batch, model_mode, size, everything)
    return Modes(model_mode, guide_mode, allocated.bytes // (size * num_data) + 1)


def _with_rounding(runner: Runner, batch: Batch, size: int, table: Table, draws: Draws) -> Table:
    """The table with a magnitude that allows for latents known to their last digit only, where densities are sharp."""
    moved = {n: replace(d, value=_next(d.value)) for n, d in draws.items()}
    change = (runner.run(batch, "looped", size, moved)[0].total - table.total).abs().nan_to_num(0.0, 0.0)
    return Table(table.total, table.magnitude + change.amax(0) / torch.finfo(change.dtype).eps)


def _mode(runner: Runner, batch: Batch, size: int, expected: Table, draws: Draws, plate: bool = True) -> Mode:
    """The fastest way of running particles that gives the numbers of a loop; ``plate=False`` leaves out the first."""
    modes: list[Mode] = ["vectorised"] if plate else []
    modes += ["folded"] if runner.layout.dim is not None else []
    for mode in modes:
        try:
            got, _ = runner.run(batch, mode, size, draws)
        except Exception:  # noqa: BLE001 - a program that was not written for a batch of particles may raise anything
            continue
        if agree(expected, got):
            return mode
    return "looped"


def _next(values: torch.Tensor) -> torch.Tensor:
    """The next larger numbers, but for whole ones, which may be bits and labels."""
    if not values.is_floating_point():
        return values
    return values.where(values == values.round(), torch.nextafter(values, torch.full_like(values, torch.inf)))


def _scores_given_draws(guides: Runner, batch: Batch, size: int, draws: Draws) -> bool:
    """Whether the guide has a density at draws from before; some flows only know that of the draw just made."""
    try:
        guides.run(batch, "looped", size, draws)
    except (KeyError, NotImplementedError):
        return False
    return True


def _check_uncoupled(program: str, runner: Runner, batch: Batch, size: int, expected: Table, draws: Draws) -> None:
    """The densities of a datum, for the same latents, do not change with the company it is in."""
    if runner.layout.dim is None:
        return
    for rows in (slice(0, len(batch) - 1), slice(1, len(batch))):
        some = {n: d.rows(rows, runner.layout) for n, d in draws.items()}
        try:
            got, _ = runner.run(batch.rows(rows), "looped", size, some)
            alone = agree(Table(expected.total[:, rows], expected.magnitude[rows]), got)
        except Exception:  # noqa: BLE001 - latents of a datum that do not fit a part of the data
            alone = False
        if not alone:
            raise PlateError(
                f"{program}: expected data that are independent given their latents, got densities of one datum that "
                "change with the other data in x. Remove what couples them (a batch mean, batch normalisation that is "
                "always in train mode, a dependence on neighbours), pass data_args=() if an argument has len(x) rows "
                "by chance, or ask for one joint result with data_plate=None.",
                finding="coupled-data",
            )


def _draws_are_independent(guides: Runner, batch: Batch) -> bool:
    """Whether no guide site depends on another's draw, so that the distributions of one run serve all draws.

    Two signs of dependence: parameters with a particle dimension, or, where the guide reshapes that away, parameters
    that change from run to run.
    """
    ranks: dict[str, int] = {}
    try:
        particles = run(
            guides.program, batch.args, num_particles=_PARTICLES, nesting=guides.layout.nesting, ranks=ranks
        )
        first, *others = (run(guides.program, batch.args) for _ in range(_PARTICLES))
        sites = [s for s in particles.values() if s["type"] == "sample"]
        if not all(is_latent(s) and ranks[s["name"]] <= guides.layout.nesting for s in sites):
            return False
        values = {s["name"]: first[s["name"]]["value"] for s in sites}
        return len(sites) == 1 or all(
            torch.allclose(first[n]["fn"].log_prob(v), other[n]["fn"].log_prob(v), equal_nan=True)
            for other in others
            for n, v in values.items()
        )
    except Exception:  # noqa: BLE001 - as in `_mode`
        return False


class _Allocated(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the sizes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.bytes += tensor.untyped_storage().nbytes()
        return out
