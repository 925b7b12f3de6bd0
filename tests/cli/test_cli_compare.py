"""`pyro-lvm compare`: trained runs, and guides of one frozen model."""

import re
import subprocess
import sys

import numpy as np
import pyro
import pytest
import torch

import pyro_lvm as lvm
from pyro_lvm.cli import main

OWN = """
import pyro, pyro.distributions as dist, torch

def model(x):
    weight = pyro.param("weight", torch.ones(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z * weight, 1.0).to_event(1), obs=x)

def one(x):
    loc = pyro.param("loc", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x.sum(-1, keepdim=True), 0.6).to_event(1))

def two(x):
    loc, scale = pyro.param("loc", torch.tensor(0.0)), pyro.param("scale", torch.ones(1), dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x.sum(-1, keepdim=True), scale).to_event(1))
"""


def call(words, *more):
    pyro.clear_param_store()
    assert main([*words.split(), *map(str, more)]) == 0


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with three runs on the same data: two seeds of a VAE, and an exact model."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        call(f"train --data two_moons --steps 5 --hidden 4 --seed {seed} --out seed_{seed}")
    call("train --data two_moons --model mixture --components 2 --steps 5 --out mixture")
    return tmp_path


def test_runs(runs, capsys):
    call("compare seed_0 seed_1 mixture --particles 40 --out table")
    found = lvm.Comparison.load("table/comparison.json")
    assert {row.name for row in found.rows} == {"seed_0", "seed_1", "mixture"}
    assert found.ranked_by == "value"
    assert found.rows[0].name == "mixture"
    assert found.rows[0].runs[0].method == "closed form"
    assert (runs / "table" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<table" in (runs / "table" / "comparison.html").read_text()
    out = capsys.readouterr().out
    assert str(found) in out
    assert "two_moons: 1000 to train on, 200 held out, each 2" in out


def test_a_row_has_the_numbers_of_evaluate(runs):
    call("compare seed_0 seed_1 --particles 40 --seed 7 --out table")
    rows = {row.name: row.runs[0] for row in lvm.Comparison.load("table/comparison.json").rows}
    call("evaluate seed_1 --particles 40 --seed 7")
    assert lvm.LogMarginal.load("seed_1/log_marginal.json").value.equal(rows["seed_1"].value)


def test_runs_of_one_name_are_told_apart_by_their_paths(runs):
    (runs / "deep").mkdir()
    (runs / "seed_1").rename(runs / "deep" / "seed_0")
    call("compare seed_0 deep/seed_0 --particles 5 --out table")
    assert {row.name for row in lvm.Comparison.load("table/comparison.json").rows} == {"seed_0", "deep/seed_0"}


def test_guides_share_one_frozen_model(tmp_path):
    call("compare --data two_moons --guides diagonal,flow --hidden 8 --steps 40 --particles 300 --out", tmp_path)
    found = lvm.Comparison.load(tmp_path / "comparison.json")
    assert found.ranked_by == "elbo"
    assert "All rows share one model" in str(found)
    first, second = (row.runs[0] for row in found.rows)
    # the weights are light-tailed after so few steps, and both estimate one number: 5 errors of each datum, and 1 %
    errors = (first.stderr.square() + second.stderr.square()).sqrt()
    assert float(((first.value - second.value).abs() < 5 * errors + 0.01).double().mean()) > 0.95
    check = lvm.Comparison.load(tmp_path / "linear_gaussian.json")
    assert [row.name for row in check.rows] == ["exact", "diagonal"]
    assert check.rows[0].runs[0].status_shares() == {"zero_variance": 1.0}
    x = lvm.datasets.two_moons(1000)[0]
    exact = lvm.models.LinearGaussian(1, 2).fit_closed_form(x)
    test = lvm.datasets.two_moons(200, seed=1)[0]
    assert check.reference.mean == pytest.approx(float(exact.log_prob(test).detach().double().mean()), abs=1e-5)


def test_a_row_does_not_depend_on_the_others(tmp_path):
    records = []
    for guides in ("diagonal", "flow,diagonal"):
        folder = tmp_path / guides
        call(f"compare --data two_moons --guides {guides} --hidden 8 --steps 4 --particles 9 --out", folder)
        rows = lvm.Comparison.load(folder / "comparison.json").rows
        records.append(next(row.runs[0] for row in rows if row.name == "diagonal"))
    assert records[0].value.equal(records[1].value)


@pytest.mark.parametrize(
    ("model", "guides", "data"),
    [
        ("linear_gaussian", "diagonal,full_rank,none", "two_moons"),
        ("binary", "bernoulli,autoregressive_bernoulli,none", "digits"),
    ],
)
def test_gaps_are_measured_from_what_is_exact(model, guides, data, tmp_path):
    call(f"compare --data {data} --model {model} --guides {guides} --steps 3 --particles 10 --out", tmp_path)
    found = lvm.Comparison.load(tmp_path / "comparison.json")
    assert found.reference.status_shares() == {"exact": 1.0}
    assert found.gap("none") == 0.0
    assert all(found.gap(name) > 0 for name in guides.split(",")[:-1])
    assert not (tmp_path / "linear_gaussian.json").exists()


def test_layers(tmp_path):
    call("compare --data digits --model hierarchical --guides top_down,ladder --steps 3 --particles 5 --out", tmp_path)
    assert "All rows share one model" in str(lvm.Comparison.load(tmp_path / "comparison.json"))


def test_own_guides(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_compared.py").write_text(OWN)
    z = np.random.default_rng(0).normal(size=(80, 1))
    np.save(tmp_path / "x.npy", (z + np.random.default_rng(1).normal(size=(80, 2))).astype("float32"))
    monkeypatch.chdir(tmp_path)
    own = "own_compared:one,own_compared:two"
    call(f"compare --data x.npy --model own_compared:model --guides {own} --steps 200 --lr 0.05 --out table")
    assert "note: own_compared:one is trained with the model first" in capsys.readouterr().out
    found = lvm.Comparison.load("table/comparison.json")
    assert "All rows share one model" in str(found)
    # the posterior has the variance 1 / (1 + |w|^2), which the second guide learns and the first has fixed
    assert [row.name for row in found.rows] == ["own_compared:two", "own_compared:one"]
    sys.modules.pop("own_compared")


def test_data_without_a_linear_gaussian_density(tmp_path, capsys):
    """A constant column and one that varies: of rank one, so that the likelihood has no maximum."""
    x = torch.stack([torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.zeros(50)], -1)
    torch.save(x, tmp_path / "flat.pt")
    call("compare --guides diagonal --steps 3 --hidden 4 --particles 5 --data", tmp_path / "flat.pt")
    assert "no check by a linear-Gaussian model: x: expected data of rank above" in capsys.readouterr().out


@pytest.mark.slow
def test_the_line_of_the_help(tmp_path):
    """As examples/compare_guides.py on another decoder, which has -18.02, -18.11, -18.45 and log p-hat near -17.45.

    Another decoder moves log p(x) by a tenth; differences between guides of one decoder have a spread of 0.02 over
    training seeds (docs/how_to_choose.md).
    """
    line = "compare --data digits --guides diagonal,full_rank,flow --out table"
    command = [sys.executable, "-m", "pyro_lvm", *line.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = lvm.Comparison.load(tmp_path / "table" / "comparison.json")
    assert [row.name for row in found.rows] == ["flow", "full_rank", "diagonal"]
    assert found.rows[0].elbo == pytest.approx(-18.02, abs=0.3)
    assert found.difference("full_rank")[0] == pytest.approx(-0.098, abs=0.08)
    assert found.difference("diagonal")[0] == pytest.approx(-0.437, abs=0.12)
    values = [row.log_marginal for row in found.rows]
    assert max(values) - min(values) < 0.1
    check = lvm.Comparison.load(tmp_path / "table" / "linear_gaussian.json")
    assert check.reference.mean == pytest.approx(12.944, abs=1e-3)  # as in the example: it has no random number
    assert re.search(r"^flow +-18\.", done.stdout, flags=re.MULTILINE)
