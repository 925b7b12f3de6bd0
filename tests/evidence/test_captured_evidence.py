"""`log_marginal(compile=True)` against the plain estimate: the same draws, the same results up to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_lvm import log_marginal
from pyro_lvm.errors import DataTypeError
from pyro_lvm.guides import DiagonalNormal
from pyro_lvm.models import DeepGaussian
from pyro_lvm.nn import MLP

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
X = (torch.rand(10, 6, generator=torch.Generator().manual_seed(1)) < 0.5).float()


def pair() -> tuple[DeepGaussian, DiagonalNormal]:
    torch.manual_seed(0)
    return DeepGaussian(MLP(2, [8], 6), 2), DiagonalNormal(2, MLP(6, [8], 4))


@pytest.mark.usefixtures("captured_at_once")
@pytest.mark.parametrize("chunks", [(10, 30), (4, 30), (10, 33)])  # the last of data, and of particles, is smaller
def test_the_same_results(chunks: tuple[int, int]) -> None:
    model, guide = pair()
    plain, replayed = (
        log_marginal(model, guide, X, num_particles=240, chunks=chunks, seed=3, compile=compile)
        for compile in (False, True)
    )
    assert plain.provenance["tables"] == "plain"
    assert replayed.provenance["tables"].startswith("captured, not compiled, because it could not be compiled")
    for column in ("value", "stderr", "elbo", "ess", "khat"):
        torch.testing.assert_close(getattr(plain, column), getattr(replayed, column), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("captured_at_once")
def test_with_half_precision_and_resumed(tmp_path: Path) -> None:
    model, guide = pair()
    options: dict[str, Any] = {"num_particles": 240, "chunks": (5, 30), "seed": 3, "model_dtype": torch.bfloat16}
    plain = log_marginal(model, guide, X, **options)
    replayed = log_marginal(model, guide, X, compile=True, resume=tmp_path / "run", **options)
    torch.testing.assert_close(plain.value, replayed.value, rtol=1e-3, atol=1e-3)
    again = log_marginal(model, guide, X, compile=True, resume=tmp_path / "run", **options)
    assert torch.equal(replayed.value, again.value)


def test_a_short_run_is_plain() -> None:
    result = log_marginal(*pair(), X, num_particles=240, compile=True)
    assert result.provenance["tables"] == "plain: too short to pay for a capture"


def test_anything_else_is_refused() -> None:
    with pytest.raises(DataTypeError, match="compile: expected True or False, got 'yes'"):
        log_marginal(*pair(), X, compile="yes")
