"""Records as files: equal when they are read, an error of one kind when they are damaged."""

import json
import math
import os
import random
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import TensorDataset

import pyro_lvm as lvm
from pyro_lvm._files import write_json
from pyro_lvm.comparison import Comparison
from pyro_lvm.errors import CheckpointError
from pyro_lvm.evidence import LogMarginal, closed_form
from pyro_lvm.evidence.columns import COLUMNS
from pyro_lvm.guides import DiagonalNormal
from pyro_lvm.models import LinearGaussian

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")

X = torch.rand(12, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Weighing(LinearGaussian):
    """A model with an argument that it does not use."""

    def log_prob(self, x: torch.Tensor, weight: Any = None) -> torch.Tensor:
        return super().log_prob(x)


def estimated(seed: int = 0) -> LogMarginal:
    torch.manual_seed(seed)
    model = LinearGaussian(2, 64).double()
    return lvm.log_marginal(model, DiagonalNormal(2, num_data=12).double(), X, num_particles=20, seed=seed)


def compared() -> Comparison:
    torch.manual_seed(0)
    model = LinearGaussian(2, 64).double()
    pairs: dict[str, Any] = {
        name: [(model, DiagonalNormal(2, num_data=12).double()) for _ in range(runs)]
        for name, runs in (("one", 1), ("two", 2))
    }
    return lvm.compare(pairs, X, num_particles=20, seed=0, reference=closed_form(model, X))


def assert_same(one: LogMarginal, other: LogMarginal) -> None:
    for name in COLUMNS[:-1]:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)
        assert getattr(other, name).dtype == torch.float64
    assert one.status.tolist() == other.status.tolist()
    assert (one.num_particles, one.method) == (other.num_particles, other.method)
    assert repr(one) == repr(other)


def test_a_record_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    record = estimated()
    record.save(tmp_path / "record.json")
    again = LogMarginal.load(str(tmp_path / "record.json"))
    assert_same(record, again)
    assert again.provenance == json.loads(json.dumps(record.provenance, default=str))
    assert again.provenance["seed"] == 0
    assert again.provenance["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json"]


def test_what_json_has_no_word_for(tmp_path: Path) -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1e-320, -0.0, 0.1] * 2, dtype=torch.float64)
    provenance = {
        "dtype": torch.bfloat16,
        "shape": (2, 3),
        "rms": math.nan,
        "count": np.int64(3),
        "names": {1: "é\n"},
        "at": None,
    }
    record = replace(estimated(), value=odd, khat=odd, provenance=provenance)
    record.save(tmp_path / "r.json")
    again = LogMarginal.load(tmp_path / "r.json")
    assert_same(record, again)
    assert again.value.signbit().equal(odd.signbit())
    expected = {"dtype": "torch.bfloat16", "shape": [2, 3], "rms": None, "count": 3, "names": {"1": "é\n"}, "at": None}
    assert again.provenance == expected

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((tmp_path / "r.json").read_text(encoding="utf-8"), parse_constant=refuse)  # NaN is no JSON


def test_a_comparison_comes_back(tmp_path: Path) -> None:
    table = compared()
    table.save(tmp_path / "table.json")
    again = Comparison.load(tmp_path / "table.json")
    assert str(again) == str(table)
    assert again.to_markdown() == table.to_markdown()
    assert again.gap("two") == table.gap("two")
    assert again.reference is not None
    for one, other in zip(table.rows, again.rows, strict=True):
        for run, saved in zip(one.runs, other.runs, strict=True):
            assert_same(run, saved)
    replace(table, reference=None).save(tmp_path / "table.json")
    assert Comparison.load(tmp_path / "table.json").reference is None


@pytest.mark.parametrize("kind", [LogMarginal, Comparison])
def test_damaged_files(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "r.json"
    (estimated() if kind is LogMarginal else compared()).save(path)
    whole, draw = path.read_bytes(), random.Random(0)
    damaged = [whole[:length] for length in draw.sample(range(len(whole) - 2), 50)]
    for _ in range(200):
        place = draw.randrange(len(whole))
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with suppress(ValueError):
            if json.loads(content) == json.loads(whole):
                continue  # 1E-5 for 1e-5
        with pytest.raises(CheckpointError, match=rf"path: expected a .*{path}|newer version"):
            kind.load(path)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    compared().save(path)
    with pytest.raises(CheckpointError, match="a file with a LogMarginal, got .* it holds a Comparison"):
        LogMarginal.load(path)
    for content in ("[]", "3", "{}", '{"kind": "LogMarginal"}', "[" * 100_000, '"' + "9" * 5000):
        path.write_text(content)
        with pytest.raises(CheckpointError, match="a file with a LogMarginal"):
            LogMarginal.load(path)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(CheckpointError, match="a file with a LogMarginal"):
            LogMarginal.load(missing)


def test_a_newer_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pyro_lvm._files.FORMAT", 2)
        estimated().save(tmp_path / "r.json")
    with pytest.raises(CheckpointError, match=r"format 1 or older, got 2 in .*Install a newer version"):
        LogMarginal.load(tmp_path / "r.json")


@pytest.mark.parametrize(
    "change",
    [
        {"value": [1.0]},
        {"value": "twelve"},
        {"value": [[1.0]] * 12},
        {"status": ["exact"]},
        {"status": None},
        {"khat": None},
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, change: dict[str, Any]) -> None:
    write_json(tmp_path / "r.json", "LogMarginal", estimated().to_dict() | change)
    with pytest.raises(CheckpointError, match="a file with a LogMarginal"):
        LogMarginal.load(tmp_path / "r.json")


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    first = estimated()
    first.save(tmp_path / "r.json")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        with pytest.raises(OSError, match="no space left"):
            estimated(seed=1).save(tmp_path / "r.json")
    assert_same(first, LogMarginal.load(tmp_path / "r.json"))
    estimated(seed=1).save(tmp_path / "r.json")
    assert LogMarginal.load(tmp_path / "r.json").provenance["seed"] == 1


def test_another_process_reads_it(tmp_path: Path) -> None:
    record = estimated()
    record.save(tmp_path / "r.json")
    code = "import sys; from pyro_lvm.evidence import LogMarginal; print(repr(LogMarginal.load(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "r.json"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(record)


# ---------------------------------------------------------------- what a number is of


def sha256(record: LogMarginal) -> tuple[str, str]:
    found = record.provenance["sha256"]
    assert {len(found["data"]), len(found["parameters"])} == {64}
    return found["data"], found["parameters"]


def test_digests_tell_data_and_parameters_apart() -> None:
    torch.manual_seed(0)
    model, guide = LinearGaussian(2, 64).double(), DiagonalNormal(2, num_data=12).double()
    options: dict[str, Any] = {"num_particles": 5, "seed": 0}
    data, parameters = sha256(lvm.log_marginal(model, guide, X, **options))
    for changed in (
        X.flip(0),
        X[:11].contiguous().repeat(2, 1)[:12],
        X.clone().index_fill_(0, torch.tensor([11]), 0.5),
    ):
        other, same = sha256(lvm.log_marginal(model, guide, changed, **options))
        assert other != data
        assert same == parameters
    with torch.no_grad():
        next(guide.parameters()).view(-1)[-1] += 1e-12
    assert sha256(lvm.log_marginal(model, guide, X, **options))[0] == data
    assert sha256(lvm.log_marginal(model, guide, X, **options))[1] != parameters


def test_digests_do_not_depend_on_how_data_are_read(tmp_path: Path) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc"), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * torch.ones(64), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 0.2))

    pyro.param("loc", torch.tensor(0.5).double())
    np.save(tmp_path / "x.npy", X.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = sha256(lvm.log_marginal(model, guide, X, num_particles=5))
    for data, options in (
        (X, {"chunks": (5, 2)}),
        (mapped, {"chunks": (1, 5)}),
        (TensorDataset(X), {"chunks": (7, 5)}),
        (X, {"resume": tmp_path / "run"}),
        (X, {"resume": tmp_path / "run"}),
    ):
        assert sha256(lvm.log_marginal(model, guide, data, num_particles=5, **options)) == expected
    assert sha256(lvm.evidence.quadrature(model, X))[0] == expected[0]


def test_digests_of_companions_and_of_what_is_no_tensor() -> None:
    def model(x: torch.Tensor, labels: torch.Tensor, scale: Any) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5).double()))
            loc = (k + labels)[..., None] * torch.ones(64)
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    labels = torch.arange(12)
    one, two, three, four = (
        sha256(lvm.evidence.enumeration(model, X, given, scale, chunks=(chunk, 2)))
        for given, scale, chunk in (
            (labels, 1.0, 12),
            (labels, 1.0, 5),
            (labels.flip(0), 1.0, 12),
            (labels, torch.tensor(2.0), 12),
        )
    )
    assert one == two
    assert len({one[0], three[0], four[0]}) == 3
    kinds = [
        torch.eye(2).to_sparse(),
        torch.eye(2),
        torch.ones(1).expand(2, 2),
        torch.ones(2, 2),
        torch.eye(2).bfloat16(),
    ]
    digests = [sha256(closed_form(Weighing(2, 64).double(), X, weight))[0] for weight in (*kinds, "eye", None)]
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]
    assert len(set(digests)) == 5
    assert sha256(closed_form(LinearGaussian(2, 64).double(), X))[0] not in {one[0], three[0]}
