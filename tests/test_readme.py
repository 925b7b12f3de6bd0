import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")  # the verdict that it prints says it
def test_python_blocks_run_in_order(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the file that is saved
    torch.manual_seed(0)
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    fitted = namespace["fitted"].params  # the comment in the README: near the values that made the data
    assert abs(fitted["bend"] - 0.5) < 0.1
    assert abs(fitted["noise"] - 0.3) < 0.1
    assert "verdict" in capsys.readouterr().out
    assert namespace["result"].value.shape == (1000,)


def test_every_file_that_it_names_exists():
    root = Path(__file__).parents[1]
    paths = re.findall(r"\]\(([\w/]+\.md)\)", README) + re.findall(r"examples/\w+\.py", README)
    assert paths
    assert all((root / path).exists() for path in paths)
