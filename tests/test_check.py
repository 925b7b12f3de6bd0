"""For every finding the smallest pair that has it, and no error on pairs that work."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions.transforms import Planar
from pyro.infer import (
    JitTraceEnum_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.ops.indexing import Vindex
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.findings import LEVELS

X = torch.randn(6, generator=torch.Generator().manual_seed(0))
Program = Callable[..., Any]


def model(x: torch.Tensor, *_: Any) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: torch.Tensor, *_: Any) -> None:
    weight = pyro.param("weight", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * x, 0.7))


def guide_of(fn: Callable[[torch.Tensor, torch.Tensor], Any], name: str = "z") -> Program:
    """A guide with a distribution that x and one parameter make."""

    def guide(x: torch.Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample(name, fn(x, weight))

    return guide


def model_of(prior: Any, likelihood: Callable[[torch.Tensor], Any]) -> Program:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(pyro.sample("z", prior)), obs=x)

    return model


Case = tuple[Program, Program, torch.Tensor, dict[str, Any]]
CASES: dict[str, Callable[[], Case]] = {}


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    CASES[function.__name__.replace("_", "-")] = function
    return function


@case
def missing_site() -> Case:
    return model, lambda x: None, X, {}


@case
def extra_site() -> Case:
    return model, guide_of(lambda x, w: dist.Normal(w * x, 1.0), "Z"), X, {}


@case
def observed_in_guide() -> Case:
    def observing(x: torch.Tensor) -> None:
        guide(x)
        with pyro.plate("more", len(x)):
            pyro.sample("seen", dist.Normal(0.0, 1.0), obs=x)

    return model, observing, X, {}


@case
def no_data() -> Case:
    def sampling(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return sampling, guide, X, {}


@case
def event_dims() -> Case:
    def forgotten(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None].expand(-1, 3), 1.0), obs=x)

    def first(x: torch.Tensor) -> None:
        guide(x[:, 0])

    return forgotten, first, X[:, None].expand(-1, 3), {}


@case
def plate_size() -> Case:
    def hundred(x: torch.Tensor) -> None:
        with pyro.plate("data", 100):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return hundred, guide, X, {}


@case
def masks() -> Case:
    return poutine.mask(model, mask=X > 0), guide, X, {}


@case
def data_outside_support() -> Case:
    return model_of(dist.Normal(0.0, 1.0), lambda z: dist.Bernoulli(logits=z, validate_args=False)), guide, X, {}


@case
def outside_prior() -> Case:
    prior, likelihood = dist.Gamma(2.0, 1.0), lambda z: dist.Normal(z, 1.0)
    return model_of(prior, likelihood), guide_of(lambda x, w: dist.Normal(w * x, 1.0, validate_args=False)), X, {}


@case
def not_finite() -> Case:
    def broken(x: torch.Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(torch.nan))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale, validate_args=False), obs=x)

    return broken, guide, X, {}


@case
def shared_name() -> Case:
    decoder, encoder = nn.Linear(1, 1), nn.Linear(1, 1)

    def decoding(x: torch.Tensor) -> None:
        pyro.module("net", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(decoder(z[..., None])[..., 0], 1.0), obs=x)

    def encoding(x: torch.Tensor) -> None:
        pyro.module("net", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x[:, None])[:, 0], 1.0))

    return decoding, encoding, X, {}


@case
def auxiliary_draw() -> Case:
    def auxiliary(x: torch.Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(a + weight * x, 1.0))

    return model, auxiliary, X, {}


@case
def coupled_data() -> Case:
    def centred(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 1.0), obs=x)

    return centred, guide, X, {}


@case
def redrawn_subsample() -> Case:
    rows = torch.arange(6)

    def chosen(x: torch.Tensor) -> None:
        with pyro.plate("data", 100, subsample=rows[: len(x)]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def redrawing(x: torch.Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(0.5))
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(weight * x, 0.7))

    return chosen, redrawing, X, {}


@case
def mean_field() -> Case:
    prior, likelihood = dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0)
    return poutine.scale(model_of(prior, likelihood), scale=2.0), guide, X, {"loss": TraceMeanField_ELBO()}


@case
def plate_nesting() -> Case:
    return model, guide, X, {"loss": Trace_ELBO(max_plate_nesting=0)}


@case
def vectorised_particles() -> Case:
    def reshaping(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.reshape(len(x)), 1.0), obs=x)

    loss = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    return reshaping, guide, X, {"loss": loss}


@case
def dtype() -> Case:
    encoder = nn.Linear(1, 1).double()

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: torch.Tensor) -> None:
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x[:, None])[:, 0], 1.0))

    return model, Guide(), X, {}


@case
def device() -> Case:
    return model, lvm.guides.DiagonalNormal(1, encoder=nn.Linear(1, 2)).to("meta"), X, {}


@case
def refused() -> Case:
    return model, guide, X, {"loss": lvm.objectives.ImportanceWeightedELBO(2, data_plate="rows")}


@case
def fails() -> Case:
    def value(model: Program, guide: Program, x: torch.Tensor) -> float:
        return Trace_ELBO().loss(model, guide, x)

    return model, guide, X, {"loss": value}


@case
def unregistered() -> Case:
    encoder = nn.Linear(1, 1)

    def encoding(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x[:, None])[:, 0], 1.0))

    return model, encoding, X, {}


@case
def shared_param() -> Case:
    scaled = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, pyro.param("scale", torch.tensor(1.0))))
    return scaled, guide_of(lambda x, w: dist.Normal(w * x, pyro.param("scale", torch.tensor(0.1)))), X, {}


@case
def moved_values() -> Case:
    table = torch.tensor([[0.0, 0.0, 2.0], [2.0, 2.0, 0.0]])

    def indexed(x: torch.Tensor) -> None:
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(mean + table[c], 1.0), obs=x)

    return indexed, None, X[:3], {"data_plate": None}


@case
def broadcast_event() -> Case:
    decoder = nn.Linear(1, 1)

    def narrow(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(decoder(z[..., None]), 1.0).to_event(1), obs=x)

    def summed(x: torch.Tensor) -> None:
        guide(x.sum(1))

    return narrow, summed, X[:, None].expand(-1, 3), {}


@case
def scales() -> Case:
    def part(x: torch.Tensor) -> None:
        with pyro.plate("data", 100, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return part, guide, X, {}


@case
def no_gradient() -> Case:
    def detached(x: torch.Tensor) -> None:
        weight, idle = pyro.param("weight", torch.tensor(0.5)), pyro.param("idle", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight * x + idle.detach(), 1.0))

    return model, detached, X, {}


@case
def guide_ignores_x() -> Case:
    return model, guide_of(lambda x, w: dist.Normal(w, 1.0)), X, {}


@case
def narrow_guide() -> Case:
    return model, guide_of(lambda x, w: dist.Gamma(1.0 + w**2 * x**2, 1.0)), X, {}


@case
def point_mass() -> Case:
    return model, AutoDelta(model), X, {}


@case
def data_plate() -> Case:
    def bare(x: torch.Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0).expand([len(x)]).to_event(1), obs=x)

    return bare, lambda x: None, X, {}


@case
def outside_plate() -> Case:
    def shared(x: torch.Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    return shared, AutoNormal(shared), X, {}


@case
def mixed_dtypes() -> Case:
    return model, guide, X.double(), {}


@case
def name_taken() -> Case:
    other = guide_of(lambda x, w: dist.Normal(w * x, 1.0))
    lvm.fit(model, other, X, num_steps=1)
    return model, guide, X, {}


@case
def drawn_from_prior() -> Case:
    return switched, guide_for_none, X, {"loss": Trace_ELBO()}


def switched(x: torch.Tensor) -> None:
    locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)


def guide_for_none(x: torch.Tensor) -> None:
    pass


@case
def nothing_to_train() -> Case:
    def fixed(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    return model, fixed, X, {}


@case
def summed_out() -> Case:
    return switched, guide_for_none, X, {}


@case
def score_function() -> Case:
    def drawing(x: torch.Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=torch.stack([-weight * x, weight * x], -1)))

    return switched, drawing, X, {}


@case
def kl_from_draws() -> Case:
    student = model_of(dist.StudentT(3.0), lambda z: dist.Normal(z, 1.0))
    return student, guide, X, {"loss": TraceMeanField_ELBO()}


@case
def train_mode() -> Case:
    encoder = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    def encoding(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x[:, None])[:, 0], 1.0))

    return model, encoding, X, {}


@case
def scaled() -> Case:
    return poutine.scale(model, scale=2.0), guide, X, {}


@case
def whole_data() -> Case:
    return model, AutoNormal(model), X, {}


@case
def particles() -> Case:
    return vectorised_particles()[0], guide, X, {}


@case
def unscorable_draws() -> Case:
    torch.manual_seed(0)
    flow = Planar(2)

    def flowing(x: torch.Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(x[:, None].expand(-1, 2), 1.0).to_event(1), flow))

    def two(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    return two, flowing, X, {}


@case
def unanswered() -> Case:
    prior = dist.ImproperUniform(dist.constraints.real, (), ())  # which cannot be drawn
    return model_of(prior, lambda z: dist.Normal(z, 1.0)), guide, X, {}


def test_every_finding_has_a_pair() -> None:
    assert set(CASES) == set(LEVELS)


@pytest.mark.parametrize("code", CASES)
def test_the_smallest_pair(code: str) -> None:
    with pyro.validation_enabled(code not in ("data-outside-support",)):
        program, other, x, options = CASES[code]()
        report = lvm.check(program, other, x, **options)
    assert code in report.codes, str(report)
    finding = report.findings[report.codes.index(code)]
    assert finding.level == LEVELS[code]
    assert finding.message.endswith((".", "!"))
    assert finding.cure.strip().endswith((".", ")", "`")) or "\n" in finding.cure
    assert finding.code in str(report)
    assert report.ok == all(LEVELS[other] != "error" for other in report.codes)
    if LEVELS[code] == "error":
        assert not report.ok


def test_every_finding_has_a_page() -> None:
    text = (Path(__file__).parents[1] / "docs" / "findings.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (Errors|Warnings|Notes)$", text, flags=re.MULTILINE)[1:]
    pages = {
        code: head[:-1].lower()
        for head, part in zip(parts[::2], parts[1::2], strict=True)
        for code in re.findall(r"^### (.+)$", part, re.MULTILINE)
    }
    assert pages == LEVELS
    assert list(pages) == list(LEVELS)


def test_the_report_prints_as_a_page() -> None:
    program, other, x, _ = no_gradient()
    report = lvm.check(poutine.scale(program, scale=2.0), other, x)
    assert str(report) == repr(report)
    assert str(report).splitlines()[:4] == [
        "check on 6 data: 2 warnings, 1 note",
        "",
        "WARNING: look at it before you train",
        "  [no-gradient] parameters: expected a gradient for each, got 0 in 3 repeats for 'idle'.",
    ]
    assert report._repr_html_().startswith("<pre>check on 6 data")
    assert [finding.site for finding in report.findings] == ["idle", "z", "x"]


def test_what_the_users_own_code_raises_passes_unchanged() -> None:
    def failing(x: torch.Tensor) -> None:
        guide(x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lvm.check(model, failing, X)
    with pytest.raises(lvm.DataTypeError, match="guide: expected a Pyro program"):
        lvm.check(model, 3, X)  # type: ignore[arg-type]
    with pytest.raises(lvm.DataTypeError, match="loss: expected a loss object"):
        lvm.check(model, guide, X, loss=Trace_ELBO)
    with pytest.raises(lvm.ShapeError, match="x: expected shape"):
        lvm.check(model, guide, X[:0])


def test_a_last_layer_that_begins_at_zero_is_no_finding() -> None:
    encoder = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1))
    nn.init.zeros_(encoder[1].weight)

    def encoding(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x[:, None])[:, 0] + x, 1.0))

    before = [p.clone() for p in encoder.parameters()]
    assert lvm.check(model, encoding, X).codes == ()
    assert all(map(torch.equal, before, encoder.parameters()))


class Locked(Trace_ELBO):
    """A loss that cannot be copied deeply."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("loss", [Locked(), TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True)])
def test_losses_of_any_kind(loss: Any) -> None:
    kept = dict(vars(loss))
    assert lvm.check(model, guide, X, loss=loss).ok
    assert vars(loss) == kept


def test_modules_of_plain_functions_have_the_gradients_that_they_had() -> None:
    encoder = nn.Linear(1, 1)

    def encoding(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x[:, None])[:, 0], 1.0))

    assert lvm.check(model, encoding, X).codes == ()
    assert encoder.weight.grad is None
    encoder.weight.grad = torch.ones(1, 1)
    lvm.check(model, encoding, X)
    assert encoder.weight.grad.tolist() == [[1.0]]


def test_a_frozen_network_need_not_be_registered() -> None:
    features = nn.Linear(1, 1).requires_grad_(False)
    assert lvm.check(model, guide_of(lambda x, w: dist.Normal(w * features(x[:, None])[:, 0], 1.0)), X).codes == ()


class Easy(EasyGuide):
    def guide(self, x: torch.Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(0.5))
        with self.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight * x, 1.0))


@pytest.mark.parametrize("make", [Easy, AutoNormal, AutoDelta])
def test_guides_that_look_at_their_model_first(make: Any) -> None:
    other = make(model)
    assert lvm.check(model, other, X[:3]).ok
    assert lvm.fit(model, other, X, num_steps=2).num_steps == 2


def test_an_example_of_a_constraint_on_vectors() -> None:
    def classes(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logits = torch.stack([z, -z], -1)
            pyro.sample("x", dist.OneHotCategorical(logits=logits, validate_args=False), obs=x)

    def first(x: torch.Tensor) -> None:
        guide(x[:, 0])

    x = torch.tensor([[1.0, 0.0], [torch.nan, 1.0], [0.5, 0.5], [0.0, 1.0]])
    words = r"observed site 'x': expected values in OneHot\(\), got \[0.5, 0.5\]"
    assert re.match(words, lvm.check(classes, first, x).findings[0].message)
    with pytest.raises(lvm.SupportError, match=words):
        lvm.log_marginal(classes, first, x, num_particles=2)


EYE = dist.Normal(0.0, 1.0).expand([1]).to_event(1)
HMM = (EYE, torch.eye(1), EYE, torch.eye(1), EYE)  # of as many steps as its data have


@pytest.mark.parametrize(
    ("loss", "marked", "code"),
    [
        (None, False, "summed-out"),
        (Trace_ELBO(), False, "drawn-from-prior"),
        (Trace_ELBO(), True, "drawn-from-prior"),
        (TraceMeanField_ELBO(), False, "drawn-from-prior"),
        (TraceGraph_ELBO(), False, "drawn-from-prior"),
        (RenyiELBO(num_particles=2), False, "drawn-from-prior"),
        (TraceEnum_ELBO(), False, "drawn-from-prior"),
        (TraceEnum_ELBO(), True, "summed-out"),
        (JitTraceEnum_ELBO(ignore_jit_warnings=True), False, "drawn-from-prior"),
        (JitTraceEnum_ELBO(ignore_jit_warnings=True), True, "summed-out"),
        (lvm.objectives.KLAnnealing(0.5, TraceEnum_ELBO()), False, "drawn-from-prior"),
        (lvm.objectives.KLAnnealing(0.5, TraceEnum_ELBO()), True, "summed-out"),
        (lvm.objectives.ImportanceWeightedELBO(2), False, "summed-out"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found vars in model", "ignore:TraceEnum_ELBO found no", "ignore:`torch.jit.trace`")
def test_a_discrete_latent_is_summed_out_by_a_loss_that_enumerates_it_alone(loss: Any, marked: bool, code: str) -> None:
    program = config_enumerate(switched) if marked else switched
    report = lvm.check(program, None, X, loss=loss)
    assert {"summed-out", "drawn-from-prior"} & set(report.codes) == {code}
    drawn = [f for f in report.findings if f.code == "drawn-from-prior"]
    assert all("TraceEnum_ELBO of a model under config_enumerate" in f.cure for f in drawn)
    assert report.ok != isinstance(loss, TraceMeanField_ELBO | TraceGraph_ELBO)  # which cannot be taken at all
    if report.ok:
        notes = lvm.fit(program, None, X, loss=loss, num_steps=1).notes
        assert any("draws from the model's prior" in note for note in notes) == bool(drawn)


class Both(nn.Module):
    """A model beside an encoder that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, 1), nn.Linear(1, 1)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.decoder(z[..., None])[..., 0], 1.0), obs=x)


def slope_guide(slope: Callable[[], torch.Tensor]) -> Program:
    return guide_of(lambda x, w: dist.Normal(w + slope() * x, 1.0))


def score_of_x(x: torch.Tensor) -> torch.Tensor:
    """A slope of the density by autograd, at a tensor that is made anew in each run."""
    with torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        return torch.autograd.grad(dist.Normal(0.0, 1.0).log_prob(at).sum(), at, create_graph=True)[0]


def test_tensors_that_nothing_trains_are_named_or_told_by_their_shape() -> None:
    plain, encoder = torch.full((), 0.1, requires_grad=True), nn.Linear(1, 1)
    found = lvm.check(model, slope_guide(lambda: plain), X).findings
    assert [(f.code, f.level) for f in found] == [("unregistered", "warning")]
    assert "got none of shape ()." in found[0].message
    assert "pyro.param" in found[0].cure
    found = lvm.check(model, slope_guide(lambda: encoder(torch.ones(1))[0]), X).findings
    assert [(f.code, f.site) for f in found] == [("unregistered", "Linear")]
    assert "got none of 'bias', 'weight'" in found[0].message
    assert plain.grad is None
    assert encoder.weight.grad is None


def test_what_is_not_used_or_only_lives_in_a_run_is_no_tensor_to_register() -> None:
    assert lvm.check(Both().model, guide, X).codes == ()
    unused, frozen = nn.Linear(1, 1), torch.full((), 0.1)
    slope = lambda: unused(torch.ones(1)).detach()[0] + frozen  # noqa: E731
    assert lvm.check(model, slope_guide(slope), X).codes == ()
    scored = guide_of(lambda x, w: dist.Normal(w * (x + score_of_x(x)) + w * x, 1.0))
    assert lvm.check(model, scored, X).codes == ()
    assert lvm.check(model, guide, X.clone().requires_grad_()).codes == ()


@pytest.mark.parametrize(
    ("ours", "theirs", "shown"),
    [
        (torch.tensor(1.0), torch.tensor(0.1), "0.1 in the guide and 1 in the model"),
        (lambda: torch.tensor(1.0), torch.tensor(0.1), "0.1 in the guide and 1 in the model"),
        (torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]), "3 in the guide and 2 in the model, element 2"),
        (torch.ones(3), torch.ones(1), "shape (1,) in the guide and (3,) in the model"),
        (torch.tensor(1.0), torch.tensor(1.0), ""),
        (lambda: torch.randn(()), lambda: torch.randn(()), ""),
        (None, torch.tensor(0.1), ""),
    ],
)
def test_a_param_of_both_halves_starts_at_one_value(ours: Any, theirs: Any, shown: str) -> None:
    scaled = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, pyro.param("s", ours).exp().mean()))
    other = guide_of(lambda x, w: dist.Normal(w * x, pyro.param("s", theirs).exp().mean()))
    found = [f for f in lvm.check(scaled, other, X).findings if f.code == "shared-param"]
    assert len(found) == bool(shown)
    assert all(f.site == "s" and shown in f.message for f in found)


def test_a_param_of_both_halves_that_starts_at_random_may_be_shared() -> None:
    scaled = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, pyro.param("s", torch.rand(()) + 1)))
    other = guide_of(lambda x, w: dist.Normal(w * x, pyro.param("s", torch.rand(()) + 1)))
    assert lvm.check(scaled, other, X).codes == ()


@pytest.mark.parametrize("likelihood", [lambda z: dist.Normal(z, 1.0), lambda z: dist.Bernoulli(logits=z)])
@pytest.mark.parametrize("loss", [None, Trace_ELBO()])
def test_a_forgotten_obs_is_no_missing_site(likelihood: Any, loss: Any) -> None:
    def forgotten(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(pyro.sample("z", dist.Normal(0.0, 1.0))))

    report = lvm.check(forgotten, guide, X, loss=loss)
    assert report.codes == ("no-data",)
    assert "obs=x at 'x'" in report.findings[0].cure
    for call in (lambda: lvm.fit(forgotten, guide, X, num_steps=1, loss=loss), lambda: lvm.elbo(forgotten, guide, X)):
        with pytest.raises(lvm.SiteError, match=r"got none.*Write obs=x at 'x'"):
            call()


def test_a_factor_is_data() -> None:
    def weighed(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Normal(0.0, 1.0))
            pyro.factor("x", -((x - z - k) ** 2))

    assert lvm.check(weighed, guide, X).codes == ("missing-site",)


@pytest.mark.parametrize(
    ("likelihood", "value", "shown"),
    [
        (
            lambda z, x: dist.Normal(z[..., None], 1.0).to_event(1),
            "wide",
            "of the data, (3,), got (1,): one number of the distribution stands for 3",
        ),
        (lambda z, x: dist.Normal(z[..., None], 1.0).mask(x[:, :1] > 0).to_event(1), "wide", "got (1,)"),
        (
            lambda z, x: dist.Normal(z[..., None].expand(-1, 3), 1.0).to_event(1),
            "narrow",
            "of the data, (1,), got (3,): one number of the data stands for 3",
        ),
        (lambda z, x: dist.Normal(z[..., None], torch.ones(3)).to_event(1), "wide", ""),
        (lambda z, x: dist.Normal(torch.zeros(1), z.exp()), "flat", ""),
        (lambda z, x: dist.GaussianHMM(*HMM), "long", ""),
        (lambda z, x: dist.Normal(torch.zeros(1), 1.0), "flat", ""),
    ],
)
def test_an_event_that_is_narrower_than_its_datum(likelihood: Any, value: str, shown: str) -> None:
    data = {"flat": X, "wide": X[:, None] + torch.arange(3.0), "narrow": X[:, None], "long": X[:, None, None]}[value]
    data = data.expand(-1, 4, 1) if value == "long" else data

    def program(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(pyro.sample("z", dist.Normal(0.0, 1.0)), x), obs=x)

    report = lvm.check(
        program, guide_of(lambda x, w: dist.Normal(w * x.flatten(1).sum(1) if x.dim() > 1 else w * x, 1.0)), data
    )
    assert report.ok, str(report)
    found = [f for f in report.findings if f.code == "broadcast-event"]
    assert len(found) == bool(shown), str(report)
    assert all(f.site == "x" and shown in f.message for f in found)


def test_one_datum_and_nan_can_be_checked() -> None:
    assert lvm.check(model, guide, X[:1]).ok
    x = X.clone()
    x[2] = torch.nan
    assert "not-finite" in lvm.check(model, guide, x).codes


def test_a_mistyped_name_is_told_before_training() -> None:
    def latent(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    report = lvm.check(latent, guide_of(lambda x, w: dist.Normal(w * x, 1.0), "latnet"), X)
    assert report.findings[0].cure == "Did you mean 'latent'? Rename or remove it."


def test_a_good_pair_has_no_finding() -> None:
    report = lvm.check(model, guide, X)
    assert report.ok
    assert report.codes == ()
    assert str(report) == "check on 6 data: nothing found"


def test_a_joint_result_is_no_fault_where_one_is_wanted():
    def regression(y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(slope * torch.arange(len(y)), 1.0), obs=y)

    def guide(y):
        loc = pyro.param("slope_loc", torch.tensor(0.1))
        pyro.sample("slope", dist.Normal(loc, 0.1))

    y = torch.arange(5.0)
    assert "outside-plate" in lvm.check(regression, guide, y).codes
    assert lvm.check(regression, guide, y, data_plate=None).codes == ()


def test_values_of_a_summed_latent_that_moved():
    """`table[c]` puts them where the loss and the evaluators do not look."""
    table = torch.tensor([[0.0, 0.0, 2.0], [2.0, 2.0, 0.0]])

    def model(y, index):
        mean = pyro.param("mean", torch.tensor(0.0))
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mean + index(table, c), 1.0), obs=y)

    def right(y):
        model(y, lambda table, c: Vindex(table)[..., c, torch.arange(3)])

    def wrong(y):
        model(y, lambda table, c: table[c])

    y = torch.tensor([0.3, 1.0, 2.0])
    assert lvm.check(right, None, y, data_plate=None).ok
    assert lvm.check(wrong, None, y, data_plate=None).codes == ("moved-values",)
    lvm.fit(right, None, y, num_steps=2, batch_size=3)
    for loss in (None, pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)):
        program = wrong if loss is None else pyro.infer.config_enumerate(wrong)
        with pytest.raises(lvm.errors.SiteError, match="Vindex"):
            lvm.fit(program, None, y, num_steps=2, batch_size=3, loss=loss)
