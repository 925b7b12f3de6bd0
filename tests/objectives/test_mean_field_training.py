"""TraceMeanField_ELBO in training: sound pairs of the library and of Pyro pass, others are refused before a step."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO, autoguide

import pyro_lvm as lvm
from pyro_lvm import guides, models
from pyro_lvm.nn import MLP
from pyro_lvm.objectives import KLAnnealing, analytic_kl
from tests.objectives.test_mean_field import Program, X, in_plate, observe


@in_plate
def chain(x: torch.Tensor) -> None:
    z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
    observe(pyro.sample("z", dist.Normal(2 * z2, 0.5)), x)


def encoder(size: int) -> torch.nn.Module:
    return MLP(4, [5], size)


GUIDES = {
    "diagonal": (lambda: guides.DiagonalNormal(2, encoder(4)), "analytic"),
    "local": (lambda: guides.DiagonalNormal(2, num_data=6), "analytic"),
    "shared": (lambda: guides.DiagonalNormal(2, shared=True), "analytic"),
    "full rank": (lambda: guides.FullRankNormal(2, encoder(5)), "Monte Carlo"),
    "flow": (lambda: guides.Flow(2, encoder=encoder(7), hidden_dim=4, context_dim=3), "Monte Carlo"),
}


@pytest.mark.parametrize("case", GUIDES)
def test_guides_of_the_library(case: str) -> None:
    make, method = GUIDES[case]
    x = torch.rand(6, 4).round()
    model, guide = models.DeepGaussian(MLP(2, [5], 4), 2, "bernoulli"), make()
    result = lvm.fit(model, guide, x, num_steps=2, loss=TraceMeanField_ELBO())
    assert [site.method for site in analytic_kl(model, guide, x).sites] == [method]
    assert [note for note in result.notes if "not in closed form, at 'z'" in note] == list(result.notes)
    assert bool(result.notes) == (method == "Monte Carlo")


@pytest.mark.parametrize("prior", ["mixture", "flow", "vamp"])
def test_priors_of_the_library(prior: str) -> None:
    guide, x = guides.DiagonalNormal(2, encoder(4)), torch.rand(6, 4).round()
    priors = {
        "mixture": lambda: models.priors.MixtureOfNormals(3, 2),
        "flow": lambda: models.priors.FlowPrior(2, 2, (4,)),
        "vamp": lambda: models.priors.VampPrior(guide, x[:3]),
    }
    model = models.DeepGaussian(MLP(2, [5], 4), 2, "bernoulli", prior=priors[prior]())
    assert len(lvm.fit(model, guide, x, num_steps=2, loss=TraceMeanField_ELBO()).notes) == 1


def test_layers() -> None:
    model, x = models.HierarchicalGaussian(MLP(3, [5], 4), [3, 2]), torch.rand(6, 4).round()
    top_down = guides.TopDown([3, 2], encoder(4), feature_dim=4)
    assert lvm.fit(model, top_down, x, num_steps=2, loss=TraceMeanField_ELBO()).notes == ()
    with pytest.raises(lvm.SiteError, match="which the guide draws given 'z'"):
        lvm.fit(model, guides.BottomUp([3, 2], encoder(6)), x, num_steps=2, loss=TraceMeanField_ELBO())


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDelta", "AutoDiagonalNormal", "AutoMultivariateNormal"])
def test_guides_of_pyro(name: str) -> None:
    guide = getattr(autoguide, name)(chain)
    result = lvm.fit(chain, guide, X, num_steps=2, batch_size=3, loss=TraceMeanField_ELBO())
    assert analytic_kl(chain, guide, X).faults == ()
    assert bool(result.notes) == (name != "AutoDelta")  # whose point mass needs no draw


def test_a_guide_of_pyro_on_a_positive_latent() -> None:
    """AutoNormal draws a Normal and hands over exp of it, with a log-density that Pyro's KL of a Delta leaves out."""

    @in_plate
    def model(x: torch.Tensor) -> None:
        observe(pyro.sample("z", dist.HalfNormal(torch.tensor(1.0).double())), x)

    guide = autoguide.AutoNormal(model)
    with pytest.raises(lvm.SiteError, match="a Delta whose log_density it leaves out. Pass loss=Trace_ELBO"):
        lvm.fit(model, guide, X, num_steps=2, loss=TraceMeanField_ELBO())
    values = []
    for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(0)
        values.append(loss.loss(model, guide, X))
    torch.manual_seed(0)
    log_jacobian = guide(X)["z"].detach().log().sum()
    assert values[0] - values[1] == pytest.approx(-float(log_jacobian), abs=1e-6)


def test_a_mini_batch_beside_a_global_latent() -> None:
    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            observe(pyro.sample("z", dist.Normal(w, 1.0)), x)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("w", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    assert lvm.fit(model, guide, X, num_steps=2, batch_size=2, loss=TraceMeanField_ELBO()).notes == ()


def test_a_plate_that_subsamples() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x[rows])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, pyro.param("s", torch.tensor(0.7), constraints.positive)))

    assert analytic_kl(model, guide, X.repeat(3)).faults == ()


# ---------------------------------------------------------------- in training


@pytest.mark.parametrize("loss", [TraceMeanField_ELBO(), KLAnnealing(0.5, TraceMeanField_ELBO())], ids=["plain", "in"])
def test_nothing_is_trained_before(loss: Any) -> None:
    link = torch.nn.Linear(1, 1).double()
    start = {name: value.clone() for name, value in link.state_dict().items()}

    @in_plate
    def guide(x: torch.Tensor) -> None:
        pyro.module("link", link)
        z = pyro.sample("z", dist.Normal(x, 0.7))
        pyro.sample("z2", dist.Normal(link(z[..., None])[..., 0], 0.6))

    state = torch.get_rng_state()
    with pytest.raises(lvm.SiteError, match="pass loss=Trace_ELBO"):
        lvm.fit(chain, guide, X, num_steps=5, loss=loss)
    assert all(torch.equal(value, start[name]) for name, value in link.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert lvm.fit(chain, guide, X, num_steps=2).notes == ()  # Trace_ELBO has no such fault


def test_what_a_loss_says_of_its_values_is_noted() -> None:
    model, guide = models.DeepGaussian(MLP(2, [5], 4), 2, "bernoulli"), guides.DiagonalNormal(2, encoder(4))
    loss = KLAnnealing(0.5, TraceMeanField_ELBO())
    assert lvm.fit(model, guide, torch.rand(6, 4).round(), num_steps=2, loss=loss).notes == tuple(loss.notes())


def test_the_loss_is_that_of_svi() -> None:
    def pair() -> tuple[Program, Program]:
        torch.manual_seed(0)
        return models.DeepGaussian(MLP(2, [5], 4), 2, "bernoulli"), guides.DiagonalNormal(2, encoder(4))

    x = torch.rand(6, 4).round()
    losses = lvm.fit(*pair(), x, num_steps=3, batch_size=6, loss=TraceMeanField_ELBO(), seed=3).losses
    pyro.clear_param_store()
    svi = SVI(*pair(), pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    pyro.set_rng_seed(3)
    torch.testing.assert_close(losses, torch.tensor([svi.step(x) / 6 for _ in range(3)]).double(), rtol=1e-5, atol=0)
