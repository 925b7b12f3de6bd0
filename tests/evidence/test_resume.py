"""`resume=` of estimators: the numbers of a run that was never interrupted, and nothing of another call."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_lvm.errors import CheckpointError, DataTypeError
from pyro_lvm.evidence import LogMarginal, annealed, importance
from pyro_lvm.evidence.columns import COLUMNS
from tests.references import ORACLES, data, normal_guide, normal_model, plain

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")

OPTIONS: dict[str, Any] = {"num_particles": 60, "chunks": (2, 25)}


def guide(x: torch.Tensor, *noise: torch.Tensor) -> None:
    """Broad, so that every number has a variance."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def model(x: torch.Tensor, *noise: torch.Tensor) -> None:
    """A datum may come with noise."""
    normal_model(x + sum(noise))


class Drawn(Dataset):
    """Noise that is drawn anew at each reading, by NumPy and by Python."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, float]:
        return self.x[i], np.random.normal() + random.gauss(0.0, 1.0)  # noqa: NPY002


class Stops:
    """The model, until it has seen the datum ``x[row]`` in a chunk of data."""

    def __init__(self, x: torch.Tensor, row: int, error: BaseException) -> None:
        self.at, self.error = float(x[row]), error
        self.__qualname__ = "model"

    def __call__(self, x: torch.Tensor, *noise: torch.Tensor) -> None:
        if len(x) == 2 and float(x[0]) == self.at:
            raise self.error
        model(x, *noise)


class Counts:
    """A model that counts its data."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.__qualname__ = "model"

    def __call__(self, x: torch.Tensor) -> None:
        self.seen.append(len(x))
        model(x)


@pytest.fixture(params=[0.0, 1e9], ids=["saved after each chunk", "saved on the way out"])
def _seconds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_lvm.evidence.resume._SECONDS", request.param)


def seed_all(seed: int) -> None:
    pyro.set_rng_seed(seed)


def assert_same(one: LogMarginal, other: LogMarginal) -> None:
    for name in COLUMNS[:-1]:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)
    assert (one.status == other.status).all()
    different = ("resumed_at", "seconds")
    first, second = ({k: v for k, v in r.provenance.items() if k not in different} for r in (one, other))
    assert first == second


@pytest.mark.usefixtures("_seconds")
@pytest.mark.parametrize("row", [2, 8])
@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a crash")], ids=["Ctrl-C", "crash"])
@pytest.mark.parametrize("wrap", [torch.Tensor.clone, Drawn], ids=["tensor", "drawn data"])
def test_going_on_gives_the_numbers_of_one_run(
    tmp_path: Path, row: int, seed: int | None, error: BaseException, wrap: Callable[[torch.Tensor], Any]
) -> None:
    x = wrap(data(10))
    seed_all(5)
    whole = importance(model, guide, x, seed=seed, **OPTIONS)
    after = torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
    seed_all(5)
    stops = Stops(data(10), row, error)
    if isinstance(error, KeyboardInterrupt):
        part = importance(stops, guide, x, seed=seed, resume=tmp_path / "run", **OPTIONS)
        assert (len(part), part.provenance["finished"]) == (row, False)
        assert part.value.equal(whole.value[:row])
    else:
        with pytest.raises(ValueError, match="a crash"):
            importance(stops, guide, x, seed=seed, resume=tmp_path / "run", **OPTIONS)
    seed_all(5 if seed is not None else 77)  # without a seed, what the process has drawn since is of no account
    result = importance(model, guide, x, seed=seed, resume=tmp_path / "run", **OPTIONS)
    assert_same(result, whole)
    assert result.provenance["resumed_at"] == [row]
    now = torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
    assert now[0].equal(after[0])
    assert now[1:] == after[1:]


@pytest.mark.usefixtures("_seconds")
@pytest.mark.parametrize("start", [guide, None, [guide, None]], ids=["guide", "prior", "both"])
def test_annealing_goes_on_with_its_chains(tmp_path: Path, start: Any) -> None:
    x, options = data(6), {"num_particles": 6, "num_steps": 4, "chunks": (2, 6), "seed": 3}
    whole = annealed(model, start, x, **options)
    part = annealed(Stops(x, 4, KeyboardInterrupt()), start, x, resume=tmp_path / "run", **options)
    assert len(part) == 4
    result = annealed(model, start, x, resume=tmp_path / "run", **options)
    assert_same(result, whole)
    assert result.provenance["resumed_at"] == [4]
    with pytest.raises(CheckpointError, match=r"num_leapfrog \(3 there, 2 here\)"):
        annealed(model, start, x, resume=tmp_path / "run", num_leapfrog=2, **options)


def test_several_interruptions(tmp_path: Path) -> None:
    x = data(10)
    whole = importance(model, guide, x, seed=1, **OPTIONS)
    for row in (2, 2, 4, 8):
        importance(Stops(x, row, KeyboardInterrupt()), guide, x, seed=1, resume=tmp_path, **OPTIONS)
    result = importance(model, guide, x, seed=1, resume=tmp_path, **OPTIONS)
    assert_same(result, whole)
    assert result.provenance["resumed_at"] == [2, 4, 8], "the second time nothing was finished"


def test_an_uninterrupted_run_is_that_without_a_path(tmp_path: Path) -> None:
    x = data(10)
    assert_same(
        importance(model, guide, x, seed=1, resume=tmp_path, **OPTIONS),
        importance(model, guide, x, seed=1, **OPTIONS),
    )


@pytest.mark.parametrize("seed", [1, None])
def test_a_finished_estimate_is_returned_at_once(tmp_path: Path, seed: int | None) -> None:
    x = data(300)
    first = importance(model, guide, x, seed=seed, resume=tmp_path, num_particles=50)
    state = torch.get_rng_state()
    counts = Counts()
    again = importance(counts, guide, x, seed=seed, resume=tmp_path, num_particles=50)
    assert max(counts.seen) <= 3 * 3, "only probes of a few rows and particles"
    assert torch.get_rng_state().equal(state)
    assert_same(again, first)
    assert again.provenance["resumed_at"] == []


@pytest.mark.parametrize("oracle", ["labels", "mixed", "conditioned_whole"])
def test_companions_masks_and_tied_pairs(tmp_path: Path, oracle: str) -> None:
    pair = ORACLES[oracle](5)
    for _ in range(2):
        result = importance(
            pair.model, pair.guide, pair.x, *pair.args, num_particles=3, chunks=(2, 2), resume=tmp_path, **pair.options
        )
        torch.testing.assert_close(result.value, pair.log_px, atol=1e-10, rtol=0)


def test_a_joint_result(tmp_path: Path) -> None:
    pair = plain(4)
    for _ in range(2):
        result = importance(pair.model, pair.guide, pair.x, data_plate=None, num_particles=3, resume=tmp_path)
        torch.testing.assert_close(result.value, pair.log_px.sum(0, keepdim=True), atol=1e-10, rtol=0)


def test_chunks_that_shrank_stay_small(tmp_path: Path) -> None:
    """Sizes that ran out of memory once are part of the state: without a first failure the draws would differ."""
    x = data(12)

    class Small(Stops):
        def __call__(self, x: torch.Tensor) -> None:
            if len(x) == 4:
                raise MemoryError
            super().__call__(x)

    options = {"num_particles": 60, "chunks": (4, 1), "seed": 2}
    whole = importance(Small(x, 11, ValueError()), guide, x, **options)
    assert whole.provenance["chunks"] == (2, 1)
    importance(Small(x, 6, KeyboardInterrupt()), guide, x, resume=tmp_path, **options)
    result = importance(Small(x, 11, ValueError()), guide, x, resume=tmp_path, **options)
    assert_same(result, whole)


# --- other calls ------------------------------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.register_buffer("offset", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> None:
        pyro.module("Scaled", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.offset, self.scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_another_call_is_refused_with_what_differs(tmp_path: Path) -> None:
    x = data(10)
    importance(normal_model, normal_guide, x, seed=1, resume=tmp_path, num_particles=60)
    changed = x.clone()
    changed[-1] += 1
    middle = x.clone()
    middle[5] += 1
    others: list[tuple[str, Any, Any, dict[str, Any]]] = [
        (r"num_particles \(60 there, 50 here\)", normal_model, x, {"num_particles": 50}),
        (r"seed \(1 there, None here\)", normal_model, x, {"seed": None}),
        (r"chunks \(None there, \(2, 2\) here\)", normal_model, x, {"chunks": (2, 2)}),
        (r"num_data \(10 there, 8 here\)", normal_model, x[:8], {}),
        (r"dtype \(torch.float64 there, torch.float32 here\)", normal_model, x.float(), {}),
        (r"differs in .*\bx\b", normal_model, changed, {}),
        (r"differs in x\.", normal_model, middle, {}),
        (r"model \(normal_model there, lambda_model here\)", lambda_model, x, {}),
        (r"model_dtype \(None there, torch.bfloat16 here\)", normal_model, x, {"model_dtype": torch.bfloat16}),
        (r"data_plate", normal_model, x, {"data_plate": None}),
        (r"particles .*looped", normal_model, x, {"vectorize": False}),
    ]
    for message, model, given, options in others:
        with pytest.raises(CheckpointError, match=message) as caught:
            importance(model, normal_guide, given, resume=tmp_path, **{"num_particles": 60, "seed": 1} | options)
        assert f"delete {tmp_path}" in str(caught.value)


def test_a_change_of_what_is_not_done_yet_is_seen(tmp_path: Path) -> None:
    x = data(10)
    importance(Stops(x, 4, KeyboardInterrupt()), guide, x, seed=1, resume=tmp_path, **OPTIONS)
    changed = x.clone()
    changed[6] += 1
    with pytest.raises(CheckpointError, match=r"differs in x\."):
        importance(model, guide, changed, seed=1, resume=tmp_path, **OPTIONS)


@pytest.mark.parametrize("wrap", [torch.Tensor.numpy, TensorDataset, lambda x: DataLoader(TensorDataset(x), 3)])
def test_the_same_data_in_another_form_go_on(tmp_path: Path, wrap: Callable[[torch.Tensor], Any]) -> None:
    x = data(600)
    first = importance(normal_model, normal_guide, x, seed=1, resume=tmp_path)
    assert importance(normal_model, normal_guide, wrap(x), seed=1, resume=tmp_path).value.equal(first.value)


def test_data_are_compared_in_pieces(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Sized(TensorDataset):
        def __getitems__(self, numbers: list[int]) -> list[tuple[torch.Tensor, ...]]:
            sizes.append(len(numbers))
            return [self[i] for i in numbers]

    for _ in range(2):
        importance(normal_model, normal_guide, Sized(data(600)), seed=1, chunks=(50, 10), resume=tmp_path)
    assert max(sizes) <= 256


def lambda_model(x: torch.Tensor) -> None:
    normal_model(x)


def test_a_parameter_a_buffer_and_a_constant_are_seen(tmp_path: Path) -> None:
    x, model = data(10), Scaled(1.0)
    importance(model, normal_guide, x, seed=1, resume=tmp_path)
    importance(model, normal_guide, x, seed=1, resume=tmp_path)
    model.offset += 1e-9
    with pytest.raises(CheckpointError, match=r"differs in parameters\."):
        importance(model, normal_guide, x, seed=1, resume=tmp_path)
    model.offset -= 1e-9
    importance(model, normal_guide, x, seed=1, resume=tmp_path)
    with torch.no_grad():
        model.scale += 1e-9
    with pytest.raises(CheckpointError, match=r"differs in parameters\."):
        importance(model, normal_guide, x, seed=1, resume=tmp_path)


def test_a_constant_in_the_code_is_seen(tmp_path: Path) -> None:
    scale = 1.0

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    importance(model, normal_guide, data(10), seed=1, resume=tmp_path)
    scale = 1.1
    with pytest.raises(CheckpointError, match=r"differs in log_weights"):
        importance(model, normal_guide, data(10), seed=1, resume=tmp_path)


def test_a_parameter_of_another_pair_may_change(tmp_path: Path) -> None:
    x = data(10)
    pyro.param("other", torch.zeros(2))
    first = importance(model, guide, x, seed=1, resume=tmp_path)
    pyro.get_param_store()["other"] = torch.ones(2)
    assert importance(model, guide, x, seed=1, resume=tmp_path).value.equal(first.value)


@pytest.mark.parametrize("path", [3, True, b"kept"], ids=repr)
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(DataTypeError, match=r"resume: expected the path of a directory, or None, got "):
        importance(normal_model, normal_guide, data(4), resume=path)


@pytest.mark.parametrize("name", ["file", "file/kept"])
def test_a_file_in_the_place_of_the_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match=rf"resume: expected the path of a directory.*{tmp_path}/file is a file"):
        importance(normal_model, normal_guide, data(4), resume=tmp_path / name)
    assert (tmp_path / "file").read_text() == "text"


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pyro_lvm.evidence.resume.write_tensors", full)
    with pytest.raises(CheckpointError, match=r"resume: expected a directory .* to write to, got .*no space left"):
        importance(normal_model, normal_guide, data(4), resume=tmp_path)


@pytest.mark.parametrize("name", ["state.pt", "columns.npy"])
@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    importance(normal_model, normal_guide, data(10), seed=1, resume=tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"resume: .*{tmp_path}.*Delete"):
        importance(normal_model, normal_guide, data(10), seed=1, resume=tmp_path)


def test_results_of_another_size(tmp_path: Path) -> None:
    importance(normal_model, normal_guide, data(10), seed=1, resume=tmp_path)
    np.save(tmp_path / "columns.npy", np.zeros((8, 5)))
    with pytest.raises(CheckpointError, match=r"holds float64 \(8, 5\)"):
        importance(normal_model, normal_guide, data(10), seed=1, resume=tmp_path)


def test_a_process_that_died_between_the_two_files_loses_only_what_was_not_counted(tmp_path: Path) -> None:
    x = data(10)
    whole = importance(model, guide, x, seed=1, **OPTIONS)
    importance(Stops(x, 4, KeyboardInterrupt()), guide, x, seed=1, resume=tmp_path, **OPTIONS)
    table = np.lib.format.open_memmap(tmp_path / "columns.npy", "r+")
    table[:, 4:] = -1.0  # results that no state counts
    table.flush()
    (tmp_path / "state.tmp").write_bytes(b"half a sta")
    assert_same(importance(model, guide, x, seed=1, resume=tmp_path, **OPTIONS), whole)


def test_nothing_is_kept_of_a_run_without_a_finished_chunk(tmp_path: Path) -> None:
    x = data(10)
    with pytest.raises(KeyboardInterrupt):
        importance(Stops(x, 0, KeyboardInterrupt()), guide, x, seed=1, resume=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()
