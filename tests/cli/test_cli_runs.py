"""Runs of the command line: what they leave, what they go on from, and that their numbers are those of Python."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

import pyro_lvm as lvm
from pyro_lvm._files import read_tensors
from pyro_lvm.cli import main
from pyro_lvm.cli.data import load_data
from pyro_lvm.cli.pairs import GUIDES

OWN = """
import os
import pyro, pyro.distributions as dist, torch
import pyro_lvm as lvm

left = int(os.environ.get("RUNS_BEFORE_CTRL_C", 10**9))
encoder = torch.nn.Linear(2, 2)

def model(x):
    global left
    left -= 1
    if not left:
        raise KeyboardInterrupt
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z * torch.ones(2), noise).to_event(1), obs=x)

def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        loc, log_scale = encoder(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

class Guide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = lvm.guides.DiagonalNormal(1, torch.nn.Linear(2, 2))

    def forward(self, x):
        return self.q(x)

def sinking(x):
    global left
    model(x)
    pyro.factor("depth", torch.tensor(0.0 if left > 10**9 - 80 else float("nan")))

def raising(x):
    raise ZeroDivisionError("of my own")
"""


def call(words, *more):
    """Run a command that is fine; as in a process of its own nothing has been trained before."""
    pyro.clear_param_store()
    assert main([*words.split(), *map(str, more)]) == 0


def params(folder):
    return read_tensors(folder / "pair.pt", "FitResult")["params"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a module of one's own, under a name that no other test has imported, and data."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    x = np.random.default_rng(0).normal(size=(60, 1)) + np.random.default_rng(1).normal(size=(60, 2))
    np.save(tmp_path / "x.npy", x)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


# --- what is left -----------------------------------------------------------------------------------------------------


def test_files_of_a_run(tmp_path, capsys):
    folder = tmp_path / "run"
    call("train --data digits --epochs 1 --batch-size 400 --hidden 8 --latent-dim 3 --guide full_rank --out", folder)
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "pair.pt", "checkpoint.pt", "history.csv", "history.png"
    }  # fmt: skip
    content = json.loads((folder / "run.json").read_text())
    pair = {"model": "vae", "guide": "full_rank", "likelihood": "bernoulli", "latent_dim": 3, "hidden": [8]}
    assert content["pair"] == pair
    assert content["data"]["binarize"] == "threshold"
    assert (content["data"]["num_train"], content["data"]["num_test"]) == (1437, 360)
    assert content["training"] | {"epochs": 1, "steps": None, "loss": "elbo", "lr": 2e-3} == content["training"]
    assert set(content["versions"]) == {"pyro_lvm", "pyro", "torch"}
    rows = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]  # 1437 data in batches of 400
    assert (folder / "history.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "digits: 1437 to train on, 360 held out, each 64" in out
    assert "vae; guide full_rank; likelihood bernoulli; latent dim 3; hidden 8" in out
    assert "FitResult: 4 steps" in out


def test_a_run_has_the_parameters_of_the_same_calls_in_python(tmp_path):
    """The learning rate is 2e-3 for half of the steps, then falls on a line towards 2 % of it."""
    call("train --data two_moons --steps 10 --hidden 8 --guide flow --loss iw:3 --seed 4 --out", tmp_path / "run")
    made = params(tmp_path / "run")
    x = load_data({"data": "two_moons", "split_seed": 0}).train
    assert x.equal(lvm.datasets.two_moons(1000)[0])
    pyro.set_rng_seed(4)
    decoder = lvm.nn.MLP(2, [8], 4)
    model = lvm.models.DeepGaussian(decoder, 2, "normal")
    encoder = lvm.nn.MLP(2, [16], 5 + 32)
    guide = lvm.guides.Flow(2, encoder, base="full", context_dim=32)
    with torch.no_grad():
        encoder.layers[0].weight /= x.abs().max().clamp(min=1)
        encoder.layers[-1].weight *= 0.1
    rates = torch.tensor([min(1.0, 0.02 + 1.96 * (1 - step / 10)) for step in range(10)])
    assert rates[5:].tolist() == pytest.approx([1.0, 0.804, 0.608, 0.412, 0.216])

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 0.02 + 1.96 * (1 - step / 10)))

    fitted = lvm.fit(
        model,
        guide,
        x,
        loss=lvm.objectives.ImportanceWeightedELBO(3),
        optim=lambda p: torch.optim.Adam(p, lr=2e-3),
        num_steps=10,
        seed=4,
        callbacks=[lvm.callbacks.Schedule(schedule)],
    )
    values = [value for name, value in sorted(fitted.params.items())]
    there = [value for name, value in sorted(made.items(), key=lambda item: item[0].replace("network.", ""))]
    assert len(values) == len(there)
    assert all(a.equal(b) for a, b in zip(values, there, strict=True))


@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")
def test_evaluate_gives_the_numbers_of_the_same_calls_in_python(tmp_path, capsys):
    folder = tmp_path / "run"
    call("train --data two_moons --steps 20 --hidden 8 --out", folder)
    capsys.readouterr()
    call("evaluate", folder, "--particles", 50, "--seed", 3)
    out = capsys.readouterr().out
    record = lvm.LogMarginal.load(folder / "log_marginal.json")
    assert out.startswith(f"{record}\nfiles in ")
    pyro.clear_param_store()
    model = lvm.models.DeepGaussian(lvm.nn.MLP(2, [8], 4), 2, "normal")
    guide = lvm.guides.DiagonalNormal(2, WithNetwork(lvm.nn.MLP(2, [16], 4)))
    x = lvm.datasets.two_moons(200, seed=1)[0]
    fitted = lvm.load(folder / "pair.pt", model, guide, x)
    same = lvm.log_marginal(fitted.model, fitted.guide, x, num_particles=50, seed=3)
    for name in ("value", "stderr", "elbo", "ess"):
        assert getattr(record, name).equal(getattr(same, name))
    assert record.status.tolist() == same.status.tolist()
    assert record.provenance["data"]["name"] == "two_moons"
    assert (folder / "khat.png").read_bytes().startswith(b"\x89PNG")


class WithNetwork(torch.nn.Module):
    """Named as the encoders of the command line are."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def test_evaluate_other_data(tmp_path, capsys):
    folder, x = tmp_path / "run", lvm.datasets.two_moons(30, seed=9)[0]
    torch.save(x.double(), tmp_path / "other.pt")
    call("train --data two_moons --steps 5 --hidden 8 --out", folder)
    call("evaluate", folder, "--particles", 9, "--data", tmp_path / "other.pt", "--out", tmp_path / "there")
    assert "other.pt: 0 to train on, 30 held out, each 2 (float64 became float32)" in capsys.readouterr().out
    record = lvm.LogMarginal.load(tmp_path / "there" / "log_marginal.json")
    assert len(record) == 30
    assert record.provenance["data"]["name"] == "other.pt"
    assert not (folder / "log_marginal.json").exists()


def test_data_that_have_changed_are_refused(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(40, 2)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    call("train --steps 3 --hidden 4 --data", tmp_path / "x.npy", "--out", tmp_path / "run")
    np.save(tmp_path / "x.npy", x + 1)
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "expected the data of" in capsys.readouterr().err


BINARY, CONTINUOUS = ("binary", "autoregressive"), ("mixture", "normalizing_flow")
PAIRS = [(model, guide) for model, guides in GUIDES.items() for guide in guides if model != "mixture_vae"]


@pytest.mark.parametrize(("model", "guide"), PAIRS)
def test_every_model_with_every_guide(model, guide, tmp_path):
    for data in ("digits",) * (model not in CONTINUOUS) + ("two_moons",) * (model not in BINARY):
        folder = tmp_path / data
        call(f"train --data {data} --model {model} --guide {guide} --steps 2 --out", folder)
        call("evaluate", folder, "--particles", 30)
        record = lvm.LogMarginal.load(folder / "log_marginal.json")
        assert bool(record.value.isfinite().all())
        assert (set(record.status_shares()) == {"exact"}) == (guide == "none")
        assert (folder / "khat.png").exists() == (guide != "none")


def test_parameters_out_of_range_are_a_refusal(tmp_path, capsys):
    """Steps of this size drive a scale of the guide to zero, which torch refuses."""
    words = f"train --data digits --hidden 8 --steps 300 --lr 50 --out {tmp_path / 'run'}"
    assert main(words.split()) == 2
    assert "error: parameters: expected such that all densities exist" in capsys.readouterr().err


def test_device_is_named(tmp_path):
    call("train --data two_moons --model mixture --components 2 --steps 2 --device cpu --out", tmp_path / "run")
    call("train --resume --device cpu:0 --out", tmp_path / "run")
    call("evaluate --device cpu", tmp_path / "run")
    call("compare --data two_moons --guides flow --steps 2 --particles 5 --device cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(tmp_path):
    for model in GUIDES:
        data = "digits" if model in BINARY else "two_moons"
        call(f"train --data {data} --model {model} --steps 3 --device cuda --out", tmp_path / model)
        call("evaluate --particles 5 --device cuda", tmp_path / model)
    call("compare --particles 5 --device cuda", tmp_path / "vae", tmp_path / "mixture")
    call("compare --data two_moons --guides flow --steps 2 --particles 5 --device cuda")


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES["mixture_vae"])
def test_mixture_vae(guide, tmp_path):
    words = f"train --data two_moons --model mixture_vae --guide {guide} --components 2 --steps 50 --out"
    call(words, tmp_path / "run")
    call("evaluate", tmp_path / "run", "--particles", 30)
    record = lvm.LogMarginal.load(tmp_path / "run" / "log_marginal.json")
    assert record.provenance["enumerated"] == ["y"]


@pytest.mark.parametrize(
    ("data", "likelihood"),
    [
        ("digits --binarize counts", "binomial:16"),
        ("digits --binarize dynamic", "bernoulli"),
        ("digits --binarize none", "shared_normal"),
        ("pinwheel", "normal"),
        ("digits --binarize counts --likelihood categorical:17", "categorical:17"),
        ("digits --binarize counts --likelihood discretized_logistic:17", "discretized_logistic:17"),
        ("digits --binarize counts --likelihood poisson", "poisson"),
    ],
)
def test_the_likelihood_fits_the_data(data, likelihood, tmp_path):
    call(f"train --data {data} --steps 2 --hidden none --out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["pair"]["likelihood"] == likelihood
    call("evaluate", tmp_path / "run", "--particles", 5)


@pytest.mark.parametrize(("dtype", "likelihood"), [(np.uint8, "discretized_logistic:256"), (np.int64, "poisson")])
def test_images_in_a_file(dtype, likelihood, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (20, 3, 4)).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    call("train --steps 2 --hidden 4 --data", tmp_path / "x.npy", "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["pair"]["likelihood"] == likelihood
    call("evaluate --particles 5", tmp_path / "run", "--data", tmp_path / "x.npy")
    assert len(lvm.LogMarginal.load(tmp_path / "run" / "log_marginal.json")) == 20


def test_images_of_a_folder(tmp_path, capsys):
    from PIL import Image

    grey = np.random.default_rng(0).integers(0, 256, (12, 9, 7), dtype=np.uint8)
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for i, image in enumerate(grey):
        Image.fromarray(image).save(tmp_path / "images" / ("deep" if i % 2 else "") / f"{i}.png")
    call("train --size 5 --steps 2 --test-share 0.25 --data", tmp_path / "images", "--out", tmp_path / "run")
    assert "images: 9 to train on, 3 held out, each 25" in capsys.readouterr().out
    call("evaluate", tmp_path / "run", "--particles", 5)
    options = {"data": str(tmp_path / "images"), "size": 7, "split_seed": 0}
    whole = load_data(options, whole=True).test
    # in the order of their paths 0.png is the first; 9 x 7 pixels are cut to 7 x 7
    assert whole[0].equal(torch.from_numpy(grey[0, 1:8]).float().flatten() / 255)
    assert set(load_data(options | {"binarize": "threshold"}).test.unique().tolist()) == {0.0, 1.0}


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_goes_on_to_the_same_parameters(own, monkeypatch, capsys):
    words = (
        f"train --data x.npy --model {own}:model --guide {own}:guide --steps 40 --batch-size 16 --checkpoint-every 5"
    )
    call(words + " --out", "whole")
    sys.modules.pop(own)
    monkeypatch.setenv("RUNS_BEFORE_CTRL_C", "30")
    pyro.clear_param_store()
    capsys.readouterr()
    assert main([*words.split(), "--out", "run"]) == 130
    assert capsys.readouterr().err == (
        "pyro-lvm train: interrupted: go on with `pyro-lvm train --resume --out run`\n"
    )  # fmt: skip
    assert not Path("run/pair.pt").exists()
    sys.modules.pop(own)
    monkeypatch.delenv("RUNS_BEFORE_CTRL_C")
    call("train --resume --out", "run")
    content = read_tensors(Path("run/pair.pt"), "FitResult")
    assert 0 < content["provenance"]["resumed_at"][0] < 30
    whole = params(Path("whole"))
    assert whole.keys() == content["params"].keys()
    assert all(value.equal(content["params"][name]) for name, value in whole.items())


@pytest.mark.filterwarnings("ignore:training stopped")
def test_a_loss_that_ends_as_nan_fails(own, capsys):
    """What it has learned before is there, and `train && evaluate` stops."""
    words = f"train --data x.npy --model {own}:sinking --guide {own}:guide --steps 200 --batch-size 16 --out run"
    assert main(words.split()) == 1
    assert "stopped by nonfinite" in capsys.readouterr().out
    assert Path("run/pair.pt").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_killed_process_goes_on_to_the_same_parameters(tmp_path):
    words = "train --data digits --model mixture_vae --components 3 --latent-dim 2 --hidden 8 --checkpoint-every 20"
    command = [sys.executable, "-m", "pyro_lvm", *words.split(), "--steps", "300"]
    whole = subprocess.run([*command, "--out", "whole"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen([*command, "--out", "run"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "pair.pt").exists()
    again = [sys.executable, "-m", "pyro_lvm", "train", "--resume", "--out", "run"]
    assert subprocess.run(again, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    made = params(tmp_path / "run")
    assert all(value.equal(made[name]) for name, value in params(tmp_path / "whole").items())


def test_resume_begins_goes_further_and_has_nothing_to_do(tmp_path, capsys):
    folder = tmp_path / "run"
    call("train --resume --data digits --binarize dynamic --hidden 8 --epochs 1 --out", folder)
    first = params(folder)
    call("train --resume --hidden 8 --out", folder)
    assert all(value.equal(first[name]) for name, value in params(folder).items())
    call("train --resume --epochs 2 --out", folder)
    assert "FitResult: 24 steps" in capsys.readouterr().out  # 12 batches of 128 in 1437 data
    assert not all(value.equal(first[name]) for name, value in params(folder).items())
    call("train --resume --steps 30 --out", folder)
    assert json.loads((folder / "run.json").read_text())["training"]["epochs"] is None


# --- pairs of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["{}:guide", "{}:Guide", "full_rank"])
def test_own_model(own, guide, capsys):
    guide = guide.format(own)
    library = " --latent-dim 1 --hidden 4" if guide == "full_rank" else ""
    call(f"train --data x.npy --model {own}:model --guide {guide} --steps 5 --out run" + library)
    call("evaluate run --particles 20")
    record = lvm.LogMarginal.load("run/log_marginal.json")
    assert len(record) == 12  # a fifth of 60
    assert bool(record.value.isfinite().all())


def test_own_guide_of_a_library_model(own):
    call(f"train --data x.npy --model linear_gaussian --latent-dim 1 --guide {own}:guide --steps 5 --out run")
    call("evaluate run --particles 20")


def test_what_the_own_code_raises_is_shown(own, capsys):
    words = f"train --data x.npy --model {own}:model --guide {own}:raising --out run".split()
    for command in (words, ["check", *words[1:-2]]):
        assert main(command) == 1
        err = capsys.readouterr().err
        assert err.startswith("Traceback")
        assert err.endswith("ZeroDivisionError: of my own\n")
    assert not os.listdir("run")  # a run that could not begin is none


def test_a_module_that_cannot_be_imported_is_shown(own, tmp_path, capsys):
    (tmp_path / f"{own}_broken.py").write_text("import a_module_that_is_not_there\n")
    assert main(f"check --data x.npy --model {own}_broken:model --guide none".split()) == 1
    assert "No module named 'a_module_that_is_not_there'" in capsys.readouterr().err


def test_nothing_of_a_call_remains(own):
    before = list(sys.path), torch.get_num_threads(), torch.get_rng_state()
    call(f"check --data x.npy --model {own}:model --guide {own}:guide")
    assert (sys.path, torch.get_num_threads()) == before[:2]
    assert torch.get_rng_state().equal(before[2])
