"""TraceMeanField_ELBO: each case in which its number is wrong is wrong, and found; no sound pair is refused."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine import mask, scale
from torch.distributions import register_kl

import pyro_lvm as lvm
from pyro_lvm.objectives import analytic_kl

Program = Callable[..., Any]
X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
HALF = torch.tensor([True, False, True])


def in_plate(body: Program) -> Program:
    def program(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            body(x)

    return program


def observe(z: torch.Tensor, x: torch.Tensor) -> None:
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@in_plate
def normal_model(x: torch.Tensor) -> None:
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)


@in_plate
def normal_guide(x: torch.Tensor) -> None:
    pyro.sample("z", dist.Normal(x / 2, 0.7))


@in_plate
def chain(x: torch.Tensor) -> None:
    z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
    observe(pyro.sample("z", dist.Normal(2 * z2, 0.5)), x)


@in_plate
def bottom_up(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(x, 0.7))
    pyro.sample("z2", dist.Normal(0.5 * z, 0.6))


@in_plate
def through_a_delta(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(x, 0.7))
    a = pyro.sample("a", dist.Normal(0.5 * z, 0.6), infer={"is_auxiliary": True})
    pyro.sample("z2", dist.Delta(a))


@in_plate
def scaled_model(x: torch.Tensor) -> None:
    with scale(scale=0.1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x)


@in_plate
def masked_model(x: torch.Tensor) -> None:
    with mask(mask=HALF.repeat(len(x) // 3)):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)


@in_plate
def masked_prior(x: torch.Tensor) -> None:
    prior = dist.Normal(torch.zeros_like(x), 1.0)
    observe(pyro.sample("z", prior.mask(HALF.repeat(len(x) // 3))), x)


@in_plate
def masked_guide(x: torch.Tensor) -> None:
    pyro.sample("z", dist.Normal(x / 2, 0.7).mask(~HALF.repeat(len(x) // 3)))


@in_plate
def folded_model(x: torch.Tensor) -> None:
    observe(pyro.sample("z", dist.FoldedDistribution(dist.Normal(0.5, 1.0))), x)


@in_plate
def folded_guide(x: torch.Tensor) -> None:
    pyro.sample("z", dist.FoldedDistribution(dist.Normal(-0.6, 0.7 * torch.ones_like(x))))


@in_plate
def positive_model(x: torch.Tensor) -> None:
    observe(pyro.sample("z", dist.HalfNormal(1.0)), x)


@in_plate
def jacobian(x: torch.Tensor) -> None:
    a = pyro.sample("a", dist.Normal(x / 2, 0.2), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Delta(a.exp(), log_density=-a))


class Shifted(dist.Normal):
    """Draws and scores around loc + 1, and inherits the KL of a Normal around loc."""

    def rsample(self, *shape: Any) -> torch.Tensor:
        return super().rsample(*shape) + 1

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return super().log_prob(value - 1)


@in_plate
def shifted_guide(x: torch.Tensor) -> None:
    pyro.sample("z", Shifted(x / 2, 0.7))


@in_plate
def in_another_order(x: torch.Tensor) -> None:
    pyro.sample("z", dist.Normal(x, 0.7))
    pyro.sample("z2", dist.Normal(0.5 * x, 0.6))


@in_plate
def scaled_alike(x: torch.Tensor) -> None:
    with scale(scale=0.1):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


WRONG = {
    "order": (chain, bottom_up, r"latent 'z'.*\['z2'\], which the guide draws given 'z'.*order of the model"),
    "order through a Delta": (chain, through_a_delta, r"latent 'z'.*\['z2'\], which the guide draws given 'z'"),
    "scale": (scaled_model, normal_guide, "one scale in model and guide, got 0.1 in the model and 1 in the guide"),
    "mask": (masked_model, normal_guide, "one mask in model and guide, got 2 values.* in the model and 1 in the guide"),
    "masked distributions": (masked_prior, masked_guide, "one mask in model and guide"),
    "folded": (folded_model, folded_guide, "that of the Normal under transforms that are not one-to-one"),
    "Jacobian": (positive_model, jacobian, "a Delta whose log_density it leaves out"),
    "subclass": (normal_model, shifted_guide, "that of a base class of Shifted"),
}
SOUND = {
    "one latent": (normal_model, normal_guide),
    "another order, independent": (chain, in_another_order),
    "scaled alike": (scaled_model, scaled_alike),
    "no closed form": (positive_model, in_plate(lambda x: pyro.sample("z", dist.LogNormal(x / 2, 0.3)))),
    "HalfNormal": (positive_model, in_plate(lambda x: pyro.sample("z", dist.HalfNormal(x.abs())))),
}


def gap_in_errors(model: Program, guide: Program) -> float:
    """Difference between the values of the two losses, in standard errors of it: 50 runs on 300 data."""
    x = X.repeat(100)
    with pyro.validation_enabled(False):
        runs = [
            torch.tensor([loss.loss(model, guide, x) for _ in range(50)]).double()
            for loss in (Trace_ELBO(), TraceMeanField_ELBO())
        ]
    error = (sum(run.var() for run in runs) / 50) ** 0.5
    return float((runs[0].mean() - runs[1].mean()).abs() / error)


@pytest.mark.statistical
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_wrong_and_is_found(case: str) -> None:
    model, guide, message = WRONG[case]
    torch.manual_seed(0)
    assert gap_in_errors(model, guide) > 5
    assert len(analytic_kl(model, guide, X).faults) == 1
    with pytest.raises(lvm.SiteError, match=message):
        lvm.fit(model, guide, X, num_steps=1, loss=TraceMeanField_ELBO())


@pytest.mark.statistical
@pytest.mark.parametrize("case", SOUND)
def test_a_right_value_is_right_and_is_let_through(case: str) -> None:
    torch.manual_seed(0)
    assert gap_in_errors(*SOUND[case]) < 5
    assert analytic_kl(*SOUND[case], X).faults == ()


def losses(model: Program, guide: Program) -> list[float]:
    """Values of Trace_ELBO and of TraceMeanField_ELBO at the same draws."""
    values = []
    for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(1)
        with pyro.validation_enabled(False):
            values.append(loss.loss(model, guide, X))
    return values


def test_errors_that_are_no_matter_of_chance() -> None:
    kl = torch.distributions.kl_divergence(dist.Normal(X / 2, 0.7), dist.Normal(0.0, 1.0))
    unscaled = losses(normal_model, normal_guide)[1]
    assert losses(scaled_model, normal_guide)[1] == unscaled  # the model's 0.1 counts for nothing
    assert unscaled - losses(scaled_model, scaled_alike)[1] == pytest.approx(0.9 * float(kl.sum()), abs=1e-10)
    torch.manual_seed(1)
    log_jacobian = dist.Normal(X / 2, 0.2).sample()  # of z = exp(a), at the draws of a
    plain, mean_field = losses(positive_model, jacobian)
    assert plain - mean_field == pytest.approx(-float(log_jacobian.sum()), abs=1e-10)
    folded = (dist.FoldedDistribution(dist.Normal(loc, s)) for loc, s in ((-0.6, 0.7), (0.5, 1.0)))
    q, p = folded
    z = torch.linspace(1e-6, 12.0, 20_001, dtype=torch.float64)
    exact = torch.trapezoid(q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z)), z)
    assert float(torch.distributions.kl_divergence(q, p) - exact) > 0.5  # 0.71 nats, where the KL is 0.04


# ---------------------------------------------------------------- dependence that is hard to see


def test_weights_that_are_still_zero_connect() -> None:
    link = torch.nn.Linear(1, 1).double()
    torch.nn.init.zeros_(link.weight)

    @in_plate
    def guide(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x, 0.7))
        pyro.sample("z2", dist.Normal(link(z[..., None])[..., 0], 0.6))

    assert "['z2'], which the guide draws given 'z'" in analytic_kl(chain, guide, X).faults[0]


def test_discrete_draws_connect() -> None:
    @in_plate
    def model(x: torch.Tensor) -> None:
        c = pyro.sample("c", dist.Bernoulli(0.5))
        observe(pyro.sample("z", dist.Normal(4 * c, 1.0)), x)

    @in_plate
    def guide(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x, 1.0))
        pyro.sample("c", dist.Bernoulli((z > 0).double() * 0.8 + 0.1))

    record = analytic_kl(model, guide, X)
    assert [bool(site.fault) for site in record.sites] == [False, True]


def test_through_a_third_latent() -> None:
    @in_plate
    def model(x: torch.Tensor) -> None:
        a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
        observe(pyro.sample("z", dist.Normal(a, 1.0)) + b, x)

    @in_plate
    def guide(x: torch.Tensor) -> None:
        b = pyro.sample("b", dist.Normal(pyro.sample("z", dist.Normal(x, 1.0)), 1.0))
        pyro.sample("a", dist.Normal(b, 1.0))

    record = analytic_kl(model, guide, X)
    assert {site.name: bool(site.fault) for site in record.sites} == {"a": False, "b": False, "z": True}


# ---------------------------------------------------------------- gradients, sites, shapes


def test_draws_without_gradient() -> None:
    """p(z) = Bernoulli(0.3), p(x | z) = N(2 z, 1), x = 1.5, q = Bernoulli(logits=0.2): the gradient lacks the data."""
    logits = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([1.5], dtype=torch.float64)

    @in_plate
    def model(x: torch.Tensor) -> None:
        observe(2 * pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double())), x)

    @in_plate
    def guide(x: torch.Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(logits=logits))

    with pyro.validation_enabled(False):
        loss = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
    got = torch.autograd.grad(loss, logits)[0]
    q, values = dist.Bernoulli(logits=logits), torch.tensor([0.0, 1.0]).double()
    kl = torch.distributions.kl_divergence(q, dist.Bernoulli(torch.tensor(0.3).double()))
    data = (q.log_prob(values).exp() * dist.Normal(2 * values, 1.0).log_prob(x)).sum()
    assert torch.equal(got, torch.autograd.grad(kl, logits, retain_graph=True)[0])
    assert abs(torch.autograd.grad(kl - data, logits)[0] - got) > 0.1
    record = analytic_kl(model, guide, x)
    assert record.monte_carlo == ()
    assert "guide site 'z': expected reparameterised draws, got Bernoulli without rsample" in record.faults[0]


def test_latents_that_one_program_lacks() -> None:
    @in_plate
    def samples_x(x: torch.Tensor) -> None:
        pyro.sample("z", dist.Normal(x / 2, 0.7))
        pyro.sample("x", dist.Normal(x, 0.5))

    for guide, got in ((samples_x, r"\['z', 'x'\]"), (lambda x: None, r"\[\]")):
        with pytest.raises(lvm.SiteError, match=rf"the latent sites \['z'\] of the model, got {got}"):
            analytic_kl(normal_model, guide, X)


def test_shapes_that_do_not_fit() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", 2, dim=-2), pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False), pytest.raises(AssertionError):
        TraceMeanField_ELBO().loss(model, normal_guide, X)
    assert "a KL of the guide's batch shape (3,), got (2, 3)" in analytic_kl(model, normal_guide, X).faults[0]


def test_a_family_of_ones_own_with_its_own_kl() -> None:
    class Mine(Shifted):
        pass

    @register_kl(Mine, dist.Normal)
    def _(q: Any, p: Any) -> torch.Tensor:
        return torch.distributions.kl_divergence(dist.Normal(q.loc + 1, q.scale), p)

    guide = in_plate(lambda x: pyro.sample("z", Mine(x / 2, 0.7)))
    assert analytic_kl(normal_model, guide, X).faults == ()


def test_the_record_prints() -> None:
    lines = str(analytic_kl(chain, bottom_up, X)).splitlines()
    assert lines[0].split() == ["latent", "KL", "families", "fault"]
    assert lines[3].split() == ["z", "analytic", "Normal", "||", "Normal", "fault"]
    assert lines[4].startswith("latent 'z': expected a prior that depends on no latent")
    state = torch.get_rng_state()
    analytic_kl(chain, bottom_up, X)
    assert torch.equal(torch.get_rng_state(), state)
