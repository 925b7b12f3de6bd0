"""Pictures of single records: points, lines, bars and the numbers in the legends."""

import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import pyro_lvm as lvm
from pyro_lvm import plots
from pyro_lvm.training.history import History
from tests.plots.records import log_marginal


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def both(draw, *args):
    """Drawn into axes that are given, and into new ones."""
    own = Figure().subplots()
    assert draw(*args, ax=own) is own
    ax = draw(*args)
    assert ax.figure is not own.figure
    return own, ax


def fit_result(rows):
    losses = torch.tensor([row["loss"] for row in rows], dtype=torch.float64)
    return lvm.FitResult(losses, len(rows), 0.1, "num_steps", 0, History(rows), {}, None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Training.


def test_history_has_the_mean_of_each_epoch_and_what_was_recorded():
    rows = [
        {"step": 1, "epoch": 1, "loss": 4.0, "seconds": 0.1},
        {"step": 2, "epoch": 1, "loss": 2.0, "seconds": 0.2, "score": -3.5, "learning_rate": 0.1, "Valid": "none"},
        {"step": 3, "epoch": 2, "loss": math.inf, "seconds": 0.3},  # skipped
        {"step": 4, "epoch": 2, "loss": 1.0, "seconds": 0.4, "score": -1.5, "test_bound": np.float64(-2.5)},
        {"step": 5, "epoch": 3, "loss": math.nan, "seconds": 0.5, "score": math.nan},
    ]
    for ax in both(plots.history, fit_result(rows)):
        drawn = {line.get_label(): np.column_stack(line.get_data()).tolist() for line in ax.lines}
        assert drawn == {
            "training: \u2212loss, mean of each epoch": [[1, -3.0], [2, -1.0]],
            "score": [[1, -3.5], [2, -1.5]],
            "test_bound": [[2, -2.5]],
        }
        assert labels(ax) == list(drawn)
        assert ax.get_ylabel() == "bound, nats per datum"


def test_history_of_a_run():
    model = lvm.models.LinearGaussian(1, 2)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    score = lvm.callbacks.validation_elbo(x)
    stop = lvm.callbacks.EarlyStopping(score, patience=9, every=2)
    fitted = lvm.fit(model, model.posterior_guide, x, num_epochs=4, batch_size=8, seed=0, callbacks=[stop])
    ax = plots.history(fitted)
    training, validation = ax.lines
    np.testing.assert_allclose(training.get_ydata(), -fitted.losses.reshape(4, 3).mean(1))
    assert validation.get_xdata() == pytest.approx([2, 4])


def test_history_refuses_what_is_no_run():
    with pytest.raises(lvm.DataTypeError, match="result: expected a FitResult, got list"):
        plots.history([1.0])


# ---------------------------------------------------------------------------------------------------------------------
# Weights.

STATUS = ["unreliable", "heavy_tail", "no_fault_found", "unreliable", "zero_variance"]
RECORD = log_marginal([0.0] * 5, None, STATUS, [0.9, 0.55, 0.1, 1.2, math.nan], ess=[2.0, 20.0, 80.0, 1.0, 100.0])


def points(ax):
    return {part.get_label(): part.get_offsets().tolist() for part in ax.collections}


def test_khat_is_sorted_and_counted():
    for ax in both(plots.khat, RECORD):
        assert points(ax) == {
            "zero variance: 1": [],  # equal weights have no tail
            "no fault found: 1": [[0, 0.1]],
            "heavy tail: 1": [[1, 0.55]],
            "unreliable: 2": [[2, 0.9], [3, 1.2]],
        }
        assert (ax.lines[0].get_label(), ax.lines[0].get_ydata()[0]) == ("usable up to 0.5", 0.5)  # both, at K = 100
        assert "no k-hat: 1" in labels(ax)
        colour = next(part for part in ax.collections if part.get_label() == "unreliable: 2").get_facecolor()[0]
        assert to_hex(colour) == "#d55e00"


@pytest.mark.parametrize(("num_particles", "expected"), [(10, [0.5]), (1000, [0.5, 2 / 3]), (10**6, [0.5, 0.7])])
def test_khat_has_the_thresholds_of_the_verdict(num_particles, expected):
    """min(1 - 1 / log10 K, 0.7): none is left for ten particles."""
    record = log_marginal([0.0, 0.0], khat=0.2, num_particles=num_particles)
    assert [line.get_ydata()[0] for line in plots.khat(record).lines] == pytest.approx(expected)


def test_ess_is_a_share_of_the_draws():
    for ax in both(plots.ess, RECORD):
        assert points(ax) == {
            "zero variance: 1": [[4, 1.0]],
            "no fault found: 1": [[3, 0.8]],
            "heavy tail: 1": [[2, 0.2]],
            "unreliable: 2": [[0, 0.01], [1, 0.02]],
        }
        assert ax.lines[0].get_ydata()[0] == 0.01
        assert ax.get_yscale() == "log"
        assert ax.get_ylim()[0] < 0.01 < 1 < ax.get_ylim()[1]
        assert ax.yaxis.get_major_formatter()(0.01) == "0.01"
    nothing = log_marginal([-math.inf], status="no_support", ess=math.nan)
    assert "no weight: 1" in labels(plots.ess(nothing))


def test_an_expectation_has_weights_too():
    model = lvm.models.LinearGaussian(1, 2)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    result = lvm.expectation(model, model.posterior_guide, x, lambda z: z, num_particles=100, seed=0)
    assert "zero variance: 6" in labels(plots.khat(result))
    assert "zero variance: 6" in labels(plots.ess(result))


@pytest.mark.parametrize("draw", [plots.khat, plots.ess])
def test_what_has_no_weights_is_refused(draw):
    with pytest.raises(lvm.DataTypeError, match="record: expected a LogMarginal or an Expectation, got Tensor"):
        draw(torch.zeros(3))


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_log_weights_as_a_histogram(shape):
    # Weights 1, 1, 2, 4: their mean is 2, the mean of their logs (3 / 4) log 2.
    table = torch.tensor([1.0, 1.0, 2.0, 4.0]).log().reshape(shape)
    for ax in both(plots.log_weights, table):
        marked = {line.get_label(): line.get_xdata()[0] for line in ax.lines}
        assert marked == pytest.approx({"ELBO 0.52 nats": 0.75 * math.log(2), "log p-hat 0.69 nats": math.log(2)})
        heights = [bar.get_height() for bar in ax.patches]
        assert sum(heights) == 4
        assert heights[0] == 2
        assert "4 draws" in labels(ax)


def test_weights_of_zero_are_counted():
    ax = plots.log_weights(np.array([-np.inf, 0.0, 0.0, -np.inf]))
    assert "2 of weight zero: ELBO \u2212\u221e" in labels(ax)
    assert [line.get_label() for line in ax.lines][:1] == ["log p-hat \u22120.69 nats"]  # the mean is 1 / 2


def test_equal_weights_are_one_bar():
    ax = plots.log_weights(torch.full((50,), -3.0))
    assert [bar.get_height() for bar in ax.patches] == [50]


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        (torch.zeros(3, 2), lvm.ShapeError, r"table\[:, n\]"),
        (torch.zeros(3, 1, 1), lvm.ShapeError, r"shape \(K,\) or \(K, 1\)"),
        (torch.tensor([0.0, math.nan]), lvm.ShapeError, "finite log-weights"),
        (torch.tensor([0.0, math.inf]), lvm.ShapeError, "finite log-weights"),
        (torch.tensor([-math.inf]), lvm.ShapeError, "no weight above zero"),
        ([0.0, 1.0], lvm.DataTypeError, "table: expected a tensor, got list"),
        (torch.zeros(3, dtype=torch.int64), lvm.DataTypeError, "table"),
    ],
)
def test_tables_that_are_refused(table, error, words):
    with pytest.raises(error, match=words):
        plots.log_weights(table)


# ---------------------------------------------------------------------------------------------------------------------
# Classes.


def test_reliability():
    # Bins of confidence between 1/2 and 1 are 0.05 wide: two data at 0.62 and 0.64, three at 0.9.
    confidence = torch.tensor([0.62, 0.64, 0.9, 0.9, 0.9])
    probs = torch.stack([confidence, 1 - confidence], 1)
    labels_ = torch.tensor([0, 1, 0, 0, 1])
    for ax in both(plots.reliability, probs, labels_):
        drawn = ax.collections[-1]
        np.testing.assert_allclose(drawn.get_offsets(), [[0.63, 0.5], [0.9, 2 / 3]], atol=1e-6)
        np.testing.assert_allclose(drawn.get_sizes(), [20 + 200 * 2 / 3, 220])
        bars = ax.collections[0].get_segments()
        errors = [np.ptp(bar[:, 1]) / 2 for bar in bars]
        np.testing.assert_allclose(errors, [math.sqrt(1 / 3 / 2), math.sqrt(1 / 4 / 3)])
        error = (2 * 0.13 + 3 * (0.9 - 2 / 3)) / 5
        assert labels(ax)[1] == f"5 data: 60.0% right, calibration error {error:.3f}"
        diagonal = next(line for line in ax.lines if line.get_label() == "as believed")
        assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("probs", "y", "words"),
    [
        (torch.full((3, 2), 0.4), torch.zeros(3), "probs: .* sum to one, got .* sums from 0.8"),
        (torch.tensor([[1.5, -0.5]]), torch.zeros(1), "probs"),
        (torch.ones(3), torch.zeros(3), r"probs: .* shape \(3,\)"),
        (torch.full((3, 2), 0.5), torch.zeros(2), "labels: expected 3 classes from 0 to 1, got shape"),
        (torch.full((3, 2), 0.5), torch.tensor([0, 1, 2]), "values from 0 to 2"),
        (torch.full((3, 2), 0.5), torch.tensor([0, 1, -1]), "leave data without a label out"),
        (torch.full((3, 2), 0.5), torch.tensor([0, 1, 0.5]), "labels"),
    ],
)
def test_probabilities_that_are_refused(probs, y, words):
    with pytest.raises(lvm.ShapeError, match=words):
        plots.reliability(probs, y)
    with pytest.raises(lvm.DataTypeError, match="probs: expected a tensor"):
        plots.reliability("probs", y)
