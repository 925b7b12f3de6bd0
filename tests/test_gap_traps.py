"""What made `inference_gap` wrong without a word, or lost its results."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormalMessenger
from torch.nn.functional import dropout

import pyro_lvm as lvm
from pyro_lvm.errors import ShapeError, UnreliableEstimateWarning
from pyro_lvm.guides import AutoregressiveBernoulli, Flow, refine
from pyro_lvm.models import BinaryLatent, LinearGaussian
from tests.references import ORACLES, normal_model, posterior


class WithDropout(torch.nn.Module):
    """The exact posterior; in train mode, noise on its mean."""

    def q(self, x):
        loc, scale, _ = posterior(x[:, None])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(dropout(loc, 0.5, training=self.training), scale))


@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
def test_a_bound_method_is_refined_and_measured_in_eval_mode():
    pair, owner = ORACLES["plain"](6), WithDropout()
    result = lvm.inference_gap(pair.model, owner.q, pair.x, num_steps=3, num_particles=10, seed=0)
    torch.testing.assert_close(result.local_elbo, pair.log_px, rtol=0, atol=1e-6)
    assert owner.training


@pytest.mark.parametrize(("prior", "noise"), [(1000.0, 1000.0), (1.0, 1e-5)])
def test_latents_of_any_size(prior, noise):
    x = prior * torch.linspace(-2, 2, 5, dtype=torch.float64)
    variance = 1 / (prior**-2 + noise**-2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), prior))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def guide(x):  # two standard deviations off
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * variance / noise**2 + 2 * variance**0.5, variance**0.5))

    result = refine(model, guide, x, seed=0)
    exact = dist.Normal(0.0, (prior**2 + noise**2) ** 0.5).log_prob(x)
    elbo = lvm.elbo(model, result.guide, x, num_particles=1000, seed=1).detach()
    torch.testing.assert_close(elbo, exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(result.gain, torch.full_like(x, 2.0), rtol=0, atol=0.5)


def test_classes_with_straight_through_draws_are_refined_by_scores():
    logits = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(3, dtype=torch.float64)))
            pyro.factor("x", (z * x).sum(-1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategoricalStraightThrough(logits=0.0 * x))

    result = refine(model, guide, logits, seed=0)
    exact = logits.logsumexp(-1) - torch.tensor(3.0).log()
    elbo = lvm.elbo(model, result.guide, logits, num_particles=1000, seed=1).detach()
    torch.testing.assert_close(elbo, exact, rtol=0, atol=5e-3)


def test_a_lost_mode_is_told_by_the_guide_itself():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.2), obs=x)

    def wide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.2 * x, 1.0))

    x = torch.tensor([2.0, 3.0], dtype=torch.float64)
    with pytest.warns(UnreliableEstimateWarning, match="lost a mode for 100.0%"):
        result = lvm.inference_gap(model, wide, x, num_steps=300, num_particles=4000, seed=0)
    assert result.contradicted.all()
    assert "q* has lost a mode" in str(result)
    exact = lvm.evidence.quadrature(model, x)
    assert (exact.value - result.log_marginal > 0.5).all()
    assert not lvm.inference_gap(model, wide, x, num_steps=2, reference=exact, seed=0).contradicted.any()


@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
def test_what_all_data_share_is_named():
    torch.manual_seed(0)
    model = LinearGaussian(2, 4)
    x = model.sample(3).detach()
    flow = refine(model, Flow(2, torch.nn.Linear(4, 4 + 8), context_dim=8), x, num_steps=2, seed=0)
    assert flow.free == ("phi",)
    assert "shared by all data" in flow.fixed["weights beside the encoder"]
    bits = BinaryLatent(3, 4)
    chain = refine(
        bits,
        AutoregressiveBernoulli(3, 8, encoder=torch.nn.Linear(4, 3 + 8), context_dim=8),
        bits.sample(3),
        num_steps=2,
    )
    assert "shared by all data" in chain.fixed["weights beside the encoder"]


def test_a_guide_that_runs_its_own_model():
    pair = ORACLES["plain"](4)
    guide = AutoNormalMessenger(normal_model)
    guide(pair.x)
    result = refine(normal_model, guide, pair.x, seed=0)
    elbo = lvm.elbo(normal_model, result.guide, pair.x, num_particles=1000, seed=1).detach()
    torch.testing.assert_close(elbo, pair.log_px, rtol=0, atol=1e-3)


def test_one_joint_result_takes_a_joint_reference():
    pair = ORACLES["plain"](4)
    joint = lvm.log_marginal(pair.model, pair.guide, pair.x, data_plate=None, num_particles=10, seed=0)
    result = lvm.inference_gap(pair.model, pair.guide, pair.x, data_plate=None, reference=joint, num_steps=2, seed=0)
    assert "nats a datum" not in str(result)
    assert result.approximation.shape == (1,)
    assert "one joint result" in str(result)
    each = lvm.log_marginal(pair.model, pair.guide, pair.x, num_particles=10, seed=0)
    with pytest.raises(ShapeError, match="expected 1 values"):
        lvm.inference_gap(pair.model, pair.guide, pair.x, data_plate=None, reference=each)


@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
def test_an_interrupt_leaves_the_data_that_are_finished():
    pair, calls = ORACLES["plain"](6), []

    def model(x):
        calls.append(1)
        if len(calls) > 150:
            raise KeyboardInterrupt
        return pair.model(x)

    options = {"num_steps": 8, "num_particles": 10, "chunks": (2, 5), "seed": 0}
    result = lvm.inference_gap(model, pair.guide, pair.x, **options)
    assert 0 < len(result) < 6
    assert not result.provenance["finished"]
    assert "of 6 data (interrupted)" in str(result)
    torch.testing.assert_close(result.local_elbo, pair.log_px[: len(result)], rtol=0, atol=0.02)


def test_gradients_are_on_whatever_is_around():
    pair = ORACLES["plain"](3)
    with torch.no_grad():
        assert refine(pair.model, pair.guide, pair.x, num_steps=2, seed=0).converged.all()


def test_a_few_steps_are_not_called_converged():
    def far(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + 9.0, 1.0))

    for num_steps in (1, 2, 3):
        assert not refine(normal_model, far, torch.zeros(3), num_steps=num_steps, seed=0).converged.any()
