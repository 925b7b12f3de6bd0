"""The defensive estimate: its two parts to the bit, all forms of data, what it says, and what is kept."""

import dataclasses
import functools
import importlib

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.errors import CheckpointError, DataTypeError, ShapeError, SiteError, SupportError
from pyro_lvm.evidence import annealed, defensive, pooled
from pyro_lvm.evidence.annealed import AnnealingJob
from pyro_lvm.ops import DOUBTFUL
from tests.references import ORACLES, lognormal

module = importlib.import_module("pyro_lvm.evidence.defensive")
X = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
LOC = torch.arange(6, dtype=torch.float64)
NOISE = 0.02
GOOD = torch.tensor([True, False, True, False, False, True])
PAIRS = {pair.name: pair for pair in lvm.testing.proving_ground()}

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")


def model(x: torch.Tensor, loc: torch.Tensor, good: torch.Tensor) -> None:
    """So sharp that a draw of the prior is no proposal."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z - loc, NOISE), obs=x)


def guide(x: torch.Tensor, loc: torch.Tensor, good: torch.Tensor) -> None:
    """The posterior, but for some data thirty noises beside it."""
    scale = (1 + NOISE**-2) ** -0.5
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + x * (scale / NOISE) ** 2 + 30 * NOISE * ~good, scale))


TRUTH = dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(X)
ARGS = (LOC, GOOD)


class Stored(torch.utils.data.Dataset):
    """Items that are tuples, as the arguments of the pair."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        return X[i], LOC[i], GOOD[i]


DATA = {
    "tensor": (X, *ARGS),
    "array": (X.numpy(), *ARGS),
    "dataset": (Stored(),),
    "read together": (TensorDataset(X, LOC, GOOD),),
    "loader": (DataLoader(Stored(), batch_size=4),),
}


@functools.cache
def parts(chunks):
    """The pool of all data, the annealing of those that it leaves in doubt, and the others pooled anew."""
    guides, options = {"guide": guide, "prior": None}, {"chunks": chunks, "num_particles": 200}
    first = pooled(model, guides, X, *ARGS, **options, seed=3)
    doubtful, others = ([t[rows] for t in (X, *ARGS)] for rows in (~GOOD, GOOD))
    again = pooled(model, guides, *others, **options, seed=4)
    return first, again, annealed(model, guides, *doubtful, chunks=chunks, num_particles=50, seed=5)


@pytest.mark.parametrize(("form", "chunks"), [(form, None) for form in DATA] + [("dataset", (4, 120))])
def test_it_is_a_new_pool_and_of_what_is_in_doubt_the_annealing(form, chunks):
    """To the bit, in the places of the data in doubt, for arguments of the data as for the data."""
    found = defensive(model, guide, *DATA[form], chunks=chunks, num_particles=200, num_chains=50, seed=3)
    first, again, chains = parts(chunks)
    doubt = np.isin(first.status, DOUBTFUL)
    assert doubt.tolist() == (~GOOD).tolist()
    for name in ("value", "stderr", "bias", "elbo", "elbo_stderr", "ess", "khat", "particles"):
        column = getattr(found, name)
        torch.testing.assert_close(column[GOOD], getattr(again, name), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(column[~GOOD], getattr(chains, name), rtol=0, atol=0, equal_nan=True)
    assert found.status[doubt].tolist() == chains.status.tolist()
    assert found.status[~doubt].tolist() == again.status.tolist()
    assert (found.num_particles, found.particles_in_words) == (400, "50 to 400")
    assert found.method == "defensive mixture of 2 guides, 3 data annealed"
    assert found.provenance["annealing"] == chains.provenance["annealing"] | {"num_data": 3}
    assert found.provenance["guides"].keys() == {"guide", "prior"}
    assert ((found.value - TRUTH).abs() < 5 * found.stderr + 1e-6).all()


@pytest.mark.statistical
def test_values_that_led_to_the_choice_are_not_kept(monkeypatch):
    """1,000 data alike: those that look well are low by many errors of their mean, and pooled anew they are not.

    log w is normal with a standard deviation of 1.3; what is annealed is left out here.
    """
    program, wide = lognormal(1.3)
    x = torch.zeros(1000, dtype=torch.float64)
    kept = np.isin(pooled(program, [wide] * 2, x, num_particles=100, seed=0).status, module._IN_DOUBT) == 0
    assert 100 < kept.sum() < 900
    rest = pooled(program, [wide] * 2, x[~kept], seed=9)
    annealed_ones = dataclasses.replace(rest, provenance=rest.provenance | {"annealing": {}})
    monkeypatch.setattr(module, "run_annealed", lambda *_, **__: annealed_ones)
    found = defensive(program, [wide] * 2, x, num_particles=100, seed=0)
    truth, first = dist.Normal(0.0, 1.0).log_prob(x[0]), pooled(program, [wide] * 2, x, num_particles=100, seed=0)
    for record, low in ((first, True), (found, False)):
        part = (record.value - record.bias - truth)[kept]
        assert (part.mean() < -5 * part.std() / len(part) ** 0.5) == low


@pytest.mark.parametrize("name", ORACLES)
def test_every_kind_of_pair_with_an_exact_guide(name):
    """Nothing is in doubt, and nothing is annealed."""
    pair = ORACLES[name](3)
    found = defensive(pair.model, [pair.guide] * 2, pair.x, *pair.args, num_particles=2, seed=0, **pair.options)
    torch.testing.assert_close(found.value, pair.log_px, rtol=0, atol=1e-10)
    assert found.method == "defensive mixture of 2 guides"
    assert "annealing" not in found.provenance


def test_a_pair_that_is_tied_to_its_data_is_annealed_as_a_whole():
    """A guide with a parameter for each datum cannot be given some of them."""

    def local(x):
        loc = pyro.param("defensive.loc", lambda: X + torch.where(GOOD, 0.0, 30 * NOISE))
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Normal(loc, NOISE))

    def plain(x):
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(6, dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    pyro.get_param_store().clear()
    with pytest.warns(lvm.UntrainedParameterWarning):
        found = defensive(plain, local, X, num_particles=200, num_chains=50, seed=0)
    assert found.provenance["streamed"] == "particles"
    assert found.particles.tolist() == torch.where(GOOD, 400.0, 50.0).tolist()
    assert ((found.value - TRUTH).abs() < 5 * found.stderr + 1e-3).all()


def test_one_joint_result():
    pair = PAIRS["wide-10d"]
    found = defensive(pair.model, pair.guide, pair.x[:2], data_plate=None, num_particles=200, seed=0)
    assert len(found) == 1
    assert found.particles.tolist() == [100]
    assert abs(found.total - float(pair.log_prob[:2].sum())) < 5 * float(found.stderr)


def test_discrete_latents_stay_as_they_were_pooled_and_it_says_why():
    pair = PAIRS["flat-bits"]
    found = defensive(pair.model, pair.guide, pair.x, seed=0)
    first = pooled(pair.model, [pair.guide, None], pair.x, seed=0)
    assert found.value.equal(first.value)
    assert found.method == "defensive mixture of 2 guides"
    assert found.provenance["annealing"]["num_data"] == 0
    assert "expected a continuous latent, got a discrete one" in found.provenance["annealing"]["refused"]


def test_one_warning_and_that_of_the_end():
    pair = PAIRS["flat-bits"]
    with pytest.warns(lvm.UnreliableEstimateWarning) as said:
        defensive(pair.model, pair.guide, pair.x, seed=0)
    assert [warning.filename for warning in said] == [__file__]
    assert "of 32 data: 32 unreliable" in str(said[0].message)


def test_ctrl_c_keeps_what_is_pooled(monkeypatch):
    first = pooled(model, [guide, None], X, *ARGS, num_particles=200, seed=3)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_annealed", interrupted)
    found = defensive(model, guide, X, *ARGS, num_particles=200, seed=3)
    assert found.value.equal(first.value)
    assert not found.provenance["finished"]
    assert "6 of 6 data (interrupted), defensive" in repr(found)


def test_ctrl_c_before_the_others_are_drawn_anew(monkeypatch):
    draw, calls = module.pool, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args, **options)

    whole = defensive(model, guide, X, *ARGS, num_particles=200, num_chains=50, seed=3)
    assert whole.provenance["finished"]
    monkeypatch.setattr(module, "pool", interrupted)
    found = defensive(model, guide, X, *ARGS, num_particles=200, num_chains=50, seed=3)
    annealed = found.particles == 50
    assert found.value[annealed].equal(whole.value[annealed])
    assert not found.value[~annealed].equal(whole.value[~annealed])
    assert not found.provenance["finished"]


def test_what_is_annealed_can_be_gone_on_with(tmp_path, monkeypatch):
    options = dict(num_particles=200, num_chains=50, chunks=(1, 50), seed=3)
    whole = defensive(model, guide, X, *ARGS, **options)
    assert (whole.particles == 50).sum() > 1
    keep, kept = AnnealingJob.keep, []

    def interrupted(self, summary):
        keep(self, summary)
        kept.append(1)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnnealingJob, "keep", interrupted)
        part = defensive(model, guide, X, *ARGS, resume=tmp_path, **options)
    assert not part.provenance["finished"]
    found = defensive(model, guide, X, *ARGS, resume=tmp_path, **options)
    assert found.value.equal(whole.value)
    with pytest.raises(DataTypeError, match="an integer beside resume=, got None"):
        defensive(model, guide, X, *ARGS, resume=tmp_path)
    with pytest.raises(DataTypeError, match="resume: expected the path of a directory"):
        defensive(model, guide, X, *ARGS, resume=5, **options)
    with pytest.raises(CheckpointError, match="num_particles"):
        defensive(model, guide, X, *ARGS, resume=tmp_path, **options | {"num_chains": 40})


def test_ctrl_c_in_the_middle_of_annealing(monkeypatch):
    """Of three data in doubt one was finished."""
    run = module.run_annealed

    def some(*args, **options):
        record = run(*args, **options)
        columns = {f.name: getattr(record, f.name)[:1] for f in dataclasses.fields(record) if f.type is torch.Tensor}
        provenance = record.provenance | {"finished": False}
        return dataclasses.replace(record, **columns, status=record.status[:1], provenance=provenance)

    monkeypatch.setattr(module, "run_annealed", some)
    found = defensive(model, guide, X, *ARGS, num_particles=200, num_chains=50, seed=3)
    assert found.particles.tolist() == [400, 50, 400, 400, 400, 400]
    assert np.isin(found.status, DOUBTFUL).tolist() == [False, False, False, True, True, False]
    assert found.provenance["annealing"]["num_data"] == 1
    assert not found.provenance["finished"]
    first, _, _ = parts(None)
    assert found.value[GOOD].equal(first.value[GOOD])  # nothing is begun after that


def test_it_can_be_saved_and_repeated(tmp_path):
    state = torch.get_rng_state()
    found, again = (defensive(model, guide, X, *ARGS, num_particles=200, num_chains=50, seed=3) for _ in range(2))
    assert found.value.equal(again.value)
    assert torch.equal(state, torch.get_rng_state())
    found.save(tmp_path / "record.json")
    read = lvm.LogMarginal.load(tmp_path / "record.json")
    assert read.value.equal(found.value)
    assert read.particles.equal(found.particles)
    assert read.status.tolist() == found.status.tolist()


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("switching", SupportError, "expected a prior density"),
        ("left-out", SiteError, r"log_marginal\(model, None, x\) is exact"),
    ],
)
def test_what_has_no_prior_to_pool(name, error, words):
    pair = PAIRS[name]
    with pytest.raises(error, match=words):
        defensive(pair.model, pair.guide, pair.x)


@pytest.mark.parametrize(
    ("proposal", "options", "error", "words"),
    [
        ([guide], {}, ShapeError, "guides: expected at least two, got 1"),
        (None, {}, DataTypeError, "guide: expected a Pyro program, got None"),
        (guide, {"num_chains": 0}, ShapeError, "num_chains: expected"),
        (guide, {"num_particles": 1.5}, DataTypeError, "num_particles: expected"),
        (guide, {"chunks": (0, 1)}, ShapeError, r"chunks\[0\]: expected"),
    ],
)
def test_bad_arguments(proposal, options, error, words):
    """Before anything is drawn, and not as what annealing refuses."""
    with pytest.raises(error, match=words):
        defensive(model, proposal, X, *ARGS, **options)
