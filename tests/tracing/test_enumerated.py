"""Latents that are summed out: the sum of what the model says of each value, or an error."""

import itertools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_lvm import evidence, log_marginal
from pyro_lvm.errors import SiteError
from pyro_lvm.tracing.intercept import run, site_log_prob

Y = torch.tensor([0.1, -0.4, 0.3, 2.2, 1.7]).double()
TABLE = torch.tensor([[0.0, 0, 0, 2, 2], [2, 2, 2, 0, 0]]).double()


def regimes(mean: Callable[[Tensor, Tensor], Tensor], order: str = "ca") -> Callable[[Tensor], None]:
    """A regime c of all data and a bit a."""

    def model(y: Tensor) -> None:
        drawn = {}
        for name in order:
            probs = torch.tensor([0.3, 0.7] if name == "c" else [0.6, 0.4]).double()
            drawn[name] = pyro.sample(name, dist.Categorical(probs))
        with pyro.plate("t", 5):
            pyro.sample("y", dist.Normal(mean(drawn["c"], drawn.get("a", torch.tensor(0))), 1.0), obs=y)

    return model


def brute_force(model: Callable[[Tensor], None], order: str) -> Tensor:
    terms = []
    for cell in itertools.product([0, 1], repeat=len(order)):
        trace = run(model, (Y,), values={n: torch.tensor(v) for n, v in zip(order, cell, strict=True)})
        terms.append(sum(site_log_prob(s).sum() for s in trace.values() if s["type"] == "sample"))
    return torch.stack(terms).logsumexp(0)


@pytest.mark.parametrize("order", ["c", "ca", "ac"])
def test_values_in_a_dimension_of_their_own(order: str) -> None:
    model = regimes(lambda c, a: Vindex(TABLE)[..., c, torch.arange(5)] + a, order)
    record = log_marginal(model, None, Y, data_plate=None)
    torch.testing.assert_close(record.value[0], brute_force(model, order))


MOVED = {
    "indexed": lambda c, a: TABLE[c] + a,
    "stacked": lambda c, a: torch.stack([torch.zeros(5), torch.arange(5.0)])[c] + a,
    "a dimension more": lambda c, a: (torch.arange(5) <= c.unsqueeze(-1)) + a,
}


@pytest.mark.parametrize("order", ["c", "ca", "ac"])
@pytest.mark.parametrize("mean", MOVED.values(), ids=MOVED)
def test_values_that_have_moved(mean: Callable[[Tensor, Tensor], Tensor], order: str) -> None:
    """With a second latent theirs may be the dimension that the first has moved to."""
    model = regimes(mean, order)
    with pytest.raises(SiteError, match=r"(?s)site 'y': expected a log-density for each value of .*'c'.*Vindex"):
        log_marginal(model, None, Y, data_plate=None)
    drawn = evidence.prior(model, Y, data_plate=None, num_particles=4000, seed=0)
    assert abs(float(drawn.value) - float(brute_force(model, order))) < 5 * float(drawn.stderr)


def test_each_estimator_refuses_them() -> None:
    def model(y: Tensor) -> None:
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("t", 5):
            pyro.sample("y", dist.Normal(TABLE[c] + mu, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(y.mean(), 0.5))

    for estimate in (
        lambda: evidence.quadrature(model, Y, data_plate=None),
        lambda: log_marginal(model, guide, Y, data_plate=None, num_particles=10),
        lambda: evidence.annealed(model, guide, Y, data_plate=None),
        lambda: evidence.expectation(model, guide, Y, lambda mu: mu, data_plate=None),
    ):
        with pytest.raises(SiteError, match="Vindex"):
            estimate()
