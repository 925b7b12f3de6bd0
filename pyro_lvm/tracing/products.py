"""Matrix products of a captured graph by oneDNN, where that is faster than what torch takes by itself.

On a CPU, torch leaves products of float32 matrices to the library that it was built with, MKL as a rule, which on
processors of another maker reaches half of what they can do. oneDNN is on board too.
"""

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

__all__ = ["with_faster_products"]

_REPEATS = 5
_CLEARLY = 0.9  # a product is replaced if it then takes at most this share of its time

_aten: Any = torch.ops.aten


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    bias = None if bias is None else bias.contiguous()  # its strides are not looked at
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")  # type: ignore[no-any-return]


def _shape_of_product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


# An operation of our own: Inductor takes that of oneDNN with constant matrices only.
_library = torch.library.Library("pyro_lvm", "DEF")
_library.define("product(Tensor a, Tensor b, Tensor? bias=None) -> Tensor")
_library.impl("product", _product, "CPU")
_library.impl("product", _shape_of_product, "Meta")


def with_faster_products(module: GraphModule, inputs: Sequence[torch.Tensor]) -> GraphModule:
    """A copy of a graph; the products that are replaced are those that oneDNN computes faster, for inputs like these.

    Runs the graph once, with whatever that draws and changes.
    """
    module = copy.deepcopy(module)
    if not torch.backends.mkldnn.is_available():
        return module
    race = _Race(module)
    race.run(*inputs)
    for node in race.faster:
        with module.graph.inserting_before(node):
            new = module.graph.call_function(torch.ops.pyro_lvm.product.default, _factors(node.target, node.args))
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    module.recompile()
    return module


class _Race(Interpreter):
    """Runs a graph, and times its products.

    Attributes:
        faster: those that oneDNN computes faster.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.faster: list[Node] = []

    def run_node(self, n: Node) -> Any:
        if n.target in (_aten.mm.default, _aten.addmm.default) and not n.kwargs:
            args, _ = self.fetch_args_kwargs_from_env(n)
            _, b, *bias = _factors(n.target, args)
            alike = all(arg.dtype == torch.float32 and arg.device.type == "cpu" and arg.numel() for arg in args)
            if alike and all(added.shape == b.shape[1:] for added in bias):
                ours = _seconds(torch.ops.pyro_lvm.product.default, *_factors(n.target, args))
                if ours < _CLEARLY * _seconds(n.target, *args):  # type: ignore[arg-type]
                    self.faster.append(n)
        return super().run_node(n)


def _factors(target: Any, args: Any) -> tuple[Any, ...]:
    """The arguments of ``product`` that correspond to those of ``mm`` or ``addmm``."""
    return (args[1], args[2], args[0]) if target is _aten.addmm.default else args  # type: ignore[no-any-return]


def _seconds(function: Callable[..., torch.Tensor], *args: torch.Tensor) -> float:
    """The shortest of several times that a function takes."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - started)
    return min(times)
