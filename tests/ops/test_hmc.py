"""Hamiltonian moves: they keep the density, its support and the coordinates that are not to move."""

import pytest
import torch

from pyro_lvm.ops.hmc import PathState, hmc_transition

F64 = torch.float64


def normal(precision):
    """base: a normal of this precision matrix; delta: the same once more, so that b adds to the precision."""

    def evaluate(u):
        gradient = -u @ precision
        log_prob = (u * gradient).sum(-1) / 2
        return PathState(u, log_prob, log_prob, gradient, gradient)

    return evaluate


PRECISION = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=F64)


@pytest.mark.statistical
@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_density_is_invariant(dense, beta):
    """20,000 exact draws after 5 moves: moments within 5 standard errors; 5 tests of a false-failure rate of 6e-7."""
    torch.manual_seed(0)
    covariance = torch.linalg.inv(PRECISION * (1 + beta))
    factor = torch.linalg.cholesky(covariance)
    scale = factor[None] if dense else torch.tensor([[0.4, 1.2]], dtype=F64)
    evaluate = normal(PRECISION)
    state = evaluate(torch.randn(20_000, 1, 2, dtype=F64) @ factor.T)
    b, step = torch.tensor([beta], dtype=F64), torch.full((20_000, 1), 0.9, dtype=F64)
    rate = 0.0
    for _ in range(5):
        state, acceptance = hmc_transition(evaluate, state, b, step, scale, 4)
        rate += float(acceptance.mean()) / 5
    assert 0.3 < rate < 0.99  # the correction has something to do
    u = state.u[:, 0]
    products = torch.stack([u[:, 0], u[:, 1], u[:, 0] ** 2, u[:, 0] * u[:, 1], u[:, 1] ** 2], 1)
    expected = torch.stack([b[0] * 0, b[0] * 0, covariance[0, 0], covariance[0, 1], covariance[1, 1]])
    error = products.std(0) / 20_000**0.5
    assert ((products.mean(0) - expected).abs() < 5 * error).all()


def test_energy_is_kept_to_second_order():
    """From the mode, where a leapfrog trajectory ends with less density than it began, so that its loss is seen."""
    evaluate, one = normal(PRECISION), torch.ones(1, 1, dtype=F64)
    state = evaluate(torch.zeros(1, 1, 2, dtype=F64))
    lost = []
    for step, num_leapfrog in ((0.1, 10), (0.05, 20)):
        torch.manual_seed(0)
        _, acceptance = hmc_transition(evaluate, state, 0 * one[0], step * one, one.expand(1, 2), num_leapfrog)
        lost.append(-float(acceptance.log()))
    assert lost[0] > 0
    assert lost[1] / lost[0] == pytest.approx(0.25, rel=0.05)


def test_a_coordinate_without_scale_stays():
    torch.manual_seed(0)
    evaluate = normal(PRECISION)
    state = evaluate(torch.randn(50, 1, 2, dtype=F64))
    step, scale = torch.full((50, 1), 0.5, dtype=F64), torch.tensor([[1.0, 0.0]], dtype=F64)
    moved, _ = hmc_transition(evaluate, state, torch.zeros(1, dtype=F64), step, scale, 3)
    assert moved.u[..., 1].equal(state.u[..., 1])
    assert not moved.u[..., 0].equal(state.u[..., 0])


def test_chains_leave_where_there_is_no_mass_and_do_not_go_there():
    """delta is -inf for u < 0: at b = 0 that does not matter, at b = 1 no chain goes there, and those there may go."""
    torch.manual_seed(0)

    def evaluate(u):
        base = -u.square().sum(-1) / 2
        delta = torch.where(u[..., 0] < 0, -torch.inf, 0.0).to(u)
        return PathState(u, base, delta, -u, torch.zeros_like(u))

    ones, start = torch.ones(1000, 1, dtype=F64), evaluate(torch.ones(1000, 1, 1, dtype=F64))
    free, _ = hmc_transition(evaluate, start, 0 * ones[0], ones, ones[:1], 3)
    bound, _ = hmc_transition(evaluate, start, ones[0], ones, ones[:1], 3)
    assert (free.u < 0).any()
    assert (bound.u >= 0).all()
    outside = evaluate(torch.full((1000, 1, 1), -0.5, dtype=F64))
    assert outside.log_density(ones[0]).isneginf().all()
    assert (hmc_transition(evaluate, outside, ones[0], ones, ones[:1], 3)[0].u >= 0).any()


def test_a_trajectory_beyond_the_numbers_is_rejected():
    evaluate = normal(PRECISION)
    state = evaluate(torch.ones(4, 1, 2, dtype=F64))
    step = torch.full((4, 1), 1e200, dtype=F64)
    moved, acceptance = hmc_transition(evaluate, state, torch.ones(1, dtype=F64), step, torch.ones(1, 2, dtype=F64), 5)
    assert moved.u.equal(state.u)
    assert (acceptance == 0).all()
