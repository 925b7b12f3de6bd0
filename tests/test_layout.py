"""The structure: what is public, what is imported, and who may see Pyro's handlers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_lvm

PACKAGE = Path(pyro_lvm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def test_import_loads_nothing_heavy():
    heavy = ("arviz", "torchvision", "matplotlib", "sklearn", "pandas", "xarray")
    code = f"import sys, pyro_lvm; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in pyro_lvm.__all__:
        assert getattr(pyro_lvm, name) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_tracing_sees_the_handlers(path):
    text = path.read_text(encoding="utf-8")
    if path.parent.name != "tracing":
        assert not re.search(r"poutine", text)
    if path.parent.name == "ops" or path.name == "nn.py":
        assert not re.search(r"^\s*(import|from) pyro\b(?!_)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_say_what_they_are_and_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith(('"""', 'r"""'))
    assert text.count("\n") <= 400


def test_log_joint_less_log_guide_is_written_once():
    found = [path for path in FILES if "log_joint - log_q" in path.read_text(encoding="utf-8")]
    assert [path.name for path in found] == ["weights.py"]
