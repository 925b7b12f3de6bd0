import math
import sys
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.comparison import ComparisonRow

# z ~ N(0, 1), x | z ~ N(z, 1): log p(x) = log N(x; 0, 2), posterior N(x / 2, 1 / 2). For q = N(x / 2 + b, s^2) and
# p = N(m, v) the KL divergence is log(sqrt(v) / s) + (s^2 + (b)^2) / (2 v) - 1 / 2, here with v = 1 / 2.
X = torch.linspace(-2.0, 2.0, 40, dtype=torch.float64)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def gaussian(shift, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, scale))

    return guide


def divergence(shift, scale):
    return math.log(math.sqrt(0.5) / scale) + (scale**2 + shift**2) - 0.5


ROWS = {
    "off": (model, gaussian(0.5, 0.9)),
    "exact": (model, gaussian(0.0, math.sqrt(0.5))),
    "wide": (model, gaussian(0.0, 0.9)),
}
LOG_PX = torch.distributions.Normal(0.0 * X[0], math.sqrt(2.0)).log_prob(X)


class Exact:
    """A model with nothing but an exact density."""

    def log_prob(self, x):
        return torch.distributions.Normal(0.0 * X[0], math.sqrt(2.0)).log_prob(x)

    __call__ = log_prob


@pytest.fixture
def result():
    return lvm.compare(ROWS, X, num_particles=2000, reference=lvm.log_marginal(Exact(), None, X))


def test_one_model_is_ranked_by_elbo(result):
    assert [row.name for row in result.rows] == ["exact", "wide", "off"]
    assert result.ranked_by == "elbo"


@pytest.mark.statistical
@pytest.mark.parametrize(("name", "shift", "scale"), [("wide", 0.0, 0.9), ("off", 0.5, 0.9)])
def test_gaps_and_differences_are_the_divergences(result, name, shift, scale):
    # 80,000 draws of log-weights with standard deviation below 2: an error of 0.01, five of which are allowed.
    assert result.gap(name) == pytest.approx(divergence(shift, scale), abs=0.05)
    difference, error = result.difference(name)
    assert difference == pytest.approx(-divergence(shift, scale), abs=5 * error)
    assert 0 < error < 0.01


def test_the_exact_row_has_no_gap_and_no_error(result):
    row = result.rows[0]
    assert result.gap("exact") == pytest.approx(0.0, abs=1e-10)
    assert row.stderr == 0.0
    assert row.log_marginal == pytest.approx(float(LOG_PX.mean()), abs=1e-10)


def test_common_random_numbers():
    # Two guides that differ by their name only see the same draws.
    rows = {"one": (model, gaussian(0.0, 0.9)), "two": (model, gaussian(0.0, 0.9))}
    one, two = lvm.compare(rows, X, num_particles=10).rows
    assert torch.equal(one.runs[0].value, two.runs[0].value)


def test_other_models_are_ranked_by_log_p_and_it_is_said():
    def wider(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 3.0), obs=x)

    rows = {"wider": (wider, gaussian(0.0, 0.9)), "model": ROWS["wide"]}
    result = lvm.compare(rows, X)
    assert result.ranked_by == "value"
    assert "do not share one model" in str(result)


def test_one_model_under_two_names_is_recognised():
    def same(x):
        return model(x)

    assert lvm.compare({"a": ROWS["wide"], "b": (same, gaussian(0.5, 0.9))}, X).ranked_by == "elbo"


def test_a_closed_form_row_and_a_record_as_row():
    record = lvm.log_marginal(*ROWS["wide"], X, seed=0)
    result = lvm.compare({"closed": (Exact(), None), "record": record}, X)
    statuses = {row.name: row.status_shares() for row in result.rows}
    assert statuses["closed"] == {"exact": 1.0}
    assert next(row for row in result.rows if row.name == "record").runs == (record,)


def test_training_runs_have_a_spread():
    runs = [(model, gaussian(shift, 0.9)) for shift in (0.0, 0.1, 0.2)]
    result = lvm.compare({"several": runs, "one": ROWS["exact"]}, X)
    several = next(row for row in result.rows if row.name == "several")
    means = torch.tensor([run.mean for run in several.runs])
    assert several.spread == pytest.approx(float(means.std()))
    assert "sd of log p-hat" in str(result)
    assert math.isnan(result.rows[0].spread)


def test_what_the_errors_cover_is_said():
    assert "do not cover training" in str(lvm.compare(ROWS, X))


def square(x):
    """Two modes, near the square roots of x."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 2.0))
        pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)


def on(loc):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_tensor(loc), 0.14))

    return guide


def test_the_reference_pools_the_guides_of_all_rows():
    """Each guide is on one of two modes: by its own log p-hat its gap is small, by that of both it is log 2 larger."""
    x = torch.full((20,), 4.0, dtype=torch.float64)
    result = lvm.compare({"left": (square, on(-1.97)), "right": (square, on(1.97))}, x)
    truth = lvm.evidence.quadrature(square, x[:1]).mean
    assert result.reference.mean == pytest.approx(truth, abs=5 * result.reference.mean_stderr)
    assert result.reference.num_particles == 2 * 1000
    for row in result.rows:
        assert row.status_shares() == {"no_fault_found": 1.0}
        assert row.log_marginal == pytest.approx(truth - math.log(2), abs=0.01)
        assert result.gap(row.name) == result.reference.mean - row.elbo
        assert result.gap(row.name) == pytest.approx(math.log(2), abs=0.05)
    text = " ".join(result.notes)
    assert "the reference is pooled: a mixture of 2 guides with K = 1000 draws of each, mean " in text
    assert "mass that another one sees is missed by left on 100.0% of the data, right on 100.0% of the data" in text
    assert " seconds." in text
    frame = result.to_pandas()
    assert frame.loc["left", "gap"] == result.gap("left")


def test_the_reference_of_guides_that_agree():
    rows = {
        "off": ROWS["off"],
        "runs": [ROWS["wide"], (model, gaussian(4.0, 0.1))],
        "other": (model, gaussian(0.1, 0.8)),
    }
    result = lvm.compare(rows, X, num_particles=500)
    assert result.reference.provenance["particles_of_each_guide"] == 334  # about 2 K in all
    assert list(result.reference.provenance["guides"]) == ["off", "runs", "other"]  # of several runs the first
    assert result.reference.mean == pytest.approx(float(LOG_PX.mean()), abs=5 * result.reference.mean_stderr)
    assert "disagree" not in " ".join(result.notes)
    again = lvm.compare(rows, X, num_particles=500)
    assert torch.equal(again.reference.value, result.reference.value)


def test_an_exact_row_is_the_reference():
    linear = lvm.models.LinearGaussian(1, 2).double()
    x = torch.stack([X, -X], -1)
    rows = {"guide": (linear, lvm.guides.DiagonalNormal(1, shared=True).double()), "exact": (linear, None)}
    result = lvm.compare(rows, x, num_particles=50)
    assert result.reference.status_shares() == {"exact": 1.0}
    assert result.gap("exact") == 0.0
    assert "the reference is that of exact, which is exact" in " ".join(result.notes)


def test_guides_that_cannot_be_pooled_leave_each_row_its_own():
    def mixture(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)))
            z = pyro.sample("z", dist.Normal(k.double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def with_k(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5], dtype=torch.float64)))
            pyro.sample("z", dist.Normal((x + k) / 2, 1.0))

    result = lvm.compare({"summed": (mixture, gaussian(0.2, 1.0)), "drawn": (mixture, with_k)}, X, num_particles=200)
    text = " ".join(result.notes)
    assert result.reference is None
    assert "There is no shared reference, for the guides cannot be pooled: guides: expected guides that draw" in text
    assert "from each row's own log p-hat" in text
    assert result.gap("drawn") == result.rows[-1].log_marginal - result.rows[-1].elbo


@pytest.mark.parametrize("rows", [{"one": ROWS["wide"]}, {"wide": ROWS["wide"], "other": None}])
def test_one_guide_or_two_models_have_no_pooled_reference(rows):
    def wider(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 3.0), obs=x)

    rows = {name: row or (wider, gaussian(0.0, 0.9)) for name, row in rows.items()}
    result = lvm.compare(rows, X, num_particles=50)
    assert result.reference is None
    assert "pooled" not in " ".join(result.notes)


def test_an_elbo_is_above_a_reference_only_beyond_its_errors():
    exact = lvm.log_marginal(Exact(), None, X)
    row = replace(exact, elbo=exact.value + 0.1)
    for stderr, said in ((0.0, True), (1.0, False)):  # of the mean of 40: 0.16
        reference = replace(exact, stderr=torch.full_like(X, stderr))
        notes = " ".join(lvm.compare({"row": row}, X, reference=reference).notes)
        assert ("above the reference" in notes) is said


@pytest.mark.parametrize(("shift", "said"), [(-1.0, True), (0.0, False), (1.0, False)])
def test_one_joint_elbo_is_above_a_reference_beyond_the_errors_of_its_draws(shift, said):
    exact = lvm.log_marginal(Exact(), None, X[:6], data_plate=None)
    reference = replace(exact, value=exact.value + shift)
    result = lvm.compare({"a": ROWS["exact"]}, X[:6], data_plate=None, reference=reference, num_particles=200)
    assert ("a: an ELBO above the reference: the reference is of other data" in str(result)) is said
    uncertain = replace(reference, stderr=torch.ones_like(exact.value))
    notes = lvm.compare({"a": ROWS["exact"]}, X[:6], data_plate=None, reference=uncertain, num_particles=200).notes
    assert "above the reference" not in " ".join(notes)


FOUR = torch.full((20,), 4.0, dtype=torch.float64)
BELOW = "below the reference: its guide misses mass, or the reference is wrong."


def contradictions(result):
    return [note for note in result.notes if " lies " in note]


@pytest.mark.parametrize(("data_plate", "x"), [("auto", FOUR), (None, FOUR[:1])], ids=["per datum", "joint"])
def test_a_log_p_hat_far_below_the_reference_is_pointed_out(data_plate, x):
    """A guide on one of two modes says nothing of it, and is log 2 too low."""
    options = {"data_plate": data_plate, "num_particles": 500}
    exact = lvm.evidence.quadrature(square, x)
    (note,) = contradictions(lvm.compare({"left": (square, on(-1.97))}, x, reference=exact, **options))
    assert note.startswith("log p-hat of 'left' lies 0.")
    assert float(note.split()[5]) == pytest.approx(math.log(2), abs=0.05)
    assert note.split()[6] == "+-"
    assert note.endswith(BELOW)


def test_a_log_p_hat_above_a_reference_that_its_elbo_is_below():
    exact = lvm.log_marginal(Exact(), None, X)
    for lower, said in ((0.0, False), (0.2, True)):  # the ELBO is 0.32 below
        reference = replace(exact, value=exact.value - lower)
        found = contradictions(lvm.compare({"off": ROWS["off"]}, X, num_particles=2000, reference=reference))
        assert bool(found) is said
    assert found[0].startswith("log p-hat of 'off' lies 0.")
    assert found[0].endswith("above the reference: the reference is of other data or another model.")


def test_a_row_is_said_once_to_be_above_or_to_miss_mass():
    exact = lvm.log_marginal(Exact(), None, X)
    result = lvm.compare({"exact": ROWS["exact"]}, X, reference=replace(exact, value=exact.value - 1.0))
    assert "exact: an ELBO above the reference" in str(result)
    assert not contradictions(result)
    pooled = lvm.compare({"left": (square, on(-1.97)), "right": (square, on(1.97))}, FOUR, num_particles=200)
    assert "is missed by left on 100.0% of the data" in str(pooled)
    assert not contradictions(pooled)


def test_a_later_run_that_misses_mass_is_below_the_pooled_reference():
    """Only the first run of a row is a part of the mixture, which finds no fault with it."""
    both = (square, on_both)
    rows = {"runs": [both, (square, on(1.97))], "both": both}
    (note,) = contradictions(lvm.compare(rows, FOUR, num_particles=500))
    assert note.startswith("log p-hat of 'runs' lies 0.3")  # half of log 2, the mean of two runs
    assert note.endswith(BELOW)


def on_both(x):
    with pyro.plate("data", len(x)):
        loc = torch.tensor([-1.97, 1.97], dtype=x.dtype)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones_like(loc)), dist.Normal(loc, 0.2)))


def two_groups(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5], dtype=x.dtype)))
        z = pyro.sample("z", dist.Normal(k.to(x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_group(probs):
    def guide(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(x.new_tensor(probs)))
            pyro.sample("z", dist.Normal((x + k) / 2, 0.8))

    return guide


@pytest.mark.parametrize(("probs", "said"), [([0.5, 0.5], False), ([1.0, 0.0], True)])
def test_without_a_reference_rows_of_one_model_are_held_against_each_other(probs, said):
    """One sums out a label that the other draws, so that they cannot be pooled; the other leaves out a group."""
    rows = {"drawn": (two_groups, with_group(probs)), "summed": (two_groups, gaussian(0.25, 1.0))}
    result = lvm.compare(rows, X, num_particles=1000)
    assert result.reference is None
    found = contradictions(result)
    assert [note.split(" lies ")[0] for note in found] == ["log p-hat of 'drawn'"] * said
    tail = "below that of 'summed': its guide misses mass, or the other value is wrong."
    assert all(note.endswith(tail) for note in found)


def test_what_is_not_to_be_quoted_or_of_another_model_contradicts_nothing():
    exact = lvm.log_marginal(Exact(), None, X)
    bad = lvm.compare({"bad": (model, gaussian(3.0, 0.05))}, X, num_particles=200, reference=exact)
    assert bad.rows[0].status_shares()["unreliable"] > 0.5
    assert not contradictions(bad)
    left = (square, on(-1.97))
    other = lvm.compare({"other": ROWS["wide"], "left": left}, FOUR, reference=lvm.evidence.quadrature(square, FOUR))
    assert other.ranked_by == "value"
    assert not contradictions(other)


@pytest.mark.parametrize("num_particles", [50, 200])
def test_biases_of_many_data_are_no_contradiction(num_particles):
    """Of 4000 data the mean has a tiny error, and a k-hat without fault says that the largest weights are not drawn."""
    x = X.repeat(100)
    exact = lvm.log_marginal(Exact(), None, x)
    result = lvm.compare({"row": (model, gaussian(0.0, 0.57))}, x, num_particles=num_particles, reference=exact)
    record = result.rows[0].runs[0]
    quotable = torch.from_numpy(~np.isin(record.status, ("unreliable",)))
    error = float(record.stderr[quotable].square().sum().sqrt() / quotable.sum())
    assert float((record.value - exact.value)[quotable].mean() - record.bias[quotable].mean()) < -5 * error
    assert not contradictions(result)


def test_data_that_are_not_to_be_quoted_are_left_out():
    exact = lvm.log_marginal(Exact(), None, X)
    status = exact.status.astype("<U20")
    status[:10] = "unreliable"
    value = exact.value - 0.5
    value[:10] -= 100.0
    row = replace(exact, value=value, status=status)
    (note,) = contradictions(lvm.compare({"row": row}, X, reference=exact))
    assert note == f"log p-hat of 'row' lies 0.500 {BELOW[:19]} on 75.0% of the data{BELOW[19:]}"


def test_half_precision_of_a_reference_is_no_contradiction():
    exact = lvm.log_marginal(Exact(), None, X)
    moved = {"model_dtype": {"dtype": "torch.bfloat16", "rms_log_p": 0.3, "mean_log_p": -0.2}}
    for provenance, said in (({}, True), (moved, False)):
        reference = replace(exact, value=exact.value + 0.2, provenance=exact.provenance | provenance)
        found = contradictions(lvm.compare({"wide": ROWS["wide"]}, X, reference=reference))
        assert bool(found) is said


def test_doubt_is_a_note_and_no_warning_a_row():
    text = str(lvm.compare({"bad": (model, gaussian(3.0, 0.05))}, X, num_particles=200))
    assert "bad: log p-hat is unreliable for" in text
    assert "+-" not in text.splitlines()[2]  # its bias is not small against its error


def test_markdown_html_pandas(result, tmp_path):
    assert result.to_markdown().startswith("| pair | ELBO |")
    result.to_html(tmp_path / "page.html")
    assert '<th scope="row">exact</th>' in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<table>" in result._repr_html_()
    frame = result.to_pandas()
    assert list(frame.index) == ["exact", "wide", "off"]
    assert frame.loc["wide", "gap"] == result.gap("wide")


def test_arviz_has_one_group_a_row(result):
    tree = result.to_datatree()
    assert set(tree.children) == {"exact", "wide", "off"}
    assert tree["off"]["value"].shape == (40,)
    groups = result.to_arviz()
    assert float(groups["exact"]["value"].mean()) == pytest.approx(float(LOG_PX.mean()))


def test_plot(result, tmp_path):
    figure = result.plot()
    assert [axes.get_title() for axes in figure.axes][0] == "bound and evidence"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["exact", "wide", "off"]
    figure.savefig(tmp_path / "comparison.png")


def test_parameters_are_counted():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 2).double()  # 4 numbers

        def forward(self, x):
            pyro.module("net", self)
            with pyro.plate("data", len(x)):
                loc, log_scale = self.layer(x[:, None]).unbind(-1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    assert lvm.compare({"net": (model, Net())}, X, num_particles=50).rows[0].num_parameters == 4


@pytest.mark.parametrize(
    ("rows", "options", "error", "words"),
    [
        ({}, {}, lvm.DataTypeError, "at least one pair"),
        ([ROWS["wide"]], {}, lvm.DataTypeError, "a dictionary"),
        ({"a": model}, {}, lvm.DataTypeError, "a pair"),
        ({"a": []}, {}, lvm.DataTypeError, "a pair"),
        ({"a": (model, ROWS["wide"][1], 3)}, {}, lvm.DataTypeError, "a pair"),
        (ROWS, {"reference": "short"}, lvm.ShapeError, "one number of data"),
        (ROWS, {"num_particles": 0}, lvm.ShapeError, "num_particles"),
    ],
)
def test_bad_arguments(rows, options, error, words):
    if options.get("reference"):
        options = {"reference": lvm.log_marginal(Exact(), None, X[:5])}
    with pytest.raises(error, match=words):
        lvm.compare(rows, X, **options)


def test_an_error_names_its_row():
    def misnamed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("zz", dist.Normal(x / 2, 1.0))

    with pytest.raises(lvm.SiteError) as caught:
        lvm.compare({"good": ROWS["wide"], "typo": (model, misnamed)}, X)
    assert "in row 'typo' of compare()" in caught.value.__notes__


def test_rows_of_one_object_share_its_model_however_they_are_measured():
    """An enumerated latent, a closed form beside a guide, and an AutoNormal that knows its own data only."""

    def mixture(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)))
            z = pyro.sample("z", dist.Normal(k.double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    local = pyro.infer.autoguide.AutoNormal(model)
    local(X)
    exact = lvm.models.LinearGaussian(1, 2).double()
    pair = (exact, exact.posterior_guide)
    assert lvm.compare({"a": (mixture, gaussian(0.0, 1.0)), "b": (mixture, gaussian(0.2, 1.0))}, X).ranked_by == "elbo"
    assert lvm.compare({"a": (exact, None), "b": pair}, torch.stack([X, -X], -1)).ranked_by == "elbo"
    assert lvm.compare({"a": (model, local), "b": ROWS["wide"]}, X, num_particles=50).ranked_by == "elbo"


def test_a_record_s_model_is_not_known_and_it_is_said():
    text = str(lvm.compare({"record": lvm.log_marginal(*ROWS["wide"], X, seed=0), "pair": ROWS["exact"]}, X))
    assert "could not be checked" in text


def test_training_runs_share_their_random_numbers_so_their_error_is_no_smaller():
    one = lvm.compare({"a": ROWS["off"]}, X, num_particles=50).rows[0]
    nine = lvm.compare({"a": [ROWS["off"]] * 9}, X, num_particles=50).rows[0]
    assert nine.stderr == pytest.approx(one.stderr)


def without_digest(record):
    return replace(record, provenance={key: value for key, value in record.provenance.items() if key != "sha256"})


def test_a_reference_of_other_data_is_noticed():
    other = without_digest(lvm.log_marginal(Exact(), None, X + 5.0))
    assert "an ELBO above the reference" in str(lvm.compare({"a": ROWS["wide"]}, X, reference=other))


MOVED = X.clone()
MOVED[20] += 1e-9
OTHER = "expected an estimate on the data of this call, got one of other data"


@pytest.mark.parametrize("x", [MOVED, X.flip(0)], ids=["one datum", "another order"])
def test_records_of_other_data_are_refused(x, tmp_path):
    other, same = (lvm.log_marginal(*ROWS["wide"], data, num_particles=200, seed=0) for data in (x, X))
    other.save(tmp_path / "record.json")
    read = lvm.LogMarginal.load(tmp_path / "record.json")
    for record in (other, read):
        with pytest.raises(lvm.CheckpointError, match=rf"^rows\['b'\]: {OTHER}.*Estimate it on the same x"):
            lvm.compare({"a": ROWS["wide"], "b": record}, X)
    with pytest.raises(lvm.CheckpointError, match=rf"^rows\['b'\]: {OTHER}"):
        lvm.compare({"a": same, "b": other}, X)
    with pytest.raises(lvm.CheckpointError, match=rf"^reference: {OTHER}"):
        lvm.compare({"a": ROWS["wide"]}, X, reference=read)
    lvm.compare({"a": ROWS["wide"], "b": without_digest(other)}, X, num_particles=200)


def test_a_joint_record_of_other_data_is_refused():
    other = lvm.log_marginal(Exact(), None, X[:5], data_plate=None)
    with pytest.raises(lvm.CheckpointError, match="reference"):
        lvm.compare({"a": ROWS["wide"]}, X, data_plate=None, num_particles=200, reference=other)


@pytest.mark.parametrize(
    ("form", "x"),
    [
        (X, X),
        (X.numpy(), X),
        (TensorDataset(X), X),
        (DataLoader(TensorDataset(X), batch_size=7), X),
        (X.float(), X),
        (X.float().double(), X.float()),
    ],
    ids=["chunks", "array", "data set", "loader", "in float32", "of float32"],
)
def test_the_same_data_in_another_form_are_the_same(form, x, tmp_path):
    record = lvm.log_marginal(*ROWS["wide"], form, num_particles=200, seed=0, chunks=(3, 7))
    record.save(tmp_path / "record.json")
    for each in (record, lvm.LogMarginal.load(tmp_path / "record.json")):
        for given in (x, TensorDataset(x)):
            assert len(lvm.compare({"a": ROWS["wide"], "b": each}, given, num_particles=200).rows) == 2


def test_estimators_without_a_guide_have_the_digest_of_the_same_data():
    bits = lvm.models.BinaryLatent(2, 4)
    x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)).round()
    rows = {"exact": lvm.evidence.enumeration(bits, x), "same": lvm.evidence.closed_form(bits, x), "pair": (bits, None)}
    assert len(lvm.compare(rows, x).rows) == 3
    with pytest.raises(lvm.CheckpointError, match=r"rows\['exact'\], rows\['same'\]"):
        lvm.compare(rows, 1 - x)


def with_noise(x, noise):
    model(x + 0 * noise)


def test_an_argument_that_a_record_does_without_makes_no_difference():
    def guide(x, noise):
        ROWS["wide"][1](x)

    exact = lvm.log_marginal(Exact(), None, X)
    assert lvm.compare({"a": (with_noise, guide)}, X, torch.ones_like(X), reference=exact, num_particles=200).reference
    other = lvm.log_marginal(with_noise, guide, X, torch.zeros_like(X), num_particles=200)
    with pytest.raises(lvm.CheckpointError, match="reference"):
        lvm.compare({"a": (with_noise, guide)}, X, torch.ones_like(X), reference=other)


def test_data_that_are_drawn_anew_are_not_compared():
    class Drawn(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return X[i] + torch.randn((), dtype=X.dtype)

    record = lvm.log_marginal(*ROWS["wide"], Drawn(), num_particles=200, seed=3)
    state = torch.get_rng_state()
    assert len(lvm.compare({"a": ROWS["wide"], "b": record}, Drawn(), num_particles=200).rows) == 2
    assert torch.equal(state, torch.get_rng_state())


def test_records_are_looked_at_before_anything_is_estimated():
    def never(x):
        raise AssertionError

    for other in (MOVED, X[:5]):
        with pytest.raises((lvm.CheckpointError, lvm.ShapeError)):
            lvm.compare({"a": (model, never)}, X, reference=lvm.log_marginal(Exact(), None, other))


def test_one_joint_result_is_called_that():
    result = lvm.compare({"wide": ROWS["wide"], "off": ROWS["off"]}, X[:6], data_plate=None, num_particles=200)
    assert result.notes[0].startswith("One joint result of 6 data; nats in all, higher is better.")
    assert "nan" not in str(result)
    assert "per datum" not in str(result)
    assert "as if the draws of two rows were independent" in result.notes[0]
    alone = lvm.compare({"exact": (Exact(), None)}, X[:6], data_plate=None)
    assert alone.notes[0].startswith("One joint result of 6 data; ")


@pytest.mark.parametrize("ranked_by", ["elbo", "value"])
def test_the_difference_of_joint_results_has_the_error_of_their_draws(ranked_by):
    """Over 30 seeds, each row with its own draws, the differences scatter as one of them says."""
    x = X[20:24]
    rows = {"first": ROWS["wide"], "second": (model, gaussian(0.1, 0.8))}

    def row(name, seed):
        record = lvm.log_marginal(*rows[name], x, data_plate=None, num_particles=200, seed=seed)
        return ComparisonRow(name, (record,), 0, 0.0, None)

    results = [lvm.Comparison((row("first", s), row("second", s + 100)), ranked_by, None, ()) for s in range(30)]
    found = torch.tensor([result.difference("second") for result in results], dtype=torch.float64)
    # The standard deviation of 30 has a standard error of 13 %.
    assert float(found[:, 0].std()) == pytest.approx(float(found[:, 1].mean()), rel=0.4)
    one, two = (each.runs[0] for each in results[0].rows)
    column = "elbo_stderr" if ranked_by == "elbo" else "stderr"
    assert found[0, 1] == pytest.approx(math.hypot(float(getattr(one, column)), float(getattr(two, column))))
    assert results[0].difference("first") == (0.0, 0.0)
    assert f"{found[0, 0]:.3f} +- {found[0, 1]:.2g}" in str(results[0])
    assert results[0].to_pandas().loc["second", "difference_stderr"] == found[0, 1]


def test_one_draw_has_no_error_and_an_exact_difference_shows_none():
    one = lvm.compare({"a": ROWS["wide"], "b": ROWS["off"]}, X[:6], data_plate=None, num_particles=1)
    assert math.isnan(one.difference(one.rows[1].name)[1])
    exact = lvm.log_marginal(Exact(), None, X[:6], data_plate=None)
    rows = {"first": exact, "second": replace(exact, value=exact.value - 1.0)}
    two = lvm.compare(rows, X[:6], data_plate=None)
    assert two.difference("second") == (pytest.approx(-1.0), 0.0)
    assert [cells[3] for cells in two.table.rows] == ["", "-1.000"]


def test_an_exact_row_has_no_draws():
    rows = {"closed": (Exact(), None), "record": lvm.log_marginal(*ROWS["wide"], X, num_particles=50, seed=0)}
    table = lvm.compare(rows, X).table
    column = table.header.index("K")
    cells = {name: tuple(rest)[column - 1 : column + 1] for name, *rest in table.rows}
    assert cells["closed"] == ("-", "-")
    assert cells["record"][0] == "50"
    assert float(cells["record"][1]) > 0.5


def test_peak_memory_is_that_of_the_row_on_the_device_of_the_data(monkeypatch):
    """Of 100 bytes that were there, and 350 at most; the current device may be another."""
    module, device, asked = sys.modules["pyro_lvm.compare"], torch.device("cuda:1"), []
    monkeypatch.setattr(module, "device_of", lambda _: device)
    for name, found in (("reset_peak_memory_stats", None), ("memory_allocated", 100), ("max_memory_allocated", 350)):
        monkeypatch.setattr(torch.cuda, name, lambda *given, found=found: asked.append(given) or found)
    row = lvm.compare({"a": ROWS["wide"]}, X, num_particles=200).rows[0]
    assert row.peak_memory == 250
    assert asked == [(device,)] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_leaves_out_what_was_there():
    there = torch.zeros(2**26, device="cuda")  # 256 MiB
    row = lvm.compare({"a": ROWS["wide"]}, X.cuda(), num_particles=200).rows[0]
    assert 0 < row.peak_memory < there.nbytes / 2


def test_ctrl_c_keeps_the_rows_that_are_finished():
    calls = 0

    def interrupted(x):
        nonlocal calls
        calls += 1
        if calls > 40:
            raise KeyboardInterrupt
        model(x)

    result = lvm.compare({"done": ROWS["wide"], "cut": (interrupted, ROWS["wide"][1])}, X, chunks=(2, 10))
    assert [row.name for row in result.rows] == ["done"]
    assert "['cut'] were not measured" in str(result)


def test_parameters_of_fitted_callables_are_counted():
    net = torch.nn.Linear(1, 2).double()  # 4 numbers

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            loc, log_scale = net(x[:, None]).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    fitted = lvm.fit(model, guide, X, num_steps=2)
    assert lvm.compare({"a": (fitted.model, fitted.guide)}, X, num_particles=50).rows[0].num_parameters == 4


def test_densities_beside_probabilities_are_pointed_out():
    """Binary data have a density without bound under a flow, and a probability under a Bernoulli."""
    x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)).round()
    rows = {
        "flow": (lvm.models.NormalizingFlow(4), None),
        "masked": (lvm.models.Autoregressive(4, [8]), None),
        "bits": (lvm.models.BinaryLatent(2, 4), None),
    }
    notes = "\n".join(lvm.compare(rows, x).notes)
    assert "['masked', 'bits'] hold probabilities of discrete data, ['flow'] densities" in notes
    del rows["flow"]
    assert "densities" not in "\n".join(lvm.compare(rows, x).notes)


def test_rounding_of_large_densities_is_no_elbo_above_the_reference():
    """In float32 a log-density of a thousand nats is known to 1e-4; an exact row differs from itself by no more."""
    linear = lvm.models.LinearGaussian(1, 2)
    reference = lvm.compare({"exact": (linear, None)}, torch.zeros(4, 2)).rows[0].runs[0]
    value = torch.full((4,), 1000.0, dtype=torch.float64)
    exact = replace(reference, value=value, elbo=value)
    for above, said in ((1e-4, False), (0.01, True)):
        row = replace(exact, elbo=value + above)
        notes = " ".join(lvm.compare({"exact": row}, torch.zeros(4, 2), reference=exact).notes)
        assert ("above" in notes) is said
