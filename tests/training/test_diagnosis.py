"""What `fit` refuses before or while it trains, under which name, and what it must not refuse."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoNormal,
    AutoNormalMessenger,
)
from torch.distributions import constraints
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_lvm.errors import PlateError, PyroLVMError, SiteError, SupportError
from pyro_lvm.evidence import importance
from pyro_lvm.guides import DiagonalNormal
from pyro_lvm.models import BinaryLatent, DeepGaussian, GaussianMixture, NormalizingFlow
from pyro_lvm.tracing import log_weights
from pyro_lvm.training import fit

CURE = r"pass batch_size=len\(x\) \(all data in each step\)"


def data(num_data=20, dim=3):
    return torch.randn(num_data, dim, generator=torch.Generator().manual_seed(7))


def pixels(num_data=20):
    return torch.rand(num_data, 3, generator=torch.Generator().manual_seed(7))


def factor(x, *_):
    """Latents of each datum, and one weight."""
    weight = pyro.param("weight", torch.ones(3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None] * weight, 1.0).to_event(1), obs=x)


def hierarchical(x):
    """Latents of each datum, and one latent of all."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None] * weight, 1.0).to_event(1), obs=x)


def amortised(x, *_):
    slope = pyro.param("slope", torch.full((3,), 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ slope, 0.7))


def indexed(x, index):
    loc = pyro.param("loc", torch.zeros(20))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc[index], 0.7))


def of_the_first_batch(x):
    loc = pyro.param("loc", lambda: torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.7))


def of_all_data(x):
    loc = pyro.param("loc", torch.zeros(20))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.7))


def mixed(model):
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["weight"])))
    guide.append(AutoNormal(poutine.block(model, expose=["z"])))
    return guide


# ---------------------------------------------------------------------------------------------------------------------
# Parameters for each datum.


@pytest.mark.parametrize("batch_size", [10, 12, 2, 19])  # of 20: equal batches, unequal ones, a last one
@pytest.mark.parametrize("family", [AutoNormal, AutoDiagonalNormal, AutoDelta, AutoNormalMessenger])
def test_an_autoguide_with_local_latents_needs_all_data_in_each_step(family, batch_size):
    with pytest.raises(PlateError, match=f"guide site '(locs.)?z'.* plate 'data'.* {CURE}"):
        fit(factor, family(factor), data(), num_steps=3, batch_size=batch_size)
    assert not list(pyro.get_param_store())
    assert fit(factor, family(factor), data(), num_steps=3, batch_size=20).skipped == 0  # the cure


@pytest.mark.parametrize("family", [AutoNormal, AutoDiagonalNormal, AutoDelta])  # the messenger makes it one for all
def test_an_autoguide_on_one_datum_a_step(family):
    with pytest.raises(PlateError, match=f"guide site 'z'.* plate 'data'.* {CURE}"):
        fit(factor, family(factor), data(), num_steps=3, batch_size=1)


@pytest.mark.parametrize("guide", [of_the_first_batch, of_all_data])
def test_a_function_with_local_parameters(guide):
    with pytest.raises(PlateError, match=f"site 'z': .* plate 'data'.* {CURE}"):
        fit(factor, guide, data(), num_steps=3, batch_size=10)
    assert fit(factor, guide, data(), num_steps=3, batch_size=20).skipped == 0


def test_a_list_of_autoguides():
    with pytest.raises(PlateError, match=f"guide site 'z': .* {CURE}"):
        fit(hierarchical, mixed(hierarchical), data(), num_steps=3, batch_size=10)
    assert fit(hierarchical, mixed(hierarchical), data(), num_steps=3, batch_size=20).skipped == 0


def test_an_autoguide_that_was_trained_on_all_data():
    guide = AutoNormal(factor)
    fit(factor, guide, data(), num_steps=3)
    with pytest.raises(PlateError, match=f"expected the 10 data of a batch in plate 'data', got all 20 data.* {CURE}"):
        fit(factor, guide, data(), num_steps=3, batch_size=10)


def test_a_data_loader():
    loader = DataLoader(TensorDataset(data()), batch_size=10, shuffle=True)
    with pytest.raises(PlateError, match=CURE):
        fit(factor, AutoNormal(factor), loader, num_steps=3)


def test_a_guide_that_subsamples_by_itself_where_the_model_is_told_the_rows():
    # without create_plates the guide draws rows of its own
    with pytest.raises(PlateError, match=f"guide site 'z': .* {CURE}"):
        fit(subsampled, AutoNormal(subsampled), (data(), torch.arange(20)), num_steps=3, batch_size=10)


def test_a_stream_of_unknown_length_is_a_warning_in_the_log(caplog):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from data()

    assert fit(factor, AutoNormal(factor), Stream(), num_steps=3, batch_size=20).skipped == 0
    assert "unless every batch holds the same data in the same order: guide site 'z'" in caplog.text


def subsampled(x, index):
    weight = pyro.param("weight", torch.ones(3))
    with pyro.plate("data", 20, subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None] * weight, 1.0).to_event(1), obs=x)


def subsampled_guide(x, index):
    with pyro.plate("data", 20, subsample=index):
        loc = pyro.param("loc", torch.zeros(20), event_dim=0)
        pyro.sample("z", dist.Normal(loc, 0.7))


def local_model(x):
    """No plate at all."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).expand([len(x), 3]).to_event(2), obs=x)


def fixed_features(x):
    """A second plate that has the size of a batch by chance."""
    with pyro.plate("features", 10, dim=-1):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("x", dist.Normal(loc, pyro.param("scale", torch.tensor(1.0))), obs=x)


def autoguide_with_plates(model):
    return AutoNormal(model, create_plates=lambda x, index: pyro.plate("data", 20, subsample=index))


SOUND = {
    "amortised": (factor, amortised, data()),
    "amortised_with_index": (factor, amortised, (data(), torch.arange(20))),
    "indexed": (factor, indexed, (data(), torch.arange(20))),
    "subsample": (subsampled, subsampled_guide, (data(), torch.arange(20))),
    "create_plates": (subsampled, autoguide_with_plates(subsampled), (data(), torch.arange(20))),
    "amortized_plates": (factor, AutoNormalMessenger(factor, amortized_plates=("data",)), data()),
    "no_plate": (local_model, AutoNormal(local_model), data()),
    "another_plate": (fixed_features, AutoNormal(fixed_features), data(dim=10)),
}


@pytest.mark.parametrize("batch_size", [10, 12])
@pytest.mark.parametrize("name", SOUND)
def test_sound_pairs_are_not_refused(name, batch_size):
    model, guide, arguments = SOUND[name]
    guide = {"create_plates": lambda: autoguide_with_plates(model), "no_plate": lambda: AutoNormal(model)}.get(
        name, lambda: guide
    )()
    assert fit(model, guide, arguments, num_epochs=2, batch_size=batch_size).skipped == 0


# ---------------------------------------------------------------------------------------------------------------------
# Pyro's errors under our names.


def location():
    return pyro.param("a", torch.zeros(3))


def no_event(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(location(), 1.0), obs=x)


def wrong_plate(x):
    with pyro.plate("data", 50):
        pyro.sample("x", dist.Normal(location(), 1.0).to_event(1), obs=x)


def wrong_shape(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(location()[0], 1.0), obs=x)


def no_event_in_the_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("b", torch.zeros(2)), 1.0))


def two_latents(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(location(), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("batch_size", [7, 20])
@pytest.mark.parametrize(
    ("model", "guide", "error", "message"),
    [
        (no_event, None, SiteError, r"site 'x'.*to_event\(1\)"),
        (two_latents, no_event_in_the_guide, SiteError, r"site 'z'.*to_event\(1\)"),
        (wrong_plate, None, PlateError, r"observed site 'x': expected a plate of size \d+.* got plates {'data': 50}"),
        (wrong_shape, None, SiteError, r"observed site 'x': expected values .* got shape \(\d+, 3\).*to_event"),
    ],
    ids=["no_event", "no_event_in_the_guide", "wrong_plate", "wrong_shape"],
)
def test_shapes(model, guide, error, message, batch_size):
    with pytest.raises(error, match=message) as info:
        fit(model, guide, data(), num_steps=3, batch_size=batch_size)
    assert isinstance(info.value.__cause__, ValueError)


def test_a_forgotten_event_as_wide_as_the_batch():
    # 3 data of 3 numbers: every shape broadcasts
    with pytest.raises(
        SiteError, match=r"site 'x': expected one log-density per element .* \[3\], got \[3, 3\].*to_event"
    ):
        fit(no_event, None, data(5), num_epochs=1, batch_size=3)


def test_a_latent_event_as_wide_as_the_batch():
    # not to be taken for parameters of each datum
    with pytest.raises(SiteError, match=r"site 'z'.*to_event"):
        fit(two_latents, no_event_in_the_guide, data(5), num_epochs=1, batch_size=2)


def test_a_shape_that_only_a_later_batch_has():
    batches = [(data(4), torch.zeros(4, 1)), (data(4), torch.zeros(4, 2))]

    def model(x, offset):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(location().sum() + offset.squeeze(1), 1.0), obs=x[:, 0])

    with pytest.raises(SiteError, match=r"site 'x'.*to_event\(1\)"):
        fit(model, None, DataLoader(batches, batch_size=None), num_epochs=1)


def bernoulli(validate_args):
    def model(x):
        with pyro.plate("data", len(x)):
            fn = dist.Bernoulli(logits=location(), validate_args=validate_args)
            pyro.sample("x", fn.to_event(1), obs=x)

    return model


@pytest.mark.parametrize("first", [0, 15])  # grey from the first batch on, or in a later one
def test_grey_pixels_under_a_bernoulli(first):
    x = pixels().round()
    x[first:] = 0.25
    loader = DataLoader(TensorDataset(x), batch_size=10)
    with pytest.raises(SupportError, match=r"observed site 'x': expected values in Boolean\(\), got 0.25.* binarise"):
        fit(bernoulli(None), None, loader, num_epochs=1)


@pytest.mark.parametrize("switch", ["validate_args", "global"])
def test_grey_pixels_that_nothing_validates_are_trained_on_and_said_so_once(switch, caplog):
    model = bernoulli(False if switch == "validate_args" else None)
    x = pixels()
    with pyro.validation_enabled(switch == "validate_args"):
        result = fit(model, None, x, num_epochs=400, optim=lambda p: torch.optim.Adam(p, 0.05), batch_size=20)
    # the optimum of the Bernoulli "likelihood" of grey pixels: the mean of each pixel
    assert torch.allclose(result.params["a"].sigmoid(), x.mean(0), atol=1e-3)
    assert caplog.text.count("observed sites ['x'] have values outside of their support") == 1


def test_data_on_the_support_are_not_mentioned(caplog):
    fit(bernoulli(None), None, pixels().round(), num_epochs=1, batch_size=10)
    assert not caplog.text


def test_nan_is_skipped_beside_grey_pixels_too():
    x = pixels()
    x[0] = torch.nan
    assert fit(bernoulli(False), None, x, num_epochs=20, batch_size=1, seed=0).skipped == 20


@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize(
    "error",
    [ValueError("Expected parameter of mine"), KeyError("mine"), ValueError("Shape mismatch inside my code")],
    ids=["parameter", "key", "shape"],
)
def test_exceptions_of_the_user_pass_unchanged(error, in_training):
    def model(x):
        if torch.is_grad_enabled() or not in_training:
            raise error
        factor(x)

    with pytest.raises(type(error)) as info:
        fit(model, amortised, data(), num_steps=3, batch_size=10)
    assert error in (info.value, info.value.__cause__)  # Pyro adds the shapes of its trace to a ValueError
    assert not isinstance(info.value, PyroLVMError)


def test_a_guide_outside_the_prior_keeps_the_error_of_pyro():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(z[:, None] * location(), 1.0).to_event(1), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(5.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, scale))

    with pytest.raises(ValueError, match="at site 'z'") as info:
        fit(model, guide, data(), num_steps=3, batch_size=10)
    assert not isinstance(info.value, PyroLVMError)


@pytest.mark.parametrize("beside", [True, False])
def test_a_site_that_the_model_lacks_would_make_the_loss_no_bound(beside):
    mixture = GaussianMixture(3, 2)

    def guide(x):
        with pyro.plate("data", len(x)):
            if beside:
                pyro.sample("z", dist.Categorical(torch.ones(3)))
            pyro.sample("k", dist.Categorical(torch.ones(3)))

    with pytest.raises(SiteError, match=r"guide: expected no more than the latent sites \['z'\] .*got \['k'\]"):
        fit(mixture, guide, data(dim=2), num_steps=1)


def test_data_of_another_dtype_get_a_note():
    with pytest.raises(RuntimeError, match="dtype") as caught:
        fit(NormalizingFlow(3), None, data().double(), num_steps=1)
    assert "x is float64 and the parameters are float32" in caught.value.__notes__[0]


def test_integers_get_a_note():
    with pytest.raises(RuntimeError, match="dtype") as caught:
        importance(DeepGaussian(3, 3), DiagonalNormal(3, torch.nn.Linear(3, 6)), data().int())
    assert caught.value.__notes__ == ["x is int32 and the parameters are float32: pass x.float()."]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that nothing trains.


def loose(slope):
    """A guide whose scale is a parameter and whose slope is not."""

    def guide(x):
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope(x), scale))

    return guide


def test_a_tensor_in_no_param_store_is_noted(caplog):
    weight, encoder = torch.full((3,), 0.1, requires_grad=True), torch.nn.Linear(3, 1)
    notes = fit(factor, loose(lambda x: x @ weight), data(), num_steps=2).notes
    assert len(notes) == 1
    assert "is in no param store, so that nothing trains it: a tensor of shape (3,)" in notes[0]
    assert notes[0] in caplog.text
    pyro.clear_param_store()
    notes = fit(factor, loose(lambda x: encoder(x)[:, 0]), data(), num_steps=2).notes
    assert "nothing trains it: 'bias', 'weight' of a Linear" in notes[0]
    pyro.clear_param_store()
    frozen = loose(lambda x: encoder.requires_grad_(False)(x)[:, 0])
    assert fit(factor, frozen, data(), num_steps=2).notes == ()


@pytest.mark.parametrize(("update", "said"), [("both", True), ("guide", True), ("model", False)])
def test_a_half_that_is_frozen_need_not_be_registered(update, said):
    weight = torch.full((3,), 0.1, requires_grad=True)
    assert bool(fit(factor, loose(lambda x: x @ weight), data(), num_steps=2, update=update).notes) == said


def test_without_a_guide_a_model_is_trained_by_its_own_density():
    torch.manual_seed(0)
    model, x = BinaryLatent(2, 3), pixels().round()
    before = model.log_prob(x).mean().item()
    result = fit(model, None, x, num_steps=50, optim=lambda params: torch.optim.Adam(params, lr=0.05))
    assert result.losses[0].item() == pytest.approx(-before, abs=1e-6)
    assert model.log_prob(x).mean().item() > before + 0.05


def test_modules_can_be_pickled_after_training_and_evaluation():
    model, x = GaussianMixture(2, 2), data(dim=2)
    fit(model, None, x, num_steps=2)
    log_weights(model, model.posterior_guide, x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model)).log_prob(x), model.log_prob(x))
