"""Data that stay on disk: arrays mapped from a file, and data sets that read items together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler

from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.evidence import LogMarginal, importance
from pyro_lvm.evidence.data import data_source
from pyro_lvm.tracing.batch import Batch
from tests.references import ORACLES, data, normal_guide, normal_model, plain

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")


class Items(Dataset):
    """Rows of an array, as users write it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.single, self.together = array, 0, 0

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> torch.Tensor:
        self.single += 1
        return torch.as_tensor(self.array[i])


class Together(Items):
    """The same, with torch's way of reading many at once."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        self.together += 1
        return list(torch.from_numpy(np.array(self.array[indices])))


def mapped(path: Path, x: torch.Tensor) -> np.memmap:
    np.save(path / "x.npy", x.numpy())
    array = np.load(path / "x.npy", mmap_mode="r")
    assert isinstance(array, np.memmap)
    assert not array.flags.writeable
    return array


def estimate(x: Any, **options: Any) -> LogMarginal:
    return importance(normal_model, normal_guide, x, **{"num_particles": 40, "seed": 0, "chunks": (4, 15)} | options)


WAYS: dict[str, Callable[[np.memmap], Any]] = {
    "array": lambda array: array,
    "items": Items,
    "together": Together,
    "loader": lambda array: DataLoader(Together(array), batch_size=3),
    "subset": lambda array: Subset(Together(array), range(len(array))),
    "with steps": lambda array: np.repeat(array, 2)[::2],
    "backwards": lambda array: np.array(array[::-1])[::-1],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_of_reading_gives_the_numbers_of_the_tensor(tmp_path: Path, way: Callable[[np.memmap], Any]) -> None:
    x = data(11)
    result, expected = estimate(way(mapped(tmp_path, x))), estimate(x)
    assert result.value.equal(expected.value)
    assert result.elbo.equal(expected.elbo)


def test_a_loader_that_chooses_its_data_is_refused(tmp_path: Path) -> None:
    """Its data set is read in order, whoever is drawn from it."""
    items = Items(mapped(tmp_path, data(11)))
    with pytest.raises(DataTypeError, match=r"one with a SubsetRandomSampler.*Subset\(dataset, indices\)"):
        estimate(DataLoader(items, sampler=SubsetRandomSampler(range(4))))
    assert len(estimate(DataLoader(items, shuffle=True))) == 11


@pytest.mark.parametrize("options", [{"data_plate": None}, {"vectorize": False}, {"chunks": None}, {"device": "cpu"}])
def test_options_with_a_mapped_array(tmp_path: Path, options: dict[str, Any]) -> None:
    x = data(11)
    assert estimate(mapped(tmp_path, x), **options).value.equal(estimate(x, **options).value)


def test_an_argument_beside_a_mapped_array(tmp_path: Path) -> None:
    pair = ORACLES["mask_pixels"](7)
    result = importance(pair.model, pair.guide, mapped(tmp_path, pair.x), *pair.args, num_particles=3, chunks=(2, 2))
    torch.testing.assert_close(result.value, pair.log_px, atol=1e-10, rtol=0)


def test_a_data_set_that_can_reads_items_together() -> None:
    items = Together(data(11).numpy())
    estimate(items)
    assert items.single == 0
    chunks = 3
    assert chunks < items.together <= chunks + 5  # and a few rows for the device and the probes


def test_a_data_set_that_is_told_not_to_reads_item_by_item() -> None:
    """The protocol of torch's own loader: an attribute that is None."""
    items = Together(data(11).numpy())
    items.__getitems__ = None  # type: ignore[assignment]
    assert estimate(items).value.equal(estimate(data(11)).value)
    assert items.together == 0


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int32", "float16", "float32"])
def test_rows_of_an_array_keep_its_dtype_and_are_copies(dtype: str) -> None:
    array = np.ones((5, 3), dtype=dtype)
    batch = data_source(array, (), "auto", None).rows(slice(1, 4))
    assert batch.args[0].dtype == torch.from_numpy(array).dtype
    assert batch.args[0].shape == (3, 3)
    batch.args[0].zero_()
    assert array.all()


class Looked(np.ndarray):
    """An array that notes how many rows are taken of it at once."""

    most = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        Looked.most = max(Looked.most, len(found))
        return found


def test_no_more_than_a_chunk_of_an_array_is_ever_read() -> None:
    array = data(5000).numpy().view(Looked)
    Looked.most = 0
    assert estimate(array, chunks=(50, 40)).value.shape == (5000,)
    assert 50 <= Looked.most <= 1024


def test_arrays_without_numbers_are_refused_and_a_few_missing_rows_are_not() -> None:
    array = np.full((3000, 2), np.nan)
    with pytest.raises(ShapeError, match="nothing but NaN"):
        data_source(array, (), "auto", None)
    array[2999, 1] = 0.0
    assert len(data_source(array, (), "auto", None)) == 3000
    with pytest.raises(ShapeError, match="N >= 1"):
        data_source(np.zeros((0, 2)), (), "auto", None)
    with pytest.raises(DataTypeError, match="a real dtype|a tensor"):
        data_source(np.zeros(3, dtype=complex), (), "auto", None)


def test_a_tensor_is_not_copied() -> None:
    pair = plain(5)
    source = data_source(pair.x, (), "auto", None)
    assert isinstance(source, Batch)
    assert source.args[0] is pair.x
