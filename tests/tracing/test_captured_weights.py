"""Tables of log-weights by captured graphs against plain ones: the same numbers from the same random state."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import Distribution

import pyro_lvm.tracing.capture as capture
from pyro_lvm.guides import DiagonalNormal, Flow
from pyro_lvm.models import DeepGaussian
from pyro_lvm.nn import MLP, ConvDecoder
from pyro_lvm.tracing.batch import Batch, make_batch
from pyro_lvm.tracing.captured_weights import CapturedTables, Tables
from pyro_lvm.tracing.isolation import validation
from pyro_lvm.tracing.probe import Plan, empty_guide, probe_pair
from pyro_lvm.tracing.weights import evaluation
from tests.references import ENUMERATED, ORACLES, Pair


@contextmanager
def probed(model: Any, guide: Any, batch: Batch, **options: Any) -> Iterator[Plan]:
    with evaluation(model, guide), torch.no_grad(), validation(False):
        yield probe_pair(model, guide, batch, **options)


def drawn(tables: Tables, batches: list[Batch], shapes: tuple[int, ...], left: int = 10**9) -> list[torch.Tensor]:
    """Tables of all shapes on all chunks of data, from one random state."""
    torch.manual_seed(4)
    results = []
    for batch in batches:
        table = tables.of(batch, left)
        for num_particles in shapes:
            found = table(num_particles)
            results += [found.total, found.magnitude]
    return results


def compared(
    model: Any, guide: Any, batches: list[Batch], shapes: tuple[int, ...] = (3, 3, 3, 3, 2), **options: Any
) -> CapturedTables:
    """Draw both ways, and compare."""
    guide = guide or empty_guide
    with probed(model, guide, batches[0], **options) as plan:
        tables = CapturedTables(plan, model, guide)
        expected, got = drawn(Tables(plan, model, guide), batches, shapes), drawn(tables, batches, shapes)
    for one, other in zip(expected, got, strict=True):
        rtol = 1e-9 if one.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(other, one, rtol=rtol, atol=rtol)
    return tables


def encoded(conv: bool = False) -> tuple[Any, Any, list[Batch]]:
    torch.manual_seed(0)
    x = (torch.rand(12, 1, 8, 8) < 0.5).float() if conv else (torch.rand(12, 6) < 0.5).float()
    decoder = ConvDecoder(2, (1, 8, 8)) if conv else MLP(2, [8], 6)
    encoder = nn.Sequential(nn.Flatten(), MLP(64, [8], 4)) if conv else MLP(6, [8], 4)
    batch = make_batch(x, ())
    return DeepGaussian(decoder, 2), DiagonalNormal(2, encoder), [batch.rows(slice(i, i + 4)) for i in (0, 4, 8)]


@pytest.mark.usefixtures("captured_at_once")
@pytest.mark.parametrize("name", ORACLES | ENUMERATED)
def test_every_oracle(name: str) -> None:
    pair: Pair = (ORACLES | ENUMERATED)[name](5)
    options = dict(pair.options)
    batch = make_batch(pair.x, pair.args, options.pop("data_args", "auto"))
    tables = compared(pair.model, pair.guide, [batch, batch, batch], **options)
    assert tables.note.startswith("plain" if name.startswith("sequential") else "captured")


@pytest.mark.usefixtures("captured_at_once")
@pytest.mark.parametrize("conv", [False, True])
def test_what_the_data_alone_determine_runs_once_for_each_chunk(conv: bool) -> None:
    model, guide, batches = encoded(conv)
    tables = compared(model, guide, batches)
    assert tables.note.startswith("captured, not compiled, because")
    for replay in tables.replays.values():
        if replay.rest is not None:
            assert replay.first is not None
            early, late = ({str(n.target) for n in part.module.graph.nodes} for part in (replay.first, replay.rest))
            assert "aten.addmm.default" in early  # the encoder
            assert not any("normal" in name or "rand" in name for name in early)
            assert any("normal" in name or "rand" in name for name in late)


@pytest.mark.usefixtures("captured_at_once")
def test_flows_and_arguments() -> None:
    torch.manual_seed(0)
    batch = make_batch((torch.rand(12, 6) < 0.5).float(), ())
    tables = compared(DeepGaussian(MLP(2, [8], 6), 2), Flow(2, MLP(6, [8], 36)), [batch, batch, batch])
    assert tables.note.startswith("captured")


@pytest.mark.usefixtures("captured_at_once")
def test_values_that_the_program_looks_at_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            shift = float(x.mean())
            pyro.sample("x", dist.Normal(z.sum(-1) + shift, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    batch = make_batch(torch.randn(1, generator=torch.Generator().manual_seed(0)), ())
    tables = compared(model, guide, [batch, batch])
    assert "looks at values of tensors, at test_captured_weights.py" in tables.note
    assert tables.note in caplog.text.replace("compile=True: plain tables of log-weights", "plain")


def test_a_short_run_is_not_captured() -> None:
    model, guide, batches = encoded()
    with probed(model, guide, batches[0]) as plan:
        tables = CapturedTables(plan, model, guide)
        drawn(tables, batches, (3, 3, 3, 3), left=1000)
    assert tables.note.startswith("plain: too short")
    assert tables.left == 1000 - 3 * 4 * 4


@pytest.mark.slow
def test_compiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By Inductor, with random numbers that nothing uses among those that are drawn."""
    monkeypatch.setattr(capture, "COMPILE_SECONDS", -1.0)
    caplog.set_level(logging.INFO, logger="pyro_lvm")
    validated = Distribution._validate_args
    model, guide, batches = encoded()
    assert compared(model, guide, batches, (3, 3, 3, 3, 3)).note == "captured and compiled"
    pair = ORACLES["obs_mask"](5)
    batch = make_batch(pair.x, pair.args)
    assert compared(pair.model, pair.guide, [batch, batch], (3, 3, 3, 3)).note == "captured and compiled"
    assert Distribution._validate_args == validated


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "COMPILE_SECONDS", -1.0)
    model, guide, batches = encoded()
    model.cuda(), guide.cuda()
    assert compared(model, guide, [batch.to("cuda") for batch in batches]).note == "captured and compiled"
