"""Which callable has learned which parameters, so that pairs never train over each other's values.

Pyro keeps parameters in one process-wide store, by name. A pair is trained in the current store, as ``SVI`` would, and
afterwards each of its callables remembers the tensors that it learned. Callables are told apart by function and bound
object, and are held weakly. Two rules follow:

* training a pair whose names are held by *another* pair happens in a store of its own (`training_store`);
* evaluating a pair runs over the current store with the pair's own learned tensors on top, and leaves the current
  store exactly as it was (`evaluation_store`).
"""

import functools
import inspect
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro.poutine.runtime import am_i_wrapped
from torch.utils.weak import WeakIdKeyDictionary

from pyro_lvm._checks import check_program, warn_caller
from pyro_lvm._typing import Guide, Model
from pyro_lvm.errors import ParameterError, PyroLVMError, UntrainedParameterWarning

__all__ = [
    "Fitted",
    "Params",
    "add_to_store",
    "anchor",
    "current_params",
    "held_by_others",
    "evaluation_store",
    "module_parameters",
    "own_store",
    "remember",
    "same_program",
    "strangers",
    "training_store",
    "warn_of_strangers",
]

#: name -> (unconstrained tensor, constraint); the tensors are live, not copies.
Params = dict[str, tuple[torch.Tensor, Any]]

_MODULE = "$$$"  # what Pyro puts between the name of a module and that of its parameter

logger = logging.getLogger("pyro_lvm")


@dataclass(frozen=True)
class _Entry:
    """What a callable learned in one pair.

    ``witnesses`` are tensors that the current store held at the time. Once all are gone from it the store was cleared,
    and with it, as in Pyro, what was learned: a notebook that clears the store and trains again begins afresh.
    """

    params: Params
    witnesses: Params

    def forgotten(self) -> bool:
        here = current_params()
        return bool(self.witnesses) and not any(n in here and here[n][0] is t for n, (t, _) in self.witnesses.items())


class _Record:
    """What one callable has learned: an entry for each callable that it was paired with and that lives, latest last."""

    def __init__(self) -> None:
        self.by_partner: WeakKeyDictionary[_Record, _Entry] = WeakKeyDictionary()


_records: Any = WeakIdKeyDictionary()  # function or bound object -> {rest of the key: _Record}
_fitted: Any = WeakIdKeyDictionary()  # tensor that some pair has learned, whether that pair lives or not -> True


class Fitted:
    """A callable together with the parameters that `fit` gave it: calling it finds them in any param store."""

    def __init__(self, program: Callable[..., Any], params: Params) -> None:
        self.program = program
        self.params = params

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program over the current store with these parameters on top."""
        with _installed(current_params() | self.params):
            return self.program(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "program":  # not there yet: an object that is being copied
            raise AttributeError(name)
        return getattr(self.program, name)

    def __repr__(self) -> str:
        return f"Fitted({self.program!r}, {len(self.params)} parameters)"


def _identity(program: Callable[..., Any]) -> tuple[Any, Hashable]:
    """(object to hold weakly, rest of the key): bound methods and partials are new objects at every access."""
    if isinstance(program, Fitted):
        return _identity(program.program)
    if isinstance(program, functools.partial):
        owner, rest = _identity(program.func)
        plain = (str, int, float, bool, type(None))
        bound = (*enumerate(program.args), *sorted(program.keywords.items()))
        return owner, (rest, tuple((k, v if isinstance(v, plain) else id(v)) for k, v in bound))
    if inspect.ismethod(program):
        return program.__self__, program.__func__
    return program, None


def anchor(program: Callable[..., Any] | None) -> Any:
    """The function, module or bound object behind a callable."""
    return None if program is None else _identity(program)[0]


def _record(program: Callable[..., Any], create: bool = False) -> _Record:
    owner, rest = _identity(program)
    if not create:
        return (_records.get(owner) or {}).get(rest) or _Record()
    if owner not in _records:
        _records[owner] = {}
    return _records[owner].setdefault(rest, _Record())


def current_params() -> Params:
    """The contents of the current param store."""
    store = pyro.get_param_store()  # whose get_state() would cut the ties of module parameters to their names
    return {name: (value, store._constraints[name]) for name, value in store.named_parameters()}


@contextmanager
def _installed(params: Params) -> Iterator[None]:
    """Put ``params`` in the place of the current store's contents; restore those on the way out."""
    store = pyro.get_param_store()
    outer = current_params()
    store.clear()
    add_to_store(params)
    try:
        yield
    finally:
        _let_pickle()
        store.clear()
        add_to_store(outer)


def _let_pickle() -> None:
    """Take back the weak references that Pyro leaves on parameters, with which no module can be pickled."""
    if not am_i_wrapped():  # else Pyro still reads them
        for tensor, _ in current_params().values():
            vars(tensor).pop("unconstrained", None)


def add_to_store(params: Params) -> None:
    """Put these into the current store, in the place of what has their names."""
    values = {name: value for name, (value, _) in params.items()}
    constraints = {name: constraint for name, (_, constraint) in params.items()}
    pyro.get_param_store().set_state({"params": values, "constraints": constraints})


def _same(a: Params, b: Params) -> bool:
    return all(n in b and (t is b[n][0] or torch.equal(t, b[n][0])) for n, (t, _) in a.items())


def _learned_by(program: Callable[..., Any], partner: Callable[..., Any] | None) -> Params:
    if isinstance(program, Fitted):
        return program.params
    entries = _record(program).by_partner
    entry = None if partner is None else entries.get(_record(partner))
    if entry is not None:
        return {} if entry.forgotten() else entry.params
    candidates = [entry.params for entry in entries.values() if not entry.forgotten()]
    if not all(_same(candidates[-1], other) for other in candidates):
        name = getattr(program, "__qualname__", type(program).__name__)
        raise ParameterError(
            f"{name}: expected parameters of one fit, got a callable that was fitted in {len(candidates)} pairs with "
            "different values. Pass the pair that it was fitted in, or `FitResult.model` / `FitResult.guide`."
        )
    return candidates[-1] if candidates else {}


def same_program(one: tuple[Model, Guide | None], other: tuple[Model, Guide | None]) -> bool:
    """Whether the models of two pairs are one callable with the same learned values."""
    (a, rest_a), (b, rest_b) = _identity(one[0]), _identity(other[0])
    return a is b and rest_a == rest_b and _same(_learned_by(*one), _learned_by(*other))


def learned(model: Model, guide: Guide | None) -> Params:
    """The parameters that this pair learned, or, for a new pair, those that its two callables bring along."""
    return _learned_by(model, guide) | (_learned_by(guide, model) if guide is not None else {})


@contextmanager
def evaluation_store(model: Model, guide: Guide | None) -> Iterator[None]:
    """Run over the current store with the pair's learned values on top; nothing of it remains afterwards.

    A name of which the current store holds a value that no fit produced (loaded from disk, say) is taken from there.

    Warns:
        UntrainedParameterWarning: a parameter came into being inside, so its value is an initial one. (The probe of a
            pair warns of values that another one has learned, `warn_of_strangers`.)
    """
    if not hasattr(model, "log_prob"):  # a distribution need not be a program
        check_program("model", model)
    if guide is not None:
        check_program("guide", guide)
    here = current_params()
    _check_not_taken(model, guide, here)
    wanted = learned(model, guide)
    loaded = {n for n in wanted if n in here and here[n][0] not in _fitted}
    before = here | {n: p for n, p in wanted.items() if n not in loaded}
    modules = {id(p) for program in (model, guide) for p in module_parameters(program)}
    with _installed(before):
        try:
            yield
        except Exception as error:
            if not isinstance(error, PyroLVMError) and (names := strangers(model, guide)):
                error.add_note(f"The param store holds what other pairs learned, under the names {names}.")
            raise
        after = current_params()
    new = [n for n, (t, _) in after.items() if n not in before]
    untrained = [n for n in new if not isinstance(after[n][0], torch.nn.Parameter)]
    created = {id(p) for program in (model, guide) for p in module_parameters(program)} - modules
    untrained += [n for n in new if id(after[n][0]) in created]
    if untrained:
        message = f"parameters {sorted(untrained)} were created during evaluation, with their initial values. "
        warn_caller(message + "Train the pair with fit(), or load its parameters first.", UntrainedParameterWarning)


@contextmanager
def own_store(model: Model, guide: Guide | None) -> Iterator[None]:
    """Run over the current store without what other pairs learned, and with what this one did."""
    mine = learned(model, guide)
    rest = {n: p for n, p in current_params().items() if n not in mine and p[0] not in _fitted}
    with _installed(rest | mine):
        yield


def strangers(model: Model, guide: Guide | None) -> list[str]:
    """Names under which the current store holds what neither callable has learned, but another pair has.

    Those of `pyro.module` are not among them: a module runs with tensors of its own.
    """
    mine = {_record(program) for program in (model, guide) if program is not None}
    wanted = learned(model, guide)
    return sorted(
        name
        for name, (tensor, _) in current_params().items()
        if tensor in _fitted and name not in wanted and _MODULE not in name
        if not any(pair & mine for pair in _owners(name, tensor))
    )


def warn_of_strangers(model: Model, guide: Guide | None, names: Iterable[str]) -> None:
    """Say so if a pair that uses these names finds there what another one has learned."""
    if found := sorted(set(names) & set(strangers(model, guide))):
        message = f"parameters {found} hold what another pair has learned, not this one. "
        cure = "Train this pair with fit(), which gives it its own, or pass `FitResult.model` and `FitResult.guide`."
        warn_caller(message + cure, UntrainedParameterWarning)


def _check_not_taken(model: Model, guide: Guide | None, here: Params) -> None:
    """A pair that was forgotten when the store was cleared must not run on what another has learned since."""
    for program, partner in ((model, guide), (guide, model)):
        if program is None or partner is None or isinstance(program, Fitted):
            continue
        entry = _record(program).by_partner.get(_record(partner))
        if entry is not None and entry.forgotten():
            taken = [n for n in entry.params if n in here and here[n][0] in _fitted]
            if taken:
                raise ParameterError(
                    f"parameters {taken}: expected what this pair learned, got values of another pair: the param store "
                    "was cleared in between. Pass `FitResult.model` and `FitResult.guide`, or train the pair again."
                )


def module_parameters(program: Any) -> list[torch.nn.Parameter]:
    """Parameters of the module that a callable is or is bound to."""
    owner = anchor(program)
    return list(owner.parameters()) if isinstance(owner, torch.nn.Module) else []


Pair = frozenset[object]


def _owners(name: str, tensor: torch.Tensor) -> set[Pair]:
    """The pairs that learned this very tensor under this name."""
    records = [record for rest in _records.values() for record in rest.values()]
    return {
        frozenset((record, partner))
        for record in records
        for partner, entry in record.by_partner.items()
        if entry.params.get(name, (None,))[0] is tensor
    }


def _foreign(name: str, tensor: torch.Tensor, pair: Pair) -> bool:
    """Whether another pair learned this tensor under this name, which may be gone by now."""
    return tensor in _fitted and _owners(name, tensor) != {pair}


def held_by_others(model: Model, guide: Guide) -> set[str]:
    """Names under which the current store holds what `fit` trained in another pair."""
    pair = frozenset((_record(model), _record(guide)))
    return {name for name, (tensor, _) in current_params().items() if _foreign(name, tensor, pair)}


def _clashes(mine: Params, pair: Pair, trainable: Callable[[str], bool]) -> Params:
    """What the current store holds of other pairs under names that this one uses, and would train over."""
    here, found = current_params(), {}
    for name, (tensor, _) in mine.items():
        if name not in here:
            continue
        module = isinstance(tensor, torch.nn.Parameter)
        others = _foreign(name, here[name][0], pair)
        shared = here[name][0] is tensor  # with the pair that it was learned in; a module has it for good
        if (others and trainable(name) and not module) if shared else (others or module):
            found[name] = here[name]
    return found


Names = tuple[set[str], set[str]]


@contextmanager
def training_store(
    model: Model, guide: Guide, parameter_names: Callable[[], Names], trainable: Callable[[str], bool] = bool
) -> Iterator[dict[str, Params]]:
    """The store in which to train: the current one, or one of the pair's own where names clash.

    ``parameter_names`` runs both callables once, in a store that holds only what they have already learned, and returns
    the names that each uses. A pair that needs a store of its own starts with copies of what its callables learned in
    other pairs, so that those stay as they are; the parameters of a module exist once, and go on from where they are.
    On the way out, also after an error, each callable remembers its parameters. Yields a dictionary that then holds
    them under ``"params"``.
    """
    before = learned(model, guide)
    with _installed(before):
        model_names, guide_names = parameter_names()
        mine = current_params()
    records = _record(model, create=True), _record(guide, create=True)
    clashes = _clashes(mine, frozenset(records), trainable)
    if clashes:
        names = list(clashes)
        shown = str(names) if len(names) < 4 else f"{names[:3]} and {len(names) - 3} more"
        logger.warning(
            "parameters %s of the param store belong to another pair: this pair trains in a store of its own", shown
        )
    refit = records[1] in records[0].by_partner
    start = mine | ({} if refit else {n: _copy(p) for n, p in before.items()})
    result: dict[str, Params] = {"params": {}}
    with _installed(start) if clashes else nullcontext():
        here = current_params()
        add_to_store({n: p for n, p in start.items() if n not in here})
        try:
            yield result
        finally:
            result["params"] = remember(model, guide, model_names, guide_names, clashes)
            _let_pickle()


def _copy(param: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    tensor, constraint = param
    if isinstance(tensor, torch.nn.Parameter):
        return param
    return tensor.detach().clone().requires_grad_(True), constraint


def remember(model: Model, guide: Guide, model_names: set[str], guide_names: set[str], clashes: Params) -> Params:
    """Note which parameters each callable of the pair has learned; returns all of them."""
    here = current_params()
    for program, partner, names in ((model, guide, model_names), (guide, model, guide_names)):
        record, other = _record(program), _record(partner)
        params = {n: here[n] for n in sorted(names) if n in here}
        record.by_partner.pop(other, None)  # so that it becomes the latest
        record.by_partner[other] = _Entry(params, clashes or params)
        _fitted.update({tensor: True for tensor, _ in params.values()})
    return {n: here[n] for n in sorted(model_names | guide_names) if n in here}
