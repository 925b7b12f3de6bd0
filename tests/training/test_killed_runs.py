"""Whenever a process dies, a good file is there, and the run that goes on from it is the run that was not killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["files"] >= 4
    assert report["points"] >= 40  # in the writing of them
    runs = report["points"] + 15 + 5  # at random moments, and from outside during a write
    assert report["killed"] == report["same"] == runs
    assert report["resumed"] > runs / 2  # the others died before their first file was there
    file = report["file"]
    assert file["calls"] == ["close", "flush", "fsync", "half", "open", "replace", "write"]
    assert file["old"] == file["points"] > 200
    assert report["unreadable"] == []
