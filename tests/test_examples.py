import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_runs_and_draws(path, tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, str(path), "--smoke", "--particles", "50", "--picture", str(picture)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"picture: {picture}" in out.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_examples_are_short():
    assert EXAMPLES
    for path in EXAMPLES:
        assert path.read_text(encoding="utf-8").count("\n") < 120
