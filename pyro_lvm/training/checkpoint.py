"""Runs that outlive their process: all that a run consists of, in a file that is written as it goes.

A file is written between two steps, and holds what the steps that are still to come depend on: parameters, buffers,
optimizer, callbacks, generators of random numbers, and how far the pass over the data is. A run that goes on from it
takes the same steps, to the last bit.
"""

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch.distributions import constraints

from pyro_lvm._checks import check_path, check_positive_int, refuse
from pyro_lvm._files import read_tensors, write_tensors
from pyro_lvm._version import versions
from pyro_lvm.errors import CheckpointError
from pyro_lvm.objectives.annealing import KLAnnealing
from pyro_lvm.objectives.importance_weighted import ImportanceWeightedELBO, register_baseline
from pyro_lvm.tracing.isolation import generator_states, set_generators
from pyro_lvm.tracing.params import current_params
from pyro_lvm.training.history import Columns
from pyro_lvm.training.values import differences, fill, held_by, listed, live

if TYPE_CHECKING:
    from pyro_lvm.training.engine import Engine

__all__ = ["Checkpoint", "read_run", "restore"]

logger = logging.getLogger("pyro_lvm")

_KIND = "training run"
_REAL = str(constraints.real)
_FINAL = ("early_stopping", "nonfinite")  # reasons to stop that hold for the run that goes on as well


class Checkpoint:
    """Write the run to a file from time to time, for ``fit(..., resume=path)`` to go on from after a crash.

    The first file is written after the first update, so that a path of no use is found out at once, and one more when
    training ends. A file that is there is replaced when the next one is whole and on disk; what is read is plain
    tensors and values (``torch.load`` with ``weights_only=True``), and runs no code. Other callbacks are asked for
    ``state_dict()``, and given it back by ``load_state_dict(state)``, where they have these methods; so is ``loss``.

    Args:
        path: the file.
        every: steps from one file to the next. Of a ``Dataset`` or ``DataLoader``, whose order nobody can foresee, runs
            go on from the end of an epoch only: files are written there, where one is due. A stream without an end
            has none.

    Raises:
        CheckpointError: in training, a state that cannot be written without a pickle of objects.
        OSError: in training, the first file cannot be written. A later one is said in the log, and tried again.

    Example:
        >>> import tempfile
        >>> from pyro_lvm.models import LinearGaussian
        >>> from pyro_lvm.training import fit
        >>> path = tempfile.mkdtemp() + "/run.pt"
        >>> model, x = LinearGaussian(1, 2), torch.zeros(4, 2)
        >>> half = fit(model, None, x, num_steps=5, seed=0, callbacks=[Checkpoint(path)])
        >>> fit(model, None, x, num_steps=10, seed=0, resume=path).num_steps
        10
    """

    def __init__(self, path: str | PathLike[str], every: int = 1000) -> None:
        self.path, self.every = check_path("path", path), check_positive_int("every", every)
        self._forget()

    def start(self) -> None:
        """A run begins: forget an earlier one, and make the folder.

        Raises:
            OSError: it cannot be made.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._forget()

    def _forget(self) -> None:
        self._written: tuple[int, int] | None = None  # step and epoch
        self._columns = Columns()

    def due(self, run: "Engine") -> bool:
        """Whether the run is to be written now."""
        return self._written is None or run.state.step - self._written[0] >= self.every

    def wait(self, step: int) -> None:
        """No file can be written, and no epoch in sight after which one could."""
        if self._written is None and step == self.every:
            logger.warning(
                "%s is not written yet: in this order of data a run goes on from the end of an epoch only, and none is "
                "in sight after %d steps. Pass tensors, or a data set whose epochs end within the run",
                self.path,
                step,
            )

    def end(self) -> None:
        """A run has ended."""
        if self._written is None:
            logger.warning("%s was not written: no epoch, or no step, came to an end from which to go on", self.path)

    def write(self, run: "Engine") -> None:
        """Write the run as it is, unless that was done."""
        now = run.state.step, run.position[0]
        if now == self._written:
            return
        try:
            write_tensors(self.path, _KIND, _snapshot(run) | {"history": self._columns.of(run.state.history)})
        except OSError as error:
            if self._written is None:
                raise
            logger.error("step %d was not written to %s, which holds an earlier one: %s", now[0], self.path, error)
        self._written = now


# ----------------------------------------------------------------------------------------------------------------------
# All of a run but its history.


def _snapshot(run: "Engine") -> dict[str, Any]:
    here, optimizer, loss = current_params(), run.guard.optimizer, run.objective.loss
    used = run.names[0] | run.names[1]
    mine = [name for name in sorted(here) if name in used or here[name][0] is not run.foreign.get(name)]
    state: Any = None
    if optimizer is not None:
        state = optimizer.get_state() if isinstance(optimizer, PyroOptim) else optimizer.state_dict()
    return {
        "fingerprint": run.fingerprint,
        "versions": versions(),
        "declared": run.declared,
        "names": [sorted(half) for half in run.names],
        "params": {name: here[name][0] for name in mine},
        "constraints": {name: str(here[name][1]) for name in mine},
        "modules": held_by(run.state.modules, current_params()),
        "optimizer": (run.guard.adopted, type(optimizer).__name__, state),
        "callbacks": [(type(owner).__name__, owner.state_dict()) for owner in _stateful(run.callbacks)],
        "loss": loss.state_dict() if hasattr(loss, "state_dict") else None,
        "max_plate_nesting": getattr(_innermost(loss), "max_plate_nesting", None),
        "position": run.position,
        "generators": generator_states(run.devices),
        "data_generators": [generator.get_state() for generator in run.batches.generators],
        "step": run.state.step,
        "epoch": run.state.epoch,
        "stop_reason": run.state.stop_reason,
        "ledger": (run.ledger.skipped, run.ledger.streak),
        "replayed": run.replayed,
        "seconds": run.seconds,
        "resumed_at": run.resumed_at,
    }


def read_run(path: str | PathLike[str], checkpoints: Sequence[Checkpoint]) -> dict[str, Any] | None:
    """What a `Checkpoint` wrote; None if there is no such file, so that one script begins and goes on.

    A path to which none of the ``checkpoints`` of this run will write may be a slip, and is warned of in the log.

    Raises:
        CheckpointError: the file is damaged, of another kind, or of a newer format.
    """
    path = check_path("resume", path)
    Path(f"{path}.tmp").unlink(missing_ok=True)  # of a process that was killed while it wrote
    if not path.exists():
        will_be = path.resolve() in [checkpoint.path.resolve() for checkpoint in checkpoints]
        logger.log(
            logging.INFO if will_be else logging.WARNING, "there is no %s to go on from: the run begins", path.resolve()
        )
        return None
    return read_tensors(path, _KIND)


def restore(run: "Engine", content: Mapping[str, Any]) -> None:
    """Put a run that has looked at its pair, and made no step yet, where the file says.

    Raises:
        CheckpointError: the file is of other arguments, parameters or callbacks; the message lists what differs.
    """
    loss = run.objective.loss
    if isinstance(loss, ImportanceWeightedELBO) and loss.baseline is not None:
        register_baseline(loss.baseline)
    _check(run, content)
    declared = {name for half in content["declared"] for name in half}
    for name, value in content["params"].items():
        if name not in declared:  # a loss has made it, or a batch after the first
            pyro.get_param_store()[name] = value.to(run.batch[0].device)
    _restore_optimizer(run, *content["optimizer"])  # first, for it may refuse
    fill({name: content["params"][name] for name in declared}, content["modules"], run.state.modules)
    for owner, (_, state) in zip(_stateful(run.callbacks), content["callbacks"], strict=True):
        owner.load_state_dict(state)
    if content["loss"] is not None:
        loss.load_state_dict(content["loss"])
    if content["max_plate_nesting"] is not None:  # else Pyro guesses it by one more run, with random numbers
        _innermost(loss).max_plate_nesting = content["max_plate_nesting"]
    for names, half in zip(run.names, content["names"], strict=True):
        names.update(half)
    run.state.history[:] = Columns.rows(content["history"])
    run.state.step, run.state.epoch = content["step"], content["epoch"]
    run.ledger.skipped, run.ledger.streak = content["ledger"]
    run.resumed_at = [*content["resumed_at"], content["step"]]
    if content["stop_reason"] in _FINAL:
        run.state.stop(content["stop_reason"])
    _restore_position(run, content)


def _check(run: "Engine", content: Mapping[str, Any]) -> None:
    """The file fits the call."""
    there, here = content["fingerprint"], run.fingerprint
    found = [f"{name} {there.get(name)} (here {here[name]})" for name in here if here[name] != there.get(name)]
    declared = {name for half in content["declared"] for name in half}
    made_later = {name for name, constraint in content["constraints"].items() if constraint == _REAL} - declared
    params = {name: value for name, value in content["params"].items() if name not in made_later}
    found += differences(params, live({name for half in run.declared for name in half}))
    found += differences(content["modules"], held_by(run.state.modules, current_params()))
    stateful = [type(owner).__name__ for owner in _stateful(run.callbacks)]
    if stateful != [name for name, _ in content["callbacks"]]:
        found.append(f"callbacks {[name for name, _ in content['callbacks']]} (here {stateful})")
    if found:
        cure = "Call `fit` as that run did, or pass another path."
        raise CheckpointError(refuse("resume", "a file of this run", f"one with {listed(found)}", cure))


def _restore_optimizer(run: "Engine", adopted: list[list[str]], kind: str, state: Any) -> None:
    """Make the optimizer as that run did, parameter by parameter, and give it its state."""
    here, guard = current_params(), run.guard
    for names in adopted:
        guard.adopt({name: here[name][0] for name in names})
    if state is None:
        return
    try:
        if type(guard.optimizer).__name__ != kind:
            raise ValueError(f"it is of {kind}, and `optim` makes {type(guard.optimizer).__name__}")
        if isinstance(guard.optimizer, PyroOptim):
            guard.optimizer(list(guard.params.values()))  # without gradients nothing moves: it makes its optimizers
            for name, param in guard.params.items():
                _load_into(guard.optimizer.optim_objs[param], state[name])
        else:
            guard.optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        cure = "Pass the `optim` of that run."
        raise CheckpointError(refuse("resume", "the state of this optimizer", str(error), cure)) from error


def _load_into(optimizer: Any, state: Any) -> None:
    """Pyro keeps an optimizer for each parameter, or a scheduler that has one."""
    if "scheduler" in state:
        optimizer.load_state_dict(state["scheduler"])
        optimizer, state = optimizer.optimizer, state["optimizer"]
    optimizer.load_state_dict(state)


def _restore_position(run: "Engine", content: Mapping[str, Any]) -> None:
    """Draw the order of the epoch once more, and pass over what has been done of it."""
    epoch, batches, generator = run.position = content["position"]
    torch.set_rng_state(generator)
    run.source.close()
    run.stream = run.source = run.batches.stream(epoch)
    for _ in range(batches):
        next(run.stream)
    for own, state in zip(run.batches.generators, content["data_generators"], strict=True):
        own.set_state(state)
    cuda = {name: state for name, state in content["generators"]["cuda"].items() if name in map(str, run.devices)}
    set_generators(content["generators"] | {"cuda": cuda})


def _innermost(loss: Any) -> Any:
    return loss.wrapped if isinstance(loss, KLAnnealing) else loss


def _stateful(callbacks: Sequence[Any]) -> list[Any]:
    return [owner for owner in callbacks if hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict")]
