"""Pictures of comparisons and of gaps: each bar and point stands where the numbers are."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import pyro_lvm as lvm
from pyro_lvm import plots
from pyro_lvm.comparison import ComparisonRow
from tests.plots.records import comparison, log_marginal

NAMES = ["flow", "mean-field & <b>", "costs $5$ or $6$"]
PANELS = [plots.bounds, plots.differences, plots.gaps, plots.statuses]


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def bars(ax):
    """Label -> (left, width) of the bar of each line."""
    return {
        part.get_label(): [(bar.get_x(), bar.get_width()) for bar in part]
        for part in ax.containers
        if hasattr(part, "patches")
    }


def gap(approximation=(0.5, 0.1), amortization=(0.25, 0.75), converged=(True, True)):
    """An InferenceGap with nothing in it but what is drawn."""
    names = lvm.InferenceGap.__dataclass_fields__
    parts = {"approximation": approximation, "amortization": amortization}
    tensors = {name: torch.tensor(part, dtype=torch.float64) for name, part in parts.items()}
    empty = dict.fromkeys(names)
    return lvm.InferenceGap(**empty | tensors | {"converged": torch.tensor(converged), "provenance": {}})


@pytest.mark.parametrize("panel", PANELS, ids=lambda f: f.__name__)
def test_lines_are_named_and_the_best_is_on_top(panel):
    own = Figure().subplots()
    for ax in (panel(comparison(), ax=own), panel(comparison())):
        assert [text.get_text() for text in ax.get_yticklabels()] == NAMES
        assert ax.get_ylim()[0] > ax.get_ylim()[1]
        ax.figure.canvas.draw()  # two dollars in a name are no formula
    assert own.get_title() == ax.get_title()
    assert own.figure is not ax.figure


def test_bounds():
    ax = plots.bounds(comparison())
    elbo, value, reference = (
        next(l for l in ax.lines if l.get_label() == n) for n in ("ELBO", "_nolegend_", "reference")
    )
    np.testing.assert_allclose(elbo.get_xdata(), [-1.0, -1.5, -4.0])
    np.testing.assert_allclose(value.get_xdata(), [-0.75, -1.0, -2.0])
    np.testing.assert_allclose(reference.get_xdata(), -0.5)
    assert sorted(labels(ax)) == ["ELBO", "log p-hat", "reference"]
    # The standard error of a mean over four data with the same error each is half of it.
    errors = [np.ptp(segment[:, 0]) / 2 for segment in ax.containers[0][2][0].get_segments()]
    np.testing.assert_allclose(errors, [0.1, 0.05, 0.2])
    assert "reference" not in labels(plots.bounds(comparison(reference=False)))


@pytest.mark.parametrize(
    ("ranked_by", "expected", "title"),
    [
        ("elbo", [0.0, -0.5, -3.0], "ELBO \u2212 best, \u00b12 errors"),
        ("value", [0.0, -0.25, -1.25], "log p-hat \u2212 best, \u00b12 errors"),
    ],
)
def test_differences(ranked_by, expected, title):
    result = comparison(ranked_by=ranked_by)
    ax = plots.differences(result)
    drawn = ax.containers[0]
    np.testing.assert_allclose(drawn[0].get_xdata(), expected)
    errors = [np.ptp(segment[:, 0]) / 4 for segment in drawn[2][0].get_segments()]  # two to each side
    np.testing.assert_allclose(errors, [result.difference(name)[1] for name in NAMES])
    assert ax.get_title() == title


def test_statuses():
    found = bars(plots.statuses(comparison()))
    assert found == {
        "no fault found": [(0, 1), (0, 0), (0, 0.25)],
        "heavy tail": [(1, 0), (0, 1), (0.25, 0.5)],
        "unreliable": [(1, 0), (1, 0), (0.75, 0.25)],
    }
    ax = plots.statuses(comparison())
    colours = {part.get_label(): to_hex(part.patches[0].get_facecolor()) for part in ax.containers}
    assert colours == {"no fault found": "#009e73", "heavy tail": "#f0e442", "unreliable": "#d55e00"}


def test_gaps_of_a_comparison():
    ax = plots.gaps(comparison())
    assert bars(ax) == {
        "log p-hat \u2212 ELBO": [(0, 0.25), (0, 0.5), (0, 2.0)],
        "reference \u2212 log p-hat": [(0.25, 0.25), (0.5, 0.5), (2.0, 1.5)],
    }
    assert [text.get_text() for text in ax.texts] == ["0.50", "1.00", "3.50"]
    without = plots.gaps(comparison(reference=False))
    assert list(bars(without)) == ["log p-hat \u2212 ELBO"]
    assert [text.get_text() for text in without.texts] == ["0.25", "0.50", "2.00"]


def test_gaps_of_inference_gaps():
    for result, names in ((gap(), []), ({"a": gap(), "b": gap()}, ["a", "b"])):
        for ax in (plots.gaps(result), plots.gaps(result, ax=Figure().subplots())):
            found, lines = bars(ax), max(len(names), 1)
            np.testing.assert_allclose(found["the encoder: amortization"], [(0, 0.5)] * lines)
            np.testing.assert_allclose(found["the family: approximation"], [(0.5, 0.3)] * lines)
            assert [text.get_text() for text in ax.texts] == ["0.80"] * lines
            assert [text.get_text() for text in ax.get_yticklabels()] == names
            # Two standard errors: of 0.25 and 0.75 the deviation is 0.5 / sqrt(2), the error 0.25.
            segments = [part[2][0].get_segments()[0] for part in ax.containers if not hasattr(part, "patches")]
            np.testing.assert_allclose([np.ptp(segment[:, 0]) / 2 for segment in segments], [0.5, 0.4])


def test_the_number_stands_beyond_every_error_bar():
    """That of the encoder's part, 0.45 +- 0.9, ends further than the bars do, at 0.45 + 0.02 +- 0.0."""
    ax = plots.gaps(gap(approximation=(0.02, 0.02), amortization=(0.9, 0.0)))
    (text,) = ax.texts
    assert text.xy[0] == pytest.approx(0.45 + 0.9)
    assert text.get_text() == "0.47"


def test_one_datum_has_no_error_over_data():
    ax = plots.gaps(gap((0.5,), (0.25,), (True,)))
    assert all(hasattr(part, "patches") for part in ax.containers)


@pytest.mark.parametrize("reference", [False, True])
def test_all_panels_of_a_comparison(reference):
    result = comparison(reference)
    figure = result.plot()
    assert isinstance(figure, Figure)
    assert [ax.get_title() for ax in figure.axes] == [panel(result).get_title() for panel in PANELS]
    figure.savefig("/dev/null", format="png")


def test_both_panels_of_an_inference_gap():
    figure = plots.inference_gap(gap(converged=(False, True)))
    means, each = figure.axes
    assert bars(means) == bars(plots.gaps(gap()))
    heights = {part.get_label(): [(bar.get_y(), bar.get_height()) for bar in part] for part in each.containers}
    # The second datum has the larger gap, 0.85 after 0.75, and stands first.
    np.testing.assert_allclose(heights["the encoder"], [(0, 0.75), (0, 0.25)])
    np.testing.assert_allclose(heights["the family"], [(0.75, 0.1), (0.25, 0.5)])
    assert next(line for line in each.lines if line.get_label() == "not converged").get_xdata().tolist() == [1]
    assert "not converged" not in labels(plots.inference_gap(gap()).axes[1])


@pytest.mark.parametrize("value", [float("-inf"), float("nan")], ids=["no support", "not a number"])
def test_what_is_not_finite_is_left_out(value):
    good, bad = log_marginal([-1.0, -2.0]), log_marginal([value, -1.0], status="no_support", stderr=float("nan"))
    rows = (ComparisonRow("good", (good,), 0, 0.0, None), ComparisonRow("bad", (bad,), 0, 0.0, None))
    figure = plots.comparison(lvm.Comparison(rows, "elbo", None, ()))
    figure.savefig("/dev/null", format="png")
    assert figure.axes[0].get_xlim()[0] > -10


def test_one_pair_on_one_datum():
    result = lvm.Comparison((ComparisonRow("one", (log_marginal([-1.0]),), 0, 0.0, None),), "elbo", None, ())
    plots.comparison(result).savefig("/dev/null", format="png")


def test_long_names_are_broken():
    name = "a name that is much longer than the picture has room for"
    result = lvm.Comparison((ComparisonRow(name, (log_marginal([-1.0, -2.0]),), 0, 0.0, None),), "elbo", None, ())
    lines = plots.bounds(result).get_yticklabels()[0].get_text().splitlines()
    assert " ".join(lines) == name
    assert max(map(len, lines)) <= 18


@pytest.mark.parametrize("draw", [*PANELS, plots.comparison, plots.inference_gap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("wrong", [None, 3, "text", log_marginal([-1.0])], ids=lambda v: type(v).__name__)
def test_another_record_is_refused(draw, wrong):
    with pytest.raises(lvm.DataTypeError, match="expected an? (Comparison|InferenceGap), got"):
        draw(wrong)


def test_other_refusals():
    with pytest.raises(lvm.DataTypeError, match="at least one InferenceGap"):
        plots.gaps({})
    with pytest.raises(lvm.DataTypeError, match="ax: expected matplotlib axes, got Figure"):
        plots.bounds(comparison(), ax=Figure())
