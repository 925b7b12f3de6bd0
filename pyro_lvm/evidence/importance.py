"""Importance sampling with the guide as proposal, streamed over data and particles."""

import os
from typing import Any

import numpy as np
import torch

from pyro_lvm._checks import check_chunks, check_positive_int, refuse
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Model, Vectorize
from pyro_lvm.errors import DataTypeError
from pyro_lvm.evidence.closed_form import closed_form
from pyro_lvm.evidence.columns import Columns
from pyro_lvm.evidence.data import data_source, device_of
from pyro_lvm.evidence.job import Job, look
from pyro_lvm.evidence.precision import check_model_dtype, in_half, rounding
from pyro_lvm.evidence.record import LogMarginal
from pyro_lvm.evidence.resume import Checkpoint, fingerprint
from pyro_lvm.evidence.targeted import TargetedJob, check_target
from pyro_lvm.evidence.verdict import quoted
from pyro_lvm.tracing.batch import DataArgs
from pyro_lvm.tracing.captured_weights import CapturedTables, Tables
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.probe import empty_guide
from pyro_lvm.tracing.weights import evaluation

__all__ = ["importance"]


def importance(
    model: Model,
    guide: Guide | None,
    x: Data,
    *args: Any,
    num_particles: int = 1000,
    target_stderr: float | None = None,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    compile: bool = False,
    model_dtype: torch.dtype | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> LogMarginal:
    r"""log p(x) of every datum by importance sampling from the guide.

    .. math:: \log \hat p(x_n) = \log \frac1K \sum_{k=1}^K \frac{p(x_n, z_{kn})}{q(z_{kn} \mid x_n)},
              \qquad z_{kn} \sim q(z \mid x_n)

    Args:
        model: generative program p(x, z), any callable.
        guide: variational program q(z | x), any callable; None for a model with an exact ``log_prob``, or whose
            latents, if any, are discrete and few: these are summed out.
        x: data ``(N, ...)`` as a tensor or NumPy array, or a map-style ``Dataset`` or ``DataLoader``, read in order. An
            array that is mapped from a file and a data set are read chunk by chunk: memory holds the results of all
            data, about 120 bytes each, and one chunk. A ``__getitems__`` of the data set is used.
        *args: further arguments of both programs; tensors with N rows go with x.
        num_particles: K.
        target_stderr: wanted standard error of each value in nats. A datum then takes as many particles as a pilot of
            its own draws asks for, 256 at least and ``num_particles`` at most, and is estimated anew with them: what
            chose K has no part in the value. About 95 % and more of the data within the budget have a stated error
            below it. Where all data are alike, one K for all is cheaper: pilot and margins take three times as much. A
            pair that is tied to all of its data takes what its worst datum needs; one without draws ignores it. Not
            with ``resume``.
        data_plate: the plate that holds the data, ``"auto"`` to find it, None for one joint result of shape ``(1,)``.
        data_args: positions among ``args`` of those with one row per datum; ``"auto"`` is all with N rows.
        vectorize: ``False`` runs one particle at a time, for models whose Python control flow looks at latents.
        chunks: (data, particles) computed at once; None chooses from a memory budget. Draws depend on it,
            expectations do not.
        seed: forks the global random state, so that guides can be compared on common random numbers.
        device: where to compute; None stays on the device of x.
        compile: capture the pair as one graph for each shape of chunk, and compile it, where the run is long enough to
            pay for that; needs a C++ compiler. The draws are the same, and the results up to rounding. What cannot be
            captured (control flow by values) runs as ever; the provenance says what was done.
        model_dtype: ``torch.bfloat16`` or ``torch.float16`` takes the matrix products and convolutions of the model in
            half precision; the guide, densities and sums keep that of the data. What this moves is measured on the
            first data and stated in the provenance, and in the verdict where it is not small. A Bernoulli VAE of 800
            training steps on MNIST (784-200-200-50, K = 100): log p-hat of a datum moves by 0.03 nats in bfloat16 (root
            mean square of 1000; 0.12 at most), the mean by -0.003; in float16 by 0.004 (0.02), the mean by -0.0001.
        resume: a directory, made if need be, that keeps finished chunks of data while the estimate runs. After a crash,
            a kill or Ctrl-C the same call goes on from there, and ends with the numbers, bit for bit, of a run that was
            not interrupted; without a seed, the draws go on from where they were. A second of work and the chunk in
            progress are lost. x is read first, and has to be what it was; a finished estimate is then returned. One
            process at a time; of a joint result (``data_plate=None``), or a pair that is tied to all of its data,
            nothing is kept before the end.
        progress: show a bar; None shows it in a terminal.

    Returns:
        `LogMarginal`, results ``(N,)`` in nats. Biased low, by about half the variance of the value. Interrupted with
        Ctrl-C it holds the data that are finished.

    Raises:
        PlateError, SiteError, SupportError, ParameterError, ShapeError, DataTypeError: what was expected, what came and
            the cure.
        BudgetError: ``num_particles`` is too few for ``target_stderr`` on every datum; says how many it takes.
        CheckpointError: ``resume`` belongs to another call (the message lists what differs), or its files are damaged.

    Warns:
        UnreliableEstimateWarning: some data have no trustworthy value, or would take more than ``num_particles`` for
            ``target_stderr``.
        UntrainedParameterWarning: a parameter was created here, with its initial value.

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders, eq. 8.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior: all weights are equal
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> result = importance(model, guide, torch.zeros(1), num_particles=100, seed=0)
        >>> print(f"{result.mean:.4f}", result.status[0])
        -1.2655 zero_variance
    """
    if guide is None and callable(getattr(model, "log_prob", None)):
        return closed_form(model, x, *args, data_plate=data_plate, data_args=data_args, device=device)
    num_particles = check_positive_int("num_particles", num_particles)
    target = check_target(target_stderr, resume)
    chunks = check_chunks(chunks)
    if model_dtype is not None:
        check_model_dtype(model_dtype)
    if not isinstance(compile, bool):
        raise DataTypeError(refuse("compile", "True or False", repr(compile), "True captures and compiles the pair."))
    source = data_source(x, args, data_args, device)
    guide = guide or empty_guide
    device = device_of(source)
    provenance: dict[str, Any] = {"seed": seed, "device": str(device)}
    with evaluation(model, guide), torch.no_grad():
        plan, pair = look(model, guide, source, data_plate, vectorize)
        num_particles = 1 if plan.exact else num_particles
        sizes = chunks or plan.chunk_sizes(len(source), num_particles, device)
        columns = Columns(plan.model_layout.num_data(source), device)
        checkpoint = None
        if resume is not None:
            options: dict[str, Any] = {
                "num_particles": num_particles,
                "chunks": chunks,
                "seed": seed,
                "device": device,
            }
            options |= pair | {"model_dtype": model_dtype}
            known = fingerprint(plan, model, guide, source, options)
            checkpoint = Checkpoint(resume, known, columns, device)
            provenance["resumed_at"] = checkpoint.resumed_at
        if model_dtype is not None:
            provenance["model_dtype"] = rounding(plan, model, guide, source, model_dtype)
            model = in_half(model, model_dtype)
        tables = CapturedTables(plan, model, guide) if compile else Tables(plan, model, guide)
        job = Job(plan, pair, tables, source, num_particles, sizes, columns, checkpoint)
        if target is not None and not plan.exact:
            job = TargetedJob(plan, pair, tables, source, num_particles, sizes, columns, target=target)
        with evaluation_rng(seed), validation(False):
            job.run(progress)
    return quoted(_record(job, provenance), x)


def _record(job: Job, provenance: dict[str, Any]) -> LogMarginal:
    plan, columns = job.plan, job.columns
    numbers, status, method = columns.numbers, columns.status, "importance sampling"
    if plan.exact:
        method = "enumeration" if plan.match.enumerated else "exact density"
        status = np.where(status == "unreliable", "exact", status)  # K = 1 says nothing of a sum that has no noise
        numbers |= dict.fromkeys(("stderr", "bias", "elbo_stderr"), torch.zeros_like(numbers["value"]))
    return LogMarginal(
        **numbers,
        status=status,
        num_particles=job.num_particles,
        method=method,
        particles=job.granted,
        provenance=provenance | job.provenance(),
    )
