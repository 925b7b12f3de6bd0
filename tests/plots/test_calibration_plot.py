"""The picture of a calibration: bars, band and labels."""

import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import binom

import pyro_lvm as lvm
from pyro_lvm import plots
from pyro_lvm.errors import DataTypeError, ShapeError


@pytest.fixture(scope="module")
def record() -> lvm.Calibration:
    torch.manual_seed(0)
    model = lvm.models.LinearGaussian(5, 6)
    return lvm.calibration(model, model.posterior_guide, torch.zeros(1, 6), num_data=400, num_draws=19, seed=0)


def test_bars_of_the_worst_marginals_in_their_order(record: lvm.Calibration) -> None:
    own = Figure().subplots()
    assert plots.calibration(record, ax=own) is own
    ax = plots.calibration(record)
    steps = [patch for patch in ax.patches if hasattr(patch, "get_data")]
    assert len(steps) == 3
    for step, i in zip(steps, record.worst[:3], strict=True):
        counts = torch.histc(record.pit[:, i], 20, 0, 1)  # 400 data: 20 bars of 20 each
        assert torch.allclose(torch.from_numpy(step.get_data().values) * 20, counts)
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == ["chance, 99%"] + [f"{record.names[i]}: no fault found" for i in record.worst[:3]]
    assert ax.get_title() == "calibration, 3 worst of 5 marginals"


def test_the_band_holds_all_bars_of_a_uniform_marginal(record: lvm.Calibration) -> None:
    """By Bonferroni: each of 20 bars is beyond either end with a probability of at most 1 % / 40."""
    ax = plots.calibration(record, num_marginals=5)
    assert ax.get_title() == "calibration"
    band = next(patch for patch in ax.patches if patch.get_label().startswith("chance"))
    low, high = (20 * edge for edge in (band.get_y(), band.get_y() + band.get_height()))  # counts
    assert binom.cdf(round(low) - 1, 400, 0.05) <= 0.01 / 40 < binom.cdf(round(low), 400, 0.05)
    assert binom.sf(round(high), 400, 0.05) <= 0.01 / 40 < binom.sf(round(high) - 1, 400, 0.05)


def test_what_is_weighted_can_be_drawn_and_nothing_else(record: lvm.Calibration) -> None:
    assert plots.calibration(record.weighted).get_xlabel() == "share of the draws below the truth"
    with pytest.raises(DataTypeError, match="record: expected a Calibration, got dict"):
        plots.calibration({})
    with pytest.raises(ShapeError, match="num_marginals"):
        plots.calibration(record, num_marginals=0)
