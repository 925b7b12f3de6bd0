import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.models import DeepGaussian, LinearGaussian, likelihoods
from pyro_lvm.nn import MLP, ConvDecoder


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
    ("poisson", MLP(2, [5], 6), (6,)),
    (likelihoods.Binomial(16), MLP(2, [5], 6), (6,)),
    (likelihoods.DiscretizedLogistic(17), MLP(2, [5], 12), (6,)),
    (likelihoods.SigmoidNormal(), nn.Linear(2, 12), (6,)),
    (likelihoods.SharedNormal(), ConvDecoder(2, (1, 2, 3), (4,)), (1, 2, 3)),
    (likelihoods.DiscretizedLogistic(17), ConvDecoder(2, (3, 5, 4), (4,), outputs_per_value=2), (3, 5, 4)),
    (likelihoods.Categorical(3, channels_first=True), ConvDecoder(2, (2, 3, 3), (4,), outputs_per_value=3), (2, 3, 3)),
    (lambda output, ndim: dist.Geometric(logits=output).to_event(output.dim() - ndim), MLP(2, [5], 6), (6,)),
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
    assert set(model.state_dict()) == {f"decoder.layers.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (torch.zeros(2), DataTypeError, "prior: expected a distribution or what makes one, got Tensor"),
        (dist.Normal(torch.zeros(2), 1.0), ShapeError, r"to_event"),
        (dist.Normal(torch.zeros(3), 1.0).to_event(1), ShapeError, r"event shape \(2,\), got .* \(3,\)"),
    ],
)
def test_wrong_prior_is_refused(prior, error, message):
    with pytest.raises(error, match=message):
        DeepGaussian(MLP(2, [5], 6), 2, prior=prior)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.zeros(2), DataTypeError, r"prior\(\): expected a distribution, got Tensor"),
        (lambda: dist.Normal(torch.zeros(2), 1.0), ShapeError, "to_event"),
    ],
)
def test_what_a_callable_prior_returns_is_checked(make, error, message):
    model = DeepGaussian(MLP(2, [5], 6), 2, prior=make)
    with pytest.raises(error, match=message):
        model(torch.zeros(4, 6))


def test_prior_may_be_any_callable():
    model = DeepGaussian(MLP(2, [5], 6), 2, prior=lambda: dist.Normal(torch.full((2,), 100.0), 1.0).to_event(1))
    assert model(torch.zeros(4, 6)).min() > 90


@pytest.mark.parametrize("likelihood", ["student", None, 3])
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
