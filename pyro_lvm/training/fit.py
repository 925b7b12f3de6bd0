"""Training: `fit` drives Pyro's `SVI` over batches of the data and returns what there is to know about the run.

Maximises the ELBO, E_q[log p(x, z) - log q(z | x)], or minimises whatever Pyro loss it is given.
"""

import logging
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim

from pyro_lvm._checks import check_device, check_positive_int, data_tensor, refuse, shown, warn_caller
from pyro_lvm._typing import Data, Guide, Model
from pyro_lvm._version import versions
from pyro_lvm.errors import DataTypeError
from pyro_lvm.objectives.default import check_loss
from pyro_lvm.tracing.batch import Batch, make_batch
from pyro_lvm.tracing.isolation import forked_rng
from pyro_lvm.tracing.notes import note_arguments
from pyro_lvm.tracing.params import Fitted, Params, anchor, training_store
from pyro_lvm.tracing.probe import empty_guide
from pyro_lvm.training.batches import make_batches
from pyro_lvm.training.checkpoint import read_run
from pyro_lvm.training.engine import Engine
from pyro_lvm.training.optimizers import MakeOptimizer, adam, check_stepped
from pyro_lvm.training.state import FitResult, make_result

__all__ = ["fit"]

logger = logging.getLogger("pyro_lvm")

_NAN_WARNING = r"Encountered (NaN|\+inf|-inf)"  # Pyro's, at each step; here such steps are counted


def fit(
    model: Model,
    guide: Guide | None,
    data: Data,
    *,
    loss: Any = None,
    optim: MakeOptimizer | PyroOptim | None = None,
    num_epochs: int | None = None,
    num_steps: int | None = None,
    batch_size: int = 128,
    update: Literal["both", "model", "guide"] = "both",
    compile: bool = False,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    callbacks: Sequence[Any] = (),
    resume: str | PathLike[str] | None = None,
) -> FitResult:
    """Train a model p(x, z) and its guide q(z | x).

    Maximises the mean over the data of the ELBO, E_q[log p(x, z) - log q(z | x)], with Pyro's `SVI`, in the current
    param store. If names there belong to another pair, this one trains in a store of its own, said once in the log.

    A step whose loss or gradient is not finite is skipped and counted: no parameter changes, also no running average of
    the optimizer. Ten in a row, or a tenth of all steps after the first hundred, end the run. To undo an update that
    overflows, one copy of the trained parameters is kept beside them, in the memory of their device.

    A model or guide that is a module (or a method of one) may have a method ``notes() -> list[str]``, which says what a
    user should know about the parameters, and a Pyro loss object one about its values: what they return after training
    is logged and is in ``FitResult.notes``.

    Args:
        model: any callable that takes the data and makes Pyro statements.
        guide: any callable with the same arguments; None for a model without latents, or with all of them enumerated.
        data: a tensor or array ``(N, ...)``, a tuple of them (the model's arguments; those with N rows are batched), a
            torch ``Dataset``, or a ``DataLoader`` with batches of its own.
        loss: a Pyro loss object, or a function ``loss(model, guide, *args)``. None is ``Trace_ELBO``; where the guide
            lacks a discrete latent, or marks one, it is ``TraceEnum_ELBO``, which enumerates; without a guide, where
            Pyro cannot enumerate, it is the model's own exact ``log_prob``. A ``TraceMeanField_ELBO`` is checked by
            `objectives.analytic_kl` first, and ``FitResult.notes`` names the latents without a closed form. They name
            too the discrete latents that the guide lacks and the loss draws from the prior, a looser bound, and what
            requires a gradient and is in no param store.
        optim: a function of the list of parameters that returns one torch optimizer for all, or a Pyro optimizer. None
            is Adam with learning rate 1e-3.
        num_epochs: passes over the data; give this or ``num_steps``.
        num_steps: updates; may end within an epoch.
        batch_size: B, data a step, drawn without replacement. With B >= N each step uses all data in their order, as
            parameters per datum need. Where a latent lies outside the data plate the loss is scaled by N / B.
        update: the half that is trained. The other keeps its parameters bit for bit and runs its modules in eval mode.
            A parameter that both use belongs to both: it is trained by ``"both"`` only.
        compile: capture the loss with its gradients as one graph for each shape of batch, and replay it without Pyro:
            the same steps from the same seed up to rounding, in a fraction of the time. A run that is long enough for
            it is compiled as well, which needs a C++ compiler and takes some seconds. What is no tensor is frozen in a
            graph (a Python number that changes, random numbers of NumPy): one step in 500 is compared with a plain one.
            If that fails, or nothing can be captured (control flow by values, a loss without ``differentiable_loss``
            such as ``TraceGraph_ELBO``), the run goes on with plain steps; ``FitResult.notes`` says why. Learning
            rates, `KLAnnealing` and ``update`` are honoured; with ``torch.optim.Adam`` or ``AdamW`` the host does not
            wait for the device. An update that overflows is taken back to the parameters of at most 100 steps before.
        seed: seeds torch, NumPy and Python inside and restores their states; None draws from them as they are.
        device: where batches are moved to.
        progress: show a bar; None shows one in a terminal.
        callbacks: functions of the `TrainingState`, called after each epoch, or objects with any of the methods
            ``on_start``, ``on_step``, ``on_epoch``, ``on_end``; see `pyro_lvm.callbacks`.
        resume: the file of a `callbacks.Checkpoint`. If it is there, the run goes on from it, up to ``num_epochs`` or
            ``num_steps`` in all, and ends as it would have ended without a break: to the last bit on one machine, with
            ``compile`` up to rounding. If it is not, the run begins. Call `fit` as that run did, with ``callbacks``
            and ``optim`` made anew.

    Returns:
        FitResult: losses in nats per datum, the history, the parameters and the fitted pair.

    Raises:
        DataTypeError: an argument of the wrong kind, or not exactly one of ``num_epochs`` and ``num_steps``.
        ShapeError: no data, or a number that is too small.
        SiteError: the guide samples what the model lacks; ``loss`` is None and the guide lacks a latent that cannot be
            enumerated; a ``to_event`` is missing; a ``TraceMeanField_ELBO`` would have a wrong value or gradient.
        PlateError: a plate has not the size of the data, or the guide has parameters for each datum (an AutoGuide with
            latents in the data plate) and ``batch_size`` is less than N.
        SupportError: validation refuses data outside the support of their likelihood. The first epoch is validated, as
            all data are seen there; with ``compile`` only the steps of it that are plain ones.
        ParameterError: nothing to train.
        NonFiniteError: the first ten steps were not finite; the parameters are as they were. It says which densities.
        CheckpointError: ``resume`` is a damaged file, or that of another run; the message lists what differs.

    Warns:
        RuntimeWarning: the run ended because too many steps were not finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> result = fit(model, None, x, num_epochs=200, optim=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> round(float(result.params["loc"]), 3)
        2.0
    """
    guide = empty_guide if guide is None else guide
    _check_options(model, guide, loss, optim, update, compile, progress)
    check_stepped(optim, _sequence(callbacks))
    _check_limits(num_epochs, num_steps)
    batch_size = check_positive_int("batch_size", batch_size)
    seed = None if seed is None else check_positive_int("seed", seed, minimum=0)
    target = check_device(device)
    batches = make_batches(data, batch_size, target)
    devices = _cuda_devices(target, data, model, guide)
    if devices:
        torch.cuda.init()  # so that their generators are seeded

    with forked_rng(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_NAN_WARNING, category=UserWarning)
        engine = Engine(_unwrapped(model), _unwrapped(guide), batches, update, _sequence(callbacks), devices)
        engine.fingerprint = {"seed": seed, "update": update, "loss": type(loss).__name__, "data": batches.digest}
        engine.fingerprint |= {"num_data": batches.num_data, "num_batches": batches.num_batches}
        engine.fingerprint["batch_size"] = batch_size
        kept = None if resume is None else read_run(resume, engine.checkpoints)
        try:
            with training_store(model, guide, lambda: engine.look(loss), engine.trainable) as store:
                engine.train(optim or adam, num_epochs, num_steps, compile, progress, kept)
                notes = (*engine.objective.notes, *_notes(engine.model, engine.guide, engine.objective.loss))
        except (RuntimeError, TypeError, ValueError) as error:
            if engine.state.step == 0:  # what fails later had arguments of the right kind
                note_arguments(error, engine.model, engine.guide, _given(data, engine.batch))
            raise
    said = tuple(engine.captured.notes) if engine.captured else ()  # logged at once
    result = _result(engine, store["params"], said + notes)
    _report(result, notes)
    return result


def _given(data: Any, batch: Any) -> Batch:
    """The arguments as they were given, or as they come in batches."""
    x, *rest = data if isinstance(data, tuple) else batch
    return make_batch(data_tensor("data", x), rest)


def _result(engine: Engine, params: Params, notes: tuple[str, ...]) -> FitResult:
    loss = engine.objective.loss
    return make_result(
        (engine.model, engine.guide),
        engine.names,
        params,
        engine.state.history,
        seconds=engine.seconds,
        stop_reason=engine.state.stop_reason or "",
        skipped=engine.ledger.skipped,
        captured=engine.replayed,
        notes=notes,
        provenance=_provenance(engine),
        modules=tuple(module for module in engine.state.modules if module is not getattr(loss, "baseline", None)),
    )


def _provenance(engine: Engine) -> dict[str, Any]:
    loss = engine.objective.loss
    return engine.fingerprint | {
        "loss": type(loss).__name__ if isinstance(loss, ELBO) else getattr(loss, "__qualname__", type(loss).__name__),
        "optim": type(engine.guard.optimizer).__name__,
        "device": str(engine.batch[0].device),
        "versions": versions(),
        "resumed_at": engine.resumed_at,
    }


def _notes(model: Any, guide: Any, loss: Any) -> tuple[str, ...]:
    """What the modules behind the programs say of their parameters, and a loss of its values."""
    modules: list[Any] = [owner for owner in map(anchor, (model, guide)) if isinstance(owner, torch.nn.Module)]
    owners = {id(owner): owner for owner in (*modules, *([loss] if isinstance(loss, ELBO) else []))}
    methods: list[Any] = [getattr(owner, "notes", None) for owner in owners.values()]
    with torch.no_grad():
        return tuple(note for notes in methods if callable(notes) for note in notes())


def _report(result: FitResult, notes: tuple[str, ...]) -> None:
    """Say once what happened to steps that were not finite, and what model and guide note."""
    skipped = f"{result.skipped} of {result.num_steps} steps had a loss or a gradient that was not finite"
    if result.stop_reason == "nonfinite":
        warn_caller(
            f"training stopped: {skipped}. The parameters are those of the last finite step. Lower the learning rate, "
            "clip gradients (e.g. pyro.optim.ClippedAdam), or look for NaN and values off their support in the data.",
            RuntimeWarning,
        )
    elif result.skipped:
        logger.warning("%s and were skipped", skipped)
    for note in notes:
        logger.warning("%s", note)


def _check_options(model: Any, guide: Any, loss: Any, optim: Any, update: Any, compile: Any, progress: Any) -> None:
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program) or isinstance(program, type):
            raise DataTypeError(refuse(name, "a callable", repr(program), "Pass a function or a module instance."))
    check_loss(loss)
    if optim is not None and (isinstance(optim, torch.optim.Optimizer) or not callable(optim)):
        cure = (
            "Pass a function such as `lambda params: torch.optim.Adam(params, lr=1e-3)`, or e.g. pyro.optim.Adam({})."
        )
        raise DataTypeError(refuse("optim", "a function of the parameters", type(optim).__name__, cure))
    if update not in ("both", "model", "guide"):
        raise DataTypeError(refuse("update", '"both", "model" or "guide"', repr(update), "Choose one of the three."))
    if not isinstance(compile, bool):
        raise DataTypeError(refuse("compile", "True or False", repr(compile), "True captures the steps."))
    shown(progress)


def _check_limits(num_epochs: Any, num_steps: Any) -> None:
    if (num_epochs is None) == (num_steps is None):
        got = "neither" if num_epochs is None else "both"
        raise DataTypeError(refuse("num_epochs, num_steps", "exactly one of the two", got, "Say when to stop."))
    for name, value in (("num_epochs", num_epochs), ("num_steps", num_steps)):
        if value is not None:
            check_positive_int(name, value)


def _sequence(callbacks: Any) -> Sequence[Any]:
    if not isinstance(callbacks, list | tuple):
        raise DataTypeError(refuse("callbacks", "a list or tuple", type(callbacks).__name__, "Pass [callback]."))
    return callbacks


def _cuda_devices(target: torch.device | None, data: Any, *programs: Any) -> list[torch.device]:
    """The CUDA devices that a run can use, as far as its arguments tell."""
    tensors = [item for item in (data if isinstance(data, tuple) else (data,)) if isinstance(item, torch.Tensor)]
    for owner in map(anchor, programs):
        tensors += owner.parameters() if isinstance(owner, torch.nn.Module) else []
    devices = {tensor.device for tensor in tensors} | ({target} if target else set())
    return sorted((device for device in devices if device.type == "cuda"), key=str)


def _unwrapped(program: Any) -> Any:
    """The callable itself: training works on the store, not on the copy that a fitted one carries."""
    return _unwrapped(program.program) if isinstance(program, Fitted) else program
