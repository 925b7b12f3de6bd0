"""On a linear hierarchy with one dimension a layer each guide can be the posterior: all weights equal log p(x)."""

import math
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.guides import BottomUp, Ladder, TopDown
from pyro_lvm.models import HierarchicalGaussian
from pyro_lvm.nn import MLP
from pyro_lvm.tracing.intercept import run
from tests.models.test_hierarchical import D, Joint, N, affine, data, linear_model

DIMS = pytest.mark.parametrize("dims", [[1, 1], [1, 1, 1]])


def set_to(layer: nn.Linear, conditional: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    gain, offset, variance = conditional
    raw = variance.sqrt().expm1().log() - math.log(math.e - 1)  # of guides.normal, softplus(raw + log(e - 1))
    affine(layer, gain, offset, raw.reshape(-1))


def exact_bottom_up(model: HierarchicalGaussian, joint: Joint, dims: list[int]) -> BottomUp:
    encoder = nn.Linear(D, 2)
    guide = BottomUp(dims, encoder, hidden_dims=()).double()
    set_to(encoder, joint.conditional(0, -1))
    for layer, network in enumerate(guide.between, start=1):
        set_to(network.layers[0], joint.conditional(layer, layer - 1))
    return guide


def exact_top_down(model: HierarchicalGaussian, joint: Joint, dims: list[int]) -> TopDown:
    guide = TopDown(dims, nn.Identity(), feature_dim=D, hidden_dims=()).double()
    top = len(dims) - 1
    for layer, network in enumerate(guide.networks):
        given = (-1,) if layer == top else (layer + 1, -1)
        set_to(network.layers[0], joint.conditional(layer, *given))
    return guide


def exact_ladder(model: HierarchicalGaussian, joint: Joint, dims: list[int]) -> Ladder:
    """The message to a layer is p(x | z_m) = N(g z_m + b, R) as a function of z_m, of precision g' R^-1 g."""
    guide = Ladder(model, nn.Linear(D, 2 * len(dims))).double()
    gains, offsets, raws = [], [], []
    for layer in range(len(dims)):
        if layer < len(dims) - 1:
            gain, offset, covariance = joint.conditional(-1, layer)
            information = gain.T @ torch.linalg.inv(covariance)  # (1, D)
            variance = (information @ gain).reciprocal()
            back, start = variance * information, -(variance * information) @ offset
        else:
            back, start, variance = joint.conditional(layer, -1)
        gains.append(back)
        offsets.append(start)
        raws.append(variance.sqrt().expm1().log().reshape(-1) - math.log(math.e - 1))
    with torch.no_grad():  # of each layer, the mean and then the raw scale
        rows = [row for back in gains for row in (back, torch.zeros_like(back))]
        guide.phi.encoder.weight.copy_(torch.cat(rows))
        guide.phi.encoder.bias.copy_(torch.cat([part for pair in zip(offsets, raws, strict=True) for part in pair]))
    return guide


EXACT = pytest.mark.parametrize("exact", [exact_bottom_up, exact_top_down, exact_ladder])


class Flattening(nn.Module):
    """A decoder that takes rows alone, as reshaping ones do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.linear(z.view(z.size(0), -1)[:, : self.linear.in_features])


@EXACT
@DIMS
@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_every_weight_of_the_posterior_is_the_evidence(exact: Any, dims: list[int], num_particles: int) -> None:
    model, x = linear_model(dims), data()
    joint = Joint(model)
    expected = joint.density(-1).log_prob(x).expand(num_particles, N)
    for vectorize in ("auto", False):
        table = pyro_lvm.log_weights(
            model, exact(model, joint, dims), x, num_particles=num_particles, vectorize=vectorize
        )
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-10)


@EXACT
@DIMS
@pytest.mark.parametrize("mode", ["vectorised", "folded", "looped"])
def test_all_ways_to_run_a_pair_agree(exact: Any, dims: list[int], mode: str) -> None:
    model, x = linear_model(dims), data()
    joint = Joint(model)
    guide = exact(model, joint, dims)
    if mode == "folded":
        model.decoder = Flattening(model.decoder)
    vectorize = False if mode == "looped" else "auto"
    result = pyro_lvm.log_marginal(model, guide, x, num_particles=50, vectorize=vectorize, seed=0)
    assert result.provenance["particles"]["model"] == mode
    assert result.provenance["particles"]["guide"] == ("looped" if mode == "looped" else "vectorised")
    assert (result.stderr < 1e-12).all()
    torch.testing.assert_close(result.value, joint.density(-1).log_prob(x), rtol=0, atol=1e-10)


@EXACT
@DIMS
def test_density_of_given_latents(exact: Any, dims: list[int]) -> None:
    model, x = linear_model(dims), data()
    joint, layers = Joint(model), range(len(dims))
    v = [torch.randn(N, 1).double() for _ in dims]
    names = ["z", *(f"z{layer + 1}" for layer in layers[1:])]
    trace = run(exact(model, joint, dims), (x,), values=dict(zip(names, v, strict=True)))
    got = sum(trace[name]["fn"].log_prob(trace[name]["value"]) for name in names)
    everything = joint.density(*layers, -1).log_prob(torch.cat([*v, x], dim=-1))
    torch.testing.assert_close(got, everything - joint.density(-1).log_prob(x), rtol=1e-12, atol=1e-10)


def amortised(size: int) -> dict[str, Any]:
    return {"encoder": MLP(D, [8], size)}


def local(size: int) -> dict[str, Any]:
    return {"num_data": N}


def shared(size: int) -> dict[str, Any]:
    return {"shared": True}


READINGS = pytest.mark.parametrize("reading", [amortised, local, shared])


def every(dims: list[int], reading: Any = amortised) -> list[Any]:
    torch.manual_seed(0)
    model = HierarchicalGaussian(MLP(dims[0], [8], D), dims, hidden_dims=(8,))
    return [
        BottomUp(dims, **reading(2 * dims[0]), hidden_dims=(8,)),
        TopDown(dims, **reading(5), feature_dim=5, hidden_dims=(8,)),
        Ladder(model, **reading(2 * sum(dims))),
    ]


def both(dims: list[int], data_dim: int) -> list[nn.Module]:
    return [
        BottomUp(dims, MLP(data_dim, [8], 2 * dims[0]), hidden_dims=(8,)),
        TopDown(dims, MLP(data_dim, [8], 5), feature_dim=5, hidden_dims=(8,)),
    ]


@READINGS
@pytest.mark.parametrize("which", [0, 1, 2])
def test_sites_shapes_and_names(which: int, reading: Any) -> None:
    dims, x = [4, 3, 2], torch.randn(N, D)
    guide = every(dims, reading)[which]
    assert guide(x).shape == (N, 4)
    with pyro.plate("particles", 6, dim=-2):
        trace = poutine.trace(guide).get_trace(x).nodes
    assert {name: trace[name]["value"].shape for name in ("z", "z2", "z3")} == {
        "z": (6, N, 4),
        "z2": (6, N, 3),
        "z3": (6, N, 2),
    }
    first = ["z", "z2", "z3"] if which == 0 else ["z3", "z2", "z"]
    assert [name for name in trace if name in ("z", "z2", "z3")] == first
    own = {f"{type(guide).__name__}$$${name}" for name, _ in guide.named_parameters()}
    shared = (
        {f"HierarchicalGaussian$$$between.{name}" for name, _ in guide.model.between.named_parameters()}
        if (which == 2)
        else set()
    )
    assert set(pyro.get_param_store()) == own | shared


@READINGS
@pytest.mark.parametrize("which", [0, 1, 2])
def test_particles_agree_with_the_loop(which: int, reading: Any) -> None:
    torch.manual_seed(0)
    dims, x = [3, 2, 2], torch.randn(N, D)
    guide = every(dims, reading)[which].double()
    if which == 2:
        guide.model.double()
    values = {name: torch.randn(6, N, size).double() for name, size in zip(("z", "z2", "z3"), dims, strict=True)}
    with pyro.plate("particles", 6, dim=-2):
        together = run(guide, (x.double(),), values=values)
    for k in range(6):
        alone = run(guide, (x.double(),), values={name: value[k] for name, value in values.items()})
        for name in values:
            scores = [trace[name]["fn"].log_prob(trace[name]["value"]) for trace in (together, alone)]
            torch.testing.assert_close(scores[0][k], scores[1], rtol=0, atol=1e-12)


@pytest.mark.statistical
def test_fitted_guides_agree_on_the_evidence() -> None:
    torch.manual_seed(0)
    model = HierarchicalGaussian(MLP(2, [8], 6), [2, 2], hidden_dims=(8,))
    with torch.no_grad():  # else the scale of z falls to its floor here and there, where both guides fail
        model.between[0].layers[-1].weight[2:].mul_(0.2)
    x = model.sample(20)
    before, results = [], []
    for guide in both([2, 2], 6):
        before.append(pyro_lvm.elbo(model, guide, x, num_particles=200, seed=0).mean())
        adam = lambda p: torch.optim.Adam(p, lr=0.02)  # noqa: E731
        fitted = pyro_lvm.fit(model, guide, x, num_steps=250, update="guide", seed=0, optim=adam)
        results.append(pyro_lvm.log_marginal(fitted.model, fitted.guide, x, num_particles=5000, seed=0))
    first, second = results
    error = (first.stderr**2 + second.stderr**2).sqrt()
    assert (error < 0.05).all()
    assert ((first.value - second.value).abs() < 5 * error).all()
    for elbo, result in zip(before, results, strict=True):
        assert elbo < result.elbo.mean() < result.mean


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("make", [BottomUp, lambda dims, encoder: TopDown(dims, encoder, feature_dim=4)])
def test_wrong_layers_are_refused(make: Any) -> None:
    with pytest.raises(ShapeError, match=r"latent_dims: expected two layers or more, got \[2\]. For one use Diagonal"):
        make([2], nn.Linear(D, 4))
    with pytest.raises(DataTypeError, match="latent_dims: expected an integer, got 'two'"):
        make([2, "two"], nn.Linear(D, 4))
    for dims in (3, torch.tensor([3, 2])):
        with pytest.raises(DataTypeError, match="latent_dims: expected a list of integers, got"):
            make(dims, nn.Linear(D, 4))
        with pytest.raises(DataTypeError, match="latent_dims: expected a list of integers, got"):
            HierarchicalGaussian(nn.Linear(3, D), dims)


def test_wrong_encoders_are_refused() -> None:
    x = torch.zeros(N, D)
    with pytest.raises(ShapeError, match=r"encoder: expected output of shape \(4, 6\), got \(4, 5\). Let its last"):
        BottomUp([3, 2], nn.Linear(D, 5))(x)
    with pytest.raises(ShapeError, match=r"encoder: expected output of shape \(4, 6\), got \(4, 5\). Let its last"):
        TopDown([3, 2], nn.Linear(D, 5), feature_dim=6)(x)
    with pytest.raises(ShapeError, match="feature_dim: expected 1 or more, got 0"):
        TopDown([3, 2], nn.Linear(D, 5), feature_dim=0)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_exactly_one_reading_is_given(which: int) -> None:
    with pytest.raises(DataTypeError, match="encoder, num_data, shared: expected exactly one of the three, got none"):
        every([3, 2], lambda size: {})[which]
    with pytest.raises(ShapeError, match="x: expected num_data=4 data, got 3"):
        every([3, 2], local)[which](torch.zeros(3, D))
