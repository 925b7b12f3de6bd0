"""Likelihoods against their textbook formulas, and the discretised logistic against sums over its levels."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError, SupportError
from pyro_lvm.guides import DiagonalNormal
from pyro_lvm.models import DeepGaussian, likelihoods
from pyro_lvm.models.likelihoods import LogisticLevels
from pyro_lvm.nn import MLP

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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


def test_normal_of_images_splits_their_channels():
    output = torch.randn(5, 4, 2, 3)
    p = likelihoods.Normal()(output, 1).base_dist
    torch.testing.assert_close(p.loc, output[:, :2])
    torch.testing.assert_close(p.scale, 1e-3 + nn.functional.softplus(output[:, 2:]))


def test_categorical_of_images_splits_their_channels():
    """Channel c of an image has the logits c C, ..., c C + C - 1."""
    output, x = torch.randn(4, 5, 6, 2, 3, dtype=F64), torch.randint(3, (5, 2, 2, 3)).double()
    expected = torch.zeros(4, 5, dtype=F64)
    for channel in range(2):
        logits = output[:, :, 3 * channel : 3 * channel + 3].log_softmax(2)  # (K, N, C, H, W)
        for level in range(3):
            expected += (logits[:, :, level] * (x[:, channel] == level)).sum((-1, -2))
    p = likelihoods.Categorical(3, channels_first=True)(output, 2)
    torch.testing.assert_close(p.log_prob(x), expected)


def test_binomial_reads_logits():
    output, x = torch.randn(5, 3, dtype=F64), torch.tensor([0.0, 7.0, 16.0], dtype=F64)
    log_choices = torch.tensor([math.log(math.comb(16, k)) for k in (0, 7, 16)], dtype=F64)
    log_one, log_zero = nn.functional.logsigmoid(output), nn.functional.logsigmoid(-output)
    expected = (log_choices + x * log_one + (16 - x) * log_zero).sum(-1)
    torch.testing.assert_close(likelihoods.Binomial(16)(output, 1).log_prob(x), expected)


def test_poisson_reads_log_rates():
    output, x = torch.randn(5, 3, dtype=F64), torch.tensor([0.0, 2.0, 9.0], dtype=F64)
    log_factorials = torch.tensor([math.log(math.factorial(k)) for k in (0, 2, 9)], dtype=F64)
    expected = (x * output - output.exp() - log_factorials).sum(-1)
    torch.testing.assert_close(likelihoods.Poisson()(output, 1).log_prob(x), expected)


@pytest.mark.parametrize(
    ("likelihood", "num_levels"),
    [(likelihoods.Bernoulli(), 2), (likelihoods.Binomial(16), 17), (likelihoods.DiscretizedLogistic(17), 17)],
)
def test_masses_sum_to_one(likelihood, num_levels):
    output = 3 * torch.randn(6, 1 if num_levels == 2 else 2, dtype=F64)
    p = likelihood(output, 1)
    levels = torch.arange(num_levels, dtype=F64)[:, None, None]
    total = p.base_dist.log_prob(levels.expand(num_levels, *p.base_dist.batch_shape)).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_sigmoid_normal_is_the_two_dimensional_example():
    """mu = sigmoid(A z + c), Sigma = diag(exp(sigmoid(B z + d))) holds variances."""
    decoder, z, x = nn.Linear(2, 4).double(), torch.randn(5, 2, dtype=F64), torch.randn(5, 2, dtype=F64)
    (a, b), (c, d) = decoder.weight.chunk(2), decoder.bias.chunk(2)
    mu, sigma = torch.sigmoid(z @ a.T + c), torch.sigmoid(z @ b.T + d).exp()
    expected = torch.distributions.MultivariateNormal(mu, torch.diag_embed(sigma)).log_prob(x)
    model = DeepGaussian(decoder, 2, likelihoods.SigmoidNormal())
    torch.testing.assert_close(model.decode(z).log_prob(x), expected)
    p = model.decode(100 * torch.randn(1000, 2, dtype=F64)).base_dist
    assert 0 <= p.loc.min() <= p.loc.max() <= 1
    assert 1 <= p.variance.min() <= p.variance.max() <= math.e + 1e-12


def test_shared_normal_has_one_scale():
    likelihood = likelihoods.SharedNormal(initial_scale=0.1, min_scale=0.01).double()
    output, x = torch.randn(5, 3, 2, 2, dtype=F64), torch.randn(5, 3, 2, 2, dtype=F64)
    expected = dist.Normal(output, 0.1).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(likelihood(output, 1).log_prob(x), expected, rtol=1e-5, atol=0)  # 0.1 in float32
    with torch.no_grad():
        likelihood.raw_scale.fill_(-50.0)
    torch.testing.assert_close(likelihood.scale, torch.tensor(0.01, dtype=F64))


def test_shared_normal_learns_its_scale_with_the_model():
    """x ~ N(0, 0.3^2) in 200 dimensions under a decoder that puts out zeros: s is their standard deviation."""

    class Zeros(nn.Module):
        def forward(self, z):
            return z.new_zeros(*z.shape[:-1], 200)

    x = 0.3 * torch.randn(50, 200)
    model = DeepGaussian(Zeros(), 1, likelihoods.SharedNormal())
    guide = DiagonalNormal(1, MLP(200, [], 2))
    optim = lambda params: torch.optim.Adam(params, lr=0.05)  # noqa: E731
    result = lvm.fit(model, guide, x, num_steps=300, batch_size=50, optim=optim, seed=0)
    assert "DeepGaussian$$$likelihood.raw_scale" in result.params
    torch.testing.assert_close(model.likelihood.scale.detach(), x.square().mean().sqrt(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("initial", "least"), [(0.0, 0.0), (1e-3, 1e-3), (math.inf, 0.1), (1.0, -1.0), (math.nan, 0)])
def test_scales_that_cannot_be_are_refused(initial, least):
    with pytest.raises(
        ParameterError, match=f"initial_scale: expected .* got min_scale={least}, initial_scale={initial}"
    ):
        likelihoods.SharedNormal(initial, least)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: likelihoods.Binomial(0), ShapeError, "total_count: expected 1 or more, got 0"),
        (lambda: likelihoods.Binomial(1.5), DataTypeError, "total_count: expected an integer, got 1.5"),
        (lambda: likelihoods.DiscretizedLogistic(1), ShapeError, "num_levels: expected 2 or more, got 1"),
    ],
)
def test_counts_that_cannot_be_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("likelihood", "shape"),
    [
        (likelihoods.SigmoidNormal(), (5,)),
        (likelihoods.DiscretizedLogistic(), (3, 8, 8)),
        (likelihoods.DiscretizedLogistic(), ()),
        (likelihoods.Categorical(3, channels_first=True), (4, 8, 8)),
        (likelihoods.Categorical(3, channels_first=True), (9,)),
        (likelihoods.Categorical(channels_first=True), (3, 8, 8)),
    ],
)
def test_output_that_the_likelihood_cannot_read_is_refused(likelihood, shape):
    with pytest.raises(ShapeError, match="decoder output: expected .* a datum, got "):
        likelihood(torch.zeros(4, *shape), 1)


BAD_DATA = [
    (likelihoods.Binomial(16), 1, 17.0, "from 0 to 16"),
    (likelihoods.DiscretizedLogistic(256), 2, 256.0, "lower_bound=0, upper_bound=255"),
    (likelihoods.DiscretizedLogistic(256), 2, 0.5, "lower_bound=0, upper_bound=255"),
    (likelihoods.Poisson(), 1, -1.0, r"lower_bound=0\)"),
]


@pytest.mark.parametrize(("likelihood", "size", "value", "support"), BAD_DATA)
def test_data_outside_of_the_support_are_named(likelihood, size, value, support):
    model, guide = DeepGaussian(nn.Linear(1, 2 * size), 1, likelihood), DiagonalNormal(1, nn.Linear(2, 2))
    x = torch.ones(6, 2)
    x[4, 1] = value
    message = f"(?s)observed site 'x': expected values in .*{support}.* got {value}"
    with pytest.raises(SupportError, match=message + r" \(1 of 6 data, the first of them row 4\)"):
        lvm.log_marginal(model, guide, x, num_particles=10)
    with pyro.validation_enabled(), pytest.raises(SupportError, match=message):
        lvm.fit(model, guide, x, num_steps=1)


# --- the discretised logistic -----------------------------------------------------------------------------------------

LOCS = torch.tensor([-400.0, -3.0, 0.0, 0.49, 7.3, 128.0, 255.0, 300.0], dtype=F64)
SCALES = torch.tensor([1e-2, 0.1, 1.0, 17.0, 1e4], dtype=F64)[:, None]


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_masses_of_the_levels_sum_to_one(num_levels):
    p = LogisticLevels(LOCS, SCALES, num_levels)
    levels = torch.arange(num_levels, dtype=F64)[:, None, None]
    log_total = p.log_prob(levels).logsumexp(0)
    torch.testing.assert_close(log_total, torch.zeros_like(log_total), rtol=0, atol=1e-12)


def test_a_mass_is_the_difference_of_two_sigmoids():
    """Eq. (2) of Salimans et al. (2017), where the difference does not cancel; x is scaled to [-1, 1] there."""
    mean, log_scale = torch.tensor([-0.8, 0.1, 0.95], dtype=F64), torch.tensor([-3.0, -2.0, -1.0], dtype=F64)
    p = likelihoods.DiscretizedLogistic(256)(torch.stack([mean, log_scale]), 0).base_dist  # (1, 3) parameters
    levels = torch.arange(256, dtype=F64)[:, None, None]
    scaled, half = 2 * levels / 255 - 1, 1 / 255
    upper = torch.sigmoid((scaled + half - mean) / log_scale.exp()).masked_fill(levels == 255, 1.0)
    lower = torch.sigmoid((scaled - half - mean) / log_scale.exp()).masked_fill(levels == 0, 0.0)
    torch.testing.assert_close(p.log_prob(levels).exp(), upper - lower, rtol=0, atol=1e-14)


def test_log_masses_are_right_in_float32_where_masses_are_not():
    """Far from the mean the mass is below the smallest float, and of a wide logistic the sigmoids cancel."""
    levels = torch.tensor([0.0, 3.0, 128.0, 254.0, 255.0])[:, None, None]
    exact = LogisticLevels(LOCS, SCALES, 256).log_prob(levels.double())
    loc, scale = LOCS.float().requires_grad_(), SCALES.float().requires_grad_()
    got = LogisticLevels(loc, scale, 256).log_prob(levels)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)
    assert exact.min() < -1e4
    gradients = torch.autograd.grad(got.sum(), (loc, scale))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_gradients_of_log_masses_are_those_of_finite_differences():
    loc, scale = (
        torch.tensor([2.2, 0.1], dtype=F64).requires_grad_(),
        torch.tensor([0.7, 3.0], dtype=F64).requires_grad_(),
    )
    for level in (0.0, 2.0, 4.0):
        value = torch.tensor(level, dtype=F64)
        assert torch.autograd.gradcheck(lambda m, s: LogisticLevels(m, s, 5).log_prob(value), (loc, scale))  # noqa: B023


def test_small_log_scales_are_raised():
    output = torch.tensor([[0.0, -30.0]], dtype=F64)
    assert float(likelihoods.DiscretizedLogistic(256)(output, 1).base_dist.scale) == pytest.approx(127.5 * math.exp(-7))


@pytest.mark.statistical
def test_levels_are_drawn_as_often_as_their_masses_say():
    p = LogisticLevels(torch.tensor([1.2, -1.0, 3.6], dtype=F64), torch.tensor([0.5, 2.0, 0.1], dtype=F64), 4)
    draws = p.sample((20_000,))
    for level in range(4):
        mass = p.log_prob(torch.tensor(float(level), dtype=F64)).exp()
        error = (mass * (1 - mass) / 20_000).sqrt()
        assert bool((((draws == level).double().mean(0) - mass).abs() <= 5 * error + 1e-9).all())


def test_levels_expand_as_distributions_do():
    p = LogisticLevels(torch.tensor([1.2, 3.0]), torch.tensor(0.5), 4)
    wide = p.expand((3, 2))
    assert (p.batch_shape, wide.batch_shape, wide.sample((5,)).shape) == ((2,), (3, 2), (5, 3, 2))
    x = torch.tensor([0.0, 3.0])
    torch.testing.assert_close(wide.log_prob(x), p.log_prob(x).expand(3, 2))


def test_levels_are_validated():
    with pyro.validation_enabled():
        p = LogisticLevels(torch.tensor(1.2), torch.tensor(0.5), 4)
        for value in (-1.0, 0.5, 4.0):
            with pytest.raises(ValueError, match="support"):
                p.expand((2,)).log_prob(torch.tensor(value))
        with pytest.raises(ValueError, match="scale"):
            LogisticLevels(torch.tensor(1.2), torch.tensor(-0.5), 4)


def test_poisson_has_no_rate_that_rounds_to_zero_or_infinity():
    log_rate = torch.tensor([-110.0, -110.0, 50.0], requires_grad=True)
    x = torch.tensor([0.0, 2.0, 3.0])
    value = likelihoods.Poisson()(log_rate, 0).base_dist.log_prob(x)
    exact = [0.0, -220.0 - math.log(2.0), 150.0 - math.exp(50.0) - math.log(6.0)]
    torch.testing.assert_close(value.detach(), torch.tensor(exact))
    value[:2].sum().backward()
    assert log_rate.grad.tolist()[:2] == [0.0, 2.0]
    with pytest.raises(ValueError, match="support"):
        likelihoods.Poisson()(log_rate.detach(), 0).base_dist.log_prob(x - 0.5)
