"""`LogMarginal`: what the record says of itself."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pyro_lvm.datasets import digits
from pyro_lvm.evidence import LogMarginal, closed_form, importance
from pyro_lvm.models import LinearGaussian
from tests.references import ENUMERATED, plain

WORDS = ["zero_variance", "no_fault_found", "heavy_tail", "unreliable"]


def record(n: int = 4, **changes: Any) -> LogMarginal:
    """n data with log p(x) = -1, -2, ... and a standard error of 0.01 each."""
    stderr = torch.full((n,), 0.01, dtype=torch.float64)
    fields: dict[str, Any] = {
        "value": -torch.arange(1.0, n + 1, dtype=torch.float64),
        "stderr": stderr,
        "bias": -(stderr**2) / 2,
        "elbo": -torch.arange(1.0, n + 1, dtype=torch.float64) - 0.5,
        "elbo_stderr": stderr,
        "ess": torch.full((n,), 800.0, dtype=torch.float64),
        "khat": torch.full((n,), 0.3, dtype=torch.float64),
        "status": np.array(["no_fault_found"] * n),
        "num_particles": 1000,
        "method": "importance sampling",
        "provenance": {"seed": 0, "chunks": (4, 1000), "particles": {"model": "vectorised"}, "device": None},
    }
    return LogMarginal(**fields | changes)


def test_a_record_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().num_particles = 3  # type: ignore[misc]


def test_sums_and_means() -> None:
    r = record()
    assert len(r) == 4
    assert (r.mean, r.total) == (-2.5, -10.0)
    assert r.mean_stderr == pytest.approx(0.01 / 2)
    assert r.data_stderr == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)
    assert r.mean_bias == pytest.approx(-0.00005)
    assert r.gap.tolist() == [0.5] * 4
    assert r.bits_per_dim(10) == pytest.approx(2.5 / (10 * math.log(2)))


def test_one_datum_has_no_sampling_error() -> None:
    assert math.isnan(record(1).data_stderr)


def test_shares_of_the_statuses_are_in_order_and_sum_to_one() -> None:
    shares = record(status=np.array(WORDS[::-1])).status_shares()
    assert list(shares) == WORDS
    assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (["no_fault_found"] * 4, "no fault found"),
        (["zero_variance"] * 4, "if the guide covers"),
        (["exact"] * 4, r"^exact\.$"),
        (["exact", "exact", "zero_variance", "exact"], "if the guide covers"),
        (["heavy_tail", "no_fault_found", "no_fault_found", "no_fault_found"], "usable.*25.0%"),
        (["disagreement", "no_fault_found", "exact", "exact"], "^usable. The guides disagree on 25.0%.*none sees"),
        (["disagreement", "heavy_tail", "exact", "exact"], "usable; .* 25.0% with heavy tails. The guides disagree"),
        (["disagreement", "unreliable", "exact", "exact"], "not to be quoted .*fits better. The guides disagree"),
        (
            ["unreliable", "no_fault_found", "no_fault_found", "no_fault_found"],
            "not to be quoted.*unreliable for 25.0%",
        ),
        (["no_support", "nonfinite", "exact", "exact"], "not to be quoted.*no_support for 25.0%, nonfinite for 25.0%"),
    ],
    ids=lambda p: p[0] if isinstance(p, list) else "",
)
def test_the_verdict(status: list[str], words: str) -> None:
    r = record(status=np.array(status))
    assert pytest.importorskip("re").search(words, r.verdict)
    assert r.verdict in repr(r)


def test_no_verdict_says_correct() -> None:
    for word in [*WORDS, "exact", "no_support", "nonfinite"]:
        assert "correct" not in record(status=np.array([word] * 4)).verdict


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"khat": torch.full((4,), torch.nan)},
        {"value": torch.tensor([-1.0, torch.nan, -math.inf, -2.0])},
        {"stderr": torch.full((4,), torch.inf), "bias": torch.full((4,), -torch.inf)},
        {"stderr": torch.zeros(4), "bias": torch.zeros(4)},
        {"ess": torch.full((4,), torch.nan)},
    ],
    ids=["plain", "no khat", "nonfinite", "no error", "exact", "no ess"],
)
@pytest.mark.parametrize("n", [1, 4])
def test_repr_has_five_lines(changes: dict[str, Any], n: int) -> None:
    r = record(n, **{name: value[:n] for name, value in changes.items()})
    lines = repr(r).splitlines()
    assert len(lines) == 5
    assert lines[0] == f"LogMarginal: {n} data, importance sampling, K = 1000"


def test_a_small_bias_leaves_the_error() -> None:
    assert "-2.5000 +- 0.005" in record().mean_with_error()


@pytest.mark.parametrize("n", [1, 10_000])
def test_no_error_is_printed_for_a_mean_whose_bias_is_not_small(n: int) -> None:
    """10^4 data with an error of 0.3: the mean's error is 0.003, its bias 0.045."""
    stderr = torch.full((n,), 0.6 if n == 1 else 0.3, dtype=torch.float64)
    text = record(n, stderr=stderr, bias=-(stderr**2) / 2).mean_with_error()
    assert "bias about" in text
    assert "+-" not in text.split("data +-")[0]


def test_exact_results_have_no_error() -> None:
    result = importance(ENUMERATED["mixture"](3).model, None, ENUMERATED["mixture"](3).x)
    assert "+-" not in result.mean_with_error().split("data +-")[0]
    assert "exact" in repr(result)


def test_nonfinite_means_have_no_error() -> None:
    assert "no error estimate" in record(value=torch.tensor([-1.0, torch.nan, -1.0, -1.0])).mean_with_error()


@pytest.mark.parametrize(("num_particles", "words"), [(100, "above 0.5 for 100.0%"), (10_000, "above 0.7 for 0.0%")])
def test_tails_are_counted_above_the_limit_that_statuses_have(num_particles: int, words: str) -> None:
    khat = torch.full((4,), 0.6, dtype=torch.float64)
    assert words in repr(record(khat=khat, num_particles=num_particles))


# --- xarray and ArviZ -------------------------------------------------------------------------------------------------


def test_a_data_tree_holds_every_column() -> None:
    r = record()
    group = r.to_datatree()["importance"]
    for name in ("value", "stderr", "bias", "elbo", "ess", "khat"):
        np.testing.assert_array_equal(group[name].values, getattr(r, name).numpy())
    assert group["status"].values.tolist() == r.status.tolist()
    assert group["value"].dims == ("datum",)
    assert group.attrs["num_particles"] == 1000
    assert group.attrs["seed"] == "0"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_arviz_reads_the_record() -> None:
    pytest.importorskip("arviz")
    converted = record().to_arviz()
    np.testing.assert_array_equal(converted["importance"]["value"].values, [-1, -2, -3, -4])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_arviz_writes_the_record_to_disk(tmp_path: Any) -> None:
    pytest.importorskip("h5netcdf")
    path = tmp_path / "record.nc"
    converted = record().to_arviz()
    converted.to_netcdf(str(path))
    assert path.stat().st_size > 0


def test_provenance_makes_the_number_quotable() -> None:
    pair = plain(3)
    p = importance(pair.model, pair.guide, pair.x, num_particles=3, seed=5, chunks=(2, 2)).provenance
    assert p["model"] == "normal_model"
    assert p["guide"] == "normal_guide"
    assert (p["seed"], p["dtype"], p["device"], p["data_plate"]) == (5, "torch.float64", "cpu", "data")
    assert (p["num_data"], p["finished"], p["chunks"]) == (3, True, (2, 2))
    assert p["particles"] == {"model": "vectorised", "guide": "once"}
    assert set(p["versions"]) == {"pyro_lvm", "pyro", "torch"}


def test_the_binarisation_of_a_data_set_is_noted() -> None:
    images = digits(binarize="dynamic")
    model = LinearGaussian(2, 64)
    result = closed_form(model, images.test)
    assert result.provenance["data"]["binarize"] == "dynamic"
    sampled = importance(model, model.posterior_guide, DataLoader(images.train_dataset, batch_size=50), num_particles=2)
    assert sampled.provenance["data"]["name"] == "digits"
    assert closed_form(model, images.test[:3]).provenance["data"] is None
