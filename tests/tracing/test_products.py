"""Products of captured graphs by oneDNN: equal numbers, and only where they are what oneDNN computes."""

from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_lvm.tracing.capture as capture
import pyro_lvm.tracing.products as products
from pyro_lvm.tracing.products import with_faster_products
from tests.training.pairs import PAIRS, assert_equal, trained

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

OURS = torch.ops.pyro_lvm.product.default


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says that oneDNN wins every race."""
    monkeypatch.setattr(products, "_seconds", lambda function, *args: float(function is not OURS))


def replaced(function: Any, *inputs: torch.Tensor) -> int:
    """How many products of a function are replaced; the numbers have to stay."""
    module = make_fx(function)(*inputs)
    faster = with_faster_products(module, inputs)
    torch.testing.assert_close(faster(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)
    assert count(module) == 0
    return count(faster)


def count(module: GraphModule) -> int:
    return sum(node.target is OURS for node in module.graph.nodes)


@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("flip_a", [False, True])
@pytest.mark.parametrize("flip_b", [False, True])
def test_equal_for_rows_and_columns(flip_a: bool, flip_b: bool) -> None:
    torch.manual_seed(0)
    a = torch.randn(5, 7).t() if flip_a else torch.randn(7, 5)
    b = torch.randn(3, 5).t() if flip_b else torch.randn(5, 3)
    assert replaced(torch.mm, a, b) == 1
    assert replaced(torch.addmm, torch.randn(3), a, b) == 1
    assert replaced(torch.mm, a[::2], b[:, 1:]) == 1
    assert replaced(torch.mm, a[:1], b[:, :1]) == 1
    assert replaced(torch.mm, a[:1].expand(4, 5), b[:, :1].expand(5, 2)) == 1
    assert replaced(torch.addmm, torch.randn(3, 2)[:, 0], a, b) == 1
    assert replaced(torch.addmm, torch.randn(1).expand(3), a, b) == 1
    assert replaced(lambda a, b: torch.nn.functional.linear(a, b.t(), b[0]).tanh() @ b.t(), a, b) == 2


@pytest.mark.usefixtures("always_faster")
def test_what_it_cannot_do_stays() -> None:
    a, b, c = torch.randn(4, 3), torch.randn(3, 2), torch.randn(2)
    assert replaced(torch.mm, a.double(), b.double()) == 0
    assert replaced(torch.mm, a[:0], b) == 0
    assert replaced(torch.addmm, torch.randn(4, 2), a, b) == 0
    assert replaced(torch.addmm, torch.randn(1), a, b) == 0
    assert replaced(lambda c, a, b: torch.addmm(c, a, b, beta=2.0), c, a, b) == 0


@pytest.mark.parametrize(("ours", "theirs", "expected"), [(0.5, 1.0, 1), (1.0, 1.0, 0), (2.0, 1.0, 0)])
def test_the_clock_decides(monkeypatch: pytest.MonkeyPatch, ours: float, theirs: float, expected: int) -> None:
    monkeypatch.setattr(products, "_seconds", lambda function, *args: ours if function is OURS else theirs)
    assert replaced(torch.mm, torch.randn(4, 3), torch.randn(3, 2)) == expected


def test_a_time_is_measured() -> None:
    a = torch.randn(400, 400)
    assert 0 < products._seconds(torch.mm, a[:2, :2], a[:2, :2]) < products._seconds(torch.mm, a, a) < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "batch statistics"])
@pytest.mark.usefixtures("always_faster")
def test_a_compiled_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every product replaced, where the numbers of a real race might leave all as they are."""
    counts: list[int] = []
    monkeypatch.setattr(capture, "COMPILE_SECONDS", -1.0)

    def counted(module: GraphModule, inputs: Any) -> GraphModule:
        counts.append(count(faster := with_faster_products(module, inputs)))
        return faster

    monkeypatch.setattr(capture, "with_faster_products", counted)
    (plain, plain_buffers), (replayed, buffers) = (trained(*PAIRS[name], compile) for compile in (False, True))
    assert not any("compile" in note for note in replayed.notes)
    assert counts == [11, 11]  # four layers each way, without the gradient of the data
    assert_equal(plain, replayed, tolerance=1e-4)
    for key, value in plain_buffers.items():
        torch.testing.assert_close(buffers[key], value, rtol=1e-4, atol=1e-4)
