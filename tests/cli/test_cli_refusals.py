"""Calls that make no sense: exit code 2, one sentence on stderr that names the culprit, nothing run, no traceback."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from pyro_lvm.cli import main

OWN = """
import pyro, pyro.distributions as dist, torch
number = 3
def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
def mistyped(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("Z", dist.Normal(loc, 1.0))
class Needy:
    def __init__(self, size):
        self.size = size
    def __call__(self, x): ...
class Mute:
    pass
"""


class Payload:
    """Reading it as a pickle would make a folder of this name."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run and with files of every wrong kind; the tests only read it."""
    folder = tmp_path_factory.mktemp("cli")
    run = str(folder / "run")
    assert main(["train", "--data", "two_moons", "--steps", "3", "--hidden", "4", "--out", run]) == 0
    assert main(["evaluate", run, "--particles", "50"]) == 0
    exact = str(folder / "exact")
    assert main(["train", "--data", "two_moons", "--model", "mixture", "--steps", "2", "--out", exact]) == 0
    assert main(["evaluate", exact]) == 0
    other = str(folder / "other_split")
    words = ["--data", "two_moons", "--split-seed", "1", "--steps", "3", "--hidden", "4", "--out", other]
    assert main(["train", *words]) == 0
    for name in ("pair.pt", "run.json"):
        shutil.copytree(run, folder / f"without_{name}")
        (folder / f"without_{name}" / name).unlink()
    shutil.copytree(run, folder / "torn")
    (folder / "torn" / "pair.pt").write_bytes((folder / "run" / "pair.pt").read_bytes()[:1000])
    shutil.copytree(run, folder / "edited")
    text = (folder / "run" / "run.json").read_text()
    (folder / "edited" / "run.json").write_text(text.replace('"latent_dim": 2', '"latent_dim": 3'))
    (folder / "strange.json").write_text(json.dumps({"kind": "poem"}))
    (folder / "no.json").write_text("{")
    (folder / "own_pair.py").write_text(OWN)
    (folder / "leaving.py").write_text("raise SystemExit(0)")
    write_data(folder)
    return folder


def write_data(folder):
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    np.save(folder / "x.npy", x)
    np.save(folder / "three.npy", np.zeros((20, 3), np.float32))
    np.save(folder / "one.npy", x[:1])
    np.save(folder / "empty.npy", x[:0])
    np.save(folder / "number.npy", np.array(1.0))
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.save(folder / "complex.npy", x.astype(complex))
    np.save(folder / "infinite.npy", np.full((20, 2), np.inf))
    np.save(folder / "missing.npy", np.full((20, 2), np.nan))
    np.save(folder / "gap.npy", np.where(np.arange(40).reshape(20, 2) == 7, np.nan, x))
    np.save(folder / "objects.npy", np.array([Payload(str(folder / "npy_ran"))] * 3, dtype=object), allow_pickle=True)
    (folder / "torn.npy").write_bytes((folder / "x.npy").read_bytes()[:-50])
    (folder / "noise.npy").write_bytes(b"nothing of the kind")
    np.savez(folder / "two.npz", a=x, b=x)
    np.savez(folder / "objects.npz", x=np.array([Payload(str(folder / "npz_ran"))], dtype=object))
    (folder / "archive.npy").write_bytes((folder / "two.npz").read_bytes())
    (folder / "array.npz").write_bytes((folder / "x.npy").read_bytes())
    (folder / "noise.npz").write_bytes(b"PK nothing of the kind")
    torch.save({"x": torch.ones(3)}, folder / "dictionary.pt")
    torch.save(Payload(str(folder / "pt_ran")), folder / "objects.pt")
    (folder / "pickle.pt").write_bytes(pickle.dumps(Payload(str(folder / "pickle_ran"))))
    torch.save(torch.ones(5, 2).to_sparse(), folder / "sparse.pt")
    (folder / "text.txt").write_text("1 2 3")
    (folder / "no_images").mkdir()
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(b"\x89PNG nothing of the kind")


TRAIN = "train --out new --steps 2 "
CALLS = {  # the call, what the sentence says
    "": "expected a command: train, evaluate",
    "trian": "Did you mean 'train'?",
    "--nope": "those of `pyro-lvm --help`",
    "train": "required: --out",
    "train --out new": "--data: expected data, got none",
    "train --data digits": "required: --out",
    TRAIN + "--data digits --epoch 3": "Did you mean 'epochs'?",
    TRAIN + "--data digits extra": "expected no further argument, got 'extra'",
    TRAIN + "--data digits --epochs 1": "not allowed with argument",
    TRAIN + "--data digit": "Did you mean 'digits'?",
    TRAIN + "--data nothing.npy": "nothing.npy: expected a readable file, got No such file",
    TRAIN + "--data text.txt": "expected a file that ends with .npy, .npz, .pt",
    TRAIN + "--data one.npy": "0 of 1 held out",
    TRAIN + "--data empty.npy": "empty.npy: x: expected shape (N, ...) with N >= 1",
    TRAIN + "--data number.npy": "number.npy: x: expected shape (N, ...), got a single number",
    TRAIN + "--data words.npy": "words.npy: x: expected a tensor",
    TRAIN + "--data complex.npy": "complex.npy",
    TRAIN + "--data infinite.npy": "got infinity",
    TRAIN + "--data missing.npy": "nothing but NaN",
    TRAIN + "--data gap.npy": "gap.npy: expected numbers only, got NaN in 1 of ",
    "evaluate run --data gap.npy": "gap.npy: expected numbers only, got NaN in 1 of ",
    TRAIN + "--data objects.npy": "objects.npy: expected a .npy file with numbers, got one that is damaged, or that",
    TRAIN + "--data torn.npy": "torn.npy: expected a .npy file with numbers",
    TRAIN + "--data noise.npy": "noise.npy: expected a .npy file with numbers",
    TRAIN + "--data archive.npy": "archive.npy: expected a .npy file with numbers",
    TRAIN + "--data two.npz": "expected one array, or one called 'x', got ['a', 'b']",
    TRAIN + "--data objects.npz": "objects.npz: expected a .npz file with numbers",
    TRAIN + "--data array.npz": "array.npz: expected a .npz file with numbers",
    TRAIN + "--data noise.npz": "noise.npz: expected a .npz file with numbers",
    TRAIN + "--data dictionary.pt": "expected a tensor, got a dict",
    TRAIN + "--data objects.pt": "objects.pt: expected a .pt file with numbers",
    TRAIN + "--data pickle.pt": "pickle.pt: expected a .pt file with numbers",
    TRAIN + "--data sparse.pt": "dense",
    TRAIN + "--data no_images": "no_images: expected images",
    TRAIN + "--data images": "a.png: expected an image",
    TRAIN + "--data images --binarize dynamic": "--binarize: expected none or threshold",
    TRAIN + "--data x.npy --binarize threshold": "--binarize: expected data that have it, got x.npy",
    TRAIN + "--data digits --test-share 0.5": "--test-share: expected data that have it, got digits",
    TRAIN + "--data x.npy --test-share 1.5": "--test-share: expected a number above 0 and below 1",
    TRAIN + "--data digits --binarize gray": "--binarize: invalid choice",
    TRAIN + "--data mnist --root nowhere": "Here root is --root.",
    TRAIN + "--data digits --model vea": "Did you mean 'vae'?",
    TRAIN + "--data digits --guide flw": "Did you mean 'flow'?",
    TRAIN + "--data digits --guide ladder": "That one fits hierarchical.",
    TRAIN + "--data digits --model mixture --guide flow": "expected one that fits mixture, of none or module:name",
    TRAIN + "--data digits --likelihood gauss": "--likelihood: expected one of bernoulli",
    TRAIN + "--data digits --likelihood binomial": "Pass e.g. binomial:16",
    TRAIN + "--data digits --likelihood binomial:x": "Pass e.g. binomial:16",
    TRAIN + "--data digits --likelihood normal:3": "expected normal without a number",
    TRAIN + "--data two_moons --likelihood bernoulli": "expected values in Boolean()",
    TRAIN + "--data two_moons --model linear_gaussian --likelihood normal": "--likelihood: expected a pair that has it",
    TRAIN + "--data two_moons --model binary": "expected values in Boolean()",
    TRAIN + "--data two_moons --components 3": "--components: expected a pair that has it",
    TRAIN + "--data two_moons --model mixture --components 5000": "distinct data",
    TRAIN + "--data digits --loss foo": "--loss: expected elbo, mean_field or iw:K",
    TRAIN + "--data digits --loss iw:1": "K from 2 to 10000",
    TRAIN + "--data two_moons --model mixture --loss iw:5": "--loss: expected elbo, where there is no guide",
    TRAIN + "--data digits --model binary --loss mean_field": "--loss: expected elbo or iw:K with guide bernoulli",
    TRAIN + "--data digits --latent-dim 0": "--latent-dim: expected an integer from 1",
    TRAIN + "--data digits --latent-dim 2.5": "--latent-dim: expected an integer, got '2.5'",
    TRAIN + "--data digits --batch-size 0": "--batch-size: expected an integer from 1",
    TRAIN + "--data digits --lr nan": "--lr: expected a number above 0",
    TRAIN + "--data digits --lr 1e300": "--lr: expected a number above 0 and below",
    TRAIN + "--data digits --seed -1": "--seed: expected",
    TRAIN + "--data digits --device cuda:99": "device: expected",
    TRAIN + "--data digits --device gpu": "device: expected a torch device",
    "train --data digits --steps 2 --hidden 4,x --out new": "--hidden: expected an integer, got 'x'",
    "train --data digits --out run": "--out: expected a folder without a run",
    "train --data digits --steps 2 --out x.npy": "--out: expected a path that can be written to",
    "train --data digits --steps 2 --out x.npy/new": "--out: expected a path that can be written to",
    "train --out run --resume --lr 0.1": "--lr: expected 0.002, as in run, got 0.1",
    "train --out run --resume --data digits": "--data: expected two_moons, as in run, got digits",
    "train --out torn --resume --hidden 5": "--hidden: expected 4, as in torn, got 5",
    TRAIN + "--data x.npy --model own_pair:model": "--guide: expected one of diagonal",
    TRAIN + "--data x.npy --model nowhere:model --guide none": "got none of the name 'nowhere'",
    TRAIN + "--data x.npy --model own_pair.py:model --guide none": "Name a module without its ending",
    TRAIN + "--data x.npy --model ../own_pair:model --guide none": "Name a module without its ending",
    TRAIN + "--data x.npy --model :model --guide none": "--model: expected module:name",
    TRAIN + "--data x.npy --model own_pair:modle --guide none": "Did you mean 'model'?",
    TRAIN + "--data x.npy --model own_pair:number --guide none": "expected something that can be called, got 3",
    TRAIN + "--data x.npy --model own_pair:Needy --guide none": "expected a class that needs no arguments",
    TRAIN + "--data x.npy --model own_pair:Mute --guide none": "expected a class whose instances can be called",
    TRAIN + "--data x.npy --model leaving:model --guide none": "which ends the program",
    "train --out new --data x.npy --model own_pair:model --guide own_pair:mistyped": "'Z'",
    "train --out new --data x.npy --model own_pair:model --guide ladder": "that fits a model of your own",
    "evaluate": "required: RUN",
    "evaluate nowhere": "nowhere, which is no folder",
    "evaluate images": "images without one",
    "evaluate without_run.json": "without_run.json without one",
    "evaluate without_pair.pt": "expected a run that has ended",
    "evaluate torn": "torn/pair.pt",
    "evaluate edited": "checksum",
    "evaluate run --particles 0": "--particles: expected an integer from 1",
    "evaluate run --data three.npy": "--data: expected data of shape (2,), got shape (3,) in three.npy",
    "evaluate run --data digits": "--data: expected data of shape (2,), got shape (64,) in digits",
    "evaluate run --data nothing.npy": "No such file",
    "evaluate run --device tpu": "device: expected a torch device",
    "evaluate run --out x.npy/new": "--out: expected a path that can be written to",
    "compare": "--data: expected RUN RUN ... or --data with --guides",
    "compare run": "Of one run: pyro-lvm evaluate run",
    "compare run nowhere": "nowhere, which is no folder",
    "compare run run": "RUN: expected different runs",
    "compare run other_split": "RUN: expected runs that hold out the same data",
    "compare run exact --data digits": "--data: expected RUN RUN ... or --data with --guides, got both",
    "compare run exact --lr 0.1": "--lr: expected RUN RUN",
    "compare --data digits": "--guides: expected",
    "compare --data digits --guides flow,": "different names with commas",
    "compare --data digits --guides flow,flow": "different names with commas",
    "compare --data digits --guides flow,fullrank": "Did you mean 'full_rank'?",
    "compare --data digits --guides flow --epochs 3": "expected those of `pyro-lvm compare --help`, got --epochs",
    "compare --data digits --guides flow --out x.npy": "--out: expected a path that can be written to",
    "check": "--data: expected data, got none",
    "check --data two_moons --guide ladder": "That one fits hierarchical.",
    "check --data two_moons --out x": "got --out",
    "plot": "required: FILE",
    "plot nothing.json": "got nothing.json: No such file or directory",
    "plot strange.json": "got strange.json: poem",
    "plot no.json": "got no.json: something else",
    "plot run/run.json": "got run/run.json: run",
    "plot images": "images without one",
    "plot run/log_marginal.json --out picture.xyz": "--out: expected an ending of",
    "plot run/log_marginal.json --out x.npy/picture.png": "--out: expected a path that can be written to",
    "plot exact/log_marginal.json": "estimates with a k-hat",
    "plot without_pair.pt": "expected a run that has ended",
}


@pytest.mark.parametrize("call", CALLS, ids=[call.removeprefix(TRAIN) or "nothing" for call in CALLS])
def test_one_sentence(call, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    code = main(call.split())
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1
    assert err.endswith("\n")
    command = call.split()[0] if call.split()[:1] and call.split()[0] in main.__globals__["_COMMANDS"] else ""
    assert err.startswith(f"pyro-lvm {command}".strip() + ": error: ")
    assert CALLS[call] in err
    assert "Traceback" not in err


def test_nothing_was_run_or_left_behind(folder):
    """After all calls above, in the order of this file."""
    assert not list(folder.glob("*_ran"))
    assert not list((folder / "new").glob("*")) if (folder / "new").exists() else True
