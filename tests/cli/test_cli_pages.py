"""What the command line says: help whose examples run, pages of `check`, pictures, and the program itself."""

import re
import shlex
import subprocess
import sys

import pyro
import pytest
import torch

import pyro_lvm as lvm
from pyro_lvm.cli import main
from pyro_lvm.cli.files import read_file
from pyro_lvm.cli.texts import COMMANDS, EPILOG

MISTYPED = """
import pyro, pyro.distributions as dist, torch

def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.stack([z, z], -1), 1.0).to_event(1), obs=x)

def guide(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("Z", dist.Normal(loc, 1.0))
"""


def test_help(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(re.search(rf"^    {name} ", page, flags=re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capsys):
    assert main([name, "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: pyro-lvm {name} ")
    assert COMMANDS[name].page in page
    assert len(re.findall(rf"^  pyro-lvm {name} ", page, flags=re.MULTILINE)) >= (1 if name == "plot" else 2)
    assert max(map(len, COMMANDS[name].page.splitlines())) <= 120


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"pyro-lvm {lvm.__version__} (pyro ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_the_examples_of_the_help_run_as_they_stand(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (COMMANDS[name].examples if name else EPILOG).splitlines()
    calls = [part for line in lines if line.startswith("  pyro-lvm ") for part in line.split("&&")]
    assert len(calls) >= 2
    for words in calls:
        if "diagonal,full_rank,flow" not in words:  # which test_cli_compare.py runs
            pyro.clear_param_store()
            assert main(shlex.split(words)[1:]) == 0


def test_check_prints_the_page_and_its_exit_code_says_whether_there_are_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_checked.py").write_text(MISTYPED)
    assert main(shlex.split("check --data two_moons --model own_checked:model --guide own_checked:guide")) == 1
    out = capsys.readouterr().out
    assert out.startswith("check on 1000 data: 1 error\n\nERROR: results would be wrong\n  [extra-site] ")
    assert main(shlex.split("check --data digits --guide full_rank")) == 0
    assert capsys.readouterr().out == "check on 1000 data: nothing found\n"
    assert main(shlex.split("check --data digits --binarize none --likelihood bernoulli")) == 1
    assert "[data-outside-support]" in capsys.readouterr().out
    sys.modules.pop("own_checked")


def test_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (
        "train --data two_moons --steps 5 --hidden 4 --out run",
        "evaluate run --particles 100",
        "compare --data two_moons --guides diagonal,flow --steps 3 --particles 10 --out table",
        "plot run/log_marginal.json",
        "plot table/comparison.json --out table.svg",
        "plot run --out bound.pdf",
    ):
        pyro.clear_param_store()
        assert main(words.split()) == 0
    assert capsys.readouterr().out.endswith("picture run/log_marginal.png\npicture table.svg\npicture bound.pdf\n")
    assert (tmp_path / "run" / "log_marginal.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "table.svg").read_text()
    assert (tmp_path / "bound.pdf").read_bytes().startswith(b"%PDF")


def test_warnings_and_the_log_become_notes_on_stdout(tmp_path, capsys):
    """Of a mixture with as many components as data some rest on the floor: `fit` says so in the log."""
    torch.save(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)), tmp_path / "x.pt")
    words = "train --model mixture --components 20 --steps 600 --lr 0.1 --out"
    assert main([*words.split(), str(tmp_path / "run"), "--data", str(tmp_path / "x.pt")]) == 0
    said = capsys.readouterr()
    assert re.search(r"^note: components .* rest on the floor", said.out, flags=re.MULTILINE)
    assert said.err == ""


def test_the_program():
    """As a module."""
    run = [sys.executable, "-m", "pyro_lvm"]
    done = subprocess.run([*run, "train", "--data", "digit", "--out", "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"pyro-lvm train: error: --data: expected .*Did you mean 'digits'\?\n", done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="runs a shell")
def test_a_closed_pipe_is_no_error_of_ours(tmp_path):
    command = f"set -o pipefail; {sys.executable} -m pyro_lvm check --data digits | :"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_arrays_of_every_kind(tmp_path):
    import numpy as np

    numbers = np.arange(12).reshape(6, 2)
    np.save(tmp_path / "x.npy", np.asfortranarray(numbers))
    np.savez_compressed(tmp_path / "only.npz", anything=numbers.astype(np.uint8))
    np.savez(tmp_path / "named.npz", other=np.zeros(3), x=numbers.astype(np.float32))
    torch.save(torch.from_numpy(numbers).half().requires_grad_(), tmp_path / "x.pt")
    torch.save(torch.nn.Parameter(torch.from_numpy(numbers).float()), tmp_path / "parameter.pt")
    notes = {"x.npy": "int64 became float32", "only.npz": "uint8 became float32", "named.npz": ""}
    notes |= {"x.pt": "float16 became float32", "parameter.pt": ""}
    for name, note in notes.items():
        x, said = read_file(tmp_path / name)
        assert (x.tolist(), x.dtype, said) == (numbers.tolist(), torch.float32, note)
        assert not x.requires_grad
