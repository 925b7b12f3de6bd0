"""Which values a pair trains, and which it is evaluated with."""

import copy
import functools
import gc
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_lvm.errors import ParameterError, UntrainedParameterWarning
from pyro_lvm.evidence import importance
from pyro_lvm.tracing import log_weights
from pyro_lvm.tracing.params import Fitted, current_params, evaluation_store, training_store
from pyro_lvm.tracing.questions import parameter_names
from tests.references import ORACLES, SIGMA, data, normal_guide, normal_model

Program = Callable[..., Any]
X = data(3)


def make_model(name: str = "mean") -> Program:
    def model(x: torch.Tensor) -> None:
        mean = pyro.param(name, torch.tensor(0.0, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    return model


def make_guide(name: str = "loc") -> Program:
    def guide(x: torch.Tensor) -> None:
        loc = pyro.param(name, torch.tensor(0.0, dtype=torch.float64))
        scale = pyro.param("scale", torch.tensor(1.0, dtype=torch.float64), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    return guide


@contextmanager
def training(model: Program, guide: Program) -> Iterator[dict[str, Any]]:
    with training_store(model, guide, lambda: parameter_names(model, guide, X)) as result:
        model(X)
        guide(X)
        yield result


def train(model: Program, guide: Program, interrupt: bool = False, **values: float) -> Any:
    """Give parameters these values, as an optimizer would: in place."""
    with training(model, guide) as result, torch.no_grad():
        for name, value in values.items():
            pyro.get_param_store().get_state()["params"][name].fill_(value)
        if interrupt:
            raise KeyboardInterrupt
    return result["params"]


def seen(model: Program, guide: Program | None) -> dict[str, float]:
    """Values that an evaluation of the pair finds (unconstrained)."""
    with evaluation_store(model, guide):
        return {name: value.item() for name, (value, _) in current_params().items()}


def store() -> dict[str, float]:
    return {name: value.item() for name, (value, _) in current_params().items()}


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_pair_trains_in_the_current_store() -> None:
    model, guide = make_model(), make_guide()
    train(model, guide, mean=1.0, loc=2.0)
    assert store() == {"mean": 1.0, "loc": 2.0, "scale": 0.0}
    assert seen(model, guide) == store()


def test_training_again_goes_on_where_it_stopped() -> None:
    model, guide = make_model(), make_guide()
    train(model, guide, mean=1.0, loc=2.0)
    train(model, guide, mean=3.0)
    assert store() == {"mean": 3.0, "loc": 2.0, "scale": 0.0}


def test_names_of_another_pair_go_to_a_store_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (make_model(), make_guide()), (make_model(), make_guide())
    train(*first, mean=1.0, loc=2.0)
    with caplog.at_level(logging.WARNING, "pyro_lvm"):
        train(*second, mean=-1.0, loc=-2.0)
    assert [r.message for r in caplog.records if "another pair" in r.message][0].startswith("parameters ['")
    assert store() == {"mean": 1.0, "loc": 2.0, "scale": 0.0}
    assert seen(*first) == store()
    assert seen(*second) == {"mean": -1.0, "loc": -2.0, "scale": 0.0}


def test_names_that_do_not_clash_share_the_store(caplog: pytest.LogCaptureFixture) -> None:
    first = make_model(), normal_guide
    second = make_model("other"), lambda x: normal_guide(x)
    train(*first, mean=1.0)
    train(*second, other=2.0)
    assert store() == {"mean": 1.0, "other": 2.0}
    assert not caplog.records


def test_a_model_keeps_its_values_under_the_next_guide() -> None:
    model, first, second = make_model(), make_guide("a"), make_guide("b")
    train(model, first, mean=1.0, a=2.0)
    with training(model, second):
        assert store()["mean"] == 1.0


def test_training_under_a_second_guide_leaves_the_first_pair_as_it_was() -> None:
    model, first, second = make_model(), make_guide(), make_guide()
    train(model, first, mean=1.0, loc=2.0)
    train(model, second, mean=5.0, loc=6.0)
    assert seen(model, first) == {"mean": 1.0, "loc": 2.0, "scale": 0.0}
    assert seen(model, second) == {"mean": 5.0, "loc": 6.0, "scale": 0.0}


def test_interrupted_training_keeps_what_was_learned() -> None:
    pairs = [(make_model(), make_guide()) for _ in "ab"]
    for value, pair in enumerate(pairs, 1):
        with pytest.raises(KeyboardInterrupt):
            train(*pair, mean=value, interrupt=True)
    assert [seen(*pair)["mean"] for pair in pairs] == [1.0, 2.0]


def test_a_cleared_store_is_forgotten() -> None:
    model, guide = make_model(), make_guide()
    train(model, guide, mean=1.0)
    pyro.clear_param_store()
    assert seen(model, guide) == {}
    with training(model, guide):
        assert store()["mean"] == 0.0


def test_methods_of_two_objects_are_two_pairs() -> None:
    class Net:
        def __init__(self) -> None:
            self.model, self.guide = make_model(), make_guide()

        def p(self, x: torch.Tensor) -> None:
            self.model(x)

        def q(self, x: torch.Tensor) -> None:
            self.guide(x)

    first, second = Net(), Net()
    train(first.p, first.q, mean=1.0)
    train(second.p, second.q, mean=2.0)
    assert seen(first.p, first.q)["mean"] == 1.0
    assert seen(second.p, second.q)["mean"] == 2.0


def test_partials_of_equal_arguments_are_one_callable() -> None:
    def model(size: int, x: torch.Tensor) -> None:
        make_model(f"mean{size}")(x)

    guide = make_guide()
    train(functools.partial(model, 1), guide, mean1=1.0, loc=3.0)
    train(functools.partial(model, 2), guide, mean2=2.0, loc=4.0)
    assert seen(functools.partial(model, 1), guide)["loc"] == 3.0
    assert seen(functools.partial(model, 2), guide)["loc"] == 4.0


def test_a_callable_is_not_kept_alive() -> None:
    model, guide = make_model(), make_guide()
    train(model, guide, mean=1.0)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_modules_of_one_name_do_not_train_over_each_other() -> None:
    """The trap of `pyro.module`: the second network would be frozen without a word."""
    first, second = ORACLES["methods"](3), ORACLES["methods"](3)
    for pair, value in ((first, 1.0), (second, 2.0)):
        x = pair.x
        with training_store(pair.model, pair.guide, lambda p=pair, x=x: parameter_names(p.model, p.guide, x)):
            pair.guide(x)
            for tensor, _ in current_params().values():
                tensor.data.fill_(value)
    for pair, value in ((first, 1.0), (second, 2.0)):
        assert {p.item() for p in pair.guide.__self__.parameters()} == {value}
        with evaluation_store(pair.model, pair.guide):
            assert {t.item() for t, _ in current_params().values()} == {value}


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_uses_what_a_plain_script_left_in_the_store() -> None:
    pyro.param("mean", torch.tensor(4.0, dtype=torch.float64))
    pair = make_model(), normal_guide
    assert seen(*pair) == {"mean": 4.0}


def test_a_value_loaded_from_disk_replaces_the_learned_one() -> None:
    model, guide = make_model(), make_guide()
    train(model, guide, mean=1.0)
    pyro.get_param_store()["mean"] = torch.tensor(7.0, dtype=torch.float64)
    assert seen(model, guide)["mean"] == 7.0


def test_a_callable_fitted_in_two_pairs_is_not_evaluated_alone() -> None:
    model, first, second = make_model(), make_guide(), make_guide()
    train(model, first, mean=1.0)
    train(model, second, mean=2.0)
    with pytest.raises(ParameterError, match=r"fitted in 2 pairs.*FitResult\.model"):
        log_weights(model, normal_guide, X)


def test_a_callable_fitted_in_two_pairs_with_one_value_is_clear() -> None:
    model, first, second = make_model(), make_guide("a"), make_guide("b")
    train(model, first, mean=1.0)
    train(model, second, mean=1.0)
    assert seen(model, normal_guide)["mean"] == 1.0


def test_a_new_pair_of_two_fitted_callables() -> None:
    """model from one fit, guide from another: each brings what it has learned."""
    first, second = (make_model(), make_guide()), (make_model(), make_guide())
    train(*first, mean=1.0, loc=2.0)
    train(*second, mean=-1.0, loc=-2.0)
    assert seen(first[0], second[1]) == {"mean": 1.0, "loc": -2.0, "scale": 0.0}


def test_fitted_callables_carry_their_values() -> None:
    first, second = (make_model(), make_guide()), (make_model(), make_guide())
    learned = [train(*first, mean=1.0, loc=2.0), train(*second, mean=-1.0, loc=-2.0)]
    fitted = [(Fitted(m, p), Fitted(g, p)) for (m, g), p in zip((first, second), learned, strict=True)]
    pyro.clear_param_store()
    for (model, guide), mean in zip(fitted, (1.0, -1.0), strict=True):
        assert seen(model, guide)["mean"] == mean
        before = pyro.poutine.trace(model).get_trace(X)
        assert before.nodes["mean"]["value"].item() == mean
    assert store() == {}


def test_fitted_callables_are_exact_in_any_store() -> None:
    pair = ORACLES["params"](4)
    params = current_params()
    model, guide = Fitted(pair.model, params), Fitted(pair.guide, params)
    pyro.clear_param_store()
    pyro.param("sigma", torch.tensor(9.0))
    table = log_weights(model, guide, pair.x, num_particles=3)
    torch.testing.assert_close(table, pair.log_px.expand(3, -1), atol=1e-10, rtol=0)
    assert list(store()) == ["sigma"]


@pytest.mark.parametrize("function", [log_weights, importance])
@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
def test_a_parameter_made_in_evaluation_is_said_to_be_untrained(function: Program) -> None:
    with pytest.warns(UntrainedParameterWarning, match=r"\['loc', 'mean', 'scale'\].*fit\(\)"):
        function(make_model(), make_guide(), X)
    assert store() == {}


@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
def test_an_auto_guide_that_never_ran_is_untrained_and_stays_so() -> None:
    guide = AutoNormal(normal_model)
    with pytest.warns(UntrainedParameterWarning):
        log_weights(normal_model, guide, X)
    assert store() == {}


def test_a_module_in_a_plain_function_is_no_new_parameter() -> None:
    """`pyro.module` registers in the store at each call; the module keeps the values."""
    pair = ORACLES["methods"](3)
    log_weights(pair.model, pair.guide, pair.x)
    assert store() == {}


def test_the_warning_names_the_line_of_the_user() -> None:
    with pytest.warns(UntrainedParameterWarning) as caught:
        log_weights(make_model(), normal_guide, X)
    assert [w.filename for w in caught] == [__file__]


def test_fitted_forwards_the_attributes_of_its_callable() -> None:
    encoder = ORACLES["pyro_module"](3).guide
    fitted = Fitted(encoder, {})
    assert fitted.linear is encoder.linear
    assert "Fitted" in repr(fitted)


def test_fitted_callables_can_be_copied_and_pickled() -> None:
    fitted = Fitted(normal_guide, {"loc": (torch.tensor(1.0), dist.constraints.real)})
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):  # noqa: S301
        assert other.params["loc"][0].item() == 1.0


def test_parameters_on_both_sides_under_one_name_are_one() -> None:
    model, guide = make_model("shared"), make_guide("shared")
    train(model, guide, shared=1.5)
    assert seen(model, guide) == {"shared": 1.5, "scale": 0.0}


# --- pairs that are gone, and pairs that have learned nothing ---------------------------------------------------------


def test_the_death_of_another_pair_changes_nothing() -> None:
    first, second = (make_model(), make_guide()), (make_model(), make_guide())
    train(*first, mean=1.0, loc=2.0, scale=3.0)
    train(*second, mean=5.0, loc=6.0, scale=7.0)
    before = seen(*second)
    del first
    gc.collect()
    assert seen(*second) == before == {"mean": 5.0, "loc": 6.0, "scale": 7.0}


def test_a_new_pair_does_not_go_on_from_one_that_is_gone() -> None:
    first = make_model(), make_guide()
    train(*first, mean=1.0, loc=2.0, scale=3.0)
    del first
    gc.collect()
    second = make_model(), make_guide()
    train(*second, mean=5.0)
    assert seen(*second) == {"mean": 5.0, "loc": 0.0, "scale": 0.0}


@pytest.mark.parametrize("function", [log_weights, importance])
@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
def test_what_another_pair_has_learned_is_said_to_be_of_another(function: Program) -> None:
    model, guide = make_model(), make_guide()
    train(model, guide, mean=1.0, loc=2.0)
    expected = function(model, guide, X, seed=0)
    with pytest.warns(UntrainedParameterWarning, match=r"\['loc', 'mean', 'scale'\] hold what another pair") as caught:
        got = function(lambda x: model(x), lambda x: guide(x), X, seed=0)
    assert [w.filename for w in caught if w.category is UntrainedParameterWarning] == [__file__]
    tables = [each if isinstance(each, torch.Tensor) else each.value for each in (expected, got)]
    assert tables[0].equal(tables[1])


def test_a_half_that_belongs_to_the_pair_vouches_for_the_other() -> None:
    model, guide = make_model(), make_guide()
    train(model, guide, mean=1.0, loc=2.0)
    log_weights(lambda x: model(x), guide, X)
    log_weights(model, lambda x: guide(x), X)


def test_a_trained_module_in_a_new_function_is_nobody_elses() -> None:
    network = torch.nn.Linear(1, 1).double()

    def guide(x: torch.Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x[:, None])[:, 0], 1.0))

    train(normal_model, guide)
    log_weights(lambda x: normal_model(x), lambda x: guide(x), X)


def test_an_error_over_names_of_another_pair_mentions_them() -> None:
    def other(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2, 3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.reshape(2, 3).sum(), 1.0))

    train(make_model(), guide := make_guide(), loc=2.0)
    with pytest.raises(RuntimeError, match="shape") as caught:
        log_weights(normal_model, other, X)
    assert "under the names ['loc', 'mean', 'scale']" in caught.value.__notes__[-1]
    assert guide is not None
