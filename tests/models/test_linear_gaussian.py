import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import MultivariateNormal

from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError
from pyro_lvm.models import LinearGaussian


@pytest.fixture(autouse=True)
def _fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def make(noise, latent_dim=2, data_dim=4):
    torch.manual_seed(0)
    model = LinearGaussian(latent_dim, data_dim, noise).double()
    with torch.no_grad():
        model.mean.normal_()
        model.log_variance.normal_(-0.5)
    return model


def data(num_data=5, data_dim=4):
    torch.manual_seed(1)
    return 2 * torch.randn(num_data, data_dim, dtype=torch.float64)


def covariance(model):
    return model.weight @ model.weight.T + model.variance.diag()


NOISES = pytest.mark.parametrize("noise", ["isotropic", "diagonal"])


@NOISES
def test_log_prob_is_the_marginal_normal(noise):
    model, x = make(noise), data()
    expected = MultivariateNormal(model.mean, covariance(model)).log_prob(x)
    torch.testing.assert_close(model.log_prob(x), expected)


@NOISES
def test_posterior_is_the_conditional_of_the_joint_normal(noise):
    model, x = make(noise), data()
    gain = model.weight.T @ covariance(model).inverse()  # (L, D)
    posterior = model.posterior(x)
    assert (posterior.batch_shape, posterior.event_shape) == ((5,), (2,))
    torch.testing.assert_close(posterior.mean, (x - model.mean) @ gain.T)
    expected = torch.eye(2, dtype=torch.float64) - gain @ model.weight
    torch.testing.assert_close(posterior.covariance_matrix, expected.expand(5, 2, 2))


@NOISES
def test_elbo_of_the_posterior_guide_is_log_prob_for_any_draw(noise):
    model, x = make(noise), data()
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    loss = loss.differentiable_loss(model, model.posterior_guide, x)
    torch.testing.assert_close(loss, -model.log_prob(x).sum(), rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    exact = torch.autograd.grad(model.log_prob(x).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(-loss, parameters), exact, rtol=0, atol=1e-9)


def test_model_runs_under_an_outer_particle_plate():
    model, x = make("diagonal"), data()
    with pyro.plate("particles", 3, dim=-2):
        assert model(x).shape == (3, 5, 2)
        assert model.posterior_guide(x).shape == (3, 5, 2)


def test_parameters_are_in_the_param_store_by_class_name():
    model = make("diagonal")
    model(data())
    names = {f"LinearGaussian$$${name}" for name in ("weight", "mean", "log_variance")}
    assert set(pyro.get_param_store().keys()) == names


def test_noise_has_one_variance_or_one_a_dimension():
    assert make("isotropic").log_variance.numel() == 1
    assert make("diagonal").log_variance.numel() == 4
    assert make("isotropic").variance.shape == make("diagonal").variance.shape == (4,)


# 3 data in 4 dimensions: one eigenvalue is zero, and still one of the D - L that are averaged.
@pytest.mark.parametrize(("num_data", "latent_dim"), [(50, 1), (50, 3), (3, 1)])
def test_closed_form_reaches_the_maximum_of_the_likelihood(num_data, latent_dim):
    x = data(num_data) @ torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64).diag()
    model = make("isotropic", latent_dim).fit_closed_form(x)
    eigenvalues = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / num_data).flip(0)
    left_out = eigenvalues[latent_dim:].sum() / (4 - latent_dim)
    torch.testing.assert_close(model.variance, left_out.expand(4))
    # The value at the maximum: Tipping and Bishop (1999), Appendix A.
    log_det = eigenvalues[:latent_dim].log().sum() + (4 - latent_dim) * left_out.log()
    expected = -0.5 * (4 * math.log(2 * math.pi) + log_det + 4)
    torch.testing.assert_close(model.log_prob(x).mean(), expected)
    gradients = torch.autograd.grad(model.log_prob(x).mean(), list(model.parameters()))
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


def test_closed_form_agrees_with_scikit_learn_where_data_outnumber_dimensions():
    from sklearn.decomposition import PCA

    x = data(60)
    model = make("isotropic", 2).fit_closed_form(x)
    expected = torch.from_numpy(PCA(2).fit(x.numpy()).score_samples(x.numpy()))
    # scikit-learn divides the covariance by N - 1: the same model for data stretched by (N / (N - 1))^(1/2).
    stretch = (60 / 59) ** 0.5
    other = make("isotropic", 2).fit_closed_form((x - x.mean(0)) * stretch)
    torch.testing.assert_close(other.log_prob(x - x.mean(0)), expected)
    assert model.log_prob(x).sum() > expected.sum()


def test_closed_form_keeps_the_dtype_of_the_model():
    model = LinearGaussian(2, 4).fit_closed_form(data(50).float())
    exact = make("isotropic").fit_closed_form(data(50))
    assert model.weight.dtype == torch.float32
    torch.testing.assert_close(model.log_prob(data().float()).double(), exact.log_prob(data()), rtol=1e-4, atol=1e-4)


@NOISES
def test_samples_have_the_marginal_moments(noise):
    model = make(noise)
    torch.manual_seed(2)
    x = model.sample(4000)
    cov = covariance(model)
    assert not x.requires_grad
    assert ((x.mean(0) - model.mean).abs() < 5 * (cov.diagonal() / 4000).sqrt()).all()
    # var of an entry of the sample covariance of normals: (C_ii C_jj + C_ij^2) / N
    error = ((torch.outer(cov.diagonal(), cov.diagonal()) + cov**2) / 4000).sqrt()
    assert ((x.T.cov() - cov).abs() < 5 * error).all()


def test_wrong_noise_is_refused():
    with pytest.raises(DataTypeError, match="noise: expected 'isotropic' or 'diagonal', got 'full'"):
        LinearGaussian(2, 4, "full")


def test_wrong_data_shape_is_refused():
    model = make("isotropic")
    for call in (model, model.log_prob, model.posterior, model.fit_closed_form):
        with pytest.raises(ShapeError, match=r"x: expected shape \(N, 4\), got \(5, 1\)"):
            call(data()[:, :1])


def test_closed_form_refuses_what_has_none():
    with pytest.raises(DataTypeError, match="noise"):
        make("diagonal").fit_closed_form(data())
    with pytest.raises(ShapeError, match="latent_dim: expected less than data_dim=4, got 4"):
        make("isotropic", 4).fit_closed_form(data())
    with pytest.raises(ParameterError, match="rank above latent_dim=2"):
        make("isotropic", 2).fit_closed_form(data(3))
