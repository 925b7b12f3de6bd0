"""The README's table of packages says what `benchmarks/features.py` measures; those that are installed are asked."""

import re
from pathlib import Path

import pytest

from benchmarks import features

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROWS = {line.split("|")[1].strip(): line.split("|")[2:7] for line in README.splitlines() if line.startswith("| ")}


def measured(facts):
    return {question: answer for _, question, answer in facts}


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_this_package():
    found = measured(features.this_package())
    (errors,) = numbers(found["log p(x)"])[1:]
    assert errors < 3.5  # the largest of 50 normal errors is above it once in 40 times
    count, low, high = numbers(found["k-hat of 50 data"])
    assert count == 50
    quoted = numbers(ROWS["k-hat of 50 data"][0])
    assert [round(low, 1), round(high, 1)] == quoted[1:]
    gradient = numbers(found["weighted bound, gradient of a Bernoulli guide"])
    (row,) = (row for name, row in ROWS.items() if name.startswith("weighted bound"))
    assert numbers(row[0]) == [gradient[0]]


def test_pyro():
    found = measured(features.pyro_itself())
    assert numbers(ROWS["log p(x) of N data"][1]) == [round(n, 1) for n in numbers(found["log p(x)"])]
    assert numbers(ROWS["k-hat of 50 data"][1])[0] == round(numbers(found["k-hat of 50 data"])[0], 1)
    (row,) = (row for name, row in ROWS.items() if name.startswith("weighted bound"))
    gradient, _, exact = numbers(found["weighted bound, gradient of a Bernoulli guide"])
    assert numbers(row[1]) == [abs(gradient)] == [0.0]
    (name,) = (name for name in ROWS if name.startswith("weighted bound"))
    assert numbers(name) == [exact]


@pytest.mark.parametrize(
    ("package", "facts"),
    [("numpyro", features.numpyro_package), ("pythae", features.pythae_package), ("scvi", features.scvi_tools)],
)
@pytest.mark.filterwarnings("ignore")
def test_packages_that_are_installed(package, facts):
    pytest.importorskip(package, reason=f"{package} is not installed")
    words = " ".join(answer for _, _, answer in facts())
    assert {
        "numpyro": "one number, 1.85" in words,
        "pythae": "100 are made" in words,
        "scvi": "12 are made, divided by 10: 0.18" in words,
    }[package]
