"""Restarts: the objective is not convex, so train from several starts and keep the best run."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.distributions import transform_to
from tqdm.auto import tqdm

from pyro_lvm._checks import check_positive_int, refuse, shown
from pyro_lvm.errors import DataTypeError, NonFiniteError, ParameterError
from pyro_lvm.tracing.isolation import forked_rng
from pyro_lvm.tracing.params import Fitted, Params, add_to_store, current_params, remember
from pyro_lvm.training.state import FitResult

__all__ = ["best_of", "final_loss"]

logger = logging.getLogger("pyro_lvm")


def best_of(
    train: Callable[[int], FitResult], num_restarts: int, *, seed: int = 0, progress: bool | None = None
) -> FitResult:
    """Train from several starts and return the run with the lowest final loss.

    Calls ``train(seed)``, ``train(seed + 1)``, and so on. Each run begins with the param store as it is now and with
    random numbers seeded by its seed, so that it is the run that it would be alone. The parameters of the best are then
    in the current store, as after `fit`, unless names there belong to another pair; the others' are in no store.

    The lowest loss is the best optimum, not the best model: a loss of training data prefers what overfits, so all runs
    should have one architecture. With Ctrl-C the run at hand is the last one.

    Args:
        train: makes a model and a guide from scratch, calls `fit` and returns its result. Modules must be made inside:
            one that all runs share has one set of parameters.
        num_restarts: R, number of runs.
        seed: of the first run.
        progress: show a bar; None shows one in a terminal.

    Returns:
        The `FitResult` of the best run; its ``notes`` end with the seed and the final losses of all. A final loss is
        the mean over the last steps, as many as an epoch has; a run that ended because too many steps were not finite
        comes last.

    Raises:
        DataTypeError: ``train`` is not callable or returns something else than a `FitResult`.
        NonFiniteError: no run had a finite loss.
        ParameterError: a later run trained the parameters of an earlier one.

    Example:
        >>> from pyro_lvm.models import GaussianMixture
        >>> from pyro_lvm.training import fit
        >>> x = torch.tensor([[0.0], [0.2], [5.0], [5.2], [9.0], [9.2]])
        >>> def train(seed):
        ...     return fit(GaussianMixture(3, data_dim=1).initialize(x, seed), None, x, num_steps=20)
        >>> result = best_of(train, num_restarts=3)
        >>> print(result.notes[-1][:26])
        best of 3 restarts: seed 0
    """
    if not callable(train) or isinstance(train, type):
        raise DataTypeError(refuse("train", "a function of a seed", repr(train), "Pass `lambda seed: fit(...)`."))
    seed, num_restarts = check_positive_int("seed", seed, minimum=0), check_positive_int("num_restarts", num_restarts)
    losses: list[float] = []
    best: FitResult | None = None
    failure: NonFiniteError | None = None
    for run in tqdm(range(seed, seed + num_restarts), unit="restart", disable=not shown(progress)):
        try:
            result = _run(train, run)
        except NonFiniteError as error:
            failure = error
            losses.append(math.inf)
            continue
        _check_untouched(best)
        losses.append(final_loss(result))
        logger.info("restart with seed %d: final loss %.4f nats per datum", run, losses[-1])
        if best is None or losses[-1] < min(losses[:-1]):
            best = result
        if result.stop_reason == "interrupted":
            break
    if best is None:
        assert failure is not None  # there is at least one run
        raise failure
    _put_into_store(best)
    chosen = seed + losses.index(min(losses))
    listed = ", ".join(f"{loss:.4f}" for loss in losses)
    note = f"best of {len(losses)} restarts: seed {chosen}; final losses of seeds {seed} to {run}: {listed}"
    return replace(best, notes=(*best.notes, note))


def final_loss(result: FitResult) -> float:
    """Mean of the last losses, as many as an epoch has steps, in nats per datum; infinite for a run that failed.

    With all data in each step that is the loss of the last step. Steps that were skipped do not count. It is a loss of
    the parameters that the steps had: also where `EarlyStopping` has put earlier ones back.

    Example:
        >>> from pyro_lvm.models import GaussianMixture
        >>> from pyro_lvm.training import fit
        >>> result = fit(GaussianMixture(1, 1), None, torch.zeros(4, 1), num_steps=3, batch_size=2)
        >>> final_loss(result) == float(result.losses[-2:].mean())
        True
    """
    steps = sum(row["epoch"] == 1 for row in result.history)
    last = result.losses[-steps:]
    last = last[last.isfinite()]
    return math.inf if result.stop_reason == "nonfinite" or not len(last) else float(last.mean())


def _run(train: Callable[[int], FitResult], seed: int) -> FitResult:
    """One run over the current store, which is as before afterwards."""
    over_current_store = Fitted(train, {})
    if torch.cuda.is_available():
        torch.cuda.init()  # so that its generators are seeded
    with forked_rng(seed):
        result = over_current_store(seed)
    if not isinstance(result, FitResult):
        cure = "Let the function end with `return fit(...)`."
        raise DataTypeError(refuse("train", "a function that returns a FitResult", type(result).__name__, cure))
    return result


def _learned(result: FitResult) -> Params:
    return result.model.params | result.guide.params


def _check_untouched(best: FitResult | None) -> None:
    """Parameters that no longer have the values of their run were trained by the next, which began where it ended."""
    learned = {} if best is None else _learned(best)
    with torch.no_grad():
        now = {name: transform_to(constraint)(value) for name, (value, constraint) in learned.items()}
    moved = [
        name for name, value in now.items() if best and not value.allclose(best.params[name], 0, 0, equal_nan=True)
    ]
    if moved:
        cure = "Make model and guide inside the function, so that each run has its own."
        raise ParameterError(refuse("train", "new parameters in each run", f"the same tensors of {moved[:3]}", cure))


def _put_into_store(best: FitResult) -> None:
    here, mine = current_params(), _learned(best)
    if all(name not in here or here[name][0] is value for name, (value, _) in mine.items()):
        add_to_store(mine)
        remember(best.model, best.guide, set(best.model.params), set(best.guide.params), {})
