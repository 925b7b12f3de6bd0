"""Capture: what a computation with Pyro programs does to tensors, as one graph without Python.

A replay draws new random numbers, as many as a plain run, and uses the current values of the parameters; it skips what
Pyro and Python do in between. What is no tensor is frozen: `capture` refuses a computation that looks at values, and
who replays compares with a plain run now and then.
"""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro.infer.util
import pyro.util
import torch
from pyro.infer.util import Dice
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from pyro_lvm.tracing.isolation import validation
from pyro_lvm.tracing.params import add_to_store, anchor, current_params
from pyro_lvm.tracing.products import with_faster_products

__all__ = ["Graph", "NotCapturable", "agree", "capture", "hoisted", "likeness", "pays"]

#: About what it costs to compile a graph, in seconds; a run that would not earn it back does without.
COMPILE_SECONDS = 15.0

_SAVED = 0.4  # share of the time that compiling saves, about

#: What can be captured: tensors in, tensors out.
Function = Callable[..., tuple[torch.Tensor, ...]]

_TORCH = str(Path(torch.__file__).parent)
_LIBRARIES = (str(Path(pyro.__file__).parent), str(Path(__file__).parents[1]))


def pays(seconds: float) -> bool:
    """Whether a computation that takes so many seconds as it is should be compiled."""
    return _SAVED * seconds > COMPILE_SECONDS


class NotCapturable(Exception):
    """Why a computation cannot be captured, in a sentence."""


class Graph:
    """A captured function: ``graph(*inputs)`` returns a tuple of tensors, without gradients.

    Attributes:
        module: the operations; its placeholders are the inputs and then the tensors that are held.
        held: parameters, buffers and other tensors that the programs refer to; their current values are used.
    """

    def __init__(self, module: GraphModule, held: Sequence[torch.Tensor]) -> None:
        self.module, self.held = module, tuple(held)
        self._run: Function = module
        self._recording: _Recording | None = None

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Replay."""
        with torch.no_grad():
            return self._recording(*inputs) if self._recording else tuple(self._run(*inputs, *self.held))

    def tried(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What a replay would return, and the values of what it would change; nothing is, and no number is drawn."""
        with self._undone(inputs) as changed:
            return tuple(tensor.clone() for tensor in [*self(*inputs), *changed])

    def compile(self, *inputs: torch.Tensor) -> None:
        """Fuse the operations by Inductor, for inputs like these; the random numbers stay those of a plain run.

        Raises:
            NotCapturable: there is no compiler, it fails, or its numbers are others; the graph then stays as it is.
        """
        expected, as_it_is = self.tried(*inputs), (self._run, self._recording)
        everything: list[Any] = [*inputs, *self.held]
        # Straight to Inductor: torch.compile would look up guards at each call, count recompilations of this module
        # over the whole process, and switch the validation of distributions off for good.
        try:
            with validation(False), torch.no_grad():
                options: Any = {"fallback_random": True}
                with self._undone(inputs):
                    module = with_faster_products(self.module, everything)
                self._run = torch._inductor.compile(module, everything, options=options)  # type: ignore[assignment]
                if self._recording:
                    self.record(*inputs)
            got = self.tried(*inputs)
        except Exception as error:
            self._run, self._recording = as_it_is
            raise NotCapturable(f"it could not be compiled: {_first_line(error)}") from error
        if not agree(expected, got, 1e4, sum(tensor.numel() for tensor in inputs)):
            self._run, self._recording = as_it_is
            raise NotCapturable("compiled it gives other numbers")

    def record(self, *inputs: torch.Tensor) -> None:
        """Replay as one launch on CUDA from now on; results are overwritten by the next replay.

        Raises:
            NotCapturable: an operation cannot be recorded, as a copy from the CPU.
        """
        self._recording = None
        self.tried(*inputs)  # what the first run allocates is no part of the recording
        try:
            with torch.cuda.device(inputs[0].device):
                self._recording = _Recording(self, inputs)
        except RuntimeError as error:
            raise NotCapturable(f"CUDA cannot record it: {_first_line(error)}") from error

    @contextmanager
    def _undone(self, inputs: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Put back what a run changes, batch statistics and the random state; gives the tensors that it changes."""
        before = [(tensor, tensor.clone()) for tensor in self._changed()]
        with torch.random.fork_rng(devices={t.device for t in inputs if t.is_cuda}), torch.no_grad():
            try:
                yield [tensor for tensor, _ in before]
            finally:
                for tensor, value in before:
                    tensor.copy_(value)

    def _changed(self) -> list[torch.Tensor]:
        """The held tensors that a replay changes: batch statistics."""
        nodes = self.module.graph.nodes
        places = [node for node in nodes if node.op == "placeholder"]
        written = {arg for node in nodes for arg in _written(node)}
        return [t for node, t in zip(places[len(places) - len(self.held) :], self.held, strict=True) if node in written]


class _Recording:
    """A CUDA graph, with the tensors that it reads its inputs from and writes its results to."""

    def __init__(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = graph(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.results


def agree(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor], factor: float, terms: int) -> bool:
    """Whether tensors are equal up to the rounding of their sizes and of that many terms of size 1."""
    size = sum(float(tensor.double().square().sum()) for tensor in expected) ** 0.5
    distance = sum(float((a - b).double().square().sum()) for a, b in zip(expected, got, strict=True)) ** 0.5
    eps = max(torch.finfo(tensor.dtype).eps for tensor in expected if tensor.is_floating_point())
    return distance <= eps * (factor * size + 100 * terms)


def likeness(arg: Any) -> Any:
    """What two arguments of programs share that one graph serves: all but the values of a tensor."""
    if isinstance(arg, torch.Tensor):
        return arg.shape, arg.stride(), arg.dtype, arg.device
    return (type(arg), arg) if isinstance(arg, bool | int | float | str) else id(arg)


def capture(function: Function, inputs: Sequence[torch.Tensor], programs: Sequence[Any]) -> Graph:
    """Run ``function(*inputs)`` once on tensors without values, and write down what it does.

    No random number is drawn, and no parameter, buffer or attribute of the modules behind ``programs`` changes.

    Raises:
        NotCapturable: it looks at values, uses what has no derivative, or writes to the param store.
    """
    before = current_params()
    try:
        with _untouched(programs):
            module = make_fx(_traceable()(function), tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
            held = _lift(module)
    except Exception as error:
        raise NotCapturable(_reason(error)) from error
    finally:
        written = _restore_store(before)
    if written:
        raise NotCapturable(f"it writes to the param store, at {written}")
    return Graph(module, held)


def _lift(module: GraphModule) -> list[torch.Tensor]:
    """Make placeholders of the tensors that the graph holds as attributes, and return these."""
    held: dict[str, tuple[Node, torch.Tensor]] = {}
    last = [node for node in module.graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in module.graph.nodes if node.op == "get_attr"]:
        if node.target not in held:
            with module.graph.inserting_after(last):
                last = module.graph.placeholder(f"held_{len(held)}")
            held[node.target] = last, getattr(module, node.target)
        node.replace_all_uses_with(held[node.target][0])
        module.graph.erase_node(node)
    module.recompile()
    return [tensor for _, tensor in held.values()]


def hoisted(graph: Graph) -> tuple[Graph, Graph]:
    """Split a graph in two: ``rest(*inputs, *first(*inputs))`` is ``graph(*inputs)``, and only ``rest`` is random.

    What depends on an input and on no random number, such as an encoder, then runs once for any number of replays.
    ``rest`` also returns the random numbers that are not used, since no compiler leaves out what is returned.

    Raises:
        NotCapturable: the graph changes tensors that it did not make.
    """
    nodes = list(graph.module.graph.nodes)
    places, output = [node for node in nodes if node.op == "placeholder"], nodes[-1]
    inputs, held = places[: len(places) - len(graph.held)], places[len(places) - len(graph.held) :]
    unused = [node for node in nodes if _is_random(node) and node not in _ancestors(output)]
    needed, written = _ancestors(output, *unused), _ancestors(*(arg for node in nodes for arg in _written(node)))
    left_out = {arg for node in nodes if node not in needed for arg in _written(node)}
    if written.intersection(places) or left_out & needed:
        raise NotCapturable("it changes a tensor in place")
    fixed, made_of_input = set(places), set(inputs)
    for node in nodes:
        parents = node.all_input_nodes
        still = not (_is_random(node) or _written(node) or node in written)
        if node.op == "call_function" and still and fixed.issuperset(parents):
            fixed.add(node)
            made_of_input |= {node} if made_of_input.intersection(parents) else set()
    early = fixed & made_of_input & needed - set(places)
    passed = [
        n for n in nodes if n in early and _is_tensor(n) and not early.issuperset(u for u in n.users if u in needed)
    ]
    first = _part(graph, [*places, *(n for n in nodes if n in _ancestors(*passed) - set(places))], [], passed)
    late = [node for node in nodes if node in needed and node not in passed and node not in places]
    rest = _part(graph, [*inputs, *passed, *held, *late], passed, [*output.args[0], *unused])
    return first, rest


def _part(graph: Graph, nodes: Sequence[Node], given: Sequence[Node], results: Any) -> Graph:
    """Some nodes as a graph of their own, in which those that are ``given`` are placeholders."""
    part, copies = torch.fx.Graph(), dict[Node, Node]()
    for node in nodes:
        if node in given:
            copies[node] = part.placeholder(f"given_{len(copies)}")
        elif node.op != "output":
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in results))
    return Graph(GraphModule(graph.module, part), graph.held)


def _ancestors(*nodes: Node) -> set[Node]:
    """The nodes themselves, and all that they are made of."""
    found, new = set[Node](), list(nodes)
    while new:
        node = new.pop()
        if node not in found:
            found.add(node)
            new += node.all_input_nodes
    return found


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_operation(node: Node) -> bool:
    """Whether a node is an operation on tensors, and not the choice of one from several results."""
    return isinstance(node.target, torch._ops.OpOverload)


def _written(node: Node) -> list[Node]:
    """What an operation changes of what it is given; batch normalisation does without saying so."""
    operation: Any = node.target
    if not _is_operation(node):
        return []
    silent = "batch_norm" in operation._schema.name and "backward" not in operation._schema.name
    arguments = zip(node.args, operation._schema.arguments, strict=False)
    changed = [arg for arg, declared in arguments if silent or (declared.alias_info and declared.alias_info.is_write)]
    return [arg for arg in changed if isinstance(arg, Node)]


def _is_random(node: Node) -> bool:
    """Whether a node draws random numbers."""
    operation: Any = node.target
    return _is_operation(node) and torch.Tag.nondeterministic_seeded in operation.tags


class _NoValues(TorchFunctionMode):
    """Pyro reads values in two places: it adds up numbers, and in a sum over a latent asks whether to leave zeros out.

    ``tensor.item()`` stays a tensor; nothing is left out, and `_expectation` takes care of the zeros.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.item:
            return args[0].detach()
        if func is torch.Tensor.all and sys._getframe(1).f_code is Dice.compute_expectation.__code__:
            return True
        return func(*args, **(kwargs or {}))


def _expectation(prob: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """The sum of ``prob * cost``, in which a cost of no probability counts for nothing, infinite or not."""
    return (prob * torch.where(prob > 0, cost, 0.0)).sum()


@contextmanager
def _traceable() -> Iterator[None]:
    """Pyro without what reads values: validation, numbers read from each site, the search for NaN in a loss."""
    changes: list[tuple[Any, str, Any]] = [
        (pyro.util, "torch_isnan", lambda _: False),
        (pyro.util, "torch_isinf", lambda _: False),
        (pyro.infer.util, "_fulldot", _expectation),
    ]
    saved = [getattr(module, name) for module, name, _ in changes]
    for module, name, ours in changes:
        setattr(module, name, ours)
    try:
        with validation(False), _NoValues():
            yield
    finally:
        for (module, name, _), value in zip(changes, saved, strict=True):
            setattr(module, name, value)


@contextmanager
def _untouched(programs: Sequence[Any]) -> Iterator[None]:
    """Put modules back: one that keeps a result would keep a tensor without values, and counts of batches go up."""
    owners = [owner for owner in map(anchor, programs) if isinstance(owner, torch.nn.Module)]
    parts = [part for owner in owners for part in owner.modules()]
    before = [(part, dict(vars(part)), dict(part._buffers)) for part in parts]
    values = [(buffer, buffer.clone()) for owner in owners for buffer in owner.buffers()]
    try:
        yield
    finally:
        for part, attributes, buffers in before:
            vars(part).clear()
            vars(part).update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)
        for buffer, value in values:
            buffer.copy_(value)


def _restore_store(before: dict[str, Any]) -> list[str]:
    """Put parameters back that were replaced, and return their names."""
    now = current_params()
    written = [name for name in now if name not in before or now[name][0] is not before[name][0]]
    for name in written:
        del pyro.get_param_store()[name]
    add_to_store({name: before[name] for name in written if name in before})
    return written


def _reason(error: BaseException) -> str:
    """What went wrong, and at which line of the user, or else of the libraries."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_TORCH, __file__, "<"))
    ]
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    what = "it looks at values of tensors" if _looks_at_values(error) else _first_line(error)
    if not frames:
        return what
    frame = (own or frames)[-1]
    return f"{what}, at {Path(frame.filename).name}:{frame.lineno}: {frame.line}"


def _looks_at_values(error: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    words = ("data-dependent", "tracing tensor", "DataDependent", "non-fake", "FakeTensor", "symbolic")
    return bool(kinds & {"GuardOnDataDependentSymNode", "DataDependentOutputException"}) or any(
        word in str(error) for word in words
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
