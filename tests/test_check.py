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
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO, TraceTailAdaptive_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
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
