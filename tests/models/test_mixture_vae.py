import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError
from pyro_lvm.guides import DiagonalNormal, Flow
from pyro_lvm.models import DeepGaussian, GaussianMixtureVAE, likelihoods
from pyro_lvm.nn import MLP

KINDS = pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
N, C, L, D = 7, 3, 2, 4
CENTRES = torch.tensor([[0.0, 0.0], [6.0, 1.0], [-1.0, 7.0]], dtype=torch.float64)  # (C, L)


def moved(model, seed=0):
    """All parameters of the mixture away from their starting values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.mixture.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    return model


def linear(covariance="full"):
    """A model whose decoder is linear and whose noise is N(0, s^2 I)."""
    torch.manual_seed(1)
    noise = likelihoods.SharedNormal(initial_scale=0.6)
    return moved(GaussianMixtureVAE(nn.Linear(L, D), L, C, noise, covariance, True).double())


def bent(covariance="full"):
    torch.manual_seed(2)
    decoder = nn.Sequential(nn.Linear(L, 5), nn.Tanh(), nn.Linear(5, D))  # smooth: quadrature is exact
    return moved(GaussianMixtureVAE(decoder, L, C, "bernoulli", covariance).double())


def data(num_data=N):
    torch.manual_seed(3)
    return 2 * torch.randn(num_data, D, dtype=torch.float64)


def exact(model, x):
    """log p(x, y = k), ``(N, C)``, and p(z | x, y = k), batch shape ``(N, C)``, of a linear model.

    x | y = k ~ N(W mu + b, W Sigma W^T + s^2 I); z | x, y = k has the precision Sigma^-1 + W^T W / s^2 (Bishop, PRML,
    Eqs. 2.115 and 2.116).
    """
    mixture, weight, bias = model.mixture, model.decoder.weight, model.decoder.bias
    variance, mean = model.likelihood.scale**2, mixture.means  # (C, L)
    covariance = mixture.covariances
    if mixture.covariance == "spherical":
        covariance = covariance[:, None].expand(C, L)
    if mixture.covariance in ("diag", "spherical"):
        covariance = covariance.diag_embed()
    covariance = covariance.expand(C, L, L)
    marginal = dist.MultivariateNormal(
        mean @ weight.T + bias, weight @ covariance @ weight.T + variance * torch.eye(D, dtype=torch.float64)
    )
    prior_precision = covariance.inverse()  # (C, L, L)
    precision = prior_precision + weight.T @ weight / variance
    rhs = (prior_precision @ mean[..., None])[..., 0] + ((x - bias) @ weight / variance)[:, None]  # (N, C, L)
    loc = torch.linalg.solve(precision, rhs[..., None])[..., 0]  # (N, C, L)
    posterior = dist.MultivariateNormal(loc, precision_matrix=precision.expand(len(x), C, L, L))
    return mixture.weights.log() + marginal.log_prob(x[:, None]), posterior


@torch.no_grad()
def posterior(model, x):
    """p(z|x), batch shape ``(N,)``, of a linear model."""
    log_joint, components = exact(model, x)
    return dist.MixtureSameFamily(dist.Categorical(logits=log_joint), components)


def posterior_guide(model):
    """A plain function that samples z from p(z|x), or from p(z|x, y) where y is known (not -1)."""

    def guide(x, y=None):
        logits, components = exact(model, x)
        if y is not None:
            other = (y[:, None] != -1) & (y[:, None] != torch.arange(C))  # (N, C)
            logits = logits.masked_fill(other, -math.inf)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=logits), components))

    return guide


def make_guide(seed=4):
    torch.manual_seed(seed)
    return DiagonalNormal(L, MLP(D, [5], 2 * L)).double()


def blobs(num_data=150, scale=0.4):
    """q(z|x) of data in three well separated clusters, and the clusters."""
    torch.manual_seed(5)
    y = torch.arange(num_data) % C
    loc = CENTRES[y] + scale * torch.randn(num_data, L, dtype=torch.float64)
    return dist.Normal(loc, 0.2).to_event(1), y


def adam(lr):
    return lambda params: torch.optim.Adam(params, lr=lr)


def same_partition(found, y):
    """Whether clusters are the same up to their names."""
    return len(set(zip(found.tolist(), y.tolist(), strict=True))) == len(set(y.tolist())) == len(set(found.tolist()))


# ---------------------------------------------------------------- exact


@KINDS
@pytest.mark.parametrize("vectorize", ["auto", False])
def test_exact_posterior_makes_all_weights_equal(covariance, vectorize):
    model, x = linear(covariance), data()
    expected = exact(model, x)[0].logsumexp(1)
    for num_particles in (1, 2, 3):
        options = {"num_particles": num_particles, "vectorize": vectorize, "seed": 0}
        table = pyro_lvm.log_weights(model, posterior_guide(model), x, **options)
        torch.testing.assert_close(table, expected.expand(num_particles, N), rtol=0, atol=1e-10)
    result = pyro_lvm.log_marginal(model, posterior_guide(model), x, num_particles=50, seed=0)
    assert set(result.status) == {"zero_variance"}


@KINDS
@pytest.mark.parametrize("vectorize", ["auto", False])
def test_bounds_are_the_formula_at_their_draws(covariance, vectorize):
    model, guide, x, drawn = bent(covariance), make_guide(), (data() > 0).double(), []

    model.decoder.register_forward_pre_hook(lambda _, args: drawn.append(args[0].reshape(-1, L)))

    def by_hand(z):
        return model.decode(z).log_prob(x) + model.mixture.log_prob(z) - guide.distribution(x).log_prob(z)  # (N,)

    elbo = pyro_lvm.elbo(model, guide, x, vectorize=vectorize, seed=0)
    torch.testing.assert_close(elbo, by_hand(drawn[-1]), rtol=0, atol=1e-10)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)  # Pyro alone
    expected = by_hand(drawn[-1]).sum()
    torch.testing.assert_close(-loss, expected, rtol=0, atol=1e-10)
    parameters = [*model.parameters(), *guide.parameters()]
    expected = torch.autograd.grad(expected, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(-loss, parameters), expected, rtol=0, atol=1e-9)


@KINDS
def test_quadrature_is_the_closed_form(covariance):
    model, x = linear(covariance), data()
    result = pyro_lvm.evidence.quadrature(model, x)
    assert set(result.status) == {"exact"}
    torch.testing.assert_close(result.value, exact(model, x)[0].logsumexp(1).detach(), rtol=0, atol=1e-8)


def test_quadrature_of_a_bent_decoder_is_the_sum_over_components():
    model, x = bent(), (data() > 0).double()
    mixture = model.mixture
    parts = []
    for k in range(C):
        prior = dist.MultivariateNormal(mixture.means[k].detach(), mixture.covariances[k].detach())
        parts.append(pyro_lvm.evidence.quadrature(DeepGaussian(model.decoder, L, "bernoulli", prior), x).value)
        pyro.clear_param_store()
    expected = (torch.stack(parts) + mixture.weights.log().detach()[:, None]).logsumexp(0)
    torch.testing.assert_close(pyro_lvm.evidence.quadrature(model, x).value, expected, rtol=0, atol=1e-8)


@pytest.mark.statistical
@pytest.mark.parametrize("make", [linear, bent])
def test_importance_sampling_meets_quadrature(make):
    model, x = make(), data() if make is linear else (data() > 0).double()
    truth = pyro_lvm.evidence.quadrature(model, x).value
    torch.manual_seed(0)
    z = model.mixture.sample(20_000)[0]
    weights = model.decode(z[:, None]).log_prob(x).softmax(0).detach()[..., None]  # (S, N, 1), those of the prior
    mean = (weights * z[:, None]).sum(0)  # (N, L)
    scale = 1.8 * (weights * (z[:, None] - mean).square()).sum(0).sqrt()
    guide = DiagonalNormal(L, num_data=N).double()
    with torch.no_grad():
        guide.phi.table.copy_(torch.cat([mean, scale.expm1().log() - math.log(math.e - 1)], 1))
    torch.testing.assert_close(guide.distribution(x).stddev, scale, rtol=0, atol=1e-9)
    result = pyro_lvm.log_marginal(model, guide, x, num_particles=20_000, seed=0)
    assert result.stderr.max() <= 0.05
    # two-sided, 5 standard errors, 7 data: 4e-6 for a false failure of each decoder
    assert ((result.value - truth).abs() < 5 * result.stderr + result.bias.abs()).all()


@KINDS
def test_fit_trains_what_is_to_be_trained(covariance):
    for learn_weights in (True, False):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model = GaussianMixtureVAE(nn.Linear(L, D), L, C, likelihoods.SharedNormal(), covariance, learn_weights)
        before = copy.deepcopy(model.state_dict())
        result = pyro_lvm.fit(model, make_guide().float(), data(40).float(), num_steps=3, batch_size=16, seed=0)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == before.keys() - (set() if learn_weights else {"mixture.logits"})
        assert ("GaussianMixtureVAE$$$mixture.logits" in result.params) == learn_weights
    assert torch.equal(model.mixture.weights, torch.full((C,), 1 / C))


# ---------------------------------------------------------------- clusters


@pytest.mark.statistical
def test_component_probs_are_the_mean_responsibilities():
    model, x = linear(), data()
    q = posterior(model, x)
    draws = 4000
    got = model.component_probs(q, draws, seed=0)
    expected = exact(model, x)[0].softmax(1).detach()  # the mean over p(z|x) is p(y|x)
    # a mean of numbers in [0, 1] with mean p has a variance of at most p (1 - p) / S
    assert ((got - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()
    torch.testing.assert_close(got.sum(1), torch.ones(N).double(), rtol=0, atol=1e-12)
    torch.manual_seed(3)
    by_hand = sum(model.mixture.responsibilities(q.sample()).detach() for _ in range(2)) / 2
    torch.testing.assert_close(model.component_probs(q, 2, seed=3), by_hand, rtol=0, atol=1e-12)


@KINDS
@pytest.mark.parametrize("learn_weights", [True, False])
def test_initialize_finds_separated_clusters(covariance, learn_weights):
    q, y = blobs()
    model = GaussianMixtureVAE(nn.Linear(L, D), L, C, covariance=covariance, learn_weights=learn_weights).double()
    assert model.initialize(q) is model
    distance, nearest = torch.cdist(CENTRES, model.mixture.means.detach()).min(1)
    assert sorted(nearest.tolist()) == [0, 1, 2]
    assert distance.max() < 0.3  # 50 data of standard deviation 0.4 a cluster: five standard errors of a mean
    assert same_partition(model.component_probs(q, 20, seed=0).argmax(1), y)
    torch.testing.assert_close(
        model.mixture.weights.detach(), torch.full((C,), 1 / C, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_weights_start_at_the_shares_only_where_they_are_trained():
    q, y = blobs()
    keep = (y == 0) | (torch.arange(len(y)) < 90)  # 50, 30, 30
    q = dist.Normal(q.mean[keep], 0.2).to_event(1)
    shares = {}
    for learn_weights in (True, False):
        model = GaussianMixtureVAE(nn.Linear(L, D), L, C, learn_weights=learn_weights).double().initialize(q)
        shares[learn_weights] = model.mixture.weights.detach().sort().values
    torch.testing.assert_close(shares[True], torch.tensor([3, 3, 5]).double() / 11)
    torch.testing.assert_close(shares[False], torch.full((C,), 1 / C, dtype=torch.float64))


def test_initial_moments_are_those_of_the_draws():
    q, y = blobs()
    model = GaussianMixtureVAE(nn.Linear(L, D), L, C).double().initialize(q, seed=3)
    torch.manual_seed(3)
    draws = q.sample((100,))  # (S, N, L)
    for k in range(C):
        part = draws[:, y == k].flatten(0, 1)
        j = torch.cdist(part.mean(0)[None], model.mixture.means.detach()).argmin()
        torch.testing.assert_close(model.mixture.means[j].detach(), part.mean(0))
        floor = 1e-3 * draws.flatten(0, 1).var(0, unbiased=False)
        torch.testing.assert_close(model.mixture.covariances[j].detach(), part.T.cov(correction=0) + floor.diag())


def test_initialize_takes_a_flow_and_is_deterministic():
    torch.manual_seed(0)
    guide = Flow(L, MLP(D, [5], 2 * L + 3), context_dim=3, hidden_dim=8).double()
    with torch.no_grad():
        guide.phi.encoder.layers[-1].weight *= 20
    q = guide.distribution(data(60))
    states = []
    for _ in range(2):
        torch.rand(1)
        model = GaussianMixtureVAE(nn.Linear(L, D).requires_grad_(False), L, C, likelihoods.SharedNormal())
        before = torch.get_rng_state()
        states.append(model.initialize(q, seed=2).mixture.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert states[0]["means"].dtype == torch.float32
    assert model.component_probs(q, 3, seed=0).shape == (60, C)


def test_seeds_leave_the_global_random_state_alone():
    model, (q, _) = linear(), blobs()
    before = torch.get_rng_state()
    first, again, other = (model.component_probs(q, 2, seed=seed) for seed in (0, 0, 1))
    model.initialize(q, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    model.component_probs(q, 2)
    assert not torch.equal(torch.get_rng_state(), before)


def test_training_after_initialize_raises_the_bound():
    q, y = blobs(300)
    torch.manual_seed(0)
    x = (q.mean @ torch.randn(L, D).double() + 0.1 * torch.randn(300, D).double()).float()
    guide = DiagonalNormal(L, MLP(D, [16], 2 * L))
    vae = DeepGaussian(MLP(L, [16], D), L, likelihoods.SharedNormal())
    pyro_lvm.fit(vae, guide, x, num_epochs=60, optim=adam(0.01), seed=0)
    model = GaussianMixtureVAE(vae.decoder, L, C, vae.likelihood).initialize(guide.distribution(x))
    before = pyro_lvm.elbo(model, guide, x, num_particles=20, seed=0).mean()
    result = pyro_lvm.fit(model, guide, x, num_epochs=40, optim=adam(0.003), seed=0)
    assert pyro_lvm.elbo(result.model, result.guide, x, num_particles=20, seed=0).mean() > before + 0.1
    assert same_partition(model.component_probs(guide.distribution(x), 20, seed=0).argmax(1), y)


# ---------------------------------------------------------------- samples, copies


@pytest.mark.statistical
def test_samples_have_the_moments_of_the_model():
    model, draws = linear(), 20_000
    torch.manual_seed(6)
    x, y = model.sample(draws)
    assert (x.shape, y.shape, x.requires_grad) == ((draws, D), (draws,), False)
    weights, mixture = model.mixture.weights.detach(), model.mixture
    assert ((y.bincount(minlength=C) / draws - weights).abs() < 5 * (weights * (1 - weights) / draws).sqrt()).all()
    for k in range(C):
        part, weight = x[y == k], model.decoder.weight.detach()
        noise = model.likelihood.scale.detach() ** 2 * torch.eye(D, dtype=torch.float64)
        covariance = weight @ mixture.covariances[k].detach() @ weight.T + noise
        error = (covariance.diagonal() / len(part)).sqrt()
        mean = model.decoder(mixture.means[k]).detach()
        assert ((part.mean(0) - mean).abs() < 5 * error).all()
        # var of an entry of the sample covariance of normals: (C_ii C_jj + C_ij^2) / N
        diagonal = covariance.diagonal()
        error = ((torch.outer(diagonal, diagonal) + covariance**2) / len(part)).sqrt()
        assert ((part.T.cov() - covariance).abs() < 5 * error).all()


@KINDS
def test_images_types_and_copies(covariance):
    decoder = nn.Sequential(MLP(L, [5], D), nn.Unflatten(-1, (1, 2, 2)))
    model = GaussianMixtureVAE(decoder, L, C, covariance=covariance).double()
    x, _ = model.sample(5)
    assert (x.shape, x.dtype) == ((5, 1, 2, 2), torch.float64)
    assert model(x).shape == (5, L)
    with pyro.plate("particles", 3, dim=-2):
        assert model(x).shape == (3, 5, L)
    q = dist.Normal(torch.zeros(5, L, dtype=torch.float64), 1.0).to_event(1)
    other = GaussianMixtureVAE(copy.deepcopy(decoder), L, C, covariance=covariance).double()
    for copied in (copy.deepcopy(model), other):
        copied.load_state_dict(model.state_dict())
        assert torch.equal(copied.component_probs(q, 3, seed=0), model.component_probs(q, 3, seed=0))
    assert model.component_probs(q, 3).dtype == torch.float64


# ---------------------------------------------------------------- refusals


def test_wrong_counts_are_refused():
    for count, error in ((0, ShapeError), (-1, ShapeError), (2.5, DataTypeError)):
        with pytest.raises(error, match=f"num_components: expected .* got {count}"):
            GaussianMixtureVAE(nn.Linear(L, D), L, count)
        with pytest.raises(error, match=f"latent_dim: expected .* got {count}"):
            GaussianMixtureVAE(nn.Linear(L, D), count, C)


def test_wrong_options_are_refused():
    with pytest.raises(DataTypeError, match="covariance: expected one of .* got 'diagonal'"):
        GaussianMixtureVAE(nn.Linear(L, D), L, C, covariance="diagonal")
    with pytest.raises(DataTypeError, match="likelihood: expected one of .* got 'gauss'"):
        GaussianMixtureVAE(nn.Linear(L, D), L, C, "gauss")


def test_a_decoder_that_does_not_fit_is_refused():
    model = GaussianMixtureVAE(nn.Linear(L, D + 1), L, C)
    with pytest.raises(ShapeError, match=r"decoder: expected p\(x\|z\) over data of shape \(4,\), got \(5,\)"):
        pyro_lvm.fit(model, make_guide().float(), torch.zeros(5, D), num_steps=1)


@pytest.mark.parametrize(
    ("q", "error", "message"),
    [
        (torch.zeros(9, L), DataTypeError, "a distribution q.* got Tensor. Pass guide.distribution"),
        (dist.Normal(torch.zeros(9, L + 1), 1.0).to_event(1), ShapeError, r"event shape \(2,\), got .* \(3,\)"),
        (dist.Normal(torch.zeros(9, L), 1.0), ShapeError, r"batch shape \(N,\).* got batch shape \(9, 2\)"),
        (dist.Normal(torch.zeros(4, 9, L), 1.0).to_event(1), ShapeError, r"got batch shape \(4, 9\)"),
    ],
)
def test_what_is_no_distribution_over_z_is_refused(q, error, message):
    model = GaussianMixtureVAE(nn.Linear(L, D), L, C)
    for call in (model.component_probs, model.initialize):
        with pytest.raises(error, match="q: expected .*" + message):
            call(q)


def test_data_that_fill_no_clusters_are_refused():
    q, _ = blobs(60)
    with pytest.raises(ShapeError, match="q: expected at least as many data as components, 61, got 60"):
        GaussianMixtureVAE(nn.Linear(L, D), L, 61).initialize(q)
    few = dist.Normal(q.mean[:9], 1e-3).to_event(1)
    with pytest.raises(ParameterError, match=r"q: expected 9 clusters, got \d. Take fewer components"):
        GaussianMixtureVAE(nn.Linear(L, D), L, 9).initialize(few)
    nowhere = dist.Normal(q.mean / 0, 1.0, validate_args=False).to_event(1)
    with pytest.raises(ParameterError, match="q: expected finite draws of z"):
        GaussianMixtureVAE(nn.Linear(L, D), L, C).initialize(nowhere)
