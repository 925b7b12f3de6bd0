import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.models import DeepGaussian, LinearGaussian, likelihoods
from pyro_lvm.nn import MLP


@pytest.fixture(autouse=True)
def _fresh_store():
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def linear_pair():
    """A deep model whose decoder is linear, and the linear-Gaussian model that it is."""
    exact, decoder = LinearGaussian(1, 3, "diagonal").double(), nn.Linear(1, 6).double()
    with torch.no_grad():
        exact.mean.normal_()
        decoder.bias[:3] = exact.mean
        decoder.weight[:3] = exact.weight
        decoder.weight[3:] = 0
        scale = 1e-3 + nn.functional.softplus(decoder.bias[3:])
        exact.log_variance.copy_(2 * scale.log())
    return DeepGaussian(decoder, 1, "normal").double(), exact


def test_linear_decoder_gives_the_linear_gaussian_density():
    model, exact = linear_pair()
    x = torch.randn(4, 3, dtype=torch.float64)
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)[:, None, None]  # (K, 1, L)
    joint = model.prior.log_prob(z) + model.decode(z).log_prob(x)  # (K, N)
    log_marginal = joint.logsumexp(0) + torch.tensor(18 / 2000).log()
    torch.testing.assert_close(log_marginal, exact.log_prob(x), rtol=0, atol=1e-7)


def test_elbo_of_the_linear_decoder_is_exact_under_the_exact_posterior():
    model, exact = linear_pair()
    x = torch.randn(4, 3, dtype=torch.float64)
    loss = pyro.infer.Trace_ELBO().loss(model, exact.posterior_guide, x)
    torch.testing.assert_close(-loss, exact.log_prob(x).sum().item(), rtol=0, atol=1e-9)


CASES = [
    ("bernoulli", MLP(2, [5], 6), (6,)),
    ("normal", MLP(2, [5], 12), (6,)),
    ("categorical", nn.Sequential(MLP(2, [5], 18), nn.Unflatten(-1, (6, 3))), (6,)),
    (likelihoods.Categorical(3), MLP(2, [5], 18), (6,)),
    (likelihoods.Categorical(3), nn.Sequential(MLP(2, [5], 18), nn.Unflatten(-1, (6, 3))), (6,)),
    ("bernoulli", nn.Sequential(MLP(2, [5], 6), nn.Unflatten(-1, (1, 2, 3))), (1, 2, 3)),
    ("normal", nn.Sequential(MLP(2, [5], 12), nn.Unflatten(-1, (2, 2, 3))), (1, 2, 3)),
    ("categorical", nn.Sequential(MLP(2, [5], 18), nn.Unflatten(-1, (1, 2, 3, 3))), (1, 2, 3)),
    (lambda output, ndim: dist.Poisson(output.exp()).to_event(output.dim() - ndim), MLP(2, [5], 6), (6,)),
]


@pytest.mark.parametrize(("likelihood", "decoder", "shape"), CASES)
def test_particles_agree_with_the_loop(likelihood, decoder, shape):
    model = DeepGaussian(decoder, 2, likelihood)
    x, z = model.sample(4), torch.randn(3, 4, 2)
    assert x.shape == (4, *shape)
    p = model.decode(z)
    assert (p.batch_shape, p.event_shape) == ((3, 4), shape)
    loop = torch.stack([model.decode(z_k).log_prob(x) for z_k in z])  # (K, N)
    torch.testing.assert_close(p.log_prob(x), loop)
    assert model(x).shape == (4, 2)
    with pyro.plate("particles", 3, dim=-2):
        assert model(x).shape == (3, 4, 2)


def test_convolutional_decoder_runs():
    decoder = nn.Sequential(nn.Unflatten(-1, (2, 1, 1)), nn.ConvTranspose2d(2, 1, 4))
    model = DeepGaussian(decoder, 2)
    assert model.sample(5).shape == (5, 1, 4, 4)
    assert model(model.sample(5)).shape == (5, 2)


def test_bernoulli_reads_logits():
    output, x = torch.randn(5, 3), torch.tensor([0.0, 1.0, 1.0])
    expected = -nn.functional.binary_cross_entropy_with_logits(output, x.expand(5, 3), reduction="none").sum(-1)
    torch.testing.assert_close(likelihoods.Bernoulli()(output, 1).log_prob(x), expected)


def test_normal_reads_means_then_raw_scales_above_the_floor():
    output = torch.tensor([[1.0, 2.0, 0.0, -50.0]])
    p = likelihoods.Normal(min_scale=0.25)(output, 1).base_dist
    torch.testing.assert_close(p.loc, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(p.scale, 0.25 + torch.tensor([[2.0, 1.0]]).log())  # log(1 + e^0), and nothing


def test_categorical_flat_and_split_logits_agree():
    output, x = torch.randn(5, 12), torch.tensor([0.0, 2.0, 1.0, 2.0])
    flat = likelihoods.Categorical(3)(output, 1)
    torch.testing.assert_close(flat.log_prob(x), likelihoods.Categorical()(output.reshape(5, 4, 3), 1).log_prob(x))
    expected = output.reshape(5, 4, 3).log_softmax(-1)[:, range(4), x.long()].sum(-1)
    torch.testing.assert_close(flat.log_prob(x), expected)


def test_prior_may_be_a_distribution_of_torch():
    normal = torch.distributions.Independent(torch.distributions.Normal(torch.full((2,), 100.0), 1.0), 1)
    model = DeepGaussian(MLP(2, [5], 6), 2, prior=normal)
    assert model(torch.zeros(4, 6)).min() > 90
    with pyro.plate("particles", 3, dim=-2):
        assert model(torch.zeros(4, 6)).shape == (3, 4, 2)
    torch.testing.assert_close(model.prior.log_prob(torch.ones(2)), normal.log_prob(torch.ones(2)))


def test_prior_may_be_a_distribution_of_pyro():
    prior = dist.StudentT(4.0, torch.zeros(2), 1.0).to_event(1)
    assert DeepGaussian(MLP(2, [5], 6), 2, prior=prior).prior is prior


def test_default_prior_follows_the_module():
    model = DeepGaussian(MLP(2, [5], 6), 2).double()
    assert model(torch.zeros(4, 6, dtype=torch.float64)).dtype == torch.float64
    assert "prior_loc" not in model.state_dict()


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (torch.zeros(2), DataTypeError, "prior: expected a distribution, got Tensor"),
        (dist.Normal(torch.zeros(2), 1.0), ShapeError, r"to_event"),
        (dist.Normal(torch.zeros(3), 1.0).to_event(1), ShapeError, r"event shape \(2,\), got .* \(3,\)"),
    ],
)
def test_wrong_prior_is_refused(prior, error, message):
    with pytest.raises(error, match=message):
        DeepGaussian(MLP(2, [5], 6), 2, prior=prior)


@pytest.mark.parametrize("likelihood", ["poisson", None, 3])
def test_wrong_likelihood_is_refused(likelihood):
    with pytest.raises(DataTypeError, match=f"likelihood: expected one of .*'normal'.* got {likelihood!r}"):
        DeepGaussian(MLP(2, [5], 6), 2, likelihood)


def test_decoder_that_does_not_fit_the_data_is_named():
    with pytest.raises(ShapeError, match=r"decoder: expected p\(x\|z\) over data of shape \(1, 2, 3\), got \(6,\)"):
        DeepGaussian(MLP(2, [5], 6), 2)(torch.zeros(4, 1, 2, 3))


@pytest.mark.parametrize(
    ("likelihood", "shape"),
    [("normal", (5,)), ("normal", ()), ("categorical", (6,)), (likelihoods.Categorical(4), (6, 3))],
)
def test_output_that_the_likelihood_cannot_read_is_refused(likelihood, shape):
    model = DeepGaussian(MLP(2, [5], 6), 2, likelihood)
    with pytest.raises(ShapeError, match="decoder output: expected .* got "):
        model.likelihood(torch.zeros(4, *shape), 1)


def test_parameters_are_in_the_param_store_by_class_name():
    DeepGaussian(nn.Linear(2, 6), 2)(torch.zeros(4, 6))
    assert set(pyro.get_param_store().keys()) == {"DeepGaussian$$$decoder.weight", "DeepGaussian$$$decoder.bias"}
