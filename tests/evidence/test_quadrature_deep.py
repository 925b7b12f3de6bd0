"""Quadrature of deep Gaussian models: against grids that are written out, and as the judge of importance sampling."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_lvm import log_marginal
from pyro_lvm.evidence import prior, quadrature
from pyro_lvm.guides import DiagonalNormal, FullRankNormal
from pyro_lvm.models import DeepGaussian, likelihoods
from pyro_lvm.models.priors import FlowPrior, MixtureOfNormals, StandardNormal, VampPrior
from pyro_lvm.nn import MLP

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def grid(reach=12.0, num=601):
    """Nodes z of [-12, 12]^2 and log N(z; 0, I) dz: e^-72 is left outside, the spacing is 0.04."""
    line = torch.linspace(-reach, reach, num, dtype=F64)
    z = torch.cartesian_prod(line, line)  # (G, 2)
    return z, -z.square().sum(-1) / 2 - math.log(2 * math.pi) + 2 * math.log(2 * reach / (num - 1))


def bounded(scale=4.0):
    """The two-dimensional example mu = sigmoid(A z + c), Sigma = diag(exp(sigmoid(B z + d))), and its truth."""
    decoder = nn.Linear(2, 4).double()
    with torch.no_grad():
        decoder.weight.mul_(scale)

    def truth(x):
        z, log_cell = grid()
        (a, b), (c, d) = decoder.weight.chunk(2), decoder.bias.chunk(2)
        mean, variance = torch.sigmoid(z @ a.T + c), torch.sigmoid(z @ b.T + d).exp()
        square = (x[:, None] - mean).square() / variance + (2 * math.pi * variance).log()  # (N, G, 2)
        return (log_cell - square.sum(-1) / 2).logsumexp(1)

    return DeepGaussian(decoder, 2, likelihoods.SigmoidNormal()).double(), truth


def free():
    """Mean and scale from a network that bends, with narrow conditionals, and its truth."""
    net = MLP(2, [16], 4, activation=nn.Tanh).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
        net.layers[-1].bias[2:] = -1.5

    def truth(x):
        z, log_cell = grid()
        mean, raw = net(z).chunk(2, -1)
        scale = 1e-3 + (1 + raw.exp()).log()
        square = ((x[:, None] - mean) / scale).square() + (2 * math.pi * scale.square()).log()  # (N, G, 2)
        return (log_cell - square.sum(-1) / 2).logsumexp(1)

    return DeepGaussian(net, 2, "normal").double(), truth


MODELS = pytest.mark.parametrize("make", [bounded, free])


@pytest.mark.parametrize(("make", "tolerance"), [(bounded, 1e-8), (free, 1e-4)])
def test_quadrature_is_the_written_out_integral(make, tolerance):
    """To rounding where conditionals are wide; narrow ones in a curved posterior are at the limit of 129 nodes."""
    model, truth = make()
    x = torch.tensor([[0.5, 0.5], [-1.0, 2.0], [3.0, -2.0]], dtype=F64)
    with torch.no_grad():
        torch.testing.assert_close(quadrature(model, x).value, truth(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_nodes", [17, 33, 65, 129])
@pytest.mark.parametrize(("make", "enough"), [(bounded, 33), (free, 65)])
def test_its_error_estimate_covers_the_error(make, enough, num_nodes):
    """Once the nodes are dense enough to see p(z|x); 1e-9 is the rounding of the truth."""
    model, truth = make()
    x = torch.randn(6, 2, dtype=F64)
    result = quadrature(model, x, num_nodes=num_nodes)
    with torch.no_grad():
        error = (result.value - truth(x)).abs()
    seen = result.stderr < 0.05
    assert bool(seen.any()) == (num_nodes >= enough)
    assert bool((error <= result.stderr + 1e-9)[seen].all())


def test_the_bounded_example_has_one_mode():
    """Its means lie within one standard deviation of each other, so that p(x) has one mode; on a grid at least."""
    model, _ = bounded(scale=20.0)
    line = torch.linspace(-2.0, 3.0, 14, dtype=F64)
    p = quadrature(model, torch.cartesian_prod(line, line), num_nodes=33).value.reshape(1, 14, 14)
    assert int((p == torch.nn.functional.max_pool2d(p, 3, stride=1, padding=1)).sum()) == 1


# --- priors and likelihoods -------------------------------------------------------------------------------------------


def shaken(module, scale=0.3):
    """With noise on every parameter, so that nothing is where it started."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def wide(latent_dim):
    """A guide that covers every posterior here."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(latent_dim, dtype=F64), 3.0).to_event(1))

    return guide


def rows():
    return torch.randn(4, 3, dtype=F64)


PRIORS = {
    "standard": StandardNormal,
    "mixture": lambda latent_dim: shaken(MixtureOfNormals(3, latent_dim)),
    "vamp": lambda latent_dim: VampPrior(DiagonalNormal(latent_dim, MLP(3, [], 2 * latent_dim)).double(), 0.5 * rows()),
    "flow": lambda latent_dim: shaken(FlowPrior(latent_dim, num_layers=2, hidden_dims=(8,)), 0.1),
}
LIKELIHOODS = {
    "normal": ("normal", 6),
    "shared": (likelihoods.SharedNormal(), 3),
    "binomial": (likelihoods.Binomial(5), 3),
    "logistic": (likelihoods.DiscretizedLogistic(5), 6),
    "poisson": ("poisson", 3),
    "categorical": (likelihoods.Categorical(4), 12),
}
PAIRS = [
    (latent_dim, name, likelihood)
    for latent_dim in (1, 2)
    for name in PRIORS
    for likelihood in LIKELIHOODS
    if (latent_dim, name) != (1, "flow") and (likelihood in ("normal", "logistic") or (latent_dim, name) == (2, "vamp"))
]


@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")
@pytest.mark.statistical
@pytest.mark.parametrize(("latent_dim", "name", "likelihood"), PAIRS)
def test_importance_sampling_agrees(latent_dim, name, likelihood):
    """Within five standard errors of at most 0.05 nats, from a wide guide and from the prior."""
    likelihood, size = LIKELIHOODS[likelihood]
    model = DeepGaussian(MLP(latent_dim, [], size), latent_dim, likelihood, PRIORS[name](latent_dim)).double()
    x = model.sample(4)
    exact = quadrature(model, x)
    assert bool((exact.stderr < 1e-3).all())
    for estimate in (
        log_marginal(model, wide(latent_dim), x, num_particles=40_000, seed=0),
        prior(model, x, num_particles=40_000, seed=0),
    ):
        assert bool((estimate.stderr <= 0.05).all())
        assert bool(((estimate.value - exact.value).abs() <= 5 * estimate.stderr).all())


def test_a_full_guide_may_be_the_prior_too():
    guide = shaken(FullRankNormal(2, MLP(3, [], 5)).double())
    model = DeepGaussian(MLP(2, [], 3), 2, "bernoulli", VampPrior(guide, rows())).double()
    x = model.sample(3)
    exact = quadrature(model, x)
    line = torch.linspace(-15, 15, 601, dtype=F64)
    z = torch.cartesian_prod(line, line)
    with torch.no_grad():
        joint = model.prior.log_prob(z)[:, None] + model.decode(z[:, None]).log_prob(x)  # (G, N)
    torch.testing.assert_close(exact.value, joint.logsumexp(0) + 2 * math.log(0.05), rtol=0, atol=1e-8)
