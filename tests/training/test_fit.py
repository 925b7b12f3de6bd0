"""Training against hand-written loops, closed forms and fresh processes."""

import random
import re
import warnings
from itertools import count

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_lvm.errors import (
    DataTypeError,
    NonFiniteError,
    ParameterError,
    PlateError,
    PyroLVMError,
    ShapeError,
    SiteError,
)
from pyro_lvm.evidence import importance
from pyro_lvm.guides import DiagonalNormal
from pyro_lvm.models import LinearGaussian
from pyro_lvm.tracing import elbo
from pyro_lvm.training import fit
from pyro_lvm.training.callbacks import EarlyStopping
from pyro_lvm.training.state import FitResult


def sgd(params):
    return torch.optim.SGD(params, lr=1e-2)


def adam(params):
    return torch.optim.Adam(params, lr=1e-2)


def data(num_data=50, dim=3):
    return torch.randn(num_data, dim, generator=torch.Generator().manual_seed(7))


def make_functions(init=0.5):
    """A pair of plain functions; every pair made uses the same names."""

    def model(x):
        weight = pyro.param("weight", torch.full((2, 3), init))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)

    def guide(x):
        encoder = pyro.param("encoder", torch.full((3, 2), -init))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ encoder, 0.7).to_event(1))

    return model, guide


class VAE(nn.Module):
    """A pair of bound methods that register networks with pyro.module, with batch normalisation in both halves."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
            self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


class Decoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.decode = PyroModule[nn.Linear](2, 3)
        self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), self.scale).to_event(1), obs=x)


class Encoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.encode = PyroModule[nn.Linear](3, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encode(x), 0.5).to_event(1))


def store_values():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# The plain engine is SVI.


def hand_written(model, guide, x, loss, optim, num_epochs, batch_size, seed):
    """What fit promises to be: SVI.step over permuted batches, in a clean store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    svi = SVI(model, guide, optim, loss)
    losses = []
    for _ in range(num_epochs):
        rows = [torch.arange(len(x))] if batch_size >= len(x) else torch.randperm(len(x)).split(batch_size)
        losses += [svi.step(x[r]) / len(r) for r in rows]
    result = store_values()
    pyro.clear_param_store()
    return losses, result


@pytest.mark.parametrize("batch_size", [16, 50, 128])
@pytest.mark.parametrize("pair", [make_functions, lambda: (VAE().model, VAE().guide), lambda: (Decoder(), Encoder())])
def test_agrees_with_a_hand_written_loop_bit_for_bit(pair, batch_size):
    pyro.set_rng_seed(3)
    model, guide = pair()
    pyro.set_rng_seed(3)
    other = pair()
    losses, params = hand_written(
        *other, data(), Trace_ELBO(), pyro.optim.Adam({"lr": 1e-2}), num_epochs=3, batch_size=batch_size, seed=1
    )
    result = fit(model, guide, data(), optim=adam, num_epochs=3, batch_size=batch_size, seed=1)
    assert result.losses.tolist() == losses
    assert_same(result.params, dict(sorted(params.items())))


def test_random_initial_values_are_those_of_a_hand_written_loop():
    # looking at the pair before training must not use up the random numbers that initialise it
    def make():
        def model(x):
            weight = pyro.param("weight", lambda: torch.randn(3))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(weight.sum(), 1.0)), 1.0), obs=x[:, 0])

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.randn(())), 1.0))

        return model, guide

    losses, params = hand_written(*make(), data(), Trace_ELBO(), pyro.optim.SGD({"lr": 1e-3}), 2, 16, seed=5)
    result = fit(*make(), data(), optim=pyro.optim.SGD({"lr": 1e-3}), num_epochs=2, batch_size=16, seed=5)
    assert result.losses.tolist() == losses
    assert_same(result.params, dict(sorted(params.items())))


def test_without_a_seed_the_global_stream_is_used_and_advances():
    model, guide = make_functions()
    losses, _ = hand_written(*make_functions(), data(), Trace_ELBO(), pyro.optim.Adam({"lr": 1e-2}), 2, 16, seed=2)
    pyro.set_rng_seed(2)
    before = torch.get_rng_state()
    result = fit(model, guide, data(), optim=adam, num_epochs=2, batch_size=16)
    assert result.losses.tolist() == losses
    assert not torch.equal(before, torch.get_rng_state())


def test_a_seed_leaves_every_random_state_as_it_was():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    fit(*make_functions(), data(), num_steps=3, seed=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


def test_one_torch_optimizer_for_all_parameters_in_the_order_of_their_names():
    made = []

    def optim(params):
        made.append([tuple(p.shape) for p in params])
        return adam(params)

    result = fit(*make_functions(), data(), optim=optim, num_steps=4)
    assert made == [[(3, 2), (), (2, 3)]]  # encoder, scale, weight
    assert list(result.params) == ["encoder", "scale", "weight"]
    assert result.params["scale"] > 0
    assert not result.params["scale"].requires_grad


def test_parameters_that_appear_later_join_the_optimizer_and_are_remembered():
    calls = count()

    def model(x):
        pyro.param("early", torch.tensor(0.0))
        loc = pyro.param("early")
        if torch.is_grad_enabled() and next(calls) >= 3 or "late" in pyro.get_param_store():
            loc = loc + pyro.param("late", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x), 3]).to_event(1), obs=x)

    result = fit(model, None, data() + 5, optim=lambda p: torch.optim.SGD(p, 1e-3), num_steps=8)
    assert result.params["early"] > result.params["late"] > 0
    assert set(result.model.params) == {"early", "late"}


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(num_particles=2, vectorize_particles=True),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        RenyiELBO(alpha=0.0, num_particles=3),
        TraceTailAdaptive_ELBO(num_particles=3, vectorize_particles=True),
        type("Mine", (Trace_ELBO,), {})(),
        lambda model, guide, x: Trace_ELBO().differentiable_loss(model, guide, x),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_any_loss_object(loss):
    result = fit(*make_functions(), data(), loss=loss, optim=adam, num_epochs=2, batch_size=20, seed=0)
    assert (result.skipped, result.num_steps) == (0, 6)
    assert all(
        bool((value != start).any()) for value, start in zip(result.params.values(), (-0.5, 1.0, 0.5), strict=True)
    )


def test_a_loss_with_two_parts_is_reported_as_their_sum():
    model, _ = make_functions()

    def guide(x, observations=None):  # the signature that reweighted wake-sleep asks for
        x = x if observations is None else observations["x"]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ pyro.param("encoder", torch.zeros(3, 2)), 0.7).to_event(1))

    pyro.set_rng_seed(0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), ReweightedWakeSleep(num_particles=2, model_has_params=True))
    expected = sum(svi.step(data())) / 50
    pyro.clear_param_store()
    loss = ReweightedWakeSleep(num_particles=2, model_has_params=True)
    result = fit(make_functions()[0], guide, data(), loss=loss, optim=adam, num_steps=1, seed=0)
    assert float(result.losses[0]) == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Discrete latents that the guide lacks.


def mixture(x):
    locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)


def marked_mixture(x):
    locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)


@pytest.mark.parametrize("model", [mixture, marked_mixture])
def test_a_missing_discrete_latent_is_enumerated(model):
    x = data()[:, 0]
    # closed form: -mean log sum_k pi_k N(x; loc_k, 1)
    joint = torch.stack([dist.Normal(loc, 1.0).log_prob(x) for loc in (-1.0, 1.0)]) + torch.tensor([[0.3], [0.7]]).log()
    result = fit(model, None, x, num_steps=1)
    assert float(result.losses[0]) == pytest.approx(-float(joint.logsumexp(0).mean()), rel=1e-6)


def test_a_discrete_latent_beside_one_that_the_guide_samples():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(k * pyro.param("shift", torch.tensor(1.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * pyro.param("slope", torch.tensor(0.1)), 1.0))

    x = data()[:, 0]
    pyro.set_rng_seed(0)
    svi = SVI(
        pyro.infer.config_enumerate(model), guide, pyro.optim.Adam({"lr": 1e-2}), TraceEnum_ELBO(max_plate_nesting=1)
    )
    losses = [svi.step(x) / len(x) for _ in range(3)]
    pyro.clear_param_store()
    result = fit(model, guide, x, optim=adam, num_steps=3, seed=0, loss=None)
    assert result.losses.tolist() == losses


def test_a_missing_continuous_latent_is_refused_before_anything_changes():
    model, _ = make_functions()
    with pytest.raises(SiteError, match="guide: expected the latent sites .*'z'"):
        fit(model, None, data(), num_steps=1)
    assert not store_values()


# ---------------------------------------------------------------------------------------------------------------------
# Halves, pairs and stores.


@pytest.mark.parametrize("update", ["guide", "model"])
@pytest.mark.parametrize("kind", ["functions", "module", "pyro_module"])
def test_the_other_half_stays_bit_identical(kind, update):
    vae = VAE()
    model, guide = {
        "functions": make_functions(),
        "module": (vae.model, vae.guide),
        "pyro_module": (Decoder(), Encoder()),
    }[kind]
    fit(model, guide, data(), optim=adam, num_epochs=1, batch_size=16, seed=0)
    buffers = {name: b.clone() for name, b in vae.named_buffers()}
    before = store_values()
    result = fit(model, guide, data(), optim=adam, num_epochs=1, batch_size=16, seed=1, update=update)
    trained = result.guide.params if update == "guide" else result.model.params
    frozen = result.model.params if update == "guide" else result.guide.params
    for name, value in result.params.items():
        assert torch.equal(value, before[name]) == (name not in trained or name in frozen), name
    for name, buffer in vae.named_buffers():  # batch statistics
        if kind == "module" and name.startswith("decoder" if update == "guide" else "encoder"):
            assert torch.equal(buffer, buffers[name])
    assert all(p.grad is None for p in vae.parameters())
    assert vae.training


def test_two_tensors_of_one_name_are_refused():
    # of two PyroModules with an attribute of one name Pyro trains the tensor that it sees first and never the other
    class Model(Decoder):
        def __init__(self):
            super().__init__()
            self.encode = PyroModule[nn.Linear](2, 3)

    with pytest.raises(
        ParameterError, match=r"guide: expected names that the model does not use, got \['encode.weight'"
    ):
        fit(Model(), Encoder(), data(), num_steps=1)


def test_a_parameter_of_both_halves_is_trained_with_both_only():
    def model(x):
        shared = pyro.param("shared", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shared, 1.0))
            pyro.sample("x", dist.Normal(z * pyro.param("own", torch.tensor(1.0)), 1.0), obs=x)

    def guide(x):
        shared = pyro.param("shared", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shared + x * pyro.param("slope", torch.tensor(0.1)), 1.0))

    start = {"own": 1.0, "shared": 0.3, "slope": 0.1}
    changed = {}
    for update in ("model", "guide", "both"):
        pyro.clear_param_store()
        result = fit(model, guide, data()[:, 0], optim=sgd, num_steps=3, update=update)
        changed[update] = {n for n, v in result.params.items() if float(v) != pytest.approx(start[n], abs=1e-7)}
    assert changed == {"model": {"own"}, "guide": {"slope"}, "both": {"own", "shared", "slope"}}


def test_pairs_with_clashing_names_end_as_if_each_were_alone(caplog):
    def train(pair, seed):
        return fit(*pair, data(), optim=adam, num_epochs=2, batch_size=16, seed=seed)

    pairs = [make_functions(init) for init in (0.5, 0.1, -0.3)]
    modules = [VAE(seed) for seed in range(3)]
    together = [train(pair, seed) for seed, pair in enumerate(pairs)]
    together += [train((m.model, m.guide), seed) for seed, m in enumerate(modules)]
    assert "belong to another pair" in caplog.text
    for seed, init in enumerate((0.5, 0.1, -0.3)):
        pyro.clear_param_store()
        assert_same(train(make_functions(init), seed).params, together[seed].params)
    for seed in range(3):
        pyro.clear_param_store()
        alone = VAE(seed)
        assert_same(train((alone.model, alone.guide), seed).params, together[3 + seed].params)
        assert_same(alone.state_dict(), modules[seed].state_dict())


def test_the_fitted_pair_carries_its_parameters_into_any_store():
    x = data()
    model, guide = make_functions()
    result = fit(model, guide, x, optim=adam, num_steps=5)
    pyro.clear_param_store()
    svi = SVI(result.model, result.guide, pyro.optim.Adam({}), Trace_ELBO())
    pyro.set_rng_seed(0)
    carried = svi.evaluate_loss(x)
    assert not store_values()
    for name, value in result.params.items():
        pyro.param(name, value, constraint=constraints.positive if name == "scale" else constraints.real)
    pyro.set_rng_seed(0)
    assert carried == SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).evaluate_loss(x)


def test_training_goes_on_from_a_fitted_pair():
    pair = make_functions()
    first = fit(*pair, data(), optim=sgd, num_steps=5, seed=0)
    again = fit(first.model, first.guide, data(), optim=sgd, num_steps=5, seed=1)
    pyro.clear_param_store()
    pair = make_functions()
    fit(*pair, data(), optim=sgd, num_steps=5, seed=0)
    assert_same(fit(*pair, data(), optim=sgd, num_steps=5, seed=1).params, again.params)


def test_predictive_sees_the_fitted_values():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Delta(pyro.param("at", torch.tensor(0.0))))

    result = fit(model, guide, data()[:, 0] + 4, optim=lambda p: torch.optim.SGD(p, lr=1e-2), num_steps=50)
    draws = Predictive(model, guide=guide, num_samples=2)(data()[:, 0])
    assert torch.equal(draws["loc"].flatten(), result.params["at"].expand(2))
    assert result.params["at"] > 3


def test_gradients_left_over_from_before_do_not_count():
    clean, soiled = VAE(), VAE()
    soiled.encoder(data()).sum().backward()
    results = []
    for vae in (clean, soiled):
        pyro.clear_param_store()
        results.append(fit(vae.model, vae.guide, data(), optim=sgd, num_steps=1, seed=0).params)
    assert_same(*results)


def test_the_store_remembers_the_pair_after_an_error():
    steps = count()

    def model(x):
        if torch.is_grad_enabled() and next(steps) == 2:
            raise KeyError("from the user's code")
        make_functions_model(x)

    make_functions_model, guide = make_functions()
    with pytest.raises(KeyError, match="from the user's code"):
        fit(model, guide, data(), optim=adam, num_steps=10)
    left = store_values()
    assert not torch.equal(left["weight"], torch.full((2, 3), 0.5))
    result = fit(
        model, guide, data(), optim=lambda p: torch.optim.SGD(p, lr=0.0), num_steps=1
    )  # lr 0: starts where it was
    assert_same(result.params, {name: left[name] for name in sorted(left)})


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite.


@pytest.mark.parametrize("validate", [True, False])
def test_a_batch_with_nan_is_skipped_and_counted(validate):
    x = data(64)
    x[5] = torch.nan
    with pyro.validation_enabled(validate):
        result = fit(*make_functions(), x, optim=adam, num_epochs=1, batch_size=4, seed=0)
    assert result.skipped == 1
    assert result.num_steps == 16
    assert int(result.losses.isnan().sum()) == 1
    assert all(value.isfinite().all() for value in result.params.values())
    assert "skipped     1 steps" in repr(result)


def test_a_skipped_step_changes_nothing_at_all():
    # the run without the bad batch, on the same noise, ends bit-identical: also Adam's running averages were left alone
    good = data(8).split(4)
    bad = [good[0], good[0] * torch.nan, good[1]]
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))

    def make():
        model, _ = make_functions()

        def guide(x):
            with pyro.plate("data", len(x)):
                loc = x @ pyro.param("encoder", torch.zeros(3, 2))
                pyro.sample("z", dist.Delta(loc + noise).to_event(1))

        return model, guide

    def train(batches):
        pyro.clear_param_store()
        return fit(*make(), DataLoader(batches, batch_size=None), optim=adam, num_epochs=3)

    with_bad = train(bad)
    assert with_bad.skipped == 3
    assert_same(with_bad.params, train(good).params)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_skipped():
    def model(x):
        a = pyro.param("a", torch.tensor(0.0))
        pyro.factor("f", a.abs().sqrt())  # value 0, gradient inf at 0

    result = fit(model, None, data(), num_steps=3, optim=sgd)
    assert result.skipped == 3
    assert result.losses.tolist() == [0.0] * 3
    assert float(result.params["a"]) == 0.0


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("captured_at_once")
def test_batches_with_nan_leave_batch_statistics_alone(compile):
    torch.manual_seed(0)
    x = torch.rand(1000, 4)
    x[::500] = torch.nan  # two batches an epoch, 1 %
    encoder = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    model = LinearGaussian(1, 4)
    guide = DiagonalNormal(1, encoder=encoder)
    result = fit(model, guide, x, num_epochs=2, batch_size=5, seed=0, compile=compile)
    assert result.skipped == 4
    norm = encoder[1]
    assert norm.num_batches_tracked == 396
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()
    assert elbo(model, guide, x[1:500]).isfinite().all()
    assert (result.captured > 300) == compile


def nan_model(x, *_):
    scale = pyro.param("scale", torch.tensor(2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale / (z - z), validate_args=False).mask(True), obs=x[:, 0])


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("captured_at_once")
def test_a_model_that_is_nan_everywhere_is_an_error_and_changes_nothing(compile):
    encoder = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))

    def squeezed(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x)[:, 0], 1.0))

    pyro.param("scale", torch.tensor(2.0))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    words = "loss: expected a finite number in at least one step, .* log-density of site 'x' of the model"
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match=words):
        fit(nan_model, squeezed, torch.rand(30, 4), num_steps=50, compile=compile)
    assert pyro.param("scale").item() == 2.0
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_nan_loss_under_finite_gradients_is_skipped():
    def loss(model, guide, x):
        return pyro.param("weight", torch.ones(2)).sum() + torch.nan  # gradient 1

    result = fit(*make_functions(), data(), loss=loss, num_steps=2)
    assert result.skipped == 2


def test_ten_in_a_row_stop_the_run():
    def loss(model, guide, x):
        return pyro.param("weight", torch.ones(2)).sum() * (torch.nan if next(steps) >= 4 else 1.0)

    steps = count()
    with pytest.warns(RuntimeWarning, match="10 of 14 steps .* Lower the learning rate"):
        result = fit(*make_functions(), data(30), num_steps=500, batch_size=10, seed=0, loss=loss)
    assert (result.stop_reason, result.num_steps, result.skipped) == ("nonfinite", 14, 10)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("optim", [lambda p: torch.optim.SGD(p, 1e20), pyro.optim.SGD({"lr": 1e30, "momentum": 0.9})])
def test_parameters_stay_finite_when_training_diverges(validate, optim):
    # the first update of this size is finite and the next overflows, under finite gradients
    model, guide = make_functions()
    with pyro.validation_enabled(validate), pytest.warns(RuntimeWarning, match="Lower the learning rate"):
        result = fit(model, guide, data(30), num_steps=500, batch_size=10, seed=0, optim=optim)
    assert result.stop_reason == "nonfinite"
    assert all(value.isfinite().all() for value in result.params.values())


def test_more_than_a_tenth_of_all_steps_stop_the_run():
    x = data(40)
    x[::8] = torch.nan
    with pytest.warns(RuntimeWarning, match=r"of 100 steps"):
        result = fit(*make_functions(), x, num_epochs=100, batch_size=4, seed=0)
    assert (result.num_steps, result.stop_reason) == (100, "nonfinite")


# ---------------------------------------------------------------------------------------------------------------------
# Data.


class Pairs(Dataset):
    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, i):
        return tuple(c[i] for c in self.columns) if len(self.columns) > 1 else self.columns[0][i]


def regression(x, y):
    slope = pyro.param("slope", torch.zeros(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)


SLOPE = torch.tensor([1.0, -2.0, 0.5])


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, y),
        lambda x, y: (x.numpy(), y.numpy()),
        lambda x, y: TensorDataset(x, y),
        lambda x, y: Pairs(x, y),
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True),
        lambda x, y: DataLoader(Pairs(x, y), batch_size=25),
    ],
    ids=["tuple", "numpy", "tensor_dataset", "dataset", "loader", "loader_25"],
)
def test_every_kind_of_data(make):
    x = data(50)
    y = x @ SLOPE
    result = fit(
        regression, None, make(x, y), optim=lambda p: torch.optim.SGD(p, 1e-2), num_epochs=60, batch_size=10, seed=0
    )
    assert torch.allclose(result.params["slope"], SLOPE, atol=1e-3)  # noise-free: the least-squares optimum is exact


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.numpy(), Pairs, lambda x: DataLoader(Pairs(x), 10)])
def test_batches_of_one_argument(make):
    assert fit(*make_functions(), make(data()), num_epochs=2, batch_size=10).num_steps == 10


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("make", [lambda x, y: TensorDataset(x, y), lambda x, y: (x, y.numpy()), Pairs])
def test_data_with_an_argument_too_many_say_so(make, fitted):
    x = data()
    pair = make_functions()
    if fitted:
        result = fit(*pair, x, num_steps=1)
        pair = (result.model, result.guide)
    with pytest.raises(TypeError, match="positional argument") as info:
        fit(*pair, make(x, torch.arange(len(x))), num_steps=1, batch_size=10)
    note = r"The data give float32 \(N, 3\) and int64 \(N,\); the model takes \(x\), the guide takes \(x\)\. .*second"
    assert [re.match(note, text) is not None for text in info.value.__notes__] == [True]
    assert "returns x alone" in info.value.__notes__[0]


def test_data_with_an_argument_too_few_say_so():
    with pytest.raises(TypeError, match="missing 1 required positional argument") as info:
        fit(regression, None, data(), num_steps=1)
    note = "The data give float32 (N, 3); the model takes (x, y). Pass the rest beside x."
    assert info.value.__notes__ == [note]


def test_an_argument_error_of_a_program_itself_gets_no_note():
    def model(x):
        return len()

    with pytest.raises(TypeError, match="takes exactly one argument") as info:
        fit(model, None, data(), num_steps=1)
    assert not hasattr(info.value, "__notes__")


@pytest.mark.parametrize("batch_size", [10, 100])
@pytest.mark.parametrize("observed", [False, True])
def test_a_companion_that_lacks_rows_is_named(observed, batch_size):
    def model(x, y):
        slope = pyro.param("slope", torch.zeros(3))
        with pyro.plate("data", len(x)):
            loc, obs = (x @ slope, y) if observed else (x @ slope + y, x[:, 0])
            pyro.sample("y", dist.Normal(loc, 1.0), obs=obs)

    x = data(50)
    with pytest.raises((RuntimeError, ValueError)) as info:
        fit(model, None, (x, x[:30, 0]), num_steps=1, batch_size=batch_size)
    assert info.value.__notes__ == [
        "y has 30 rows and x has 50: every batch is given all of it. If it belongs to the data, give it 50 rows."
    ]


def test_arguments_without_a_row_per_datum_are_passed_whole():
    def model(x, offset, name):
        assert (tuple(offset.shape), name) == ((3,), "fixed")
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("a", torch.zeros(3)) + offset, 1.0).to_event(1), obs=x)

    assert fit(model, None, (data(), np.ones(3, dtype=np.float32), "fixed"), num_epochs=1, batch_size=10).num_steps == 5


def test_every_datum_once_an_epoch_in_a_new_order_and_in_order_when_full():
    seen = []

    def model(x):
        if torch.is_grad_enabled():
            seen.append(x.flatten().tolist())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0), obs=x)

    x = torch.arange(10.0)
    fit(model, None, x, num_epochs=2, batch_size=4)
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    first, second = (sum(seen[i : i + 3], []) for i in (0, 3))
    assert sorted(first) == sorted(second) == x.tolist()
    assert first != second
    seen.clear()
    fit(model, None, x, num_epochs=2, batch_size=10)
    assert seen == [x.tolist()] * 2


def test_num_steps_may_end_within_an_epoch_and_on_its_end():
    epochs = []
    call = lambda state: epochs.append((state.step, state.epoch))  # noqa: E731
    result = fit(*make_functions(), data(50), num_steps=12, batch_size=10, callbacks=[call])
    assert (result.num_steps, result.stop_reason, epochs) == (12, "num_steps", [(5, 1), (10, 2)])
    epochs.clear()
    result = fit(*make_functions(), data(50), num_steps=10, batch_size=10, callbacks=[call])
    assert (result.num_steps, epochs) == (10, [(5, 1), (10, 2)])
    assert [row["epoch"] for row in result.history] == [1] * 5 + [2] * 5


def test_device_moves_each_batch():
    def model(x, y):
        with pyro.plate("data", len(x), device="meta"):
            pyro.sample("x", dist.Normal(pyro.param("a", torch.tensor(0.0, device="meta")), 1.0), obs=x)
        assert x.device.type == y.device.type == "meta"
        raise LookupError("arrived")  # nothing can be read back from this device

    for source in ((data()[:, 0], data()), Pairs(data()[:, 0], data())):
        with pytest.raises(LookupError, match="arrived"), pyro.validation_enabled(False):
            fit(model, None, source, num_steps=1, device="meta", batch_size=10)


# ---------------------------------------------------------------------------------------------------------------------
# Latents outside the data plate.


def normal_mean(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 2.0), obs=x)


def normal_mean_guide(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("mu", dist.Normal(loc, scale))


def own_scaling(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 40, subsample=x):
        pyro.sample("x", dist.Normal(mu, 2.0), obs=x)


@pytest.mark.parametrize("model", [normal_mean, own_scaling])
def test_a_global_latent_under_mini_batches_reaches_the_exact_posterior(model):
    # conjugate: precision 1 + N/4, mean (sum x / 4) / precision; a guide trained on unscaled batches of 5 would have
    # the posterior of 5 data, precision 2.25 instead of 11
    x = data(40)[:, 0] + 1.0
    precision = 1.0 + 40 / 4.0
    mean = float(x.sum()) / 4.0 / precision
    result = fit(
        model,
        normal_mean_guide,
        x,
        loss=TraceMeanField_ELBO(num_particles=8, vectorize_particles=True) if model is normal_mean else None,
        optim=lambda p: torch.optim.Adam(p, lr=5e-3),
        num_steps=1200,
        batch_size=5,
        seed=0,
    )
    assert float(result.params["loc"]) == pytest.approx(mean, abs=0.05)
    assert float(result.params["scale"]) == pytest.approx(precision**-0.5, rel=0.15)
    # -log p(x) / N: the guide family holds the posterior, so the loss per datum is that of all N data
    covariance = 4.0 * torch.eye(40) + 1.0
    evidence = -float(dist.MultivariateNormal(torch.zeros(40), covariance).log_prob(x)) / 40
    assert float(result.losses[-400:].mean()) == pytest.approx(evidence, abs=0.05)


def test_the_scaled_gradient_is_unbiased():
    # the mean over all batches of an epoch of the scaled gradient is the full-batch gradient, for the same draw of mu
    x = data(12)[:, 0]
    gradients = []

    class Record(torch.optim.SGD):
        def step(self, closure=None):
            gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])

    def guide(x):
        pyro.sample("mu", dist.Delta(pyro.param("loc", torch.tensor(0.7))))

    fit(normal_mean, guide, x, optim=lambda p: Record(p, lr=0.1), num_epochs=1, batch_size=4)
    batches = torch.tensor(gradients)
    gradients.clear()
    pyro.clear_param_store()
    fit(normal_mean, guide, x, optim=lambda p: Record(p, lr=0.1), num_epochs=1, batch_size=12)
    assert torch.allclose(batches.mean(), torch.tensor(gradients).mean(), rtol=1e-5)
    assert float(torch.tensor(gradients)) == pytest.approx(0.7 - float((x - 0.7).sum()) / 4.0, rel=1e-5)


@pytest.mark.parametrize("family", [AutoNormal, AutoDiagonalNormal, AutoDelta])
def test_autoguides(family):
    x = data(40)[:, 0]
    guide = family(normal_mean)
    result = fit(normal_mean, guide, x, optim=adam, num_epochs=30, batch_size=10, seed=0)
    assert result.skipped == 0
    assert float(guide.median(x)["mu"]) == pytest.approx(float(x.sum()) / 4 / 11, abs=0.2)


def test_guide_messengers():
    x = data(40)[:, 0]
    guide = AutoNormalMessenger(normal_mean)
    assert fit(normal_mean, guide, x, num_steps=3, batch_size=40).skipped == 0
    with pytest.raises(PlateError, match="guide: expected a function, to scale plate 'data', got a GuideMessenger"):
        fit(normal_mean, guide, x, num_steps=3, batch_size=10)


def test_a_stream_without_a_length_cannot_be_scaled():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from data(12)[:, 0]

    with pytest.raises(PlateError, match="data: expected a known size, for plate 'data', got a stream without one"):
        fit(normal_mean, normal_mean_guide, Stream(), num_steps=3, batch_size=4)
    assert fit(regression_to_mean, None, Stream(), num_epochs=2, batch_size=4).num_steps == 6


def regression_to_mean(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0), obs=x)


def test_a_model_without_a_plate_is_trained_as_it_is_and_said_so(caplog):
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z * pyro.param("w", torch.tensor(1.0)), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x * pyro.param("a", torch.tensor(1.0)), 1.0).to_event(1))

    assert fit(model, guide, data()[:, 0], num_epochs=1, batch_size=10).num_steps == 5
    assert "no data plate found" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# The end, the record, and what is refused.


def test_a_guide_in_the_place_of_the_model_is_refused():
    model, guide = make_functions()
    with pytest.raises(SiteError, match=r"model: expected an observed site.*in the guide.*fit\(model, guide, data\)"):
        fit(guide, model, data(), num_steps=1)


def test_ctrl_c_returns_what_there_is():
    class Interrupt:
        def on_step(self, state):
            if state.step == 7:
                raise KeyboardInterrupt

    result = fit(*make_functions(), data(), num_steps=100, batch_size=10, callbacks=[Interrupt()])
    assert (result.stop_reason, result.num_steps, len(result.losses)) == ("interrupted", 7, 7)
    assert set(result.params) == {"encoder", "scale", "weight"}


@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
def test_ctrl_c_in_an_estimate_of_a_callback_ends_training():
    """A mean over the data that happened to be finished is no score of this epoch."""
    model, guide = make_functions()
    scores = []

    def interrupted(x):
        if len(scores) == 2 and len(x) == 2 and x[0].equal(data()[20]):  # after some of the chunks of the third
            raise KeyboardInterrupt
        model(x)

    def score(*_):
        scores.append(importance(interrupted, guide, data(), num_particles=2, chunks=(2, 2)).mean)
        return scores[-1]

    result = fit(model, guide, data(), num_epochs=10, callbacks=[EarlyStopping(score, patience=10)])
    assert (result.stop_reason, len(scores)) == ("interrupted", 2)


def test_ctrl_c_in_the_model():
    steps = count(1)

    def model(x):
        if torch.is_grad_enabled() and next(steps) == 4:
            raise KeyboardInterrupt
        inner(x)

    inner, guide = make_functions()
    result = fit(model, guide, data(), num_steps=100)
    assert (result.stop_reason, result.num_steps) == ("interrupted", 3)


def test_the_record():
    result = fit(*make_functions(), data(), num_epochs=3, batch_size=25, seed=0)
    assert isinstance(result, FitResult)
    assert (result.losses.dtype, result.losses.shape) == (torch.float64, (6,))
    assert result.stop_reason == "num_epochs"
    assert [list(row) for row in result.history] == [["step", "epoch", "loss", "seconds"]] * 6
    assert [row["loss"] for row in result.history] == result.losses.tolist()
    assert 0 < result.history[0]["seconds"] <= result.history[-1]["seconds"] <= result.seconds
    lines = repr(result).split("\n")
    assert len(lines) == 5
    assert lines[0].startswith("FitResult: 6 steps in")
    assert "(mean of the last 6 steps)" in lines[1]
    assert "13 numbers under 3 names" in lines[3]
    with pytest.raises(AttributeError):
        result.losses = None


def test_history_as_a_file(tmp_path):
    class Extra:
        def on_step(self, state):
            if state.step == 2:
                state.history.record(extra=0.5)

    result = fit(*make_functions(), data(), num_steps=2, callbacks=[Extra()])
    result.history.to_csv(tmp_path / "history.csv")
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,loss,seconds,extra"
    assert lines[1].endswith(",")
    assert lines[2].endswith(",0.5")


def test_progress_bar(capsys):
    fit(*make_functions(), data(), num_steps=2, progress=True)
    assert "2/2" in capsys.readouterr().err
    fit(*make_functions(), data(), num_steps=2)
    fit(*make_functions(), data(), num_steps=2, progress=False)
    assert capsys.readouterr().err == ""


def test_a_model_in_eval_mode_stays_in_eval_mode():
    vae = VAE().eval()
    before = {name: b.clone() for name, b in vae.named_buffers()}
    fit(vae.model, vae.guide, data(), num_steps=2)
    assert not any(module.training for module in vae.modules())
    assert_same(before, dict(vae.named_buffers()))


BAD = [
    (dict(num_epochs=None), DataTypeError, "num_epochs, num_steps: expected exactly one of the two, got neither"),
    (dict(num_steps=3), DataTypeError, "num_epochs, num_steps: expected exactly one of the two, got both"),
    (dict(num_epochs=0), ShapeError, "num_epochs: expected 1 or more, got 0"),
    (dict(num_epochs=1.5), DataTypeError, "num_epochs: expected an integer, got 1.5"),
    (dict(batch_size=0), ShapeError, "batch_size: expected 1 or more, got 0"),
    (dict(update="modle"), DataTypeError, 'update: expected "both", "model" or "guide", got .modle'),
    (dict(optim=0.1), DataTypeError, "optim: expected a function of the parameters, got float"),
    (dict(optim=torch.optim.SGD([torch.zeros(1)], 0.1)), DataTypeError, "optim: .* got SGD"),
    (dict(optim=lambda params: None), DataTypeError, "optim: expected a first-order torch optimizer, got NoneType"),
    (dict(optim=torch.optim.LBFGS), DataTypeError, "optim: expected a first-order torch optimizer, got LBFGS"),
    (dict(loss=Trace_ELBO), DataTypeError, "loss: expected a loss object or function"),
    (dict(loss=0), DataTypeError, "loss: expected a loss object or function, got 0"),
    (dict(model=None), DataTypeError, "model: expected a callable, got None"),
    (dict(guide=AutoNormal), DataTypeError, "guide: expected a callable"),
    (dict(seed=-1), ShapeError, "seed: expected 0 or more, got -1"),
    (dict(seed="a"), DataTypeError, "seed: expected an integer"),
    (dict(device="gpuu"), DataTypeError, "device: expected a torch device, got 'gpuu'"),
    (dict(progress="yes"), DataTypeError, "progress: expected True, False or None"),
    (dict(callbacks=print), DataTypeError, "callbacks: expected a list or tuple"),
    (dict(callbacks=[3]), DataTypeError, "callbacks: expected functions of the state, or objects, got 3"),
    (dict(data=torch.zeros(0, 3)), ShapeError, "data: expected shape"),
    (dict(data=torch.full((4, 3), torch.nan)), ShapeError, "data: expected finite numbers, got nothing but NaN"),
    (dict(data=()), DataTypeError, "data: expected a tensor, got tuple"),
    (dict(data=[1, 2]), DataTypeError, "data: expected a tensor, got list"),
    (dict(data=Pairs(torch.zeros(0))), ShapeError, "data: expected at least one datum, got an empty Dataset"),
    (
        dict(data=DataLoader(data(3), 5, drop_last=True)),
        ShapeError,
        "data: expected at least one batch an epoch, got none",
    ),
    (dict(data=DataLoader(["a", "b"])), DataTypeError, "data: expected batches of tensors"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[f"{'_'.join(b[0])}_{i}" for i, b in enumerate(BAD)])
def test_bad_arguments_are_named_before_anything_changes(bad, error, message):
    model, guide = make_functions()
    state = torch.get_rng_state()
    arguments = {"model": model, "guide": guide, "data": data(), "num_epochs": 1} | bad
    with pytest.raises(error, match=message) as info:
        fit(**arguments)
    assert isinstance(info.value, PyroLVMError)
    if "optim" not in bad and not isinstance(bad.get("data"), DataLoader):
        assert not store_values()
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("update", ["both", "guide", "model"])
def test_nothing_to_train(update):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    with pytest.raises(ParameterError, match="update: expected a parameter of the"):
        fit(model, None, data(), num_steps=1, update=update)


def test_a_loss_without_a_gradient():
    model, guide = make_functions()
    with pytest.raises(ParameterError, match="loss: expected a gradient for at least one parameter, got none"):
        fit(model, guide, data(), loss=lambda model, guide, x: torch.tensor(1.0), num_steps=1)


def test_no_warning_escapes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(*make_functions(), data(), num_epochs=2, batch_size=20)
