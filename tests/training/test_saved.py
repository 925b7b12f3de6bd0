"""Trained pairs as files: the same numbers from another process, and no file does more than hold values."""

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

import pyro_lvm as lvm
from pyro_lvm._files import read_tensors, write_tensors
from pyro_lvm.errors import CheckpointError, DataTypeError
from pyro_lvm.training.callbacks import Checkpoint

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Pair = tuple[Callable[..., Any], Callable[..., Any]]

PAIR = """
import pyro, pyro.distributions as dist, torch
import pyro_lvm as lvm
X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
torch.manual_seed(int(SEED))
encoder = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
frozen = torch.nn.Linear(3, 3).requires_grad_(False)
def model(x):
    loc = pyro.param("loc", torch.zeros(3))
    scale = pyro.param("scale", torch.ones(3), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc + z[..., None], scale).to_event(1), obs=x)
def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        loc, log_scale = encoder(frozen(x)).unbind(-1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))
"""


def make(seed: int = 0) -> Pair:
    scope: dict[str, Any] = {"SEED": seed}
    exec(PAIR, scope)  # noqa: S102 - the very code that the other process runs
    return scope["model"], scope["guide"]


def auto() -> Pair:
    model, _ = make()
    return model, pyro.infer.autoguide.AutoNormal(model)


def library() -> Pair:
    model = lvm.models.LinearGaussian(2, 3)
    return model, lvm.guides.DiagonalNormal(2, num_data=40)


def prior() -> Pair:
    model = lvm.models.DeepGaussian(lvm.nn.MLP(2, [4], 6), 2, lvm.models.likelihoods.Normal())
    return model, lvm.guides.DiagonalNormal(2, encoder=lvm.nn.MLP(3, [4], 4))


def trained(pair: Pair, **options: Any) -> lvm.FitResult:
    return lvm.fit(*pair, X, num_steps=20, batch_size=40, seed=0, **options)


def values(model: Any, guide: Any) -> list[float]:
    """What a paper would quote."""
    return lvm.elbo(model, guide, X, num_particles=5, seed=0).tolist()


@pytest.mark.parametrize("make_pair", [make, auto, library, prior])
def test_a_pair_comes_back_to_the_last_bit(make_pair: Callable[[], Pair], tmp_path: Path) -> None:
    result = trained(make_pair())
    expected = values(result.model, result.guide)
    lvm.save(result, tmp_path / "pair.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["pair.pt"]
    pyro.clear_param_store()
    torch.manual_seed(1)
    pair = make_pair()
    state = torch.get_rng_state()
    again = lvm.load(str(tmp_path / "pair.pt"), *pair, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert values(*pair) == values(again.model, again.guide) == expected
    assert again.params.keys() == result.params.keys()
    for name, value in result.params.items():
        assert torch.equal(again.params[name], value)
    assert torch.equal(again.losses, result.losses)
    assert again.history == result.history
    assert again.provenance == result.provenance
    assert repr(again) == repr(result)
    assert all(module.training for module in again.modules)
    lvm.save(again, tmp_path / "again.pt")
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("pair.pt", "again.pt"))
    assert first["sha256"] == second["sha256"]


@pytest.mark.slow
def test_another_process_says_the_same(tmp_path: Path) -> None:
    result = trained(make())
    lvm.save(result, tmp_path / "pair.pt")
    script = f"SEED = 5\n{PAIR}\nresult = lvm.load({str(tmp_path / 'pair.pt')!r}, model, guide, X[:2])\n"
    script += "torch.set_num_threads(1)\nprint(lvm.elbo(model, guide, X, num_particles=5, seed=0).tolist())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(values(result.model, result.guide))


def test_training_goes_on_from_what_was_loaded(tmp_path: Path) -> None:
    lvm.save(trained(make()), tmp_path / "pair.pt")
    pyro.clear_param_store()
    model, guide = make(1)
    loaded = lvm.load(tmp_path / "pair.pt", model, guide, X)
    more = trained((model, guide))
    assert more.losses[0] < loaded.losses[0] - 0.02
    assert more.provenance["seed"] == 0


def test_names_of_another_pair_are_left_alone(tmp_path: Path) -> None:
    lvm.save(trained(make()), tmp_path / "pair.pt")
    pyro.clear_param_store()
    other = trained(make(1), optim=lambda params: torch.optim.Adam(params, lr=0.1))
    pair = make(2)
    loaded = lvm.load(tmp_path / "pair.pt", *pair, X)
    assert not torch.equal(loaded.params["loc"], other.params["loc"])
    assert torch.equal(pyro.param("loc"), other.params["loc"])
    assert values(*pair) == values(loaded.model, loaded.guide) != values(other.model, other.guide)


def wider() -> Pair:
    model = lvm.models.DeepGaussian(lvm.nn.MLP(2, [5], 6), 2, lvm.models.likelihoods.Normal())
    return model, lvm.guides.DiagonalNormal(2, encoder=lvm.nn.MLP(3, [4], 4))


@pytest.mark.parametrize(
    ("make_pair", "words"),
    [
        (wider, [r"decoder.layers.0.bias' float32 \(4,\) \(here float32 \(5,\)\)", "layers.2.weight"]),
        (library, [r"decoder.layers.0.bias' float32 \(4,\) \(not here\)", "more"]),
        (lambda: tuple(half.double() for half in prior()), [r"float32 \(4,\) \(here float64 \(4,\)\)"]),  # type: ignore[attr-defined]
    ],
)
def test_a_pair_that_differs(make_pair: Callable[[], Pair], words: list[str], tmp_path: Path) -> None:
    lvm.save(trained(prior()), tmp_path / "pair.pt")
    pyro.clear_param_store()
    model, guide = make_pair()
    before = [p.clone() for half in (model, guide) for p in half.parameters()]  # type: ignore[attr-defined]
    for word in words:
        with pytest.raises(CheckpointError, match=word):
            lvm.load(tmp_path / "pair.pt", model, guide, X.to(before[0].dtype))
    after = [p for half in (model, guide) for p in half.parameters()]  # type: ignore[attr-defined]
    assert all(map(torch.equal, before, after))
    assert not list(pyro.get_param_store().keys())


def test_a_pair_the_wrong_way_round_is_refused(tmp_path: Path) -> None:
    lvm.save(trained(make()), tmp_path / "pair.pt")
    pyro.clear_param_store()
    model, guide = make(1)
    with pytest.raises(
        CheckpointError, match=r"model: expected .*'loc', 'scale'.*, got that of the guide.*model, guide"
    ):
        lvm.load(tmp_path / "pair.pt", guide, model, X)
    assert not list(pyro.get_param_store().keys())


def test_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "new" / "pair.pt"
    lvm.save(trained(make()), path)
    assert lvm.load(path, *make(1), X).num_steps == 20


def test_what_is_no_trained_pair(tmp_path: Path) -> None:
    result = trained(prior())
    with pytest.raises(DataTypeError, match="result: expected a FitResult, got tuple"):
        lvm.save((result.model, result.guide), tmp_path / "pair.pt")  # type: ignore[arg-type]
    lvm.save(result, tmp_path / "pair.pt")
    with pytest.raises(DataTypeError, match="model: expected a Pyro program"):
        lvm.load(tmp_path / "pair.pt", "model", prior()[1], X)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        lvm.load(tmp_path / "pear.pt", *prior(), X)
    run = tmp_path / "run.pt"
    trained(prior(), callbacks=[Checkpoint(run)])
    with pytest.raises(CheckpointError, match="expected a file with a FitResult, .* it holds a training run"):
        lvm.load(run, *prior(), X)


def test_a_model_without_a_guide(tmp_path: Path) -> None:
    result = lvm.fit(lvm.models.NormalizingFlow(3), None, X, num_steps=3, seed=0)
    lvm.save(result, tmp_path / "flow.pt")
    model = lvm.models.NormalizingFlow(3)
    lvm.load(tmp_path / "flow.pt", model, None, X)
    assert torch.equal(model.log_prob(X), result.model.log_prob(X))


# ----------------------------------------------------------------------------------------------------------------------
# Damaged, foreign and hostile files, as a checkpoint and as a pair.

BANG = Path(os.environ.get("TMPDIR", "/tmp")) / f"bang-{os.getpid()}"  # noqa: S108


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (BANG,)


def files(tmp_path: Path) -> dict[str, Callable[[Path], Any]]:
    """Files that load, and how."""
    run, pair = tmp_path / "run.pt", tmp_path / "pair.pt"
    lvm.save(trained(library(), callbacks=[Checkpoint(run)]), pair)

    def resume(path: Path) -> lvm.FitResult:
        return trained(library(), resume=path)

    def load(path: Path) -> lvm.FitResult:
        return lvm.load(path, *library(), X)

    return {str(run): resume, str(pair): load}


def test_truncated_and_flipped_files(tmp_path: Path) -> None:
    random.seed(0)
    target = tmp_path / "damaged.pt"
    for name, read in files(tmp_path).items():
        content = Path(name).read_bytes()
        expected = read(Path(name)).params
        pyro.clear_param_store()
        for _ in range(50):
            target.write_bytes(content[: random.randrange(len(content))])  # noqa: S311
            with pytest.raises(CheckpointError, match=r"damaged\.pt: "):
                read(target)
        refused = 0
        for _ in range(100):
            flipped = bytearray(content)
            flipped[random.randrange(len(content))] ^= 1 << random.randrange(8)  # noqa: S311
            target.write_bytes(flipped)
            try:
                found = read(target).params
                assert all(torch.equal(found[key], expected[key]) for key in expected)  # padding, dates, names of parts
            except CheckpointError:
                refused += 1
            pyro.clear_param_store()
        assert refused > 30


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"kind": "FitResult", "format": 1, "params": bomb}])
def test_a_planted_payload_does_not_run(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    by_torch, by_pickle, legacy = tmp_path / "torch.pt", tmp_path / "pickle.pt", tmp_path / "legacy.pt"
    torch.save(wrap(Bomb()), by_torch)
    by_pickle.write_bytes(pickle.dumps(wrap(Bomb())))
    torch.save(wrap(Bomb()), legacy, _use_new_zipfile_serialization=False)
    for read in files(tmp_path).values():
        for path in (by_torch, by_pickle, legacy):
            with pytest.raises(CheckpointError) as caught:
                read(path)
            assert "weights_only" not in str(caught.value)  # torch's way to run what is in there
            assert not BANG.exists()
    pickle.loads(by_pickle.read_bytes())  # noqa: S301 - it would have gone off
    assert BANG.exists()
    BANG.unlink()


def test_a_newer_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pyro_lvm._files.FORMAT", 2)
        ways = files(tmp_path)
    for name, read in ways.items():
        with pytest.raises(CheckpointError, match="format 1 or older, got 2 in .*Install a newer version of pyro_lvm"):
            read(Path(name))


@pytest.mark.parametrize("content", [3, None, [], {}, {"kind": "FitResult"}, {"format": "x"}, torch.ones(2)])
def test_files_of_something_else(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="expected a file with a FitResult"):
        lvm.load(tmp_path / "other.pt", *library(), X)


def test_all_kinds_of_values_come_back(tmp_path: Path) -> None:
    content = {
        "dtypes": [torch.arange(3).to(d) for d in (torch.bool, torch.int8, torch.bfloat16, torch.float64)],
        "view": torch.arange(10.0)[::3].t(),
        "nested": ({"a": (1, 2.5, None, True, "words")}, [float("nan"), float("-inf")]),
        3: "a key that is a number",
    }
    write_tensors(tmp_path / "x.pt", "test", content)
    found = read_tensors(tmp_path / "x.pt", "test")
    for mine, theirs in zip(content["dtypes"], found["dtypes"], strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    assert torch.equal(found["view"], content["view"])
    assert repr(found["nested"]) == repr(content["nested"])
    assert found[3] == content[3]
    large = torch.zeros(1_000_000)[:3]
    write_tensors(tmp_path / "view.pt", "test", {"view": large})
    assert (tmp_path / "view.pt").stat().st_size < 10_000
