"""A linear-Gaussian model whose posterior covariance is diagonal plus rank one: the guide can be exact."""

import math

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.guides import DiagonalNormal, FullRankNormal, LowRankNormal
from pyro_lvm.models import LinearGaussian
from pyro_lvm.ops.gaussian import normal_kl

N, L = 4, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Constant(nn.Module):
    def __init__(self, phi: torch.Tensor) -> None:
        super().__init__()
        self.phi = phi

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.phi


def rank_one_case() -> tuple[LinearGaussian, torch.Tensor]:
    """Sigma = diag(d) + v v^T below I, and W from Sigma^-1 = I + W^T W / sigma^2 with sigma = 1."""
    v = torch.tensor([0.4, -0.5, 0.3, 0.2], dtype=torch.float64)
    covariance = torch.tensor([0.2, 0.3, 0.25, 0.35], dtype=torch.float64).diag() + v.outer(v)
    model = LinearGaussian(L, L).double().requires_grad_(False)
    model.weight.copy_(torch.linalg.cholesky(covariance.inverse() - torch.eye(L)).T)
    x = model.sample(N)
    torch.testing.assert_close(model.posterior(x).covariance_matrix[0], covariance)
    return model.eval(), x


def gap(model: LinearGaussian, guide: LowRankNormal | FullRankNormal, x: torch.Tensor) -> torch.Tensor:
    """KL(q || p(z|x)), ``(N,)``, in closed form."""
    q, posterior = guide.distribution(x), model.posterior(x)
    return normal_kl(q.loc, q.scale_tril, posterior.loc, posterior.scale_tril)


def train(model: LinearGaussian, guide: nn.Module, x: torch.Tensor) -> None:
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    for lr, steps in ((0.05, 300), (0.005, 300), (0.001, 300)):
        optim = lambda params, lr=lr: torch.optim.Adam(params, lr=lr)  # noqa: E731
        pyro_lvm.fit(model, guide, x, loss=loss, optim=optim, num_steps=steps, update="guide", seed=0)


# ---------------------------------------------------------------- the family


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_parameters_of_zero_are_the_standard_normal(rank: int) -> None:
    q = LowRankNormal(L, rank, num_data=N).double().distribution(torch.zeros(N, 2))
    expected = torch.eye(L, dtype=torch.float64).expand(N, L, L)
    torch.testing.assert_close(q.covariance_matrix, expected, rtol=0, atol=1e-12)
    assert not q.loc.any()


def test_parameters_are_means_raw_scales_and_loadings_by_rows() -> None:
    phi = torch.tensor([[1.0, 2.0, 3.0, 0.0, 50.0, 0.0, 3.0, 6.0, 9.0, 12.0, 15.0, 18.0]], dtype=torch.float64)
    q = LowRankNormal(3, 2, Constant(phi)).distribution(torch.zeros(1, 5))
    start, root = math.sqrt(0.5), math.sqrt(3)
    torch.testing.assert_close(q.loc, phi[:, :3])
    factor = [[start + 3 / root, 6 / root], [9 / root, start + 12 / root], [15 / root, 18 / root]]
    torch.testing.assert_close(q.cov_factor[0], torch.tensor(factor, dtype=torch.float64))
    large = 50 + math.log(math.e - 1)  # softplus(y) = y for a large y
    torch.testing.assert_close(q.cov_diag[0], torch.tensor([0.5, 0.5 * large**2, 1.0], dtype=torch.float64))


def test_loadings_have_gradients_at_the_start() -> None:
    """d KL / dV = 2 (d KL / dSigma) V, with d KL / dSigma = (P - I) / 2 at Sigma = I and posterior precision P."""
    model, x = rank_one_case()
    guide = LowRankNormal(L, 2, num_data=N).double()
    (gradient,) = torch.autograd.grad(gap(model, guide, x).sum(), guide.phi.table)
    precision = model.posterior(x).precision_matrix
    expected = (precision - torch.eye(L))[..., :2] * math.sqrt(0.5) / math.sqrt(L)  # (N, L, R), dV/dB = 1 / sqrt(L)
    torch.testing.assert_close(gradient[:, 2 * L :].reshape(N, L, 2), expected)
    assert expected.abs().amax((0, 2)).min() > 0.01  # of every coordinate


def test_it_contains_the_diagonal_normal() -> None:
    phi = torch.randn(N, 2 * L, dtype=torch.float64)
    raw = 1 + phi[:, L:].abs()
    scale = DiagonalNormal(L, Constant(torch.cat([phi[:, :L], raw], 1))).distribution(phi).stddev
    loadings = torch.zeros(N, L, 1, dtype=torch.float64)
    loadings[:, 0] = -math.sqrt(L / 2)  # takes out where V starts
    wanted = scale.clone()
    wanted[:, 0] *= math.sqrt(2)
    raw = wanted.expm1().log() - math.log(math.e - 1)  # of guides.normal, softplus(raw + log(e - 1))
    q = LowRankNormal(L, 1, Constant(torch.cat([phi[:, :L], raw, loadings[..., 0]], 1))).distribution(phi)
    torch.testing.assert_close(q.covariance_matrix, scale.square().diag_embed())


# ---------------------------------------------------------------- as a guide


@pytest.mark.parametrize("rank", [1, 2])
def test_it_finds_a_posterior_of_its_rank(rank: int) -> None:
    model, x = rank_one_case()
    guide = LowRankNormal(L, rank, num_data=N).double()
    train(model, guide, x)
    assert gap(model, guide, x).max() < 1e-3
    for vectorize in ("auto", False):
        result = pyro_lvm.log_marginal(model, guide, x, num_particles=200, vectorize=vectorize, seed=1)
        # log-weights of variance 2 KL, where KL is small: a standard error below sqrt(0.002 / 200)
        assert (result.stderr < 0.0032).all()
        assert ((result.value - model.log_prob(x)).abs() < 5 * 0.0032).all()


def test_what_is_missing_is_correlation() -> None:
    """The best mean-field normal stays at its closed-form gap, 1/2 (sum_l log P_ll - log det P), well above 0.001."""
    model, x = rank_one_case()
    precision = model.posterior(x).precision_matrix[0]
    assert 0.5 * (precision.diagonal().log().sum() - precision.logdet()) > 0.1


@pytest.mark.parametrize("make", [FullRankNormal, lambda *a, **k: LowRankNormal(*a, 1, **k)])
def test_one_phi_for_all_finds_the_posterior_of_equal_data(make: type) -> None:
    model, x = rank_one_case()
    x = x[:1].repeat(N, 1)
    guide = make(L, shared=True).double()
    assert sum(p.numel() for p in guide.parameters()) in (L + L * (L + 1) // 2, 3 * L)
    train(model, guide, x)
    assert gap(model, guide, x).max() < 1e-3
    assert len(guide(x[:2])) == 2  # of any number of data
    assert pyro_lvm.log_weights(model, guide, x[:3], num_particles=10).shape == (10, 3)


def test_ranks_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"rank: expected at most latent_dim=4, got 5.*FullRankNormal"):
        LowRankNormal(L, 5, num_data=N)
    with pytest.raises(ShapeError, match="rank: expected 1 or more, got 0"):
        LowRankNormal(L, 0, num_data=N)
    with pytest.raises(DataTypeError, match="rank: expected an integer"):
        LowRankNormal(L, 1.5, num_data=N)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"encoder: expected output of shape \(4, 12\), got \(4, 7\)"):
        LowRankNormal(L, 1, nn.Linear(2, 7))(torch.zeros(N, 2))
