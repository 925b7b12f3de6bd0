"""Discrete latents are few enough to sum over: densities, gradients and gaps are exact."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.guides import AutoregressiveBernoulli, Bernoulli, Categorical
from pyro_lvm.models import BinaryLatent, GaussianMixture
from pyro_lvm.nn import MLP
from pyro_lvm.tracing.intercept import run

N, D, L = 4, 5, 3
Z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * L)  # (2^L, L)
Reading = Callable[[int], dict[str, Any]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def bernoulli(reading: Reading) -> Bernoulli:
    return Bernoulli(L, **reading(L))


def chain(reading: Reading) -> AutoregressiveBernoulli:
    return AutoregressiveBernoulli(L, 16, **reading(L + 6), context_dim=6)


def categorical(reading: Reading) -> Categorical:
    return Categorical(3, **reading(3))


def amortised(size: int) -> dict[str, Any]:
    return {"encoder": MLP(D, [8], size)}


def local(size: int) -> dict[str, Any]:
    return {"num_data": N}


def shared(size: int) -> dict[str, Any]:
    return {"shared": True}


BITS = pytest.mark.parametrize("family", [bernoulli, chain])
FAMILIES = pytest.mark.parametrize("family", [bernoulli, chain, categorical])
READINGS = pytest.mark.parametrize("reading", [amortised, local, shared])


def random(family: Callable[[Reading], Any], reading: Reading) -> tuple[Any, torch.Tensor]:
    guide = family(reading).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    return guide, torch.randn(N, D).double()


def support(family: Any) -> torch.Tensor:
    """All values, ``(M, 1, L)`` or ``(M, 1)``."""
    return torch.arange(3)[:, None] if family is categorical else Z[:, None]


def table(guide: Any, x: torch.Tensor, family: Any) -> torch.Tensor:
    """log q(z|x) of all z, ``(M, N)``."""
    values = support(family)
    return guide.distribution(x).log_prob(values.expand(-1, N, *values.shape[2:]))


# ---------------------------------------------------------------- densities


@READINGS
@FAMILIES
def test_densities_sum_to_one(family: Any, reading: Reading) -> None:
    guide, x = random(family, reading)
    total = table(guide, x, family).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(N).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reading", [local, shared])
@FAMILIES
def test_parameters_of_zero_are_uniform(family: Any, reading: Reading) -> None:
    log_q = table(family(reading).double(), torch.zeros(N, D), family)
    torch.testing.assert_close(log_q, torch.full_like(log_q, -math.log(len(log_q))))


def test_chain_starts_at_independent_bits() -> None:
    phi = torch.randn(N, L + 6).double()
    guide = AutoregressiveBernoulli(L, 16, nn.Identity(), context_dim=6).double()
    independent = Bernoulli(L, nn.Identity()).distribution(phi[:, :L])
    z = Z[:, None].expand(-1, N, L)
    torch.testing.assert_close(guide.distribution(phi).log_prob(z), independent.log_prob(z))


def test_each_bit_of_a_chain_sees_all_before_it_and_none_else() -> None:
    guide, x = random(chain, amortised)
    z = torch.rand(N, L).double()
    jacobian = torch.autograd.functional.jacobian(guide.distribution(x).conditional_logits, z)  # (N, L, N, L)
    own = jacobian[torch.arange(N), :, torch.arange(N)]  # (N, L, L)
    assert not own.triu().any()
    assert (own[:, *torch.tril_indices(L, L, -1)] != 0).all()
    jacobian[torch.arange(N), :, torch.arange(N)] = 0
    assert not jacobian.any()  # none of another datum


@READINGS
@FAMILIES
def test_draws_have_the_frequencies_of_the_density(family: Any, reading: Reading) -> None:
    guide, x = random(family, reading)
    draws, num = guide.distribution(x).sample((4000,)), 4000
    values = support(family)
    equal = draws[:, None] == values  # (4000, M, N, ...)
    frequency = (equal if family is categorical else equal.all(-1)).double().mean(0)
    p = table(guide, x, family).exp()
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / num).sqrt() + 1 / num).all()


@READINGS
@FAMILIES
def test_stored_values_are_scored_alike_together_and_one_by_one(family: Any, reading: Reading) -> None:
    guide, x = random(family, reading)
    z = support(family)
    z = z.expand(-1, N, *z.shape[2:])
    with pyro.plate("particles", len(z), dim=-2):
        together = run(guide, (x,), values={"z": z})["z"]
        assert guide(x).shape == z.shape
    assert guide(x).shape == z[0].shape
    for k in range(len(z)):
        alone = run(guide, (x,), values={"z": z[k]})["z"]
        assert torch.equal(alone["value"], z[k])
        mine, theirs = together["fn"].log_prob(together["value"])[k], alone["fn"].log_prob(alone["value"])
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        torch.testing.assert_close(theirs, table(guide, x, family)[k], rtol=0, atol=1e-10)


@READINGS
@FAMILIES
def test_scores_reach_every_parameter(family: Any, reading: Reading) -> None:
    guide, x = random(family, reading)
    weights = torch.randn(len(support(family)), N).double()
    (table(guide, x, family) * weights).sum().backward()
    for name, parameter in guide.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_values_that_are_not_bits_are_refused() -> None:
    guide, x = random(chain, local)
    with pytest.raises(ValueError, match="within the support"):
        guide.distribution(x).log_prob(torch.full((N, L), 0.5).double())


# ---------------------------------------------------------------- exact posteriors


def binary_case() -> tuple[BinaryLatent, torch.Tensor]:
    model = BinaryLatent(L, D).double().requires_grad_(False).eval()
    model.decoder.weight.copy_(2 * torch.randn(D, L))
    model.logits.copy_(torch.randn(L))
    return model, model.sample(N)


def exact_gap(model: BinaryLatent, guide: Any, x: torch.Tensor) -> torch.Tensor:
    """KL(q || p(z|x)), ``(N,)``, summed over all z."""
    log_q = table(guide, x, bernoulli)
    return (log_q.exp() * (log_q - model.log_joint(x, Z[:, None]))).sum(0) + model.log_prob(x)


def descend(guide: nn.Module, loss: Callable[[], torch.Tensor], steps: int = 400) -> None:
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("reading", [local, amortised])
def test_chain_finds_the_posterior_where_independent_bits_cannot(reading: Reading) -> None:
    model, x = binary_case()
    guide, independent = chain(reading).double(), bernoulli(reading).double()
    for each in (guide, independent):
        descend(each, lambda each=each: exact_gap(model, each, x).sum())
    assert exact_gap(model, guide, x).max() < 1e-3
    assert exact_gap(model, independent, x).max() > 0.02
    for vectorize in ("auto", False):
        weights = pyro_lvm.log_weights(model, guide, x, num_particles=200, vectorize=vectorize, seed=0)
        # log-weights of variance 2 KL, where KL is small: a standard error below sqrt(0.002 / 200)
        assert ((weights.mean(0) - model.log_prob(x)).abs() < 5 * 0.0032).all()


def factorised_case() -> tuple[BinaryLatent, torch.Tensor, torch.Tensor]:
    """Each bit has a datum of its own, x_l | z_l: a model, data and the logits of the posterior."""
    model = BinaryLatent(L, L).double().requires_grad_(False).eval()
    model.decoder.weight.copy_(torch.tensor([2.0, -1.0, 3.0]).diag())
    model.decoder.bias.copy_(torch.tensor([-1.0, 0.5, -2.0]))
    model.logits.copy_(torch.tensor([0.5, -0.5, 1.0]))
    x = model.sample(N)
    off, on = (dist.Bernoulli(logits=model.decoder(torch.full((L,), v).double())).log_prob(x) for v in (0.0, 1.0))
    return model, x, model.logits + on - off


@BITS
@pytest.mark.parametrize("vectorize", ["auto", False])
def test_posterior_of_independent_bits_makes_all_weights_equal(family: Any, vectorize: Any) -> None:
    model, x, logits = factorised_case()
    guide = family(local).double()
    guide.phi.table.data[:, :L] = logits
    weights = pyro_lvm.log_weights(model, guide, x, num_particles=3, vectorize=vectorize)
    torch.testing.assert_close(weights, model.log_prob(x).expand(3, N), rtol=0, atol=1e-10)
    assert exact_gap(model, guide, x).abs().max() < 1e-10


def test_score_function_finds_independent_bits() -> None:
    model, x, _ = factorised_case()
    guide = Bernoulli(L, num_data=N).double()
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    for lr, steps in ((0.05, 300), (0.003, 300)):
        optim = lambda params, lr=lr: torch.optim.Adam(params, lr=lr)  # noqa: E731
        pyro_lvm.fit(model, guide, x, loss=loss, optim=optim, num_steps=steps, update="guide", seed=0)
    assert exact_gap(model, guide, x).max() < 1e-3


@BITS
def test_one_phi_for_all_finds_the_posterior_of_equal_data(family: Any) -> None:
    model, x, _ = factorised_case()
    x = x[:1].repeat(N, 1)
    guide = family(shared).double()
    descend(guide, lambda: exact_gap(model, guide, x).sum())
    assert exact_gap(model, guide, x).max() < 1e-3
    assert len(guide(x[:2])) == 2  # of any number of data


@READINGS
@BITS
def test_any_guide_of_bits_gives_the_evidence(family: Any, reading: Reading) -> None:
    model, x = binary_case()
    guide = family(reading).double()
    result = pyro_lvm.log_marginal(model, guide, x, num_particles=5000, seed=0)
    assert ((result.value - model.log_prob(x)).abs() < 5 * result.stderr).all()


# ---------------------------------------------------------------- classes


def clusters() -> tuple[GaussianMixture, torch.Tensor]:
    model = GaussianMixture(3, D).double().requires_grad_(False).eval()
    model.means.mul_(0.7)
    model.logits.copy_(torch.tensor([0.5, 0.0, -0.5]))
    return model, model.sample(N)[0]


@pytest.mark.parametrize(("reading", "lr"), [(local, 0.1), (amortised, 0.03)])
def test_classes_are_the_responsibilities(reading: Reading, lr: float) -> None:
    """`fit` sums z out of the ELBO, which leaves no noise."""
    model, x = clusters()
    guide = categorical(reading).double()
    optim = lambda params: torch.optim.Adam(params, lr=lr)  # noqa: E731
    result = pyro_lvm.fit(model, guide, x, optim=optim, num_steps=500, update="guide", seed=0)
    log_q = table(guide, x, categorical).T  # (N, C)
    gap = (log_q.exp() * (log_q - model.log_joint(x))).sum(1) + model.log_prob(x)
    assert gap.max() < 1e-3
    torch.testing.assert_close(log_q.exp(), model.responsibilities(x), rtol=0, atol=0.03)
    assert (result.losses[-1] + model.log_prob(x).mean()).abs() < 1e-3  # the loss itself has no noise


@pytest.mark.parametrize("vectorize", ["auto", False])
def test_responsibilities_as_parameters_make_all_weights_equal(vectorize: Any) -> None:
    model, x = clusters()
    guide = categorical(local).double()
    guide.phi.table.data.copy_(model.log_joint(x))
    weights = pyro_lvm.log_weights(model, guide, x, num_particles=3, vectorize=vectorize)
    torch.testing.assert_close(weights, model.log_prob(x).expand(3, N), rtol=0, atol=1e-10)


@READINGS
def test_any_guide_of_classes_gives_the_evidence(reading: Reading) -> None:
    model, x = clusters()
    guide = categorical(reading).double()
    result = pyro_lvm.log_marginal(model, guide, x, num_particles=5000, seed=0)
    assert ((result.value - model.log_prob(x)).abs() < 5 * result.stderr).all()


# ---------------------------------------------------------------- as Pyro guides, refusals


@FAMILIES
def test_parameters_and_site_have_their_names(family: Any) -> None:
    guide = family(amortised)
    guide(torch.zeros(N, D))
    name = type(guide).__name__
    assert set(pyro.get_param_store()) == {f"{name}$$${key}" for key, _ in guide.named_parameters()}
    assert family(lambda size: {"num_data": N, "site": "w"}).site == "w"


@FAMILIES
def test_exactly_one_use_is_given(family: Any) -> None:
    with pytest.raises(DataTypeError, match="expected exactly one of the three, got none"):
        family(lambda size: {})
    with pytest.raises(DataTypeError, match="got encoder and shared"):
        family(lambda size: {"encoder": nn.Linear(D, size), "shared": True})


@FAMILIES
def test_other_shapes_are_refused(family: Any) -> None:
    with pytest.raises(ShapeError, match="x: expected num_data=4 data, got 2"):
        family(local)(torch.zeros(2, D))
    with pytest.raises(ShapeError, match=r"encoder: expected output of shape .* got \(4, 20\)"):
        family(lambda size: {"encoder": nn.Linear(D, 20)})(torch.zeros(N, D))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Bernoulli(0, num_data=N), ShapeError, "latent_dim: expected 1 or more"),
        (lambda: Categorical(1, num_data=N), ShapeError, "num_classes: expected 2 or more, got 1"),
        (lambda: AutoregressiveBernoulli(L, 0, num_data=N), ShapeError, "hidden_dim: expected 1 or more"),
        (lambda: AutoregressiveBernoulli(L, 4, num_data=N, context_dim=0), ShapeError, "context_dim: expected 1"),
        (lambda: AutoregressiveBernoulli(L, nn.Linear(2, 2)), DataTypeError, "hidden_dim|encoder, num_data"),
    ],
)
def test_bad_sizes_are_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
