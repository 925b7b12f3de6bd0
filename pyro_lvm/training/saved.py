"""A trained pair as a file: parameters, batch statistics, history and provenance, to be put into the pair again."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch

from pyro_lvm._checks import check_path, check_program, data_tensor, refuse
from pyro_lvm._files import read_tensors, write_tensors
from pyro_lvm._typing import Guide, Model, TensorLike
from pyro_lvm.errors import CheckpointError, DataTypeError
from pyro_lvm.objectives.importance_weighted import BASELINE
from pyro_lvm.tracing.isolation import called_modules, eval_mode, evaluation_rng, validation
from pyro_lvm.tracing.params import current_params, training_store
from pyro_lvm.tracing.probe import empty_guide
from pyro_lvm.tracing.questions import parameter_names
from pyro_lvm.training.history import Columns, History
from pyro_lvm.training.state import FitResult, make_result
from pyro_lvm.training.values import differences, fill, held_by, listed, live

__all__ = ["load", "save"]

_KIND = "FitResult"
_PLAIN = ("seconds", "stop_reason", "skipped", "notes", "captured", "provenance")


def save(result: FitResult, path: str | PathLike[str]) -> None:
    """Write a trained pair to a file: what `fit` returned, with the parameters that the pair has now.

    The code of model and guide is not in it, only values: parameters, batch statistics and what else their modules
    hold, the history and the provenance. It is written whole or not at all.

    Args:
        result: what `fit`, `best_of` or `load` returned.
        path: the file; its folder is made if it is not there.

    Raises:
        DataTypeError: ``result`` is not a `FitResult`.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pyro_lvm.models import LinearGaussian
        >>> from pyro_lvm.training import fit
        >>> torch.manual_seed(0) and None
        >>> model, x = LinearGaussian(1, 2), torch.zeros(4, 2)
        >>> path = tempfile.mkdtemp() + "/pair.pt"
        >>> save(fit(model, None, x, num_steps=2, seed=0), path)
        >>> again = LinearGaussian(1, 2)  # with other values, in another process for instance
        >>> load(path, again, None, x).num_steps
        2
        >>> torch.equal(again.weight, model.weight)
        True
    """
    if not isinstance(result, FitResult):
        cure = "Pass what fit() returned; a pair that was trained without it is saved by Pyro's param store."
        raise DataTypeError(refuse("result", "a FitResult", type(result).__name__, cure))
    params = {
        name: param
        for name, param in (result.model.params | result.guide.params).items()
        if not name.startswith(BASELINE)  # part of a loss
    }
    content = {name: getattr(result, name) for name in _PLAIN} | {
        "names": [sorted(params.keys() & half.params.keys()) for half in (result.model, result.guide)],
        "params": {name: params[name][0] for name in sorted(params)},
        "modules": held_by(result.modules, params),
        "history": Columns().of(result.history),
    }
    path = check_path("path", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, _KIND, content)


def load(path: str | PathLike[str], model: Model, guide: Guide | None, x: TensorLike, *args: Any) -> FitResult:
    """Put the values that `save` wrote into a pair, as if `fit` had just trained it.

    The pair is run once, so that its parameters are there; then all of them, and what its modules hold, get the values
    of the file. As after `fit` they are in the current param store, or, where names there belong to another pair, in
    one of their own that ``FitResult.model`` and ``FitResult.guide`` carry.

    Args:
        path: the file.
        model: the model whose code is that of the saved pair.
        guide: its guide, or None.
        x: data of the kind that it was trained on, ``(N, ...)``: a few rows, or all where there are parameters per
            datum.
        args: further arguments of the model.

    Returns:
        FitResult: with the history, notes and provenance of the run.

    Raises:
        CheckpointError: the file is damaged, of another kind, of a newer format, or of a pair whose names, shapes or
            dtypes differ; the message lists them. Or the model has the place of the guide. Nothing is changed then.
        ParameterError: two modules of the pair register different tensors under one name.

    Example:
        See `save`.
    """
    guide = empty_guide if guide is None else guide
    check_program("model", model)
    check_program("guide", guide)
    content = read_tensors(check_path("path", path), _KIND)
    batch = (data_tensor("x", x), *args)
    modules: list[torch.nn.Module] = []

    def look() -> tuple[set[str], set[str]]:
        with (
            evaluation_rng(0),
            eval_mode(model, guide),
            validation(False),
            called_modules(model, guide) as found,
        ):
            names = parameter_names(model, guide, *batch)
        modules.extend(found)
        differ = differences(content["params"], live(names[0] | names[1]))
        differ += differences(content["modules"], held_by(modules, current_params()))
        if differ:
            cure = "Make the pair as it was when it was saved."
            raise CheckpointError(refuse("path", "the parameters of this pair", listed(differ), cure))
        _check_not_swapped(content["names"], names)
        return names

    with training_store(model, guide, look) as store:
        fill(content["params"], content["modules"], modules)
    history = History(Columns.rows(content["history"]))
    rest = {name: content[name] for name in _PLAIN}
    return make_result((model, guide), content["names"], store["params"], history, modules=tuple(modules), **rest)


def _check_not_swapped(saved: Sequence[Sequence[str]], names: tuple[set[str], set[str]]) -> None:
    """Each half has the parameters of its own half in the file."""
    model_names, guide_names = map(set, saved)
    if names == (guide_names, model_names) != (model_names, guide_names):
        expected, cure = f"the half with parameters {sorted(model_names)}", "Pass load(path, model, guide, x)."
        raise CheckpointError(refuse("model", expected, "that of the guide", cure))
