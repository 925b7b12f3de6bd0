"""A floor under the KL of each latent dimension: closed forms, the losses of Pyro that it falls back to, refusals."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.errors import DataTypeError, PlateError, SiteError
from pyro_lvm.nn import MLP
from pyro_lvm.objectives import FreeBits, KLAnnealing, analytic_kl
from tests.objectives.test_importance_weighted import chain_guide, chain_model
from tests.objectives.test_mean_field import Shifted
from tests.references import ORACLES, SIGMA, data, normal_model

N, L = 5, 3


def affine_guide(gain: torch.Tensor, log_scale: torch.Tensor) -> Callable[..., None]:
    """q(z_j | x) = N(gain_j x_j, scale_j)."""

    def guide(x: torch.Tensor, *_: Any) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gain * x, log_scale.exp()).to_event(1))

    return guide


def model(x: torch.Tensor, *_: Any) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(L).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, SIGMA).to_event(1), obs=x)


def parameters() -> tuple[torch.Tensor, torch.Tensor]:
    gain = torch.tensor([0.1, 0.6, 1.5], dtype=torch.float64, requires_grad=True)
    return gain, torch.tensor([-0.1, -0.5, -1.0], dtype=torch.float64, requires_grad=True)


def divergence(x: torch.Tensor, gain: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """KL(q || p), ``(N, L)``."""
    return 0.5 * ((gain * x) ** 2 + (2 * log_scale).exp() - 1) - log_scale


def loss_and_gradients(objective: Any, pair: Any, x: torch.Tensor, params: Any) -> list[torch.Tensor]:
    pyro.set_rng_seed(0)
    loss = objective.differentiable_loss(*pair, x)
    return [loss.detach(), *torch.autograd.grad(loss, params)]


@pytest.mark.parametrize("nats", [0.0, 0.25, 1.0, 20.0])
def test_value_and_gradient_in_closed_form(nats: float) -> None:
    """What it adds to Pyro's analytic loss is the floor of each dimension, averaged over the batch."""
    x, (gain, log_scale) = data(N, L), parameters()
    pair = (model, affine_guide(gain, log_scale))
    got = loss_and_gradients(FreeBits(nats), pair, x, [gain, log_scale])
    want = loss_and_gradients(TraceMeanField_ELBO(), pair, x, [gain, log_scale])
    kl = divergence(x, gain, log_scale)
    added = N * kl.mean(0).clamp(min=nats).sum() - kl.sum()
    slopes = torch.autograd.grad(added, [gain, log_scale])
    assert float(added.detach()) > 0 or nats < 0.05  # KL: 0.01, 0.4 and 2.5 nats
    for one, other, more in zip(got, want, [added.detach(), *slopes], strict=True):
        torch.testing.assert_close(one, other + more, rtol=0, atol=1e-10)


def test_zero_is_the_analytic_loss_and_a_site_without_to_event_is_a_dimension() -> None:
    x = data(N)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.9 * x, 0.4))

    for particles, vectorize in ((1, False), (2, False), (2, True)):
        losses = []
        options = {"num_particles": particles, "vectorize_particles": vectorize}
        for objective in (FreeBits(0.0, **options), TraceMeanField_ELBO(**options)):
            pyro.set_rng_seed(0)
            losses.append(objective.loss(normal_model, guide, x))
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_subsample_and_mini_batch() -> None:
    """The average is over the data of the step, the plate's scale multiplies all."""
    x, (gain, log_scale) = data(20, L), parameters()

    def sized(program: str, size: int | None, rows: torch.Tensor | None) -> Callable[[torch.Tensor], None]:
        def run(x: torch.Tensor) -> None:
            with pyro.plate("data", 20, subsample_size=size, subsample=rows) as index:
                if program == "model":
                    z = pyro.sample("z", dist.Normal(torch.zeros(L).double(), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(z, SIGMA).to_event(1), obs=x[index] if size else x)
                else:
                    loc = gain * (x[index] if size else x)
                    pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        return run

    for size, rows in ((4, None), (None, torch.tensor([3, 1, 7, 11]))):
        seed = 2
        pyro.set_rng_seed(seed)
        taken = torch.randperm(20)[:4] if size else rows
        batch = x if size else x[rows]
        losses = []
        for nats in (0.0, 0.5):
            pyro.set_rng_seed(seed)
            objective = FreeBits(nats)
            losses.append(objective.loss(sized("model", size, rows), sized("guide", size, rows), batch))
        kl = divergence(x[taken], gain, log_scale).detach().mean(0)
        assert losses[1] - losses[0] == pytest.approx(20 * float((kl.clamp(min=0.5) - kl).sum()), rel=1e-10)


def test_annealed_free_bits_weigh_the_floor_too() -> None:
    x, (gain, log_scale) = data(N, L), parameters()
    losses = []
    for beta in (0.0, 1.0, 0.3):
        pyro.set_rng_seed(0)
        losses.append(KLAnnealing(beta, FreeBits(0.5)).loss(model, affine_guide(gain, log_scale), x))
    floored = N * float(divergence(x, gain, log_scale).mean(0).clamp(min=0.5).sum().detach())
    assert losses[1] - losses[0] == pytest.approx(floored, rel=1e-10)
    assert losses[2] - losses[0] == pytest.approx(0.3 * floored, rel=1e-10)


# ---------------------------------------------------------------- without a closed form


def test_latents_in_another_order_are_taken_at_the_draws() -> None:
    """z2 depends on z in the guide and z on z2 in the model: the closed form would be wrong."""
    theta, phi = torch.tensor([0.7, 1.2]).double(), torch.tensor([0.4, -0.3, 0.5, 0.2, -0.2]).double()
    pair, x = (chain_model(theta), chain_guide(phi)), data(4) + 3
    losses = []
    for objective in (FreeBits(0.0), Trace_ELBO()):
        pyro.set_rng_seed(0)
        losses.append(objective.loss(*pair, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)  # both means are positive
    pyro.set_rng_seed(0)
    many = FreeBits(0.0, num_particles=20_000, vectorize_particles=True).loss(*pair, x)
    elbo = lvm.elbo(*pair, x, num_particles=20_000, seed=1)
    table = lvm.log_weights(*pair, x, num_particles=20_000, seed=2)
    error = float((2 * table.var(0) / 20_000).sum().sqrt())
    assert abs(many + float(elbo.sum())) < 5 * error
    pyro.set_rng_seed(0)
    with pytest.warns(UserWarning, match="Failed to verify mean field restriction"):
        wrong = TraceMeanField_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1).loss(*pair, x)
    assert abs(wrong + float(elbo.sum())) > 15 * error  # 2.9 nats


@pytest.mark.parametrize("masked", [True, False])
def test_joint_distributions_and_masks_have_one_kl_a_site(masked: bool) -> None:
    x, tril = data(4, L), torch.eye(L).double() + 0.3 * torch.ones(L, L).double().tril(-1)
    seen = torch.tensor([True, False, True, True]) if masked else torch.ones(4, dtype=torch.bool)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            pyro.sample("z", dist.MultivariateNormal(x, scale_tril=tril))

    masked_model = poutine.mask(model, mask=seen)
    pyro.set_rng_seed(0)
    z = dist.MultivariateNormal(x, scale_tril=tril).sample()
    kl = dist.MultivariateNormal(x, scale_tril=tril).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    likelihood = dist.Normal(z, SIGMA).log_prob(x).sum(-1) * seen
    for nats in (0.0, 30.0):
        pyro.set_rng_seed(0)
        want = 4 * max(float((kl * seen).mean()), nats) - float(likelihood.sum())
        assert FreeBits(nats).loss(masked_model, guide, x) == pytest.approx(want, rel=1e-10)


def test_particles_are_averaged_before_the_floor() -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(5.0, 0.5 * x, torch.tensor(0.5).double()))  # no KL in closed form

    x = data(4)
    losses = []
    for vectorize in (True, False):
        objective = FreeBits(0.05, num_particles=3, vectorize_particles=vectorize)
        torch.manual_seed(0)
        losses.append(objective.loss(normal_model, guide, x))
        torch.manual_seed(0)
        z = torch.stack([dist.StudentT(5.0, 0.5 * x, torch.tensor(0.5).double()).sample() for _ in range(3)])
        if not vectorize:
            log_q = dist.StudentT(5.0, 0.5 * x, torch.tensor(0.5).double()).log_prob(z)
            kl = float((log_q - dist.Normal(0.0, 1.0).log_prob(z)).mean())
            want = 4 * max(kl, 0.05) - float(dist.Normal(z, SIGMA).log_prob(x).sum(-1).mean())
            assert losses[-1] == pytest.approx(want, rel=1e-10)
    assert all(math.isfinite(loss) for loss in losses)


def test_a_latent_outside_the_plate_is_not_averaged() -> None:
    def global_model(x: torch.Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.tensor(0.0).double(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("shift", dist.Normal(torch.tensor(1.0).double(), 1.0))  # KL = 1 / 2

    x = data(N)
    losses = []
    for nats in (0.0, 0.75):
        pyro.set_rng_seed(0)
        losses.append(FreeBits(nats).loss(global_model, guide, x))
    assert losses[1] - losses[0] == pytest.approx(0.25, rel=1e-10)


# ---------------------------------------------------------------- training


def test_a_dimension_below_its_floor_is_not_pushed_to_the_prior() -> None:
    """The data do not depend on z: the ELBO takes its KL to zero, a floor leaves it where it is."""

    def useless(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(2.0).double())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(len(x), 1), 1.0).to_event(1))  # KL = loc^2 / 2

    for nats in (0.0, 0.5):
        pyro.clear_param_store()
        svi = SVI(useless, guide, pyro.optim.SGD({"lr": 0.01}), loss=FreeBits(nats))
        for _ in range(200):
            svi.step(data(N))
        assert float(pyro.param("loc").detach()) == pytest.approx((2 * nats) ** 0.5, abs=0.05)


@pytest.mark.parametrize("kind", ["hierarchical", "flow"])
def test_guides_of_the_library_in_fit(kind: str) -> None:
    torch.manual_seed(0)
    guide: nn.Module
    if kind == "flow":
        pair_model: nn.Module = lvm.models.LinearGaussian(2, 3)
        guide, x = lvm.guides.Flow(2, encoder=MLP(3, [4], 7), base="diagonal", hidden_dim=6, context_dim=3), data(48, 3)
    else:
        pair_model = lvm.models.HierarchicalGaussian(MLP(2, [8], 6), [2, 2], hidden_dims=(8,))
        guide, x = lvm.guides.BottomUp([2, 2], MLP(6, [8], 4), hidden_dims=(8,)), (data(48, 6) > 0).double()
    adam = lambda p: torch.optim.Adam(p, lr=0.02)  # noqa: E731
    result = lvm.fit(pair_model, guide, x.float(), loss=FreeBits(0.1), num_steps=60, batch_size=24, seed=0, optim=adam)
    assert float(result.losses[-10:].mean()) < float(result.losses[:10].mean())
    assert FreeBits(0.1).notes()[0] in result.notes


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("nats", [-0.1, math.nan, math.inf, True, "0.1", torch.tensor(0.1)])
def test_a_floor_that_is_none(nats: Any) -> None:
    with pytest.raises(DataTypeError, match="nats: expected a finite number >= 0"):
        FreeBits(nats)


def refused(error: type[Exception], match: str, *pair: Any, x: Any = None) -> None:
    with pytest.raises(error, match=match):
        FreeBits(0.1).loss_and_grads(*pair, data(N) if x is None else x)


def test_refusals() -> None:
    with pytest.raises(DataTypeError, match="data_plate: expected a name, got None"):
        FreeBits(0.1, data_plate=None)  # type: ignore[arg-type]
    refused(
        SiteError, r"guide: expected the latent sites \['z'\] of the model, got", normal_model, AutoNormal(normal_model)
    )
    refused(DataTypeError, "x, the first argument: expected a tensor, got list", normal_model, normal_model, x=[1.0])
    sequential = ORACLES["sequential_data"](N)
    refused(PlateError, "data plate 'data': expected a tensor dimension", sequential.model, sequential.guide)
    whole = ORACLES["subsample in the model"](N)
    refused(SiteError, "guide site 'z': expected the model's scale 200, got 1", whole.model, whole.guide)

    def drawn(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=torch.zeros(3).requires_grad_()))

    refused(SiteError, "guide site 'c': expected reparameterised draws", ORACLES["discrete_guide"](N).model, drawn)

    def two_plates(x: torch.Tensor) -> None:
        with pyro.plate("one", len(x), dim=-1), pyro.plate("other", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(len(x), -1))

    refused(PlateError, "data plate: expected one, got 2 candidates", two_plates, poutine.block(two_plates, hide=["x"]))


@pytest.mark.parametrize("options", [{"num_particles": 2.0}, {"vectorize_particles": 1}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(DataTypeError, match=f"{next(iter(options))}: expected"):
        FreeBits(0.1, **options)
    with pytest.raises(lvm.ShapeError, match="num_particles: expected 1 or more"):
        FreeBits(0.1, num_particles=0)


def test_no_floor_does_not_clamp_and_a_closed_form_of_a_base_class_is_not_taken() -> None:
    """A family that inherits a KL which is not its own: log q - log p at the draws, negative for some of them."""

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Shifted(x / 2, 0.7))

    values = []
    for seed in range(20):
        for objective in (FreeBits(0.0), Trace_ELBO()):
            pyro.set_rng_seed(seed)
            values.append(objective.loss(normal_model, guide, data(1)))
    assert values[::2] == pytest.approx(values[1::2], rel=1e-10)


def test_a_guide_may_sample_what_is_missing() -> None:
    def masked(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x, obs_mask=x > 0)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(gain * x, 0.5))
            with poutine.mask(mask=x <= 0):
                pyro.sample("x_unobserved", dist.Normal(z, SIGMA))  # as in the model: its KL is zero at any draw

    gain = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert (data(N) < 0).any()
    assert analytic_kl(masked, guide, data(N)).faults == ()
    losses = []
    for objective in (FreeBits(0.0), TraceMeanField_ELBO()):
        pyro.set_rng_seed(0)
        losses.append(objective.loss_and_grads(masked, guide, data(N)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
