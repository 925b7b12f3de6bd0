"""Graphs that CUDA would replay as one launch, without CUDA: what becomes of one that it cannot record."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from pyro_lvm.tracing import capture
from pyro_lvm.tracing.capture import NotCapturable


def test_a_graph_that_cannot_be_recorded_is_not_capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that plain steps are taken, and the run is not lost."""

    def refused(*_: Any) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    x = torch.arange(3.0)
    graph = capture.capture(lambda x: (2 * x,), [x], ())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(capture, "_Recording", refused)
    with pytest.raises(NotCapturable, match="CUDA cannot record it: .*stream is capturing$"):
        graph.record(x)
    assert torch.equal(graph(x)[0], 2 * x)
