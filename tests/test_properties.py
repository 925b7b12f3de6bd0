"""Properties for any shapes, plate nestings, dtypes and chunks, on pairs whose weights are all equal: no error is left.

The guide is the exact posterior, so that every log-weight is log p(x) of its datum, whatever is drawn.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyro_lvm as lvm
from pyro_lvm._files import read_tensors, write_tensors
from pyro_lvm.evidence.record import LogMarginal
from pyro_lvm.training.history import Columns

EXACT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


@dataclass(frozen=True)
class Arrangement:
    """Where the plates of a pair are, and what is in them.

    Attributes:
        num_data: N.
        inner: sizes of plates inside the data plate.
        data_dim: dimension of the data plate.
        inner_dims: those of the others.
        latent_inside: whether the latent is in the inner plates, too.
        event: shape of the event of the latent and of the observation.
        dtype: of everything.
        scale: of the noise.
    """

    num_data: int
    inner: tuple[int, ...]
    data_dim: int
    inner_dims: tuple[int, ...]
    latent_inside: bool
    event: tuple[int, ...]
    dtype: torch.dtype
    scale: float

    def data(self) -> torch.Tensor:
        """x, ``(N, inner..., event...)``."""
        generator = torch.Generator().manual_seed(self.num_data)
        return torch.randn(self.num_data, *self.inner, *self.event, generator=generator, dtype=torch.float64).to(
            self.dtype
        )

    def arranged(self, x: torch.Tensor) -> torch.Tensor:
        """x with its dimensions where the plates are."""
        sources = [self.data_dim, *self.inner_dims]
        order = sorted(range(len(sources)), key=lambda i: sources[i])
        moved = x.permute(*order, *range(len(sources), x.dim()))
        shape = [1] * -min(sources)
        for i in order:
            shape[sources[i]] = x.shape[i]
        return moved.reshape(*shape, *self.event)

    def enter(self, stack: ExitStack) -> None:
        """The inner plates."""
        for i, (size, dim) in enumerate(zip(self.inner, self.inner_dims, strict=True)):
            stack.enter_context(pyro.plate(f"inner{i}", size, dim=dim))

    def model(self, x: torch.Tensor) -> None:
        """z ~ N(0, 1), x ~ N(z, scale), each element of the event by itself."""
        prior = dist.Normal(torch.zeros(self.event, dtype=self.dtype), 1.0).to_event(len(self.event))
        with pyro.plate("data", len(x), dim=self.data_dim), ExitStack() as inner:
            if self.latent_inside:
                self.enter(inner)
            z = pyro.sample("z", prior)
            if not self.latent_inside:
                self.enter(inner)
            pyro.sample("x", dist.Normal(z, self.scale).to_event(len(self.event)), obs=self.arranged(x))

    def guide(self, x: torch.Tensor) -> None:
        """The exact posterior."""
        total, count = self.arranged(x), 1
        if not self.latent_inside:
            count, rank = math.prod(self.inner), total.dim()
            for dim in self.inner_dims:
                total = total.sum(dim - len(self.event), keepdim=True)
            total = total.reshape(total.shape[rank - len(self.event) + self.data_dim :])
        precision = 1 + count / self.scale**2
        q = dist.Normal(total / self.scale**2 / precision, precision**-0.5)
        with pyro.plate("data", len(x), dim=self.data_dim), ExitStack() as inner:
            if self.latent_inside:
                self.enter(inner)
            pyro.sample("z", q.to_event(len(self.event)))

    def log_px(self) -> torch.Tensor:
        """Log p(x) of each datum, ``(N,)``, float64."""
        x = self.data().double().reshape(self.num_data, math.prod(self.inner), math.prod(self.event))
        count = 1 if self.latent_inside else math.prod(self.inner)
        grouped = x.unsqueeze(-1) if self.latent_inside else x.transpose(1, 2)  # the last dimension shares its latent
        eye = torch.eye(count, dtype=torch.float64)
        joint = torch.distributions.MultivariateNormal(torch.zeros(count).double(), eye * self.scale**2 + 1.0)
        return joint.log_prob(grouped).flatten(1).sum(1)


@st.composite
def arrangements(draw: Any) -> Arrangement:
    depth = draw(st.integers(0, 2))
    dims = draw(st.permutations([-1, -2, -3][: depth + 1] if draw(st.booleans()) else [-1, -2, -3]))[: depth + 1]
    return Arrangement(
        num_data=draw(st.integers(1, 5)),
        inner=tuple(draw(st.lists(st.integers(1, 4), min_size=depth, max_size=depth))),
        data_dim=dims[0],
        inner_dims=tuple(dims[1:]),
        latent_inside=draw(st.booleans()),
        event=tuple(draw(st.lists(st.integers(1, 3), max_size=2))),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        scale=draw(st.sampled_from([0.5, 1.0, 3.0])),
    )


@EXACT
@given(pair=arrangements(), num_particles=st.integers(1, 5), vectorize=st.sampled_from(["auto", False]))
def test_log_weights_of_an_exact_posterior(pair: Arrangement, num_particles: int, vectorize: Any) -> None:
    x = pair.data()
    weights = lvm.log_weights(
        pair.model, pair.guide, x, num_particles=num_particles, vectorize=vectorize, data_plate="data"
    )
    assert weights.shape == (num_particles, pair.num_data)
    assert weights.dtype == pair.dtype
    expected = pair.log_px().expand(num_particles, -1)
    tolerance = TOLERANCE[pair.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=tolerance)


@EXACT
@given(
    pair=arrangements(),
    num_particles=st.integers(1, 7),
    rows=st.integers(1, 6),
    particles=st.integers(1, 8),
    seed=st.integers(0, 3),
)
@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
def test_log_marginal_in_any_chunks(
    pair: Arrangement, num_particles: int, rows: int, particles: int, seed: int
) -> None:
    options: dict[str, Any] = {"num_particles": num_particles, "data_plate": "data", "seed": seed}
    result = lvm.log_marginal(pair.model, pair.guide, pair.data(), chunks=(rows, particles), **options)
    expected = pair.log_px()
    tolerance = TOLERANCE[pair.dtype] * max(1.0, float(expected.abs().max()))
    for column in (result.value, result.elbo):
        assert (column.shape, column.dtype) == ((pair.num_data,), torch.float64)
        torch.testing.assert_close(column, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(result.ess, torch.full_like(result.ess, num_particles), rtol=1e-3, atol=1e-3)
    assert len(result) == result.provenance["num_data"] == pair.num_data
    assert LogMarginal.from_dict(result.to_dict()).value.equal(result.value)


@EXACT
@given(pair=arrangements())
def test_check_finds_no_error_in_them(pair: Arrangement) -> None:
    report = lvm.check(pair.model, pair.guide, pair.data())
    assert report.ok or "data-plate" in report.codes, str(report)


@EXACT
@given(pair=arrangements())
def test_the_gradient_of_the_elbo_reaches_x(pair: Arrangement) -> None:
    x = pair.data().requires_grad_(True)
    value = lvm.elbo(pair.model, pair.guide, x, data_plate="data", seed=0)
    assert value.shape == (pair.num_data,)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.shape == x.shape
    assert gradient.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Files.


def nested(inner: Any) -> Any:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.tuples(inner)


ATOMS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
PLAIN = st.recursive(ATOMS, nested, max_leaves=10)
ROW = st.dictionaries(st.sampled_from("abc"), st.integers(-9, 9) | st.floats() | st.text(max_size=2), min_size=1)


@EXACT
@given(content=st.dictionaries(st.text(min_size=1, max_size=4), PLAIN, max_size=4))
def test_plain_values_come_back_from_files(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    path = Path(tmp_path_factory.mktemp("files")) / "x.pt"
    write_tensors(path, "test", {"content": content})
    assert repr(read_tensors(path, "test")["content"]) == repr(content)


@EXACT
@given(rows=st.lists(ROW), cuts=st.lists(st.integers(0, 20), max_size=4))
def test_a_history_comes_back_however_often_it_was_packed(rows: list[dict[str, Any]], cuts: list[int]) -> None:
    columns = Columns()
    for cut in sorted(cuts):
        columns.of(rows[:cut])
    found = Columns.rows(columns.of(rows))
    assert [words(row) for row in found] == [words(row) for row in rows]


def words(row: dict[str, Any]) -> dict[str, str]:
    """NaN is not equal to itself."""
    return {name: repr(value) for name, value in row.items()}
