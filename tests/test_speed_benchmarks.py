"""The speed benchmarks: contenders do the same work, the scripts run, docs/performance.md quotes their numbers."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch

from benchmarks import gpu, speed, speed_tables
from benchmarks.rivals import evidence, training
from benchmarks.rivals.problems import EVIDENCE, TRAINING, Problem, make
from benchmarks.rounds import Contender, Turn, measure, ratios, spread

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
REPORTS = {name: ROOT / "benchmarks" / f"{name}.json" for name in ("speed", "gpu")}
SIZES = [Problem("toy", 40, 20), Problem("IWAE", 40, 20), Problem("conv", 20, 10), Problem("mixture", 200, 50)]
committed = pytest.mark.skipif(not REPORTS["speed"].exists(), reason="the benchmark has not been run")


def report(name: str = "speed") -> dict[str, Any]:
    return json.loads(REPORTS[name].read_text(encoding="utf-8"))


# ---------------------------------------------------------------- contenders do the same work


@pytest.mark.parametrize("problem", SIZES, ids=lambda problem: problem.network)
def test_the_loss_written_by_hand_is_that_of_pyro(problem: Problem) -> None:
    pair = make(problem)
    x = pair.x[: problem.batch_size]
    torch.manual_seed(1)
    by_hand = pair.loss(x).item()
    torch.manual_seed(1)  # the same noise
    by_pyro = pair.elbo.loss(pair.model, pair.guide or (lambda x: None), x)
    assert by_hand == pytest.approx(float(by_pyro), rel=1e-5)


@pytest.mark.parametrize("problem", SIZES[:3], ids=lambda problem: problem.network)
def test_the_loss_of_numpyro_is_the_same_at_the_same_z(problem: Problem) -> None:
    numpyro_vae = pytest.importorskip("benchmarks.rivals.numpyro_vae", exc_type=ImportError)
    pair = make(problem)
    x = pair.x[: problem.batch_size]
    torch.manual_seed(1)
    by_hand = pair.loss(x).item()
    torch.manual_seed(1)
    with torch.no_grad():
        loc, log_scale = pair.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
    assert numpyro_vae.loss_at(numpyro_vae.JaxVAE(pair), x.numpy(), z.numpy()) == pytest.approx(by_hand, rel=1e-5)


def losses(contender: Callable[[Problem, Any], object], problem: Problem, epochs: int = 2) -> list[float]:
    """At the ends of epochs."""
    found: list[float] = []

    def turn(value: Any, done: int) -> bool:
        assert done == problem.epoch
        found.append(float(value))
        return len(found) < epochs

    pyro.clear_param_store()
    contender(problem, turn)
    return found


@pytest.mark.parametrize("problem", SIZES, ids=lambda problem: problem.network)
def test_all_make_the_same_steps(problem: Problem) -> None:
    """Permutations, noise and updates: two epochs end with the same losses, up to rounding."""
    expected = losses(training.hand_written, problem)
    assert losses(training.svi, problem) == pytest.approx(expected, rel=1e-4)
    per_datum = [loss / problem.batch_size for loss in expected]
    assert losses(training.fit_plain, problem) == pytest.approx(per_datum, rel=1e-4)


@pytest.mark.parametrize("name", ["update", "whole_epoch"])
def test_numpyro_learns_as_much(name: str) -> None:
    """Its batches and noise are others: of 60 epochs, means over the last 20, which differ by less than 1 %."""
    numpyro_vae = pytest.importorskip("benchmarks.rivals.numpyro_vae", exc_type=ImportError)
    problem = Problem("toy", 1400, 100)
    expected = losses(training.hand_written, problem, 60)
    found = losses(getattr(numpyro_vae, name), problem, 60)
    assert sum(found[-20:]) == pytest.approx(sum(expected[-20:]), rel=0.02)
    assert sum(found[-20:]) < 0.85 * sum(found[:20])  # 0.79 measured


def test_estimates_agree() -> None:
    problem = Problem("toy", 10, num_particles=2000)
    pair = make(problem)
    record = evidence.evaluate(problem, pair, seed=0)
    value = evidence.hand_written_log_marginal(pair, pair.log_weights, 2000, 20)
    assert abs(float(value.mean()) - record.mean) < 5 * math.sqrt(2) * record.mean_stderr


def test_weights_written_by_hand_are_those_of_the_package() -> None:
    """Minus their sum is the loss at the same noise, which is that of Pyro, of as many draws as there are data."""
    for problem in SIZES[:3]:
        pair = make(problem)
        with torch.no_grad():
            loc, log_scale = pair.encoder(pair.x).chunk(2, -1)
            torch.manual_seed(1)
            weights = pair.log_weights(pair.x, loc, log_scale, 1)
            torch.manual_seed(1)
            assert -float(weights.sum()) == pytest.approx(pair.loss(pair.x).item(), rel=1e-5)


def test_pythae_and_numpyro_estimate_the_same() -> None:
    problem = Problem("toy", 10, num_particles=2000)
    pair = make(problem)
    record = evidence.evaluate(problem, pair, seed=0)
    error = 5 * math.sqrt(2) * record.mean_stderr
    numpyro_vae = pytest.importorskip("benchmarks.rivals.numpyro_vae", exc_type=ImportError)
    value = numpyro_vae.log_marginal(numpyro_vae.JaxVAE(pair), np.asarray(pair.x), 2000) / len(pair.x)
    assert abs(value - record.mean) < error
    pytest.importorskip("pythae")
    with torch.no_grad():
        value = evidence.as_pythae(pair).get_nll(pair.x, n_samples=2000, batch_size=500)  # it has the sign of log p
    assert abs(float(value) - record.mean) < error


# ---------------------------------------------------------------- rounds


class Parent:
    """The other end of a contender's connection."""

    def __init__(self, *sizes: int) -> None:
        self.sizes, self.sent = list(sizes), list[Any]()

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def recv(self) -> int:
        return self.sizes.pop(0)


def test_a_turn_has_a_piece_that_is_not_timed() -> None:
    parent = Parent(3, 2, 0)
    turn, pieces = Turn(parent, first=4), 1
    while turn(float(pieces)):
        pieces += 1
    assert [message[0] for message in parent.sent] == ["ready", "turn", "turn"]
    assert pieces == 4 + (1 + 3) + (1 + 2)
    assert [message[2:] for message in parent.sent[1:]] == [(3, 8.0), (2, 11.0)]


def test_medians_quartiles_and_ratios() -> None:
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "lower": 2.0, "upper": 4.0}
    assert spread([2.0]) == {"median": 2.0, "lower": 2.0, "upper": 2.0}
    assert ratios([1.0, 4.0, 9.0], [1.0, 2.0, 3.0])["median"] == 2.0


@pytest.mark.slow
def test_rounds_of_processes_and_who_is_left_out() -> None:
    problem = SIZES[0]
    names = {"by hand": "training:hand_written", "absent": "no_such_package:step", "fails": "training:cuda_graph"}
    found = measure([speed.contender(n, f, problem) for n, f in names.items()], rounds=2, turn_seconds=0.001)
    assert [len(found[name]["rounds"]) for name in names] == [2, 0, 0]
    assert found["absent"]["left_out"] == "benchmarks.rivals.no_such_package is not installed"
    assert found["fails"]["left_out"] or torch.cuda.is_available()
    peak = measure([Contender("peak", "benchmarks.rivals.evidence:peak", Problem("toy", 5))], 0, 0.0)["peak"]
    assert peak["notes"]["megabytes"] >= 0


# ---------------------------------------------------------------- the scripts


@pytest.mark.slow
@pytest.mark.long
def test_it_runs_and_writes_all_keys(tmp_path: Path) -> None:
    out, page = tmp_path / "speed.json", tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.speed", "--smoke", "--out", str(out), "--page", str(page)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    found = json.loads(out.read_text(encoding="utf-8"))
    about = {"protocol", "smoke", "machine", "versions", "date", "minutes"}
    assert found.keys() == about | speed.SECTIONS.keys()
    assert found["machine"].keys() == {"cpu", "threads", "load", "system"}
    assert found["training"]["toy, 20"]["contenders"].keys() == speed.TRAINERS.keys()
    assert found["evidence"]["contenders"].keys() == speed.ESTIMATORS.keys()
    check_numbers(found, rounds=2)
    assert speed_tables.fill(PAGE, found) == page.read_text(encoding="utf-8")
    assert speed_tables.printed(found).splitlines()[0] in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_without_a_gpu_the_script_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.json")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1
    assert "This benchmark needs a CUDA device, and PyTorch finds none." in ended.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_pieces_of_the_gpu_script() -> None:
    assert gpu.waits(["aten::mm", "cudaStreamSynchronize", "cudaLaunchKernel", "cudaDeviceSynchronize"]) == 2
    first = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor(2.0)}
    second = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor(2.5)}
    assert gpu.distance(first, first) == 0.0
    assert gpu.distance(first, second) == 0.125
    assert math.isnan(gpu.distance(first, {"a": torch.tensor([1.0, math.nan]), "b": torch.tensor(2.0)}))
    with pytest.raises(ValueError, match=r"other parameters: \['b'\]"):
        gpu.distance(first, {"a": first["a"]})


# ---------------------------------------------------------------- the committed numbers and docs/performance.md


def rows_of(found: dict[str, Any]) -> list[tuple[str, dict[str, dict[str, Any]], str, str | None]]:
    """Contenders, their unit and whose ratios they are, by section."""
    rows: list[tuple[str, dict[str, dict[str, Any]], str, str | None]] = [
        (name, part["contenders"], "ms", "fit(compile=True)") for name, part in found["training"].items()
    ]
    ours = "log_marginal(compile=True)"
    rows.append(("evidence", found["evidence"]["contenders"], "thousand/s", ours))
    rows.append(("calls", found["evidence"]["calls"], "s", None))
    rows += [(axis, part, "s", None) for axis, part in found["scaling"].items()]
    return [*rows, ("mixture", found["mixture"]["contenders"], "s", "scikit-learn, EM")]


def check_numbers(found: dict[str, Any], rounds: int) -> None:
    """Medians and ratios are those of the rounds; who is left out has none."""
    for section, rows, unit, ours in rows_of(found):
        for name, row in rows.items():
            where = f"{section}: {name}"
            assert len(row["rounds"]) == (0 if row["left_out"] else rounds), where
            if not row["left_out"]:
                assert row[unit] == pytest.approx(spread(row["rounds"]), rel=1e-3), where
            if ours and row["rounds"] and rows[ours]["rounds"]:
                times = [rows[ours]["rounds"], row["rounds"]]
                expected = ratios(*(reversed(times) if unit == "thousand/s" else times))
                assert row["ratio"] == pytest.approx(expected, rel=1e-3), where


@committed
def test_it_is_the_whole_protocol() -> None:
    found = report()
    assert found["protocol"] == speed.__doc__
    assert found["smoke"] is False
    assert list(found["training"]) == [problem.name for problem in TRAINING]
    assert found["machine"]["threads"] >= 1
    check_numbers(found, rounds=7)
    for section, rows, _, _ in rows_of(found):
        for name, row in rows.items():
            wanted = name.split(", K")[0] in speed.OURS or "PyTorch" in name
            assert not (wanted and row["left_out"]), f"{section}: {name} is left out, {row['left_out']}"
            assert not row["left_out"] or row["left_out"].endswith("is not installed"), row["left_out"]
    for name, part in found["training"].items():
        captured = part["contenders"]["fit(compile=True)"]["notes"]
        assert captured["captured"] > 0.5 * captured["steps"] or name.startswith("mixture")


@committed
def test_memory_is_flat() -> None:
    """From where chunks fill their budget on, 16 times the work takes at most a quarter more."""
    for axis, sizes in report()["memory"].items():
        peaks = [row["megabytes"] for row in sizes.values()]
        assert max(peaks[1:]) < 1.25 * peaks[1], axis


@pytest.mark.parametrize("name", REPORTS)
def test_tables_in_the_documentation_are_those_of_the_numbers(name: str) -> None:
    if not REPORTS[name].exists():
        pytest.skip("the benchmark has not been run")
    assert speed_tables.fill(PAGE, report(name)) == PAGE


def test_the_page_has_a_place_for_each_table() -> None:
    for name in speed_tables.TABLES:
        assert PAGE.count(f"<!-- table {name} -->\n") == 1
    assert PAGE.count("<!-- end -->") == len(speed_tables.TABLES)
    memory = {"memory": {"N": {"100": {"megabytes": 251.4}}}}
    filled = speed_tables.fill(PAGE, memory)
    assert "<!-- table memory -->\n| log_marginal | 10^6 bytes |\n" in filled
    assert "| N = 100 | 251 |\n<!-- end -->" in filled
    assert speed_tables.fill(filled, memory) == filled


def test_the_protocol_names_what_is_measured() -> None:
    assert set(speed.SECTIONS) <= {line.split(" ")[0] for line in str(speed.__doc__).splitlines()}
    assert EVIDENCE.num_particles == 1000
    assert all(problem.num_data % problem.batch_size == 0 for problem in TRAINING)
