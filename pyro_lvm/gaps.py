r"""What a guide loses by its family, and what by its encoder, datum by datum.

.. math:: \log p(x) - ELBO(q) = \underbrace{\log p(x) - ELBO(q^*)}_{\text{approximation}}
          + \underbrace{ELBO(q^*) - ELBO(q)}_{\text{amortization}}

q* is the best member of the guide's own family for one datum alone.
"""

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from pyro_lvm._checks import check_chunks, check_positive_int, check_seed, refuse, shown, warn_caller
from pyro_lvm._interrupts import kept_if, whole_results
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Model, Vectorize
from pyro_lvm.errors import DataTypeError, ShapeError, SiteError, UnreliableEstimateWarning
from pyro_lvm.evidence import LogMarginal, importance
from pyro_lvm.evidence.data import data_source
from pyro_lvm.evidence.record import check_reference, concatenate
from pyro_lvm.evidence.verdict import data_in_words, is_joint
from pyro_lvm.guides.refine import Refinement, refine
from pyro_lvm.table import TextTable
from pyro_lvm.tracing.batch import DataArgs, Rows
from pyro_lvm.tracing.isolation import evaluation_rng
from pyro_lvm.tracing.params import Fitted, current_params
from pyro_lvm.tracing.probe import Plan, probe_pair
from pyro_lvm.tracing.weights import evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["InferenceGap", "inference_gap"]

_ROWS, _STEP_BYTES = 1000, 2**30  # data refined at once, and memory of one step
_CONTRADICTION = 0.05  # nats that log p-hat of the guide may be above that of q*, besides errors


@dataclass(frozen=True, eq=False, repr=False)
class InferenceGap:
    """Where the gap of each datum comes from; tensors are ``(N,)``, in nats.

    Attributes:
        log_marginal: log p(x), of the reference if there is one, else by importance sampling from the flow guide, or
            from q* where no flow could be had. Biased low, which makes ``approximation`` too small; a mode that all of
            them miss is missing from it, and from ``approximation`` too.
        log_marginal_stderr: its Monte Carlo standard error.
        elbo: ELBO of the guide.
        local_elbo: ELBO of q*, the guide with parameters of its own for each datum. At most that of the best member of
            the family: too few steps make ``approximation`` too large and ``amortization`` too small.
        flow_elbo: ELBO of q* with a flow of its own for each datum on top: what a richer family would give. NaN where
            the latents are not continuous.
        approximation: log_marginal - local_elbo, what the family costs.
        amortization: local_elbo - elbo, what the encoder costs.
        approximation_stderr: Monte Carlo standard error, at most: draws that both terms share make it smaller.
        amortization_stderr: likewise.
        last_gain: ELBO of q* that the last quarter of the steps added to the mean of the quarter before.
        converged: whether that was next to nothing, see `guides.refine`.
        contradicted: whether draws of the guide itself give a larger log p-hat than ``log_marginal``, by five standard
            errors and 0.05 nats: q* has lost a mode, and ``approximation`` is too small.
        evidence: the record behind ``log_marginal``, with k-hat and status of each datum.
        free: names of the parameters that each datum has for itself in q*. Where the guide shares one of them over the
            data, q* is from a larger family, and amortization contains the sharing.
        fixed: what is not free -> why. What all data share makes ``approximation`` larger.
        provenance: steps, draws, particles, seed, whether all data are finished; and that of ``evidence``.
    """

    log_marginal: torch.Tensor
    log_marginal_stderr: torch.Tensor
    elbo: torch.Tensor
    local_elbo: torch.Tensor
    flow_elbo: torch.Tensor
    approximation: torch.Tensor
    amortization: torch.Tensor
    approximation_stderr: torch.Tensor
    amortization_stderr: torch.Tensor
    last_gain: torch.Tensor
    converged: torch.Tensor
    contradicted: torch.Tensor
    evidence: LogMarginal
    free: tuple[str, ...]
    fixed: dict[str, str]
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.elbo)

    @property
    def table(self) -> TextTable:
        """Means over the data, with the errors of the draws and of the data."""
        flow, joint = self.local_elbo - self.flow_elbo, is_joint(self.provenance)
        lines = [
            ("log p(x)", self.log_marginal, self.log_marginal_stderr),
            ("ELBO, q* with a flow", self.flow_elbo, None),
            ("ELBO, q* of the same family", self.local_elbo, None),
            ("ELBO, the guide", self.elbo, None),
            ("gap", self.log_marginal - self.elbo, None),
            ("  approximation: the family", self.approximation, self.approximation_stderr),
            ("    of which a flow takes away", -flow, None),
            (f"  amortization: the {'training' if joint else 'encoder'}", self.amortization, self.amortization_stderr),
        ]
        rows = tuple(_cells(*line) for line in lines if not bool(line[1].isnan().all()))
        return TextTable(("", "nats" if joint else "nats a datum", "+- draws", "+- data"), rows, self.notes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the numbers cover, which way they err, and what was free."""
        share, left = float(self.converged.double().mean()), float(self.last_gain.mean())
        steps = self.provenance["num_steps"]
        notes = [
            f"{data_in_words(len(self), self.provenance)}. Free for each datum: {', '.join(self.free)}."
            + "".join(f" Not free: {name} ({why})." for name, why in self.fixed.items()),
            f"{steps} steps; converged for {share:.0%} of the data: the last quarter of them gained next to nothing "
            f"there. It gained {left:.2g} on average; what is left to gain is counted as approximation, not as "
            "amortization.",
        ]
        evidence = self.evidence
        if evidence.status_shares().keys() - {"exact"}:
            notes.append(
                f"log p-hat (K = {evidence.num_particles}) is biased low by about {-evidence.mean_bias:.1g}, and "
                "approximation with it; a mode that q* misses is missing from both."
                + (f" It is {evidence.doubt}, and likely too low there." * bool(evidence.doubt))
            )
        if bool(self.contradicted.any()):
            notes.append(_contradiction(self.contradicted))
        return tuple(notes)

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table.to_html()

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return self.table.to_markdown()

    def plot(self) -> "Figure":
        """Both parts of the gap: their means, and datum by datum."""
        from pyro_lvm.plots import inference_gap

        return inference_gap(self)


def _contradiction(contradicted: torch.Tensor) -> str:
    share = float(contradicted.double().mean())
    return f"q* has lost a mode for {share:.1%} of the data: the guide itself finds more of p(x). log p-hat is too low."


def _cells(name: str, values: torch.Tensor, stderr: torch.Tensor | None) -> tuple[str, ...]:
    data = f"{float(values.std()) / math.sqrt(len(values)):.2g}" if len(values) > 1 else ""
    draws = "" if stderr is None else f"{float(stderr.square().sum().sqrt()) / len(stderr):.1g}"
    return name, f"{float(values.mean()):.4f}", draws, data


def inference_gap(
    model: Model,
    guide: Guide,
    x: Data,
    *args: Any,
    num_steps: int = 400,
    num_draws: int = 8,
    reference: LogMarginal | None = None,
    num_particles: int = 1000,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> InferenceGap:
    """Split the gap log p(x) - ELBO of any guide into what its family and what its encoder costs.

    Every parameter of the distributions at the guide's latent sites is freed for each datum and optimised from where
    the guide puts it (`guides.refine`); then a flow is optimised on top. log p(x) comes from the richest of these as
    the proposal, for the guide itself is a bad one just where the gap is large. Neither model nor guide changes.

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x), any whose latent sites are distributions with parameters.
        x: data ``(N, ...)``, a tensor, array, ``Dataset`` or ``DataLoader``.
        *args: further arguments of both.
        num_steps: gradient steps on q*, and again on the flow: the rule for stopping.
        num_draws: draws of each step.
        reference: exact log p(x), from `evidence.quadrature` say, in the place of importance sampling.
        num_particles: K of all ELBOs and of log p-hat.
        data_plate: see `log_marginal`, as are the options below.
        data_args: positions of the arguments with one row per datum.
        vectorize: ``False`` for Python control flow on latents.
        chunks: (data refined at once, particles at once).
        seed: forks the global random state.
        device: where to compute.
        progress: show a bar.

    Returns:
        `InferenceGap`; its ``str`` is a table. Interrupted with Ctrl-C it holds the data that are finished.

    Raises:
        SiteError: no parameter of the guide can be freed.
        ShapeError: a reference of another number of data.
        PlateError, SupportError, ParameterError, DataTypeError: as in `log_marginal`.

    Warns:
        UnreliableEstimateWarning: log p-hat of some data is not to be trusted.

    Source: Cremer, Li and Duvenaud (2018), Inference Suboptimality in Variational Autoencoders, Eq. (4) to (6).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the best family, with the right scale and a bad mean
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0.0 * x, 0.5**0.5))
        >>> result = inference_gap(model, guide, torch.tensor([2.0, 0.0]), num_steps=100, seed=0)
        >>> (result.approximation.abs() < 1e-3).all(), result.amortization.round(decimals=1)
        (tensor(True), tensor([1., 0.], dtype=torch.float64))
    """
    check_positive_int("num_steps", num_steps), check_positive_int("num_draws", num_draws, 2)
    chunks, seed = check_chunks(chunks), check_seed(seed)
    if guide is None:
        raise DataTypeError(refuse("guide", "a callable", None, "Without a guide there is no gap."))
    source = data_source(x, args, data_args, device)
    expected = 1 if data_plate is None else len(source)
    check_reference(reference)
    if reference is not None and len(reference) != expected:
        cure = "Estimate it on the same x, with the same data_plate."
        raise ShapeError(refuse("reference", f"{expected} values of log p(x)", len(reference), cure))
    with evaluation(model, guide), evaluation_rng(0):
        plan = probe_pair(model, guide, source, data_plate, vectorize)
        params = current_params()  # the same in all runs, also those with a random start that nothing has trained
    model, guide = Fitted(model, params), Fitted(guide, params)
    rows = len(source) if plan.tied else min(len(source), _num_rows(plan, num_draws, chunks))
    steps = {"num_steps": num_steps, "num_draws": num_draws}
    job = _Job(
        model, guide, {"data_plate": data_plate, "vectorize": vectorize}, steps, num_particles, chunks, seed, progress
    )
    parts: list[_Part] = []
    with kept_if(lambda: parts), tqdm(total=len(source), unit="datum", disable=not shown(progress)) as bar:
        for start in range(0, len(source), rows):
            parts.append(job.run(source, slice(start, min(len(source), start + rows)), len(parts)))
            bar.update(rows)
    record = _record(parts, reference, job, len(source))
    if record.evidence.doubt:
        warn_caller(f"log p-hat is {record.evidence.doubt} of the data.", UnreliableEstimateWarning)
    if bool(record.contradicted.any()):
        warn_caller(_contradiction(record.contradicted), UnreliableEstimateWarning)
    return record


def _num_rows(plan: Plan, num_draws: int, chunks: Chunks) -> int:
    """How many data to refine at once: a step keeps all that its draws compute."""
    if chunks is not None:
        return chunks[0]
    return max(1, min(_ROWS, _STEP_BYTES // (plan.bytes_per_particle * num_draws)))


@dataclass(frozen=True)
class _Part:
    """What was found on some data."""

    guide: LogMarginal
    local: LogMarginal
    flow: LogMarginal | None
    own: Refinement


@dataclass(frozen=True)
class _Job:
    """One model/guide pair and the options of all runs on it."""

    model: Model
    guide: Guide
    options: dict[str, Any]
    steps: dict[str, Any]
    num_particles: int
    chunks: Chunks
    seed: int | None
    progress: bool | None

    def run(self, source: Rows, rows: slice, index: int) -> _Part:
        """Refine the guide on some data, and measure the three guides there."""
        seed = None if self.seed is None else self.seed + 7919 * index  # other draws for other data
        with evaluation_rng(seed):
            batch = source.rows(rows)
        own = [i - 1 for i, per_datum in enumerate(batch.per_datum) if i and per_datum]
        options = self.options | {"data_args": own, "seed": seed, "progress": self.progress}
        x, *args = batch.args
        local = refine(self.model, self.guide, x, *args, **self.steps, **options)
        try:
            flow = refine(self.model, local.guide, x, *args, family="flow", **self.steps, **options)
        except SiteError:  # no latent is continuous
            flow = None
        options |= {"num_particles": self.num_particles, "chunks": self.chunks, "progress": False}

        def measure(guide: Guide) -> LogMarginal:
            return importance(self.model, guide, x, *args, **options)

        with warnings.catch_warnings(), whole_results():
            warnings.simplefilter("ignore", UnreliableEstimateWarning)  # said once, of all data
            return _Part(measure(self.guide), measure(local.guide), measure(flow.guide) if flow else None, local)


def _record(parts: list[_Part], reference: LogMarginal | None, job: _Job, num_data: int) -> InferenceGap:
    guide, local = concatenate([part.guide for part in parts]), concatenate([part.local for part in parts])
    best = concatenate([part.flow or part.local for part in parts])
    evidence = reference or best
    value, error = evidence.value[: len(local)], evidence.stderr[: len(local)]
    flow = [torch.full_like(part.local.elbo, math.nan) if part.flow is None else part.flow.elbo for part in parts]
    joint = job.options["data_plate"] is None
    provenance = job.steps | {"num_particles": job.num_particles, "seed": job.seed, "num_data": num_data}
    return InferenceGap(
        log_marginal=value,
        log_marginal_stderr=error,
        elbo=guide.elbo,
        local_elbo=local.elbo,
        flow_elbo=torch.cat(flow),
        approximation=value - local.elbo,
        amortization=local.elbo - guide.elbo,
        approximation_stderr=torch.hypot(error, local.elbo_stderr),
        amortization_stderr=torch.hypot(local.elbo_stderr, guide.elbo_stderr),
        last_gain=torch.cat([part.own.last_gain for part in parts]).double(),
        converged=torch.cat([part.own.converged for part in parts]),
        contradicted=guide.value - value > 5 * torch.hypot(error, guide.stderr) + _CONTRADICTION,
        evidence=evidence,
        free=parts[0].own.free,
        fixed=parts[0].own.fixed,
        provenance=provenance
        | {"data_plate": None if joint else guide.provenance["data_plate"]}
        | {"finished": joint or len(local) == num_data, "evidence": evidence.provenance},
    )
