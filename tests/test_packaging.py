"""What `setup.cfg` and CONTRIBUTING.md say of the package is what it is."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pyro_lvm

PACKAGE = Path(pyro_lvm.__file__).parent
ROOT = Path(__file__).parents[1]
NAMES = {"pyro": "pyro-ppl", "sklearn": "scikit-learn", "skimage": "scikit-image", "PIL": "pillow"}


def config() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg", encoding="utf-8")
    return found


def declared(words: str) -> set[str]:
    return {re.split(r"[<>=!~;\s]", line)[0] for line in words.split("\n") if line}


def imported(path: Path) -> set[str]:
    """Packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module))
    return {name.split(".")[0] for name in found} - {"pyro_lvm", *sys.stdlib_module_names}


def test_what_is_imported_is_declared() -> None:
    needed = {NAMES.get(name, name) for path in PACKAGE.rglob("*.py") for name in imported(path)}
    required = declared(config()["options"]["install_requires"])
    assert needed - declared(config()["options.extras_require"]["data"]) == required


def test_layers_are_listed_as_they_are_checked() -> None:
    layers = config()["importlinter:contract:layers"]["layers"].replace("pyro_lvm.", "").strip()
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```\n{layers}\n```" in text
