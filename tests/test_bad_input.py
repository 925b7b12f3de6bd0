"""Everything that a user can get wrong, each with the error that names what was expected, what came and the cure."""

import gzip
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_lvm as lvm

X = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))


def sampling(name, distribution, plate=True):
    """A guide with one site."""

    def written(x):
        if not plate:
            pyro.sample(name, distribution)
            return
        with pyro.plate("data", len(x)):
            pyro.sample(name, distribution)

    return written


def two_sites(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def nothing_observed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def fixed_plate(x):
    with pyro.plate("data", 7):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x)


def two_plates(x):
    with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", len(x), dim=-1):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x @ x.T)


def no_plate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Bernoulli(logits=z.expand(x.shape)).to_event(2), obs=x)


def own_subsample(x):
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x[rows])


def no_to_event(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z), obs=x)


def coupled(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z - z.mean(-2, keepdim=True)).to_event(1), obs=x)


def nan_parameter(x):
    loc = pyro.param("loc", torch.tensor([torch.nan, 0.0]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc.expand(len(x), 2), 1.0).to_event(1))


def global_latent(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x)


def global_guide(x):
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    guide(x)


class Sudden(RuntimeError):
    pass


def raising(x):
    raise Sudden("from the user's own code")


normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
CASES = {
    "x is empty": (model, guide, X[:0], {}, lvm.ShapeError, r"x: expected shape \(N, ...\) with N >= 1, got \(0, 2\)"),
    "x is a list": (model, guide, [[0.0, 1.0]], {}, lvm.DataTypeError, "x: expected a tensor, got list"),
    "x is complex": (model, guide, X + 0j, {}, lvm.DataTypeError, "x: expected a real dtype, got torch.complex64"),
    "x is text": (model, guide, np.array(["a"]), {}, lvm.DataTypeError, "x: expected a tensor"),
    "x is a scalar": (model, guide, torch.tensor(1.0), {}, lvm.ShapeError, r"got \(\)"),
    "x is all NaN": (model, guide, X * torch.nan, {}, lvm.ShapeError, "nothing but NaN"),
    "x is grey": (model, guide, X / 2, {}, lvm.SupportError, "site 'x': expected values in .*Boolean.*binarise"),
    "no particles": (model, guide, X, {"num_particles": 0}, lvm.ShapeError, "num_particles: expected 1 or more, got 0"),
    "negative particles": (model, guide, X, {"num_particles": -5}, lvm.ShapeError, "num_particles: .* got -5"),
    "half a particle": (
        model,
        guide,
        X,
        {"num_particles": 1.5},
        lvm.DataTypeError,
        "num_particles: expected an integer",
    ),
    "nothing observed": (nothing_observed, guide, X, {}, lvm.SiteError, "at least one observed site.*obs=x"),
    "extra site": (model, two_sites, X, {}, lvm.SiteError, "'extra'.*lacks.*Rename or remove"),
    "missing site": (model, lambda x: None, X, {}, lvm.SiteError, "without 'z'.*Sample 'z' in the guide"),
    "no guide": (model, None, X, {}, lvm.SiteError, "without 'z'"),
    "misnamed site": (model, sampling("zz", normal), X, {}, lvm.SiteError, "'zz'.*Did you mean 'z'"),
    "narrow guide": (
        model,
        sampling("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1)),
        X,
        {},
        lvm.SupportError,
        "'z': expected a support that covers the prior's",
    ),
    "point mass": (model, sampling("z", dist.Delta(torch.zeros(2)).to_event(1)), X, {}, lvm.SupportError, "point mass"),
    "plate unlike N": (fixed_plate, guide, X, {}, lvm.PlateError, "'data': expected size 4.*size len"),
    "two plates": (two_plates, None, X, {}, lvm.PlateError, r"2 candidates \['rows', 'columns'\].*data_plate="),
    "no plate": (no_plate, sampling("z", normal, plate=False), X, {}, lvm.PlateError, "got none.*data_plate=None"),
    "plate misnamed": (model, guide, X, {"data_plate": "dat"}, lvm.PlateError, r"data_plate='dat'.*\['data'\]"),
    "own subsample": (own_subsample, guide, X, {}, lvm.PlateError, "subsample"),
    "to_event forgotten": (no_to_event, guide, X, {}, lvm.SiteError, "'x'.*to_event"),
    "data coupled": (coupled, guide, X, {}, lvm.PlateError, "model: expected data that are independent"),
    "global latent": (global_latent, global_guide, X, {}, lvm.PlateError, "'scale'.*outside.*data_plate=None"),
    "NaN parameter": (model, nan_parameter, X, {}, lvm.ParameterError, r"\['loc'\]: expected finite"),
    "data_args": (model, guide, X, {"data_args": [0]}, lvm.ShapeError, "data_args: expected argument 0 to have 4 rows"),
    "user's own error": (raising, guide, X, {}, Sudden, "^from the user's own code$"),
}


@pytest.mark.parametrize(("program", "q", "x", "options", "error", "words"), CASES.values(), ids=CASES)
def test_the_error_says_what_to_do_and_nothing_changes(program, q, x, options, error, words):
    keys, random = set(pyro.get_param_store().keys()), torch.get_rng_state()
    for estimator in (lvm.log_marginal, lvm.log_weights):
        with pytest.raises(error, match=f"(?s){words}"):
            estimator(program, q, x, **options)
    assert set(pyro.get_param_store().keys()) == keys
    assert torch.equal(torch.get_rng_state(), random)


def test_every_error_is_of_the_library_and_of_python():
    for name in ("PlateError", "SupportError", "SiteError", "ShapeError", "ParameterError"):
        assert issubclass(getattr(lvm, name), lvm.PyroLVMError)
        assert issubclass(getattr(lvm, name), ValueError)
    assert issubclass(lvm.DataTypeError, TypeError)


def test_a_single_bad_datum_is_a_status_and_no_error():
    x = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [1.0, 1.0], [1.0, 0.0]])

    def sound(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.nan_to_num(), 1.0).to_event(1))

    with pytest.warns(lvm.UnreliableEstimateWarning, match="1 nonfinite"):
        result = lvm.log_marginal(model, sound, x, num_particles=200, seed=0)
    assert result.status[1] == "nonfinite"
    assert result.value[[0, 2, 3]].isfinite().all()


def test_missing_values_behind_a_mask_are_no_fault():
    def masked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            known = ~x.isnan()
            pyro.sample("x", dist.Bernoulli(logits=z).mask(known).to_event(1), obs=x)

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    x = torch.tensor([[0.0, torch.nan], [torch.nan, 1.0], [torch.nan, torch.nan]])
    result = lvm.log_marginal(masked, prior, x, num_particles=2000, seed=0)
    # P(x_d = 1) = E sigmoid(z_d) = 1/2 by symmetry; nothing observed has probability 1.
    torch.testing.assert_close(result.value, torch.tensor([0.5, 0.5, 1.0]).double().log(), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, lvm.DataTypeError, "num_epochs, num_steps: expected exactly one"),
        ({"num_steps": 1, "num_epochs": 1}, lvm.DataTypeError, "exactly one of the two, got both"),
        ({"num_steps": 0}, lvm.ShapeError, "num_steps"),
        ({"num_steps": 1, "batch_size": 0}, lvm.ShapeError, "batch_size"),
        ({"num_steps": 1, "update": "decoder"}, lvm.DataTypeError, "update: expected"),
        ({"num_steps": 1, "optim": "adam"}, lvm.DataTypeError, "optim: expected a function"),
        ({"num_steps": 1, "loss": "elbo"}, lvm.DataTypeError, "loss: expected"),
    ],
)
def test_fit_refuses_before_it_changes_anything(options, error, words):
    with pytest.raises(error, match=words):
        lvm.fit(model, guide, X, **options)
    assert not pyro.get_param_store()


def test_a_data_set_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_LVM_DATA", str(tmp_path / "variable"))
    with pytest.raises(lvm.DatasetError) as caught:
        lvm.datasets.mnist(root=tmp_path / "root")
    for words in (str(tmp_path / "root"), str(tmp_path / "variable"), "download=True", "$PYRO_LVM_DATA", "root="):
        assert words in str(caught.value)


def test_a_damaged_data_set(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        (folder / f"{name}.gz").write_bytes(gzip.compress(b"\x00\x00\x08\x03 not an image"))
    with pytest.raises(lvm.DatasetError, match=re.escape(str(folder)) + ".*delete it"):
        lvm.datasets.mnist(root=tmp_path)


def test_a_callable_of_two_pairs_alone():
    def shared(x):
        bias = pyro.param("bias", torch.zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z + bias).to_event(1), obs=x)

    def other(x):
        loc = pyro.param("loc", torch.ones(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(len(x), 2), 1.0).to_event(1))

    def optim(params):
        return torch.optim.SGD(params, lr=0.1)

    first = lvm.fit(shared, other, X, num_steps=3, optim=optim, seed=0)
    second = lvm.fit(shared, lambda x: other(x), X, num_steps=30, optim=optim, seed=0)
    assert not torch.equal(first.params["bias"], second.params["bias"])
    with pytest.raises(lvm.ParameterError, match=r"shared.*fitted in 2 pairs.*FitResult.model"):
        lvm.log_weights(shared, guide, X)
    assert lvm.log_weights(first.model, guide, X, seed=0).shape == (1, 4)
