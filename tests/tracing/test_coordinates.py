"""Latents as one vector: there and back, with the Jacobian, for constraints, plates and masks; and what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import Planar
from pyro.infer.autoguide import AutoNormal

from pyro_lvm.errors import PlateError, SiteError, SupportError
from pyro_lvm.tracing.batch import make_batch
from pyro_lvm.tracing.coordinates import pair_coordinates
from pyro_lvm.tracing.isolation import validation
from pyro_lvm.tracing.probe import probe_pair
from pyro_lvm.tracing.proposals import prior_guide
from pyro_lvm.tracing.weights import Proposal

F64 = torch.float64


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def made(model, guide, x, *args, **options):
    """Coordinates of a pair, and three draws of the guide with their density."""
    batch = make_batch(x, args)
    guide = guide or prior_guide(model)
    with torch.no_grad():
        plan = probe_pair(model, guide, batch, **options)
        with validation(False):
            coordinates = pair_coordinates(plan, model, guide, batch)
            proposal = Proposal(plan, guide, batch)
            return coordinates, *proposal.draw(3), proposal


def constrained(x):
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Gamma(2.0, 1.0))
        pyro.sample("b", dist.Beta(2.0 * torch.ones(2), 3.0).to_event(1))
        pyro.sample("c", dist.Dirichlet(torch.ones(3)))
        pyro.sample("d", dist.Uniform(x - 1, x + 2))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def plates(data_dim):
    """Local latents in a plate of their own, to the right or to the left of the data."""

    def model(x):
        data, inner = pyro.plate("data", len(x), dim=data_dim), pyro.plate("inner", 3, dim=-3 - data_dim)
        with data:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with data, inner:
            z = pyro.sample("z", dist.Gamma(torch.full((2,), 2.0), 1 + mu.exp()[..., None]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x if data_dim == -2 else x.transpose(0, 1))

    return model


CASES = {
    "constrained": (constrained, torch.randn(4, dtype=F64), {}, 6),
    "plate inside": (plates(-2), torch.randn(4, 3, 2, dtype=F64), {}, 7),
    "plate outside": (plates(-1), torch.randn(4, 3, 2, dtype=F64), {}, 7),
    "one joint vector": (plates(-1), torch.randn(4, 3, 2, dtype=F64), {"data_plate": None}, 28),
}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name):
    model, x, options, dim = CASES[name]
    coordinates, _, draws, _ = made(model, None, x, **options)
    u = coordinates.vector(draws)
    assert u.shape == (3, 1 if options else len(x), dim) == (3, coordinates.num_data, coordinates.dim)
    values, _ = coordinates.latents(u)
    for name, latent in values.items():
        assert latent.rank == draws[name].rank
        torch.testing.assert_close(latent.value, draws[name].value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_each_datum_has_its_own_rows(name):
    model, x, options, _ = CASES[name]
    coordinates, _, draws, _ = made(model, None, x, **options)
    u = coordinates.vector(draws)
    moved = u.clone()
    moved[:, 0] += 1.0
    before, after = coordinates.latents(u), coordinates.latents(moved)
    back = coordinates.vector(after[0])
    torch.testing.assert_close(back, moved, rtol=1e-6, atol=1e-6)
    assert (before[1] != after[1])[:, 0].all()
    assert before[1][:, 1:].equal(after[1][:, 1:])


@pytest.mark.parametrize("name", CASES)
def test_the_jacobian_is_that_of_the_map(name):
    """By automatic differentiation of the free elements of z; of a simplex the last is none."""
    model, x, options, dim = CASES[name]
    coordinates, _, draws, _ = made(model, None, x, **options)
    u = coordinates.vector(draws)[:1]

    def free(row):
        values, _ = coordinates.latents(torch.cat([row[None, None], u[:, 1:]], 1))
        parts = []
        for axis in coordinates.axes:
            value = values[axis.name].value
            value = value[..., :-1] if axis.name == "c" else value
            parts.append(coordinates._rows(value)[0, 0])
        return torch.cat(parts)

    jacobian = torch.autograd.functional.jacobian(free, u[0, 0])
    assert jacobian.shape == (dim, dim)
    torch.testing.assert_close(coordinates.latents(u)[1][0, 0], torch.linalg.slogdet(jacobian)[1])


def positive(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(torch.full((2,), 2.0), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def test_an_auto_normal_is_scored_by_its_own_coordinates():
    x = torch.rand(3)
    guide = AutoNormal(positive, init_scale=0.3)
    guide(x)
    coordinates, log_q, draws, proposal = made(positive, guide, x)
    u = coordinates.vector(draws)
    torch.testing.assert_close(coordinates._rows(draws["z_unconstrained"].value), u)
    values, _ = coordinates.latents(u)
    torch.testing.assert_close(proposal.score(coordinates.guide_draws(u, values), 3).total, log_q.total)


def test_masked_coordinates_do_not_move():
    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))

    coordinates, *_ = made(model, guide, torch.tensor([1.0, -1.0, 2.0]))
    assert coordinates.moves.tolist() == [[True] * 2, [False] * 2, [True] * 2]


def refused(error, model, guide, match, x=None, **options):
    with pytest.raises(error, match=match):
        made(model, guide, torch.rand(3) if x is None else x, **options)


def test_a_discrete_latent_that_the_guide_draws_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    refused(SupportError, model, None, "latent site 'c'.*gradients: leave it out of the guide")


def test_a_support_that_moves_with_other_latents_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0, 1.0))
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(a), a))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused(SupportError, model, None, "latent site 'z'.*moves with the draws of other latents")


class Above(torch.distributions.constraints.Constraint):
    """Positive numbers, under a name of which torch knows no bijection."""

    def check(self, value):
        return value > 0


class OfNoBijection(dist.Gamma):
    support = Above()


def test_a_support_without_a_bijection_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", OfNoBijection(torch.tensor(2.0), torch.tensor(1.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused(SupportError, model, None, "latent site 'z'.*bijection")


def normal(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def test_a_guide_that_knows_the_density_of_its_own_draws_only_is_refused():
    planar = Planar(2)

    def guide(x):
        flow = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [planar])
        with pyro.plate("data", len(x)):
            pyro.sample("z", flow)

    refused(SiteError, normal, guide, r"guide: expected a density log q\(z \| x\) at any draws")


def test_a_delta_of_draws_from_elsewhere_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            eps = pyro.sample("eps", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
            log_density = torch.full((len(x),), -2 * math.log(2.0))
            pyro.sample("z", dist.Delta(2 * eps, log_density=log_density, event_dim=1))

    refused(SiteError, normal, guide, "guide site 'z'.*a density, got a Delta")


def test_a_model_without_continuous_latents_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    refused(SupportError, model, lambda x: None, "guide: expected a continuous latent, got none")


def test_a_plate_that_is_a_python_loop_is_refused():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    refused(PlateError, model, None, "plate 'data'.*a plate with a dimension")
    coordinates, *_ = made(model, None, torch.rand(3), data_plate=None)
    assert (coordinates.num_data, coordinates.dim) == (1, 3)
