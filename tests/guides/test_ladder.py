"""The guide that shares the model's networks: they are one set of parameters, registered and trained once."""

import copy
from typing import Any

import pyro
import pytest
import torch
from torch import nn

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.guides import DiagonalNormal, Ladder, TopDown
from pyro_lvm.models import DeepGaussian, HierarchicalGaussian
from pyro_lvm.nn import MLP
from pyro_lvm.tracing.batch import make_batch
from pyro_lvm.tracing.intercept import run
from pyro_lvm.tracing.questions import count_parameters, parameter_names

N, D = 20, 6


def pair(dtype: torch.dtype = torch.float64) -> tuple[HierarchicalGaussian, Ladder, torch.Tensor]:
    torch.manual_seed(0)
    model = HierarchicalGaussian(MLP(2, [8], D), [2, 2], hidden_dims=(8,)).to(dtype)
    guide = Ladder(model, MLP(D, [8], 8)).to(dtype)
    return model, guide, torch.rand(N, D).round().to(dtype)


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def test_conditionals_are_merged_by_precision() -> None:
    """Sonderby et al. (2016), Eqs. (18) and (19), and the density of the product up to a constant."""
    model, guide, x = pair()
    above, z = torch.randn(3, N, 2).double(), torch.randn(3, N, 2).double()
    with pyro.plate("particles", 3, dim=-2):
        trace = run(guide, (x,), values={"z2": above, "z": z})
    first, top = guide.phi(x).split([4, 4], dim=-1)
    loc, raw = first.chunk(2, dim=-1)
    message = torch.distributions.Normal(loc, torch.nn.functional.softplus(raw + torch.tensor(1.0).expm1().log()))
    prior = model.conditional(1, above).base_dist
    precision = message.stddev**-2 + prior.stddev**-2
    mean = (message.mean * message.stddev**-2 + prior.mean * prior.stddev**-2) / precision
    q = trace["z"]["fn"]
    torch.testing.assert_close(q.mean, mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(q.variance, 1 / precision, rtol=1e-6, atol=1e-8)
    other = torch.randn(3, N, 2).double()
    ratio = (q.base_dist.log_prob(z) - q.base_dist.log_prob(other)).sum(-1)
    product = [(message.log_prob(v) + prior.log_prob(v)).sum(-1) for v in (z, other)]
    torch.testing.assert_close(ratio, product[0] - product[1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(trace["z2"]["fn"].mean, top[:, :2])


def test_shared_networks_are_one_set_of_parameters() -> None:
    model, guide, x = pair()
    model_names, guide_names = parameter_names(model, guide, x)
    between = {f"HierarchicalGaussian$$$between.{name}" for name, _ in model.between.named_parameters()}
    assert model_names & guide_names == between
    assert guide_names - between == {f"Ladder$$${name}" for name, _ in guide.named_parameters()}
    once = [*model.parameters(), *guide.parameters()]
    assert len({id(p) for p in once}) == len(once)
    assert count_parameters(model, guide, make_batch(x, ())) == sum(p.numel() for p in once)


@pytest.mark.parametrize("loss", [None, pyro_lvm.objectives.ImportanceWeightedELBO(1, "sticking_the_landing")])
def test_fit_trains_both_and_every_half_alone(loss: Any) -> None:
    model, guide, x = pair()
    decoder = {name for name, _ in model.named_parameters() if name.startswith("decoder")}
    for update, of_model, of_guide in (
        ("guide", set(), set(values(guide))),
        ("model", decoder, set()),
        ("both", set(values(model)), set(values(guide))),
    ):
        before = values(model), values(guide)
        result = pyro_lvm.fit(model, guide, x, loss=loss, optim=adam, num_steps=3, update=update, seed=0)  # type: ignore[arg-type]
        assert changed(model, before[0]) == of_model
        assert changed(guide, before[1]) == of_guide
        assert result.losses.isfinite().all()


def test_gradient_is_that_of_the_elbo_through_model_and_guide() -> None:
    """One step of plain gradient descent on the shared weights, against autograd of the estimated ELBO."""
    model, guide, x = pair()
    trained = copy.deepcopy((model, guide))  # together, so that the copy of the guide holds the copy of the model
    assert trained[1].model is trained[0]
    elbo = pyro.infer.Trace_ELBO()
    pyro.clear_param_store()
    torch.manual_seed(3)
    elbo.differentiable_loss(model, guide, x).backward()
    pyro.clear_param_store()
    torch.manual_seed(3)
    pyro.infer.SVI(*trained, pyro.optim.SGD({"lr": 1e-3}), elbo).step(x)
    for (name, before), after in zip(model.named_parameters(), trained[0].parameters(), strict=True):
        torch.testing.assert_close(after, before - 1e-3 * before.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.statistical
def test_trained_ladder_has_weights_of_the_evidence() -> None:
    """It agrees with another guide of the same model on log p(x), and its ELBO rose."""
    model, guide, x = pair()
    with torch.no_grad():  # else the scale of z falls to its floor here and there, where the other guide fails
        model.between[0].layers[-1].weight[2:].mul_(0.2)
    before = pyro_lvm.elbo(model, guide, x, num_particles=200, seed=0).mean()
    pyro_lvm.fit(model, guide, x, optim=adam, num_steps=150, seed=0)
    other = TopDown([2, 2], MLP(D, [8], 5), feature_dim=5, hidden_dims=(8,)).double()
    pyro_lvm.fit(model, other, x, optim=adam, num_steps=150, update="guide", seed=0)
    first, second = (pyro_lvm.log_marginal(model, q, x, num_particles=5000, seed=0) for q in (guide, other))
    error = (first.stderr**2 + second.stderr**2).sqrt()
    assert ((first.value - second.value).abs() < 5 * error).all()
    assert before < first.elbo.mean() < first.mean


def test_frozen_networks_are_not_registered() -> None:
    model, guide, x = pair()
    model.requires_grad_(False).eval()
    guide(x)
    assert all(name.startswith("Ladder$$$") for name in pyro.get_param_store())


def test_models_of_another_kind_are_refused() -> None:
    model = DeepGaussian(MLP(2, [4], D), 2)
    with pytest.raises(DataTypeError, match="model: expected latent_dims, conditional and between, got DeepGaussian w"):
        Ladder(model, nn.Linear(D, 4))  # type: ignore[arg-type]
    with pytest.raises(DataTypeError, match="got DiagonalNormal without latent_dims, conditional, between"):
        Ladder(DiagonalNormal(2, shared=True), nn.Linear(D, 4))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"encoder: expected output of shape \(20, 8\), got \(20, 4\)"):
        Ladder(pair()[0], nn.Linear(D, 4).double())(torch.zeros(N, D).double())
