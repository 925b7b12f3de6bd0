"""A run that was broken off and goes on from its file is the run that was not, to the last bit."""

import enum
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.errors import CheckpointError, DataTypeError, ShapeError
from pyro_lvm.models.likelihoods import Normal
from pyro_lvm.objectives import ImportanceWeightedELBO, KLAnnealing, warm_up
from pyro_lvm.training import FitResult, TrainingState
from pyro_lvm.training.callbacks import Checkpoint, EarlyStopping, Log, Schedule, validation_elbo

X = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
Pair = tuple[Callable[..., Any], Callable[..., Any]]


LATE = int(torch.randperm(50, generator=torch.Generator().manual_seed(7))[25])


class Crash(Exception):
    """The end of a process."""


def plain_pair() -> Pair:
    """Functions, a module with batch statistics, a constrained parameter, numbers of NumPy's and Python's."""
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.BatchNorm1d(8))
    encoder.append(torch.nn.Linear(8, 2))

    def model(x: torch.Tensor, *_: Any) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        scale = pyro.param("scale", torch.ones(3), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            noise = 0.01 * float(np.random.rand()) + 0.01 * random.random()  # noqa: NPY002, S311
            pyro.sample("x", dist.Normal(loc + z[..., None] + noise, scale).to_event(1), obs=x)

    def guide(x: torch.Tensor, *_: Any) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return model, guide


def late_pair() -> Pair:
    """A parameter that comes into being with a batch that has one datum in it, the first of which is the fourth."""
    model, guide = plain_pair()

    def late(x: torch.Tensor) -> None:
        model(x)
        if bool((x == X[LATE]).all(-1).any()):
            pyro.factor("pull", -((pyro.param("late", torch.randn(())) - 3.0) ** 2))

    return late, guide


def library_pair() -> Pair:
    """Modules with parameters of the same names in both."""
    decoder = lvm.nn.MLP(2, [8], 6)
    model = lvm.models.DeepGaussian(decoder, 2, Normal())
    return model, lvm.guides.DiagonalNormal(2, encoder=lvm.nn.MLP(3, [8], 4))


def auto_pair() -> Pair:
    """A guide that makes its parameters at its first call, for each datum."""
    model, _ = plain_pair()
    return model, pyro.infer.autoguide.AutoNormal(model)


def mixture_pair() -> Pair:
    """A discrete latent that is summed out."""
    model = lvm.models.GaussianMixture(2, 3)
    with torch.no_grad():
        model.means.copy_(X[:2])
    return model, lambda x: None


def discrete_pair() -> Pair:
    """A discrete latent that the guide draws, with a baseline in the param store."""

    def model(x: torch.Tensor) -> None:
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(locs[k.long()], 1.0), obs=x[:, 0])

    def guide(x: torch.Tensor) -> None:
        logit = pyro.param("logit", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=logit.expand(len(x))), infer={"baseline": BASELINE})

    return model, guide


BASELINE = {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}


def adam(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def groups(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], lr=0.01, amsgrad=True)


def halves(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": params[:1]}, {"params": params[1:]}])


def scheduled() -> Any:
    options = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-5, "momentum": 0.9}, "gamma": 0.9}
    return pyro.optim.ExponentialLR(options)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)


def reinforce() -> ImportanceWeightedELBO:
    return ImportanceWeightedELBO(num_particles=3, gradient="reinforce", baseline=torch.nn.Linear(3, 1))


class Noisy(Dataset):
    """Draws a random number for each datum that it is asked for."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> torch.Tensor:
        return X[i] + 0.1 * torch.randn(3)


def loader(**options: Any) -> Callable[[], Any]:
    return lambda: DataLoader(TensorDataset(X), batch_size=8, **options)


def own_generator() -> Any:
    return loader(shuffle=True, generator=torch.Generator().manual_seed(3))()


#: name -> (pair, data, options of `fit`); all of them made anew for each process.
RUNS: dict[str, tuple[Callable[[], Pair], Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "mini-batches": (plain_pair, lambda: X, lambda: {"optim": adam}),
    "NumPy": (plain_pair, X.numpy, lambda: {"optim": adam}),
    "all data in a step": (plain_pair, lambda: X, lambda: {"batch_size": 100}),
    "a guide alone": (plain_pair, lambda: X, lambda: {"update": "guide", "optim": adam}),
    "arguments": (plain_pair, lambda: (X, X[:, 0], torch.tensor(2.0)), lambda: {}),
    "a parameter that comes late": (late_pair, lambda: X, lambda: {"optim": adam}),
    "modules": (library_pair, lambda: X, lambda: {"optim": adam}),
    "AutoGuide": (auto_pair, lambda: X, lambda: {"batch_size": 50}),
    "summed out": (mixture_pair, lambda: X, lambda: {"loss": TraceEnum_ELBO()}),
    "a baseline in the store": (discrete_pair, lambda: X, lambda: {"loss": TraceGraph_ELBO(), "batch_size": 25}),
    "a baseline network": (discrete_pair, lambda: X, lambda: {"loss": reinforce()}),
    "weighted bound": (library_pair, lambda: X, lambda: {"loss": ImportanceWeightedELBO(num_particles=3)}),
    "annealing": (library_pair, lambda: X, lambda: {"loss": KLAnnealing(warm_up(15)), "optim": adam}),
    "groups": (plain_pair, lambda: X, lambda: {"optim": groups}),
    "momentum": (plain_pair, lambda: X, lambda: {"optim": lambda p: torch.optim.SGD(p, lr=1e-5, momentum=0.9)}),
    "Pyro's Adam": (plain_pair, lambda: X, lambda: {"optim": pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99})}),
    "Pyro's scheduler": (
        plain_pair,
        lambda: X,
        lambda: {"optim": scheduled(), "callbacks": [lambda s: s.optimizer.step()]},
    ),
    "schedule by step": (plain_pair, lambda: X, lambda: {"optim": adam, "callbacks": [Schedule(one_cycle)]}),
    "schedule by epoch": (
        plain_pair,
        lambda: X,
        lambda: {"optim": adam, "callbacks": [Schedule(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), "epoch")]},
    ),
    "plateau": (
        plain_pair,
        lambda: X,
        lambda: {"optim": adam, "callbacks": [Schedule(lambda o: ReduceLROnPlateau(o, patience=0), "epoch")]},
    ),
    "early stopping": (
        library_pair,
        lambda: X,
        lambda: {"optim": adam, "callbacks": [EarlyStopping(validation_elbo(X[:5]), patience=10)]},
    ),
    "loader": (plain_pair, loader(shuffle=True), lambda: {"optim": adam}),
    "loader with its own generator": (plain_pair, own_generator, lambda: {"optim": adam}),
    "loader that drops the last": (plain_pair, loader(shuffle=True, drop_last=True), lambda: {"optim": adam}),
    "data set that draws": (plain_pair, Noisy, lambda: {"optim": adam, "batch_size": 8}),
}


def run(name: str, path: Path, resume: bool = False, crash_at: int | None = None, **change: Any) -> FitResult:
    """One process; with ``crash_at`` it ends after that step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    make_pair, make_data, make_options = RUNS[name]
    model, guide = make_pair()
    options: dict[str, Any] = {"batch_size": 8, "num_steps": 30, "seed": 7} | make_options() | change

    class Killer:
        def on_step(self, state: TrainingState) -> None:
            if state.step == crash_at:
                raise Crash

    options["callbacks"] = [Checkpoint(path, every=4), *options.get("callbacks", ()), Killer()]
    return lvm.fit(model, guide, make_data(), resume=path if resume else None, **options)


def assert_equal(one: FitResult, other: FitResult) -> None:
    assert one.params.keys() == other.params.keys()
    for name, value in one.params.items():
        assert torch.equal(value, other.params[name]), name
    assert torch.equal(one.losses.nan_to_num(), other.losses.nan_to_num())
    rows = [
        [{n: v for n, v in row.items() if n != "seconds" and v == v} for row in result.history]
        for result in (one, other)
    ]
    assert rows[0] == rows[1]
    assert (one.stop_reason, one.skipped, one.num_steps) == (other.stop_reason, other.skipped, other.num_steps)
    for mine, theirs in zip(one.modules, other.modules, strict=True):
        for (name, a), (_, b) in zip(mine.state_dict().items(), theirs.state_dict().items(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_goes_on_is_the_run_without_a_break(name: str, tmp_path: Path) -> None:
    whole = run(name, tmp_path / "whole.pt")
    for first, second in ((3, 17), (7, 8), (25, 29)):
        path = tmp_path / f"{first}.pt"
        with pytest.raises(Crash):
            run(name, path, crash_at=first)
        with pytest.raises(Crash):
            run(name, path, resume=True, crash_at=second)
        again = run(name, path, resume=True)
        assert_equal(again, whole)
        assert len(again.provenance["resumed_at"]) == (2 if path.exists() else 0) or "loader" in name or "set" in name
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".pt"] * 4


@pytest.mark.slow
def test_a_loader_with_workers_goes_on_at_the_end_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data = lambda: DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=2)  # noqa: E731
    monkeypatch.setitem(RUNS, "workers", (plain_pair, make_data, lambda: {"optim": adam}))
    whole = run("workers", tmp_path / "whole.pt")
    assert_equal(run("workers", tmp_path / "again.pt"), whole)
    with pytest.raises(Crash):
        run("workers", tmp_path / "broken.pt", crash_at=19)
    again = run("workers", tmp_path / "broken.pt", resume=True)
    assert_equal(again, whole)
    assert again.provenance["resumed_at"] == [14]


def test_without_a_seed_the_generators_go_on_as_they_were(tmp_path: Path) -> None:
    whole = run("mini-batches", tmp_path / "whole.pt", seed=None)
    then = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002, S311
    with pytest.raises(Crash):
        run("mini-batches", tmp_path / "broken.pt", seed=None, crash_at=9)
    assert_equal(run("mini-batches", tmp_path / "broken.pt", seed=None, resume=True), whole)
    assert torch.equal(torch.rand(3), then[0])
    assert (np.random.rand(3) == then[1]).all()  # noqa: NPY002
    assert random.random() == then[2]  # noqa: S311


@pytest.mark.parametrize("limit", [{"num_epochs": 2}, {"num_steps": 11}])
def test_a_finished_run_goes_on_when_it_is_given_more(limit: dict[str, int], tmp_path: Path) -> None:
    limits = {"num_steps": None} | limit
    whole = run("schedule by epoch", tmp_path / "whole.pt", **{n: v and 2 * v for n, v in limits.items()})
    half = run("schedule by epoch", tmp_path / "half.pt", **limits)
    same = run("schedule by epoch", tmp_path / "half.pt", resume=True, **limits)
    assert_equal(same, half)
    assert_equal(
        run("schedule by epoch", tmp_path / "half.pt", resume=True, **{n: v and 2 * v for n, v in limits.items()}),
        whole,
    )


def test_a_run_that_was_stopped_early_stays_stopped(tmp_path: Path) -> None:
    stopping = {"callbacks": [EarlyStopping(lambda model, guide: 0.0, patience=2)], "num_steps": 200}
    ended = run("modules", tmp_path / "run.pt", **stopping)
    assert ended.stop_reason == "early_stopping"
    assert_equal(run("modules", tmp_path / "run.pt", resume=True, **stopping), ended)


def test_a_run_that_was_stopped_by_the_user_goes_on(tmp_path: Path) -> None:
    whole = run("mini-batches", tmp_path / "whole.pt")

    class Impatient:
        def on_step(self, state: TrainingState) -> None:
            if state.step == 10:
                raise KeyboardInterrupt

    stopped = run("mini-batches", tmp_path / "run.pt", callbacks=[Impatient()])
    assert (stopped.stop_reason, stopped.num_steps) == ("interrupted", 10)
    assert_equal(run("mini-batches", tmp_path / "run.pt", resume=True), whole)

    timed = run("mini-batches", tmp_path / "run.pt", callbacks=[lambda state: state.stop("time is up")])
    assert timed.stop_reason == "time is up"
    assert_equal(run("mini-batches", tmp_path / "run.pt", resume=True), whole)


def test_skipped_steps_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = X.clone()
    bad[3] = math.nan
    monkeypatch.setitem(RUNS, "nan", (plain_pair, lambda: bad, lambda: {"optim": adam}))
    whole = run("nan", tmp_path / "whole.pt")
    assert whole.skipped >= 3
    with pytest.raises(Crash):
        run("nan", tmp_path / "broken.pt", crash_at=23)
    assert_equal(run("nan", tmp_path / "broken.pt", resume=True), whole)


@pytest.mark.usefixtures("captured_at_once")
def test_captured_steps_go_on_up_to_rounding(tmp_path: Path) -> None:
    whole = run("modules", tmp_path / "whole.pt", compile=True)
    with pytest.raises(Crash):
        run("modules", tmp_path / "broken.pt", compile=True, crash_at=15)
    again = run("modules", tmp_path / "broken.pt", compile=True, resume=True)
    for name, value in whole.params.items():
        torch.testing.assert_close(again.params[name], value, rtol=1e-4, atol=1e-5)
    assert 0 < again.captured < whole.captured == 28 - 4  # two shapes of batches, of which three steps each are plain


class Counter:
    """A user's callback with a state."""

    def __init__(self) -> None:
        self.seen = 0

    def on_step(self, state: TrainingState) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_callbacks_of_a_user_keep_their_state(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run("mini-batches", tmp_path / "run.pt", crash_at=10, callbacks=[Counter(), lambda state: None])
    counter = Counter()
    run("mini-batches", tmp_path / "run.pt", resume=True, callbacks=[counter, Log(Printer())])
    assert counter.seen == 30


class Printer:
    def log(self, metrics: dict[str, Any], step: int) -> None:
        pass


@pytest.mark.parametrize(("written", "level"), [("run.pt", logging.INFO), ("typo.pt", logging.WARNING)])
def test_a_file_that_no_checkpoint_will_write_is_warned_of(
    written: str, level: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "pyro_lvm")
    callbacks = [Checkpoint(tmp_path / written)]
    lvm.fit(*plain_pair(), X, num_steps=2, callbacks=callbacks, resume="run.pt")
    assert [record.levelno for record in caplog.records if "the run begins" in record.getMessage()] == [level]


def test_one_callback_serves_run_after_run(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(tmp_path / "new" / "run.pt"), every=4)
    for num_steps in (9, 3):
        model, guide = plain_pair()
        with lvm_store():
            lvm.fit(model, guide, X, num_steps=num_steps, callbacks=[checkpoint])
        assert torch.load(checkpoint.path, weights_only=True)["step"] == num_steps


def lvm_store() -> Any:
    return pyro.get_param_store().scope()


def test_nothing_to_resume_is_a_run_that_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pyro_lvm"):
        begun = run("mini-batches", tmp_path / "run.pt", resume=True)
    assert "the run begins" in caplog.text
    assert begun.num_steps == 30
    assert begun.provenance["resumed_at"] == []


# ----------------------------------------------------------------------------------------------------------------------
# Files of another run.


def wider_pair() -> Pair:
    decoder = lvm.nn.MLP(2, [9], 6)
    return lvm.models.DeepGaussian(decoder, 2, Normal()), lvm.guides.DiagonalNormal(2, encoder=lvm.nn.MLP(3, [8], 4))


def double_pair() -> Pair:
    model, guide = library_pair()
    return model.double(), guide.double()  # type: ignore[attr-defined]


def normalised_pair() -> Pair:
    encoder = torch.nn.Sequential(lvm.nn.MLP(3, [8], 4), torch.nn.BatchNorm1d(4))
    return library_pair()[0], lvm.guides.DiagonalNormal(2, encoder=encoder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 8}, ["seed 7 (here 8)"]),
        ({"update": "model"}, ["update both (here model)"]),
        ({"batch_size": 10}, ["num_batches 7 (here 5)"]),
        ({"loss": pyro.infer.Trace_ELBO()}, ["loss NoneType (here Trace_ELBO)"]),
        ({"pair": wider_pair}, ["decoder.layers.0.weight' float32 (8, 2) (here float32 (9, 2))"]),
        ({"pair": double_pair, "data": X.double()}, ["float32 (8, 2) (here float64 (8, 2))", "more"]),
        ({"pair": plain_pair}, ["decoder.layers.0.bias' float32 (8,) (not here)", "more"]),
        (
            {"pair": normalised_pair},
            ["no 'DiagonalNormal$$$phi.encoder.0.layers.0.weight'", "more"],
        ),
        ({"data": X[:49]}, ["num_data 50 (here 49)"]),
        ({"data": X.flip(0)}, ["data "]),
        ({"callbacks": [Counter()]}, ["callbacks [] (here ['Counter'])"]),
        ({"optim": lambda params: torch.optim.SGD(params, lr=0.1)}, ["it is of Adam, and `optim` makes SGD"]),
        ({"optim": halves}, ["parameter group"]),
        ({"optim": pyro.optim.Adam({})}, ["it is of Adam"]),
    ],
)
def test_a_file_of_another_run(
    change: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("modules", tmp_path / "run.pt", num_steps=5)
    before = (tmp_path / "run.pt").read_bytes()
    pair, data = change.pop("pair", library_pair), change.pop("data", X)
    monkeypatch.setitem(RUNS, "other", (pair, lambda: data, lambda: {"optim": adam}))
    with pytest.raises(CheckpointError) as error:
        run("other", tmp_path / "run.pt", resume=True, num_steps=5, **change)
    for word in words:
        assert word in str(error.value)
    assert "Call `fit` as that run did" in str(error.value) or "Pass the `optim`" in str(error.value)
    assert (tmp_path / "run.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("run.pt", 0), ShapeError),
        (("run.pt", 1.5), DataTypeError),
        ((None, 1), DataTypeError),
        ((3, 1), DataTypeError),
    ],
)
def test_arguments_of_a_checkpoint(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Checkpoint(*arguments)


def test_resume_is_the_path_of_a_file(tmp_path: Path) -> None:
    model, guide = plain_pair()
    with pytest.raises(DataTypeError, match="resume: expected the path"):
        lvm.fit(model, guide, X, num_steps=1, resume=True)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="IsADirectory"):
        lvm.fit(model, guide, X, num_steps=1, resume=tmp_path)


class Unwritable(Counter):
    def state_dict(self) -> dict[str, Any]:
        return {"function": [1, print]}


def test_a_state_that_is_no_data_is_found_out_at_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"\['callbacks'\]\[0\]\[1\]\['function'\]\[1\]: .* <built-in function print>"
    ):
        run("mini-batches", tmp_path / "run.pt", callbacks=[Unwritable()])
    assert not list(tmp_path.iterdir())


def test_a_history_may_hold_what_callbacks_record(tmp_path: Path) -> None:
    def record(state: TrainingState) -> None:
        values = {"number": np.float64(0.1), "words": "a", "flag": True, "count": state.step, "part": torch.ones(2)}
        state.history.record(**(values if state.step < 12 else {"number": None, "flag": math.inf}))

    options = {"callbacks": [record], "num_steps": 20}
    whole = run("mini-batches", tmp_path / "whole.pt", **options)
    with pytest.raises(Crash):
        run("mini-batches", tmp_path / "broken.pt", crash_at=17, **options)
    again = run("mini-batches", tmp_path / "broken.pt", resume=True, **options)
    assert [list(row) for row in again.history] == [list(row) for row in whole.history]
    for mine, theirs in zip(again.history, whole.history, strict=True):
        for name in mine.keys() - {"seconds", "part"}:
            assert mine[name] == theirs[name]
            assert isinstance(mine[name], type(theirs[name])) or name == "number"


def test_a_full_disk_ends_a_run_at_its_first_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        run("mini-batches", tmp_path / "file" / "run.pt")
    saved = torch.save

    def full(content: dict[str, Any], file: Any) -> None:
        if content["step"] in (9, 13):
            raise OSError(28, "No space left on device")
        saved(content, file)

    monkeypatch.setattr(torch, "save", full)
    assert run("mini-batches", tmp_path / "run.pt").num_steps == 30
    assert caplog.text.count("was not written") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# Less usual runs.


class Decoder(torch.nn.Module):
    """Used by a method of its own; holds a running scale, which it assigns anew, and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 3)
        self.register_buffer("scale", torch.ones(3))
        self.frozen = torch.nn.Parameter(torch.randn(3, 3), requires_grad=False)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        y = self.linear(z) @ self.frozen
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * y.detach().abs().flatten(0, -2).mean(0)
        return y / self.scale


def method_pair() -> Pair:
    decoder, encoder = Decoder(), torch.nn.Linear(3, 4)

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder.decode(z), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    model.decoder = decoder  # type: ignore[attr-defined]
    return model, guide


def tied_pair() -> Pair:
    """One network under two names."""
    net = torch.nn.Linear(3, 3)

    def model(x: torch.Tensor) -> None:
        pyro.module("down", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("up", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.5).to_event(1))

    return model, guide


def sampled_batches() -> Any:
    order = torch.utils.data.RandomSampler(X, generator=torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    return DataLoader(TensorDataset(X), batch_sampler=torch.utils.data.BatchSampler(order, 8, False))


@pytest.mark.filterwarnings("ignore:frozen was not registered:UserWarning")
@pytest.mark.parametrize(
    ("pair", "make_data"), [(method_pair, lambda: X), (tied_pair, lambda: X), (plain_pair, sampled_batches)]
)
def test_less_usual_runs_go_on_too(
    pair: Callable[[], Pair], make_data: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNS, "unusual", (pair, make_data, lambda: {"optim": adam}))
    whole = run("unusual", tmp_path / "whole.pt")
    with pytest.raises(Crash):
        run("unusual", tmp_path / "broken.pt", crash_at=19)
    again = run("unusual", tmp_path / "broken.pt", resume=True)
    assert_equal(again, whole)
    assert len(again.provenance["resumed_at"]) == 1


@pytest.mark.filterwarnings("ignore:frozen was not registered:UserWarning")
def test_what_modules_hold_is_saved_whatever_method_uses_them(tmp_path: Path) -> None:
    model, guide = method_pair()
    result = lvm.fit(model, guide, X, num_steps=20, seed=0)
    model.decoder.eval()  # type: ignore[attr-defined]
    expected = lvm.elbo(model, guide, X, seed=0)
    lvm.save(result, tmp_path / "pair.pt")
    pyro.clear_param_store()
    model, guide = method_pair()
    model.decoder.eval()  # type: ignore[attr-defined]
    lvm.load(tmp_path / "pair.pt", model, guide, X[:5])
    assert torch.equal(lvm.elbo(model, guide, X, seed=0), expected)


def test_a_baseline_is_no_part_of_a_saved_pair(tmp_path: Path) -> None:
    result = lvm.fit(*discrete_pair(), X, num_steps=3, loss=reinforce(), seed=0)
    lvm.save(result, tmp_path / "pair.pt")
    pyro.clear_param_store()
    again = lvm.load(tmp_path / "pair.pt", *discrete_pair(), X)
    assert torch.equal(again.params["logit"], result.params["logit"])


@pytest.mark.filterwarnings("ignore:frozen was not registered:UserWarning")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("captured_at_once")
def test_nan_leaves_alone_what_a_module_assigns_anew(compile: bool) -> None:
    model, guide = method_pair()
    bad = X.repeat(4, 1)
    bad[7] = math.nan
    with pyro.validation_enabled(False):
        result = lvm.fit(model, guide, bad, num_epochs=2, batch_size=8, seed=0, compile=compile)
    assert result.skipped == 2
    assert model.decoder.scale.isfinite().all()  # type: ignore[attr-defined]
    assert not compile or "assign their buffers ['scale'] anew" in result.notes[0]


@pytest.mark.filterwarnings("ignore:training stopped:RuntimeWarning")
def test_writing_does_not_change_the_run(tmp_path: Path) -> None:
    """Updates that overflow now and then are taken back by the next step, whether or not a file is due."""

    def loss(model: Any, guide: Any, x: torch.Tensor) -> torch.Tensor:
        weight = pyro.param("weight", torch.tensor(0.5))
        return (weight - 1) ** 2 + weight * (3e38 if bool((x == X[LATE]).all(-1).any()) else 0.0)

    def once(**options: Any) -> lvm.FitResult:
        pyro.clear_param_store()
        options |= {"optim": lambda params: torch.optim.SGD(params, lr=10.0), "num_steps": 60, "batch_size": 8}
        return lvm.fit(*plain_pair(), X, loss=loss, seed=7, **options)

    plain = once()
    assert plain.skipped > 0
    for every in (1, 4, 1000):
        written = once(callbacks=[Checkpoint(tmp_path / f"{every}.pt", every=every)])
        assert torch.equal(written.losses.nan_to_num(), plain.losses.nan_to_num())
        assert torch.equal(written.params["weight"], plain.params["weight"])


class Phase(int, enum.Enum):
    WARM = 1


def test_an_enum_is_refused_before_it_spoils_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Phase.WARM"):
        run("mini-batches", tmp_path / "run.pt", callbacks=[Recorder()])
    assert not list(tmp_path.iterdir())


class Recorder:
    def on_step(self, state: TrainingState) -> None:
        state.history.record(phase=Phase.WARM)


def test_a_loader_without_an_end_writes_nothing_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, guide = plain_pair()
    data = DataLoader(TensorDataset(X), batch_size=5)
    lvm.fit(model, guide, data, num_steps=9, seed=0, callbacks=[Checkpoint(tmp_path / "run.pt")])
    assert "run.pt was not written" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        lvm.fit(model, guide, data, num_steps=9, callbacks=[Checkpoint(tmp_path / "file" / "run.pt")])


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield from X


@pytest.mark.parametrize(
    ("make_data", "warnings"),
    [
        (lambda: DataLoader(Endless(), batch_size=5), 1),
        (lambda: DataLoader(TensorDataset(X), batch_size=5), 1),  # of which 9 steps are no epoch
        (lambda: DataLoader(TensorDataset(X), batch_size=10), 0),
        (lambda: X, 0),
    ],
)
def test_a_file_that_is_not_written_where_it_is_due_is_said_there(
    make_data: Callable[[], Any], warnings: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    class Reader:
        def on_step(self, state: TrainingState) -> None:
            seen.append(caplog.text.count("run.pt is not written yet"))

    callbacks = [Checkpoint(tmp_path / "run.pt", every=3), Reader()]
    lvm.fit(*plain_pair(), make_data(), batch_size=5, num_steps=9, callbacks=callbacks)
    assert seen == [0] * 3 + [warnings] * 6


def test_the_wrong_optimizer_leaves_the_pair_alone(tmp_path: Path) -> None:
    run("modules", tmp_path / "run.pt", num_steps=5)
    pyro.clear_param_store()
    model, guide = library_pair()
    before = [p.clone() for p in model.parameters()]  # type: ignore[attr-defined]
    options = {"batch_size": 8, "num_steps": 5, "seed": 7, "resume": tmp_path / "run.pt"}
    with pytest.raises(CheckpointError, match="makes SGD"):
        lvm.fit(model, guide, X, optim=lambda params: torch.optim.SGD(params, lr=0.1), **options)
    assert all(map(torch.equal, before, model.parameters()))  # type: ignore[attr-defined]
