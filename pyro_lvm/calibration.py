"""Simulation-based calibration: are the latents of simulated data ordinary draws of the guide?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from tqdm.auto import tqdm

from pyro_lvm._checks import check_chunks, check_positive_int, check_program, refuse, shown
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Model, Vectorize
from pyro_lvm.errors import PlateError, SupportError
from pyro_lvm.evidence.columns import Columns
from pyro_lvm.evidence.data import data_source, device_of
from pyro_lvm.evidence.expectation import Expectation, MeansJob, Values
from pyro_lvm.evidence.job import look
from pyro_lvm.ops import DOUBTFUL
from pyro_lvm.ops.uniformity import holm, symmetry_test, uniformity_test
from pyro_lvm.tracing.batch import Batch, DataArgs
from pyro_lvm.tracing.captured_weights import Tables
from pyro_lvm.tracing.forward import one_of
from pyro_lvm.tracing.intercept import base_distribution, run
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.particles import Draws, Layout
from pyro_lvm.tracing.probe import Plan
from pyro_lvm.tracing.simulation import canonical, observed_arguments, simulate
from pyro_lvm.tracing.weights import evaluation

__all__ = ["Calibration", "calibration"]

_LEVEL = 0.01  # of each of the three tests, for all marginals together
_WORDS = {
    "biased_low": "lies below the posterior",
    "biased_high": "lies above the posterior",
    "too_narrow": "is too narrow",
    "too_wide": "is too wide",
    "misshapen": "has another shape",
    "untested": "has no numbers to test",
}


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    r"""Where the latents of simulated data lie among the draws of the guide; D marginals, of all sites together.

    Attributes:
        names: of the marginals: the site, with an index where it has more than one number.
        pit: :math:`q(z_j < z_j^* \mid x)` by L draws, randomised so that it is uniform if the guide is the posterior,
            ``(num_data, D)``; NaN where draws or weights are, and such data are left out of what follows.
        shift: mean of ``pit`` less 1/2, ``(D,)``: above 0, the truth lies above the guide's draws.
        spread: 12 times the mean square of ``pit`` - 1/2, ``(D,)``: above 1 for a guide that is too narrow.
        symmetry: p-value of symmetry about 1/2, exact, ``(D,)``: small for a guide that is off its place. This and the
            next two are adjusted by Holm's method for D tests.
        width: p-value of a spread of 1, by its normal limit, ``(D,)``: small for a guide that is too narrow or wide.
        uniformity: p-value of the Kolmogorov-Smirnov test, exact, ``(D,)``: small for any large miscalibration.
        status: a word for each marginal, by the first of the p-values that is below 0.01. ``biased_low``,
            ``biased_high`` of symmetry: the side of the posterior on which the guide lies. ``too_narrow``, ``too_wide``
            of width; ``misshapen`` of uniformity; else ``no_fault_found``. A calibrated guide has another word in any
            of its marginals in at most 3 % of runs. ``untested``: fewer than two data have ranks.
        num_draws: L.
        weighted: the same of draws weighted to the posterior; None in what is weighted itself.
        weight_status: of the weights of each data set, as in `LogMarginal`, ``(num_data,)``.
        provenance: seed, device, versions, ``sha256`` of the parameters.
    """

    names: tuple[str, ...]
    pit: torch.Tensor
    shift: torch.Tensor
    spread: torch.Tensor
    symmetry: torch.Tensor
    width: torch.Tensor
    uniformity: torch.Tensor
    status: np.ndarray
    num_draws: int
    weighted: "Calibration | None"
    weight_status: np.ndarray
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pit)

    @property
    def ranks(self) -> torch.Tensor:
        """How many of the L draws lie below the truth, 0 to L, ties at random; -1 for NaN; ``(num_data, D)``."""
        ranks = (self.pit * (self.num_draws + 1)).floor().clamp(max=self.num_draws)
        return ranks.nan_to_num(-1.0).long()

    @property
    def worst(self) -> list[int]:
        """The marginals, from the smallest p-value to the largest."""
        smallest = torch.stack([self.symmetry, self.width, self.uniformity]).amin(0)  # (D,)
        return [int(i) for i in smallest.argsort(stable=True)]

    @property
    def verdict(self) -> str:
        """What may be said of the guide, in a plain sentence."""
        what = "the guide" if self.weighted else "the weighted guide"
        found = {word: [self.names[i] for i in self.worst if self.status[i] == word] for word in _WORDS}
        faults = [f"{what} {words} in {_listed(found[word])}" for word, words in _WORDS.items() if found[word]]
        doubtful = float(np.isin(self.weight_status, DOUBTFUL).mean())
        more = f" The weights of {doubtful:.1%} of the data say nothing." if doubtful and not self.weighted else ""
        if faults:
            return "; ".join(faults) + "." + more
        mean = "on average over the model's own data, where q(z | x) = p(z) would pass, too."
        return f"no fault found in the marginals of {what}, {mean}{more}"

    def __repr__(self) -> str:
        first = self.worst[:5]
        width = max(len(self.names[i]) for i in first)
        size = f"{len(self)} simulated data, {self.num_draws} draws of each, {len(self.names)} marginals"
        lines = [f"Calibration: {size}"]
        for i in first:
            shift = f"shift {self.shift[i]:+.3f} (p = {self.symmetry[i]:.2g})"
            spread = f"spread {self.spread[i]:.2f} (p = {self.width[i]:.2g})"
            whole = f"uniform p = {self.uniformity[i]:.2g}"
            lines.append(f"  {self.names[i]:{width}}  {shift}, {spread}, {whole}: {self.status[i]}")
        lines += [f"  verdict   {self.verdict}"]
        return "\n".join(lines + ([f"  weighted  {self.weighted.verdict}"] if self.weighted else []))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def calibration(
    model: Model,
    guide: Guide,
    x: Data,
    *args: Any,
    num_data: int = 1000,
    num_draws: int = 1000,
    site: str | Sequence[str] | None = None,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Calibration:
    r"""Simulation-based calibration of an amortised guide, marginal by marginal.

    .. math:: z^*, x \sim p(z)\, p(x \mid z), \qquad p_j = q(z_j < z_j^* \mid x)

    If q is the posterior, each p_j is uniform. If q is off its place, p_j is not symmetric about 1/2; if it is too
    narrow, p_j gathers at 0 and 1, if too wide, at 1/2. These are data that the model makes: of others, such as those
    that a guide was trained on, it says nothing. And it is a mean over data: q(z | x) = p(z) for all x is calibrated.

    Args:
        model: generative program p(x, z); what it observes must be x or another argument as it stands.
        guide: variational program q(z | x) that takes any x: amortised.
        x: tells the model what to make: data of the right shape, one or more. Their values are replaced by what is
            drawn. Other arguments go with their rows, over and over.
        *args: further arguments of both programs; tensors with N rows go with x.
        num_data: how many data to simulate, or data sets of ``len(x)`` with ``data_plate=None``.
        num_draws: L, draws of the guide for each.
        site: the latent site, or several; None for all that the guide draws.
        data_plate: the plate that holds the data, ``"auto"`` to find it, None for latents that are shared by all data,
            with a guide that takes in a whole data set.
        data_args: positions among ``args`` of those with one row per datum.
        vectorize: ``False`` runs one particle at a time.
        chunks: (data, particles) computed at once; None chooses from a memory budget.
        seed: forks the global random state; None draws from it.
        device: where to compute; None stays on the device of x.
        progress: show a bar; None shows it in a terminal.

    Returns:
        `Calibration`. p-values hold for the guide at any L; for `Calibration.weighted` as its ESS grows.

    Raises:
        PlateError: the pair only runs on all of x: a guide with parameters for each datum, or a plate of fixed size.
        SiteError: the model cannot be simulated (a factor, missing values, an ``obs=`` that is made of x), or the guide
            does not draw ``site``.
        SupportError: a latent is a class, whose values have no order.

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian inference algorithms with
        simulation-based calibration, theorem 1. Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work?, section 4,
        for symmetry.

    Example:
        >>> from pyro_lvm.models import LinearGaussian
        >>> model = LinearGaussian(2, 5)
        >>> found = calibration(model, model.posterior_guide, torch.zeros(1, 5), num_data=200, num_draws=99, seed=0)
        >>> found.pit.shape, found.status.tolist()
        (torch.Size([200, 2]), ['no_fault_found', 'no_fault_found'])
    """
    check_program("guide", guide)
    num_data, num_draws = check_positive_int("num_data", num_data, 2), check_positive_int("num_draws", num_draws)
    chunks = check_chunks(chunks)
    source = data_source(x, args, data_args, device)
    device = device_of(source)
    with evaluation(model, guide), torch.no_grad():
        plan, pair = look(model, guide, source, data_plate, vectorize)
        joint = plan.model_layout.plate is None
        names = _sites(plan, site)
        few = source.rows(slice(0, len(source) if joint else min(len(source), num_data)))
        with evaluation_rng(0):
            _check_ordered(model, few, names)
            arguments = observed_arguments(model, few)
        rows = few if joint else few.rows(torch.arange(num_data, device=device) % len(few))
        sizes = chunks or plan.chunk_sizes(len(rows), num_draws, device)
        study = _Study(plan, pair, Tables(plan, model, guide), arguments, names, num_draws, sizes)
        with evaluation_rng(seed), validation(False):
            pieces = range(num_data if joint else 1)
            for _ in tqdm(pieces, unit=" data sets", disable=not joint or not shown(progress)):
                study.add(rows, False if joint else progress)
    return study.record({"seed": seed, "device": str(device)})


def _sites(plan: Plan, site: str | Sequence[str] | None) -> list[str]:
    layout = plan.model_layout
    if layout.plate is not None and (plan.tied or layout.dim is None):
        got = "one that only runs on all of x, in its order"
        cure = "An encoder gives q(z | x) of new data; parameters for each datum do not. Plates have the size len(x)."
        raise PlateError(refuse("guide, model", "an amortised pair, which takes any data", got, cure))
    there, what = plan.match.sampled, "latent sites that the guide draws"
    if site is None and there:
        return list(there)
    wanted = [site] if site is None or isinstance(site, str) else list(site)
    return [one_of(name, there, what) for name in wanted]


def _check_ordered(model: Model, batch: Batch, names: Sequence[str]) -> None:
    trace = run(model, batch.args)
    for name in names:
        if isinstance(base_distribution(trace[name]["fn"]), dist.Categorical):
            cure = "Name the other sites with site=[...], or write it as OneHotCategorical: p(y = k) has ranks."
            raise SupportError(refuse(f"latent site {name!r}", "values with an order", "classes", cure))


@dataclass
class _Study:
    """Simulated data, and what became of them."""

    plan: Plan
    pair: dict[str, str]
    tables: Tables
    arguments: dict[str, int]
    sites: list[str]
    num_draws: int
    chunks: tuple[int, int]
    pit: list[torch.Tensor] = field(default_factory=list)
    weighted: list[torch.Tensor] = field(default_factory=list)
    weight_status: list[np.ndarray] = field(default_factory=list)

    def add(self, rows: Batch, progress: bool | None) -> None:
        """Simulate once for these rows."""
        layout = self.plan.model_layout
        trace, simulated = simulate(self.tables.model, rows, self.arguments)
        found = canonical(trace, self.sites, layout, slice(None))
        truth = {n: z.per_datum(layout) if layout.dim is None else z.per_datum(layout)[0] for n, z in found.items()}
        self.names = _marginals(truth)
        flat = torch.cat([value.reshape(len(value), -1).double() for value in truth.values()], 1)  # (N, D)
        ties = torch.rand_like(flat)
        columns = Columns(len(flat), flat.device)
        values = _below(self.sites, layout, flat, ties, columns)
        job = MeansJob(
            self.plan, self.pair, self.tables, simulated, self.num_draws, self.chunks, columns, values=values
        )
        job.run(progress)
        means = job.record(job.provenance())
        self.chunks, self.provenance = job.chunks, means.provenance
        self._keep(means, ties[: len(means)])

    def _keep(self, found: Expectation, ties: torch.Tensor) -> None:
        size, ess = float(self.num_draws), found.ess[:, None]  # (N, 1)
        self.pit.append((size * found.under_guide + ties) / (size + 1))
        self.weighted.append((ess * found.value + ties) / (ess + 1))
        self.weight_status.append(found.status)

    def record(self, provenance: dict[str, Any]) -> Calibration:
        """All that was simulated."""
        kept = ("model", "guide", "sha256", "dtype", "data_plate", "chunks", "particles", "enumerated", "versions")
        provenance |= {name: self.provenance[name] for name in kept}
        provenance["sha256"] = {"parameters": provenance["sha256"]["parameters"]}
        status = np.concatenate(self.weight_status)
        weighted = _tested(self.names, torch.cat(self.weighted), self.num_draws, None, status, provenance)
        return _tested(self.names, torch.cat(self.pit), self.num_draws, weighted, status, provenance)


def _marginals(latents: dict[str, torch.Tensor]) -> tuple[str, ...]:
    names = []
    for name, value in latents.items():
        indices = np.ndindex(tuple(value.shape[1:]))
        names += [f"{name}[{', '.join(map(str, index))}]" if index else name for index in indices]
    return tuple(names)


def _below(names: list[str], layout: Layout, truth: torch.Tensor, ties: torch.Tensor, columns: Columns) -> Values:
    """Whether a draw lies below the truth, ``(K, N, D)``; of one that equals it, the share ``ties``."""

    def values(batch: Batch, size: int, draws: Draws) -> torch.Tensor:
        some = [draws[name].per_datum(layout) for name in names]
        some = [value.unsqueeze(1) for value in some] if layout.dim is None else some
        drawn = torch.cat([value.reshape(*value.shape[:2], -1).double() for value in some], 2)  # (K, N, D)
        rows = slice(columns.done, columns.done + drawn.shape[1])
        below = (drawn < truth[rows]).double() + ties[rows] * (drawn == truth[rows])
        return below.masked_fill(drawn.isnan(), torch.nan)

    return values


def _tested(
    names: tuple[str, ...],
    pit: torch.Tensor,
    num_draws: int,
    weighted: Calibration | None,
    weight_status: np.ndarray,
    provenance: dict[str, Any],
) -> Calibration:
    pit = pit.cpu()
    kept = pit[pit.isfinite().all(1)]  # (n, D)
    return Calibration(
        names=names,
        pit=pit,
        **(_tests(kept) if len(kept) > 1 else _untested(len(names))),
        num_draws=num_draws,
        weighted=weighted,
        weight_status=weight_status,
        provenance=provenance,
    )


def _untested(num_marginals: int) -> dict[str, Any]:
    nothing = torch.full((num_marginals,), torch.nan, dtype=torch.float64)
    columns = dict.fromkeys(("shift", "spread", "symmetry", "width", "uniformity"), nothing)
    return {**columns, "status": np.full(num_marginals, "untested")}


def _tests(pit: torch.Tensor) -> dict[str, Any]:
    """Shift, spread and the three p-values of each marginal, ``(D,)``; and its word."""
    shift, spread = pit.mean(0) - 0.5, 12 * (pit - 0.5).square().mean(0)
    error = (0.8 / len(pit)) ** 0.5  # of the spread of uniform numbers: the variance of 12 (p - 1/2)^2 is 4/5
    width = holm(torch.special.erfc((spread - 1).abs() / error / 2**0.5))
    symmetry, uniformity = holm(symmetry_test(pit)), holm(uniformity_test(pit))
    status = np.where(uniformity < _LEVEL, "misshapen", "no_fault_found")
    status = np.where(width < _LEVEL, np.where(spread > 1, "too_narrow", "too_wide"), status)
    status = np.where(symmetry < _LEVEL, np.where(shift > 0, "biased_low", "biased_high"), status)
    columns = {"shift": shift, "spread": spread, "symmetry": symmetry, "width": width, "uniformity": uniformity}
    return {**columns, "status": status}
