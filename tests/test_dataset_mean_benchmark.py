"""The quoted repeats of `evidence.dataset_mean`: what the documentation says, and one of them again."""

import json
from pathlib import Path

import pytest

from benchmarks.dataset_mean import STATED, one, summary

RESULT = json.loads((Path(__file__).parents[1] / "benchmarks/dataset_mean.json").read_text())


def test_the_unbiased_interval_covers_and_the_plain_one_does_not():
    means = RESULT["means"]
    assert RESULT["repeats"] == RESULT["seeds"] == 500
    assert 0.93 <= means["value"]["coverage"] <= 0.97
    assert abs(means["value"]["mean_error"]) < 3 * means["value"]["mean_error_stderr"]
    assert means["plain"]["errors_off"] < -5


def test_a_summary_of_known_errors():
    stated = dict.fromkeys(STATED.values(), 1.0)
    runs = [{"seed": i, "particles": 1.0} | dict.fromkeys(STATED, float(i)) | stated for i in range(4)]  # errors 0 to 3
    found = summary(runs)["means"]["value"]
    assert (found["mean_error"], found["errors_off"], found["coverage"]) == (1.5, 1.5, 0.5)


@pytest.mark.slow
@pytest.mark.statistical
def test_one_repeat_again():
    """Bounds are five times what one repeat scatters by, and the bias of the plain mean eight."""
    run = one(seed=0)
    assert abs(run["value"]) < 5 * run["stderr"]
    assert run["plain"] < -4 * run["plain_stderr"]
    assert abs(run["stderr"] / RESULT["means"]["value"]["stated_stderr"] - 1) < 0.25
