"""Guides that draw in unconstrained coordinates: one draw for each latent, one for all of them, and lists of such."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor

from pyro_lvm import evidence

X = torch.linspace(-1, 2, 7).double()
Y = torch.tensor([0.3, -0.2, 1.4, 0.9, 2.2, 1.1, 2.9]).double()
DESIGN = torch.stack([X, X.square(), torch.ones_like(X)], 1)  # of slope, slope, log of the level
PRECISION = DESIGN.T @ DESIGN + torch.eye(3).double()
LOC = torch.linalg.solve(PRECISION, DESIGN.T @ Y)
LOG_PY = dist.MultivariateNormal(torch.zeros(7).double(), DESIGN @ DESIGN.T + torch.eye(7).double()).log_prob(Y)


def regression(y: Tensor) -> None:
    """Everything is Gaussian in unconstrained coordinates."""
    slopes = pyro.sample("slopes", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
    level = pyro.sample("level", dist.LogNormal(y.new_zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        mean = slopes[..., 0] * X.to(y) + slopes[..., 1] * X.square().to(y) + level.log()
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def started(guide: autoguide.AutoGuide, *args: Tensor) -> autoguide.AutoGuide:
    pyro.set_rng_seed(0)
    guide(*args)
    return guide


def exact() -> autoguide.AutoGuide:
    guide = started(autoguide.AutoMultivariateNormal(regression), Y).double()
    tril = torch.linalg.cholesky(torch.linalg.inv(PRECISION))
    with torch.no_grad():
        guide.loc.copy_(LOC)
    guide.scale, guide.scale_tril = tril.diagonal(), tril / tril.diagonal()[:, None]
    return guide


def test_the_exact_posterior_has_equal_weights_whoever_draws() -> None:
    pooled = evidence.pooled(regression, [exact(), exact()], Y, num_particles=5, data_plate=None, seed=0)
    annealed = evidence.annealed(regression, exact(), Y, num_particles=5, num_steps=5, data_plate=None, seed=0)
    for record in (pooled, annealed):
        torch.testing.assert_close(record.value, LOG_PY[None], rtol=0, atol=1e-9)
        assert list(record.status) == ["zero_variance"]


def two_in_a_list(model: object) -> autoguide.AutoGuideList:
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["level"])))
    guide.append(autoguide.AutoMultivariateNormal(poutine.block(model, expose=["slopes"])))
    return guide


FAMILIES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": lambda model: autoguide.AutoIAFNormal(model, hidden_dim=[8], num_transforms=1),
    "list": two_in_a_list,
}


@pytest.mark.statistical
@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_untrained_guides_of_every_kind_beside_the_prior(name: str) -> None:
    guide = started(FAMILIES[name](regression), Y.float())
    record = evidence.pooled(regression, [guide, None], Y.float(), num_particles=5000, data_plate=None, seed=0)
    assert abs(float(record.value - LOG_PY)) < 5 * float(record.stderr) < 0.5


@pytest.mark.statistical
@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")
def test_annealing_from_one_draw_for_a_latent_and_one_for_the_others() -> None:
    guide = started(two_in_a_list(regression), Y)
    record = evidence.annealed(regression, guide, Y, num_particles=100, num_steps=100, data_plate=None, seed=0)
    assert abs(float(record.value - LOG_PY)) < 5 * float(record.stderr) < 0.5


def test_a_single_latent_in_a_plate_as_one_row() -> None:
    """The joint draw has the shape of the latent and other plates."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    x = Y[:3]
    guide = started(autoguide.AutoDiagonalNormal(model), x).double()
    with torch.no_grad():
        guide.loc.copy_(x / 2)
    guide.scale = torch.full_like(x, 0.5**0.5)
    expected = dist.Normal(torch.zeros_like(x), 2**0.5).log_prob(x).sum()[None]
    for record in (
        evidence.pooled(model, [guide, guide], x, num_particles=4, data_plate=None, seed=0),
        evidence.annealed(model, guide, x, num_particles=4, num_steps=4, data_plate=None, seed=0),
    ):
        torch.testing.assert_close(record.value, expected, rtol=0, atol=1e-9)
