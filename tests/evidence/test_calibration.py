"""Stated errors against true ones, on a model whose log p(x) and whose weights' tail are known.

z ~ N(0, 1), x ~ N(z, 1), and the guide N(x / 2, r / 2) has r times the variance of the posterior. Its weights have the
Pareto tail index 1 - r: bounded for r > 1, and with a fourth moment for r > 3/4.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_lvm as lvm

REPEATS = 2000
X = torch.full((REPEATS,), 0.7, dtype=torch.float64)  # each repeat is a datum
EXACT = dist.Normal(0.0, math.sqrt(2.0)).log_prob(X)


def model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.statistical
@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")  # of a few repeats, which count all the same
@pytest.mark.parametrize("num_particles", [1000, 5000])
@pytest.mark.parametrize("tail_index", [0.34, 0.3, 0.2, 0.1, -0.3, -2.0])
def test_intervals_cover(tail_index: float, num_particles: int) -> None:
    """95 % intervals cover 93 to 97 % of 2,000 repeats, all counted; four standard errors of that share are 1.9 %.

    Where the weights have no fourth moment the error is underestimated now and then: at a tail index of 0.34 and 1,000
    particles three seeds gave 93.4 to 94.0 %. The seed is fixed.
    """

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt((1 - tail_index) / 2)))

    result = lvm.log_marginal(model, guide, X, num_particles=num_particles, seed=0)
    covered = ((result.value - EXACT).abs() <= 1.96 * result.stderr).double().mean()
    assert 0.93 <= covered <= 0.97
