"""Closed forms of the linear-Gaussian model against dense matrices and the identity ELBO + KL = log p(x)."""

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from pyro_lvm import ops
from pyro_lvm.errors import ShapeError

SIZES = [(1, 1, 1), (3, 5, 2), (2, 2, 4), (4, 30, 3)]  # N, D, L


def problem(num_data, data_dim, latent_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(num_data, data_dim), normal(data_dim, latent_dim), normal(data_dim), normal(data_dim).exp()


def normals(num_data, latent_dim, seed, batched=True):
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(num_data, latent_dim, generator=generator, dtype=torch.float64)
    shape = (num_data, latent_dim, latent_dim) if batched else (latent_dim, latent_dim)
    scale_tril = torch.randn(shape, generator=generator, dtype=torch.float64).tril(-1)
    return loc, scale_tril + torch.diag_embed(torch.rand(shape[:-1], generator=generator, dtype=torch.float64) + 0.5)


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", SIZES)
def test_log_marginal_equals_the_dense_normal(sizes):
    x, weight, mean, variance = problem(*sizes)
    dense = MultivariateNormal(mean, weight @ weight.mT + variance.diag())
    close(ops.linear_gaussian_log_marginal(x, weight, mean, variance), dense.log_prob(x))


def test_log_marginal_keeps_its_digits_where_the_noise_is_small():
    # x is explained by z = 1 alone: log p(x) = log N(x; 0, w^2 + psi) in one dimension, known to full precision.
    psi = 1e-10
    total = 1 + psi
    expected = -0.5 * (math.log(2 * math.pi * total) + 9 / total)
    x, one = torch.tensor([[3.0]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    result = ops.linear_gaussian_log_marginal(x, one, torch.zeros(1, dtype=torch.float64), psi * one[0])
    assert result.item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("sizes", SIZES)
def test_posterior_equals_dense_conditioning(sizes):
    x, weight, mean, variance = problem(*sizes)
    gain = weight.mT @ torch.linalg.inv(weight @ weight.mT + variance.diag())  # (L, D)
    loc, scale_tril = ops.linear_gaussian_posterior(x, weight, mean, variance)
    close(loc, (x - mean) @ gain.mT)
    close(scale_tril @ scale_tril.mT, torch.eye(sizes[2], dtype=torch.float64) - gain @ weight)
    assert torch.equal(scale_tril, scale_tril.tril())
    assert (scale_tril.diagonal() > 0).all()


@pytest.mark.parametrize("sizes", SIZES)
def test_bayes_rule_holds_at_any_latent(sizes):
    x, weight, mean, variance = problem(*sizes)
    z, _ = normals(sizes[0], sizes[2], seed=1)
    loc, scale_tril = ops.linear_gaussian_posterior(x, weight, mean, variance)
    prior = Normal(0, 1).log_prob(z).sum(1)
    likelihood = Independent(Normal(z @ weight.mT + mean, variance.sqrt()), 1).log_prob(x)
    posterior = MultivariateNormal(loc, scale_tril=scale_tril).log_prob(z)
    close(prior + likelihood - posterior, ops.linear_gaussian_log_marginal(x, weight, mean, variance))


@pytest.mark.parametrize("latent_dim", [1, 3])
@pytest.mark.parametrize("batched", [(True, True), (True, False), (False, True), (False, False)])
def test_kl_equals_torch(latent_dim, batched):
    q = normals(4, latent_dim, 2, batched[0])
    p = normals(4, latent_dim, 3, batched[1])
    expected = kl_divergence(MultivariateNormal(q[0], scale_tril=q[1]), MultivariateNormal(p[0], scale_tril=p[1]))
    close(ops.normal_kl(*q, *p), expected)


def test_kl_is_not_symmetric_and_vanishes_for_equal_normals():
    q, p = normals(4, 2, 2), normals(4, 2, 3)
    close(ops.normal_kl(*q, *q), torch.zeros(4, dtype=torch.float64))
    assert ((ops.normal_kl(*q, *p) - ops.normal_kl(*p, *q)).abs() > 1e-3).all()


def test_kl_of_single_normals_is_a_scalar():
    loc, scale_tril = normals(1, 3, 4, batched=False)
    assert ops.normal_kl(loc[0], scale_tril, 0 * loc[0], scale_tril).shape == ()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_elbo_and_kl_add_up_to_the_log_marginal(sizes, batched):
    model = problem(*sizes)
    q = normals(sizes[0], sizes[2], 5, batched)
    gap = ops.normal_kl(*q, *ops.linear_gaussian_posterior(*model))
    close(ops.linear_gaussian_elbo(*model, *q) + gap, ops.linear_gaussian_log_marginal(*model))


@pytest.mark.statistical
def test_elbo_equals_its_monte_carlo_mean():
    x, weight, mean, variance = problem(2, 3, 2, seed=6)
    loc, scale_tril = normals(2, 2, 7)
    torch.manual_seed(8)
    q = MultivariateNormal(loc, scale_tril=scale_tril)
    z = q.sample((50_000,))  # (K, N, L)
    joint = Normal(0, 1).log_prob(z).sum(-1) + Normal(z @ weight.mT + mean, variance.sqrt()).log_prob(x).sum(-1)
    log_weights = joint - q.log_prob(z)  # (K, N)
    error = log_weights.mean(0) - ops.linear_gaussian_elbo(x, weight, mean, variance, loc, scale_tril)
    assert (error.abs() < 5 * log_weights.std(0) / math.sqrt(50_000)).all()


def test_the_posterior_as_proposal_has_equal_weights():
    x, weight, mean, variance = problem(3, 4, 2, seed=9)
    loc, scale_tril = ops.linear_gaussian_posterior(x, weight, mean, variance)
    q = MultivariateNormal(loc, scale_tril=scale_tril)
    z = q.sample((5,))
    joint = Normal(0, 1).log_prob(z).sum(-1) + Normal(z @ weight.mT + mean, variance.sqrt()).log_prob(x).sum(-1)
    log_marginal = ops.linear_gaussian_log_marginal(x, weight, mean, variance)
    close(joint - q.log_prob(z), log_marginal.expand(5, 3))


def test_the_log_marginal_is_differentiable_in_the_parameters():
    x, weight, mean, variance = problem(3, 4, 2, seed=10)
    arguments = [value.requires_grad_() for value in (weight, mean, variance)]
    assert torch.autograd.gradcheck(lambda *args: ops.linear_gaussian_log_marginal(x, *args), arguments)


def test_errors_name_the_argument():
    x, weight, mean, variance = problem(3, 4, 2)
    with pytest.raises(ShapeError, match=r"x: expected shape \(N, 4\), got \(3, 5\)"):
        ops.linear_gaussian_log_marginal(torch.zeros(3, 5), weight, mean, variance)
    with pytest.raises(ShapeError, match=r"weight: expected shape \(D, L\), got \(4,\)"):
        ops.linear_gaussian_posterior(x, weight[:, 0], mean, variance)
    with pytest.raises(ShapeError, match=r"variance: expected shape \(4,\), got \(\)"):
        ops.linear_gaussian_posterior(x, weight, mean, variance[0])
    with pytest.raises(ShapeError, match=r"loc: expected shape \(3, 2\), got \(3, 1\)"):
        ops.linear_gaussian_elbo(x, weight, mean, variance, torch.zeros(3, 1), torch.eye(1))
    with pytest.raises(ShapeError, match=r"scale_tril_p: expected last dimensions of size 2, got \(3, 3\)"):
        ops.normal_kl(torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(3))
    with pytest.raises(ShapeError, match=r"loc_q: expected leading dimensions that broadcast, got \[\(4,\), \(3,\)"):
        ops.normal_kl(torch.zeros(4, 2), torch.eye(2), torch.zeros(3, 2), torch.eye(2))
