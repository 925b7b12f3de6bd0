"""`check` finds no error in pairs that are right: the library's, oracles, and kinds that Pyro publishes."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.nn.functional import softplus

import pyro_lvm as lvm
from pyro_lvm import guides, models
from tests.guides.test_log_prob import DISCRETE, REAL, D, N, hierarchies
from tests.references import ENUMERATED, ORACLES

Pair = tuple[Any, Any, tuple[Any, ...], Any]  # model, guide, arguments, loss
REALS = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
BITS = (REALS > 0).float()


def assert_no_error(model: Any, guide: Any, args: tuple[Any, ...], loss: Any = None) -> lvm.CheckReport:
    report = lvm.check(model, guide, *args, loss=loss)
    assert report.ok, str(report)
    return report


# ----------------------------------------------------------------------------------------------------------------------
# The library.


def ladder() -> Pair:
    model = models.HierarchicalGaussian(lvm.nn.MLP(2, [6], D), [2, 1], hidden_dims=(6,))
    return model, guides.Ladder(model, lvm.nn.MLP(D, [6], 6)), (BITS,), None


def semi_supervised() -> Pair:
    model = models.SemiSupervisedVAE(nn.Linear(2, D), 2, 3)
    y = torch.tensor([0, 1, 2, -1, -1])[:N]
    net = lvm.nn.MLP(D + 3, [6], 4)

    def guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        pyro.module("net", net)
        classes = torch.zeros(len(x), 3) if y is None else nn.functional.one_hot(y.clamp_min(0), 3).float()
        with pyro.plate("data", len(x)):
            loc, raw = net(torch.cat([x, classes], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw)).to_event(1))

    return model, guide, (BITS, y), None


def posterior() -> Pair:
    model = models.LinearGaussian(2, D)
    return model, guides.as_guide(model.posterior), (REALS,), None


LIBRARY: dict[str, Callable[[], Pair]] = {
    "PCA": lambda: (models.LinearGaussian(2, D), None, (REALS,), None),
    "PCA and its posterior": posterior,
    "mixture": lambda: (models.GaussianMixture(2, D), None, (REALS,), None),
    "flow": lambda: (models.NormalizingFlow(D), None, (REALS,), None),
    "autoregressive": lambda: (models.Autoregressive(D, [8]), None, (BITS,), None),
    "binary": lambda: (models.BinaryLatent(3, D), None, (BITS,), None),
    "binary with a guide": lambda: (models.BinaryLatent(3, D), guides.Bernoulli(3, nn.Linear(D, 3)), (BITS,), None),
    "VAE": lambda: (models.DeepGaussian(nn.Linear(2, D), 2), guides.DiagonalNormal(2, nn.Linear(D, 4)), (BITS,), None),
    "mixture VAE": lambda: (
        models.GaussianMixtureVAE(nn.Linear(2, D), 2, 3),
        guides.DiagonalNormal(2, nn.Linear(D, 4)),
        (BITS,),
        None,
    ),
    "semi-supervised": semi_supervised,
    "ladder": ladder,
}


@pytest.mark.parametrize("name", LIBRARY)
def test_models_of_the_library(name: str) -> None:
    assert_no_error(*LIBRARY[name]())


@pytest.mark.parametrize("loss", [None, TraceMeanField_ELBO()])
@pytest.mark.parametrize("family", REAL)
def test_guides_of_the_library(family: str, loss: Any) -> None:
    report = assert_no_error(models.DeepGaussian(nn.Linear(3, D), 3), REAL[family](), (BITS,), loss)
    assert ("guide-ignores-x" in report.codes) == (family == "shared")
    assert ("whole-data" in report.codes) == (family == "local")


@pytest.mark.parametrize("which", range(2))
def test_hierarchical_guides_of_the_library(which: int) -> None:
    model = models.HierarchicalGaussian(lvm.nn.MLP(2, [6], D), [2, 1], hidden_dims=(6,)).double()
    assert_no_error(model, hierarchies()[which].double(), (BITS.double(),))


@pytest.mark.parametrize("family", ["bernoulli", "chain"])
def test_discrete_guides_of_the_library(family: str) -> None:
    report = assert_no_error(models.BinaryLatent(3, D), DISCRETE[family][0](), (BITS,))
    assert "score-function" in report.codes


@pytest.mark.parametrize("name", [*ORACLES, *ENUMERATED])
def test_pairs_with_an_exact_posterior(name: str) -> None:
    pair = (ORACLES | ENUMERATED)[name](7)
    report = assert_no_error(pair.model, pair.guide, (pair.x, *pair.args))
    assert "guide-ignores-x" not in report.codes


# ----------------------------------------------------------------------------------------------------------------------
# Pairs in the shape of Pyro's published examples.

PIXELS = (torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.5).float()
LABELS = nn.functional.one_hot(torch.arange(12) % 3, 3).float()


class VAE(nn.Module):
    """A variational autoencoder, bound methods of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = lvm.nn.MLP(36, [16], 8), lvm.nn.MLP(4, [16], 36)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            prior = dist.Normal(x.new_zeros(x.shape[0], 4), x.new_ones(x.shape[0], 4)).to_event(1)
            image = torch.sigmoid(self.decoder(pyro.sample("latent", prior)))
            pyro.sample("obs", dist.Bernoulli(image, validate_args=False).to_event(1), obs=x.reshape(-1, 36))

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x.reshape(-1, 36)).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


class SemiSupervised(nn.Module):
    """A classifier as part of the guide; labels are observed, or summed out in parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.encoder = lvm.nn.MLP(36, [16], 3), lvm.nn.MLP(39, [16], 8)
        self.decoder = lvm.nn.MLP(7, [16], 36)

    def model(self, xs: torch.Tensor, ys: torch.Tensor | None = None) -> None:
        pyro.module("ss_vae", self)
        flat = xs.reshape(-1, 36)
        with pyro.plate("data", len(xs)):
            zs = pyro.sample("z", dist.Normal(flat.new_zeros(len(xs), 4), flat.new_ones(len(xs), 4)).to_event(1))
            weights = flat.new_ones(len(xs), 3) / 3
            ys = pyro.sample("y", dist.OneHotCategorical(weights), obs=ys)
            both = torch.cat([zs.expand(*ys.shape[:-1], 4), ys], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(both)).to_event(1), obs=flat)

    def guide(self, xs: torch.Tensor, ys: torch.Tensor | None = None) -> None:
        flat = xs.reshape(-1, 36)
        with pyro.plate("data", len(xs)):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(flat)))
            both = torch.cat([flat.expand(*ys.shape[:-1], 36), ys], -1)
            loc, log_scale = self.encoder(both).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def unlabelled() -> Pair:
    pair = SemiSupervised()
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    return pair.model, config_enumerate(pair.guide, "parallel", expand=True), (PIXELS,), loss


def labelled() -> Pair:
    pair = SemiSupervised()
    return pair.model, config_enumerate(pair.guide, "parallel", expand=True), (PIXELS, LABELS), None


def sparse_gamma() -> Pair:
    """A deep exponential family: layers of gamma latents, weights for all data, a guide of gammas."""
    widths, counts = (4, 3, 2), torch.arange(1.0, 41.0).reshape(8, 5) % 6

    def model(x: torch.Tensor) -> None:
        tops = []
        for i, (rows, columns) in enumerate(((4, 3), (3, 2), (2, 5))):
            with pyro.plate(f"rows_{i}", rows, dim=-2), pyro.plate(f"columns_{i}", columns, dim=-1):
                tops.append(pyro.sample(f"w_{i}", dist.Gamma(0.1, 0.3)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z_top", dist.Gamma(0.1, 0.1).expand([widths[0]]).to_event(1))
            for i in (0, 1):
                mean = torch.matmul(z, tops[i]).clamp_min(1e-3)
                z = pyro.sample(f"z_{i}", dist.Gamma(0.1, 0.1 / mean).to_event(1))
            pyro.sample("obs", dist.Poisson(torch.matmul(z, tops[2]).clamp_min(1e-3)).to_event(1), obs=x)

    def gamma(name: str, shape: tuple[int, ...]) -> dist.Gamma:
        alpha = pyro.param(f"alpha_{name}", lambda: 0.5 + 0.1 * torch.randn(shape))
        mean = pyro.param(f"mean_{name}", lambda: 0.1 * torch.randn(shape))
        alpha, mean = softplus(alpha).clamp_min(1e-3), softplus(mean).clamp_min(1e-3)
        return dist.Gamma(alpha, alpha / mean)

    def guide(x: torch.Tensor) -> None:
        for i, (rows, columns) in enumerate(((4, 3), (3, 2), (2, 5))):
            with pyro.plate(f"rows_{i}", rows, dim=-2), pyro.plate(f"columns_{i}", columns, dim=-1):
                pyro.sample(f"w_{i}", gamma(f"w_{i}", (rows, columns)))
        with pyro.plate("data", len(x)):
            for name, width in zip(("z_top", "z_0", "z_1"), widths, strict=True):
                pyro.sample(name, gamma(name, (len(x), width)).to_event(1))

    return model, guide, (counts,), None


def enumerated_mixture(guide: Callable[[Any], Any]) -> Pair:
    """A mixture of Gaussians with global latents, whose assignments are summed out."""

    @config_enumerate
    def model(x: torch.Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=x)

    hidden = poutine.block(model, expose=["weights", "locs", "scale"])
    return model, guide(hidden), (torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]),), TraceEnum_ELBO(max_plate_nesting=1)


def partially_pooled(guide: Callable[[Any], Any]) -> Pair:
    """A regression with an intercept and a slope for each group."""
    group = torch.arange(20) % 4

    def model(y: torch.Tensor, x: torch.Tensor, group: torch.Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        spread = pyro.sample("spread", dist.HalfNormal(5.0))
        noise = pyro.sample("noise", dist.HalfCauchy(2.0))
        with pyro.plate("groups", 4):
            intercept = pyro.sample("intercept", dist.Normal(mean, spread))
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(intercept[group] + slope[group] * x, noise), obs=y)

    y = torch.randn(20, generator=torch.Generator().manual_seed(2))
    return model, guide(model), (y, torch.linspace(-1, 1, 20), group), None


class Regression(PyroModule):
    """A Bayesian regression by `PyroSample`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def bayesian_regression(guide: Callable[[Any], Any]) -> Pair:
    model = Regression()
    return model, guide(model), (torch.randn(10, 2), torch.randn(10)), None


PUBLISHED: dict[str, Callable[[], Pair]] = {
    "VAE": lambda: (lambda vae: (vae.model, vae.guide, (PIXELS,), None))(VAE()),
    "VAE, Trace_ELBO": lambda: (lambda vae: (vae.model, vae.guide, (PIXELS,), Trace_ELBO()))(VAE()),
    "VAE, mean field": lambda: (lambda vae: (vae.model, vae.guide, (PIXELS,), TraceMeanField_ELBO()))(VAE()),
    "semi-supervised, without labels": unlabelled,
    "semi-supervised, with labels": labelled,
    "sparse gamma DEF": sparse_gamma,
    "sparse gamma DEF, Trace_ELBO": lambda: (*sparse_gamma()[:3], Trace_ELBO()),
    "mixture, AutoDelta": lambda: enumerated_mixture(AutoDelta),
    "mixture, AutoNormal": lambda: enumerated_mixture(AutoNormal),
    "hierarchical regression, AutoNormal": lambda: partially_pooled(AutoNormal),
    "hierarchical regression, AutoDiagonalNormal": lambda: partially_pooled(AutoDiagonalNormal),
    "hierarchical regression, AutoLowRank": lambda: partially_pooled(AutoLowRankMultivariateNormal),
    "Bayesian regression": lambda: bayesian_regression(AutoDiagonalNormal),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_pairs_after_the_published_examples(name: str) -> None:
    torch.manual_seed(0)
    assert_no_error(*PUBLISHED[name]())


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is left behind.


@pytest.mark.parametrize("name", [*PUBLISHED, "trained", "gradients"])
def test_check_leaves_no_trace(name: str) -> None:
    torch.manual_seed(0)
    model, guide, args, loss = PUBLISHED.get(name, PUBLISHED["VAE"])()
    owner = getattr(guide, "__self__", guide)
    if name == "trained":
        lvm.fit(model, guide, args[0], num_steps=2)
    if name == "gradients":
        for parameter in owner.parameters():
            parameter.grad = torch.ones_like(parameter)
    holders = [h for h in (owner, getattr(model, "__self__", model)) if isinstance(h, nn.Module)]
    attributes = [sorted(vars(part)) for holder in holders for part in holder.modules()]
    tensors = [p for holder in holders for p in (*holder.parameters(), *holder.buffers())]
    copies = [(t.detach().clone(), None if t.grad is None else t.grad.clone()) for t in tensors]
    store = {name: (id(t), t.detach().clone()) for name, t in pyro.get_param_store().named_parameters()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    depth = copy.copy(vars(loss)) if loss is not None else None

    lvm.check(model, guide, *args, loss=loss)

    assert [sorted(vars(part)) for holder in holders for part in holder.modules()] == attributes
    for tensor, (value, grad) in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, value)
        assert (tensor.grad is None) == (grad is None)
        assert grad is None or torch.equal(tensor.grad, grad)
    after = {name: (id(t), t) for name, t in pyro.get_param_store().named_parameters()}
    assert {n: i for n, (i, _) in after.items()} == {n: i for n, (i, _) in store.items()}
    assert all(torch.equal(t, store[n][1]) for n, (_, t) in after.items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]
    assert loss is None or vars(loss) == depth
    assert getattr(guide, "prototype_trace", None) is None
