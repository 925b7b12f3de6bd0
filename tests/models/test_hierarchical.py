"""A linear hierarchy is one Gaussian over all latents and the data: everything about it is known."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.guides import BottomUp
from pyro_lvm.models import HierarchicalGaussian, likelihoods
from pyro_lvm.nn import MLP

N, D = 4, 3
MIN_SCALE = 1e-3  # of likelihoods.Normal


def affine(layer: nn.Linear, gain: torch.Tensor, offset: torch.Tensor, raw_scale: torch.Tensor) -> None:
    """Let a linear layer put out the mean gain z + offset, then a constant raw scale."""
    with torch.no_grad():
        layer.weight.copy_(torch.cat([gain, torch.zeros_like(gain)]))
        layer.bias.copy_(torch.cat([offset, raw_scale]))


def linear_model(dims: list[int], seed: int = 0) -> HierarchicalGaussian:
    """Linear maps and constant scales, all of them random."""
    generator = torch.Generator().manual_seed(seed)
    model = HierarchicalGaussian(nn.Linear(dims[0], 2 * D), dims, "normal", hidden_dims=()).double()
    for layer in [model.decoder, *(network.layers[0] for network in model.between)]:
        size, above = layer.out_features // 2, layer.in_features
        gain, offset, raw = torch.randn(size, above + 2, generator=generator).double().split([above, 1, 1], dim=1)
        affine(layer, gain, offset[:, 0], raw[:, 0])
    return model


class Joint:
    """The Gaussian over z, z2, ..., x of a linear model; a part is called by its number, the data by -1."""

    def __init__(self, model: HierarchicalGaussian) -> None:
        self.sizes = [*model.latent_dims, D]
        places = torch.arange(sum(self.sizes)).split(self.sizes)
        self.places = dict(enumerate(places)) | {-1: places[-1]}
        total, top = sum(self.sizes), len(model.latent_dims) - 1
        weight, offset, variance = torch.zeros(total, total), torch.zeros(total), torch.ones(total)
        weight, offset, variance = weight.double(), offset.double(), variance.double()
        layers = {part: network.layers[0] for part, network in enumerate(model.between)} | {-1: model.decoder}
        for part, layer in layers.items():
            here, above = self.places[part], self.places[part + 1]  # the data's parent is z, number 0
            gain, raw = layer.weight.detach()[: len(here)], layer.bias.detach()[len(here) :]
            weight[here[:, None], above] = gain
            offset[here] = layer.bias.detach()[: len(here)]
            variance[here] = (MIN_SCALE + nn.functional.softplus(raw)) ** 2
        assert (variance[self.places[top]] == 1).all()
        spread = torch.linalg.inv(torch.eye(total).double() - weight)  # v = weight v + offset + noise
        self.mean, self.covariance = spread @ offset, spread @ variance.diag() @ spread.T

    def density(self, *parts: int) -> dist.MultivariateNormal:
        index = torch.cat([self.places[part] for part in parts])
        return dist.MultivariateNormal(self.mean[index], self.covariance[index[:, None], index])

    def conditional(self, part: int, *given: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gain, offset and covariance of p(part | given)."""
        here, there = self.places[part], torch.cat([self.places[g] for g in given])
        cross = self.covariance[here[:, None], there]
        gain = cross @ torch.linalg.inv(self.covariance[there[:, None], there])
        return gain, self.mean[here] - gain @ self.mean[there], self.covariance[here[:, None], here] - gain @ cross.T


def data(num_data: int = N) -> torch.Tensor:
    return torch.randn(num_data, D, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("dims", [[1, 1], [2, 1], [1, 2], [1, 1, 1]])
def test_quadrature_finds_the_density_of_a_linear_hierarchy(dims: list[int]) -> None:
    model = linear_model(dims)
    result = pyro_lvm.evidence.quadrature(model, data())
    assert set(result.status) == {"exact"}
    torch.testing.assert_close(result.value, Joint(model).density(-1).log_prob(data()), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dims", [[1, 1], [2, 3], [3, 2, 4]])
def test_joint_density_is_that_of_the_gaussian(dims: list[int]) -> None:
    model, x = linear_model(dims), data()
    v = [torch.randn(N, size).double() for size in dims]
    got = model.prior.log_prob(v[-1]) + model.decode(v[0]).log_prob(x)
    for layer in range(1, len(dims)):
        got = got + model.conditional(layer, v[layer]).log_prob(v[layer - 1])
    torch.testing.assert_close(got, Joint(model).density(*range(len(dims)), -1).log_prob(torch.cat([*v, x], dim=-1)))


@pytest.mark.statistical
@pytest.mark.parametrize("dims", [[1, 1], [1, 1, 1]])
def test_importance_sampling_agrees_with_quadrature(dims: list[int]) -> None:
    torch.manual_seed(0)
    model = HierarchicalGaussian(MLP(1, [8], D), dims, hidden_dims=(8,)).double()
    x, guide = (data() > 0).double(), BottomUp(dims, nn.Linear(D, 2)).double()
    with torch.no_grad():
        for network in model.between:  # else the scale falls to its floor, a ridge between the nodes
            network.layers[-1].weight[1:].mul_(0.2)
    exact = pyro_lvm.evidence.quadrature(model, x)
    assert (exact.stderr < 1e-3).all()  # an ELU is not smooth at zero
    adam = lambda p: torch.optim.Adam(p, lr=0.02)  # noqa: E731
    fitted = pyro_lvm.fit(model, guide, x, num_steps=200, update="guide", seed=0, optim=adam)
    result = pyro_lvm.log_marginal(fitted.model, fitted.guide, x, num_particles=20_000, seed=0)
    assert (result.stderr <= 0.05).all()
    assert ((result.value - exact.value).abs() < 5 * result.stderr + exact.stderr).all()


@pytest.mark.statistical
def test_samples_have_the_moments_of_the_gaussian() -> None:
    model, draws = linear_model([2, 3]), 20_000
    expected = Joint(model).density(-1)
    torch.manual_seed(3)
    x = model.sample(draws)
    assert x.shape == (draws, D)
    assert ((x.mean(0) - expected.mean).abs() < 5 * (expected.variance / draws).sqrt()).all()
    squares = (x - expected.mean).square()
    assert ((squares.mean(0) - expected.variance).abs() < 5 * expected.variance * math.sqrt(2 / draws)).all()


CASES = [
    ("bernoulli", MLP(2, [5], 6), (6,)),
    ("normal", MLP(2, [5], 12), (6,)),
    (likelihoods.Categorical(3), MLP(2, [5], 18), (6,)),
    ("bernoulli", nn.Sequential(MLP(2, [5], 6), nn.Unflatten(-1, (1, 2, 3))), (1, 2, 3)),
]


@pytest.mark.parametrize(("likelihood", "decoder", "shape"), CASES)
def test_sites_and_shapes(likelihood: Any, decoder: nn.Module, shape: tuple[int, ...]) -> None:
    model = HierarchicalGaussian(decoder, [2, 3, 4], likelihood)
    x = model.sample(5).float()  # encoders read floats
    assert x.shape == (5, *shape)
    for leading in ((), (7,)):
        with pyro.plate("particles", 7, dim=-2) if leading else pyro.plate("one", 1, dim=-3):
            z = model(x)
        assert z.shape[-2:] == (5, 2)
    guide = BottomUp([2, 3, 4], nn.Sequential(nn.Flatten(), nn.Linear(6, 4)))
    assert pyro_lvm.log_weights(model, guide, x, num_particles=3).shape == (3, 5)


def test_fit_raises_the_elbo() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.ones(20, 6), torch.zeros(20, 6)])
    model, guide = HierarchicalGaussian(MLP(2, [8], 6), [2, 2], hidden_dims=(8,)), BottomUp([2, 2], MLP(6, [8], 4))
    before = pyro_lvm.elbo(model, guide, x, num_particles=100, seed=0).mean()
    result = pyro_lvm.fit(model, guide, x, num_steps=150, seed=0, optim=lambda p: torch.optim.Adam(p, lr=0.02))
    after = pyro_lvm.elbo(result.model, result.guide, x, num_particles=100, seed=0).mean()
    # From 6 log 2 = 4.16 nats of blind coins towards log 2 = 0.69 of two equally likely data.
    assert before < -4 < -2 < after < -math.log(2)


def test_parameters_are_in_the_param_store_by_class_name() -> None:
    HierarchicalGaussian(nn.Linear(2, 6), [2, 3], hidden_dims=())(torch.zeros(4, 6))
    names = {"decoder.weight", "decoder.bias", "between.0.layers.0.weight", "between.0.layers.0.bias"}
    assert set(pyro.get_param_store().keys()) == {f"HierarchicalGaussian$$${name}" for name in names}


def test_prior_follows_the_module() -> None:
    model = HierarchicalGaussian(nn.Linear(2, 6), [2, 3]).double()
    assert model(torch.zeros(4, 6, dtype=torch.float64)).dtype == torch.float64
    assert "prior_loc" not in model.state_dict()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("dims", "error", "message"),
    [
        ([2], ShapeError, r"latent_dims: expected two layers or more, got \[2\]. For one use DeepGaussian"),
        ([2, 0], ShapeError, "latent_dims: expected 1 or more, got 0"),
        ([2, 1.5], DataTypeError, "latent_dims: expected an integer, got 1.5"),
    ],
)
def test_wrong_layers_are_refused(dims: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HierarchicalGaussian(nn.Linear(2, 6), dims)


def test_wrong_likelihood_is_refused() -> None:
    with pytest.raises(DataTypeError, match="likelihood: expected one of .* got 'gamma'"):
        HierarchicalGaussian(nn.Linear(2, 6), [2, 3], "gamma")  # type: ignore[arg-type]


def test_decoder_that_does_not_fit_the_data_is_named() -> None:
    with pytest.raises(ShapeError, match=r"decoder: expected p\(x\|z\) over data of shape \(1, 2, 3\), got \(6,\)"):
        HierarchicalGaussian(MLP(2, [5], 6), [2, 3])(torch.zeros(4, 1, 2, 3))
