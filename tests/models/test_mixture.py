import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture as Reference

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError
from pyro_lvm.models import GaussianMixture

KINDS = pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
N, C, D = 7, 3, 2


def make(covariance="full", num_components=C, data_dim=D):
    """A model with all parameters away from their starting values."""
    torch.manual_seed(0)
    model = GaussianMixture(num_components, data_dim, covariance).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    return model


def data(num_data=N, data_dim=D):
    torch.manual_seed(1)
    return 2 * torch.randn(num_data, data_dim, dtype=torch.float64)


def clusters(num_data=300):
    """Three correlated clusters that overlap."""
    torch.manual_seed(2)
    centres = torch.tensor([[0.0, 0.0], [4.0, 1.0], [1.0, 5.0]], dtype=torch.float64)
    shear = torch.tensor([[[1.0, 0.6], [0.0, 0.5]], [[0.7, 0.0], [-0.6, 1.2]], [[1.0, 0.0], [0.0, 1.0]]]).double()
    z = torch.randint(3, (num_data,))
    noise = torch.randn(num_data, 2, dtype=torch.float64)
    return centres[z] + (noise[:, None] @ shear[z])[:, 0]


def from_reference(reference, covariance):
    parameters = (reference.weights_, reference.means_, reference.covariances_)
    model = GaussianMixture(len(reference.weights_), D, covariance).double()
    return model.set_parameters(*map(torch.as_tensor, parameters))


@KINDS
def test_scikit_learn_has_the_same_density_and_posterior(covariance):
    x = clusters()
    reference = Reference(C, covariance_type=covariance, random_state=0).fit(x.numpy())
    model = from_reference(reference, covariance)
    for name in ("weights", "means", "covariances"):
        expected = torch.as_tensor(getattr(reference, name + "_"))
        torch.testing.assert_close(getattr(model, name).detach(), expected, rtol=0, atol=1e-12)
    expected = torch.from_numpy(reference.score_samples(x.numpy()))
    torch.testing.assert_close(model.log_prob(x).detach(), expected, rtol=0, atol=1e-9)
    expected = torch.from_numpy(reference.predict_proba(x.numpy()))
    torch.testing.assert_close(model.responsibilities(x).detach(), expected, rtol=0, atol=1e-9)


@KINDS
def test_density_integrates_to_one(covariance):
    model = make(covariance)
    axis = torch.linspace(-20, 20, 801, dtype=torch.float64)
    total = model.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * 0.05**2
    torch.testing.assert_close(total.item(), 1.0, rtol=0, atol=1e-9)


@KINDS
def test_enumerated_elbo_is_log_prob_with_its_gradients(covariance):
    model, x = make(covariance), data()
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda x: None, x)
    torch.testing.assert_close(-loss, model.log_prob(x).sum(), rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    exact = torch.autograd.grad(model.log_prob(x).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(-loss, parameters), exact, rtol=0, atol=1e-9)


@KINDS
def test_posterior_guide_makes_all_weights_equal(covariance):
    model, x = make(covariance), data()
    for num_particles in (1, 2, 3):
        table = pyro_lvm.log_weights(model, model.posterior_guide, x, num_particles=num_particles, seed=0)
        torch.testing.assert_close(table, model.log_prob(x).expand(num_particles, N), rtol=0, atol=1e-10)
    result = pyro_lvm.log_marginal(model, model.posterior_guide, x, num_particles=50, seed=0)
    assert set(result.status) == {"zero_variance"}
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    loss = loss.loss(model, model.posterior_guide, x)
    torch.testing.assert_close(-loss, model.log_prob(x).sum().item(), rtol=0, atol=1e-10)


@KINDS
def test_model_runs_under_an_outer_particle_plate(covariance):
    model, x = make(covariance), data()
    with pyro.plate("particles", 3, dim=-2):
        assert model(x).shape == (3, N)
        assert model.posterior_guide(x).shape == (3, N)


def test_log_marginal_and_compare_use_the_exact_density():
    model, x = make(), data()
    result = pyro_lvm.log_marginal(model, None, x)
    assert result.method == "closed form"
    assert set(result.status) == {"exact"}
    torch.testing.assert_close(result.value, model.log_prob(x).detach())
    row = pyro_lvm.compare({"mixture": (model, None)}, x).rows[0]
    assert row.status_shares() == {"exact": 1.0}


@KINDS
def test_enumeration_of_a_plain_function_agrees_with_log_prob(covariance):
    model, x = make(covariance), data()
    result = pyro_lvm.log_marginal(lambda x: model(x), None, x)
    assert result.method == "enumeration"
    torch.testing.assert_close(result.value, model.log_prob(x).detach(), rtol=0, atol=1e-10)


def test_fit_without_a_guide_enumerates_and_its_loss_is_the_log_density():
    model, x = make(), data()
    before = -model.log_prob(x).mean().item()
    result = pyro_lvm.fit(model, None, x, num_steps=30, optim=lambda p: torch.optim.Adam(p, lr=0.05))
    assert result.losses[0].item() == pytest.approx(before, abs=1e-6)
    assert -model.log_prob(x).mean().item() < result.losses[-1].item() < before


def svi_less_em(x, num_components, covariance, num_steps):
    """Mean log p(x) by SVI and by scikit-learn's EM to convergence from the same start: their difference, in nats."""
    model = GaussianMixture(num_components, x.shape[1], covariance).double().initialize(x)
    weights, means, covariances = (getattr(model, name).detach() for name in ("weights", "means", "covariances"))
    em = Reference(
        num_components,
        covariance_type=covariance,
        tol=1e-7,
        max_iter=5000,
        reg_covar=1e-9,
        weights_init=weights.numpy(),
        means_init=means.numpy(),
        precisions_init=(covariances.inverse() if covariances.dim() == 3 or covariance == "tied" else 1 / covariances),
    ).fit(x.numpy())
    assert em.converged_
    decay = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)  # noqa: E731
    options = {"batch_size": len(x), "callbacks": [pyro_lvm.callbacks.Schedule(decay)]}
    adam = lambda params: torch.optim.Adam(params, lr=0.05)  # noqa: E731
    result = pyro_lvm.fit(model, None, x, num_steps=num_steps, optim=adam, **options)
    assert result.notes == ()
    return model.log_prob(x).mean().item() - em.score(x.numpy())


@KINDS
def test_svi_from_k_means_reaches_the_likelihood_of_em(covariance):
    assert svi_less_em(clusters(), C, covariance, num_steps=150) > -0.01


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_svi_reaches_the_likelihood_of_em_on_bent_arms(covariance):
    assert svi_less_em(pyro_lvm.datasets.pinwheel(500)[0].double(), 5, covariance, num_steps=200) > -0.01


@pytest.mark.slow
@KINDS
def test_svi_reaches_the_likelihood_of_em_on_digits(covariance):
    counts = load_digits().data  # (1797, 64)
    x = torch.from_numpy(PCA(20, random_state=0).fit_transform(counts))
    assert svi_less_em(x / x.std(), 10, covariance, num_steps=300) > -0.01


@KINDS
def test_a_density_keeps_its_value_when_its_own_parameters_are_set_again(covariance):
    model, x = make(covariance), data()
    expected = model.log_prob(x)
    model.set_parameters(model.weights, model.means.clone(), model.covariances)
    torch.testing.assert_close(model.log_prob(x), expected, rtol=0, atol=1e-10)


def test_coefficients_are_the_regression_on_the_dimensions_before():
    x = clusters()
    model = GaussianMixture(1, D).double()
    moments = (torch.ones(1).double(), x.mean(0)[None], x.T.cov(correction=0)[None])
    model.set_parameters(*moments)
    first, second = (x - x.mean(0)).T
    slope = (first * second).sum() / first.square().sum()
    torch.testing.assert_close(model.coefficients.detach(), slope[None, None])
    residual = (second - slope * first).square().mean().sqrt()
    torch.testing.assert_close(model.log_scale.detach().exp()[0, 1] + model.min_scale, residual)


def test_starts_of_other_seeds_differ():
    x = pyro_lvm.datasets.pinwheel(300)[0]
    starts = [GaussianMixture(8, D).initialize(x, seed=seed).means.detach() for seed in range(3)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        nearest = torch.cdist(starts[one], starts[other]).min(1).values  # (8,)
        assert nearest.max() > 0.1  # 0 for the same clusters in another order


def test_fit_notes_components_on_the_floor_once(caplog):
    x = torch.cat([clusters(60), torch.full((20, D), 9.0, dtype=torch.float64)])  # twenty equal data
    model = GaussianMixture(C + 1, D, min_scale=0.01).double().initialize(x)
    low = model.responsibilities(x)[-1].argmax().item()
    assert model.notes() == []
    result = pyro_lvm.fit(model, None, x, num_steps=250, optim=lambda p: torch.optim.Adam(p, lr=0.1))
    assert model.at_floor().nonzero().flatten().tolist() == [low]
    (note,) = result.notes
    assert note.startswith(f"components [{low}] of the mixture rest on the floor, min_scale=0.01")
    assert note in repr(result)
    assert [record.message for record in caplog.records].count(note) == 1


@KINDS
def test_initial_parameters_are_those_of_the_clusters(covariance):
    x = torch.tensor([[0.0, 0.0], [2.0, 1.0], [0.0, 1.0], [100.0, 0.0], [102.0, 0.5]]).double()
    model = GaussianMixture(2, D, covariance).double().initialize(x)
    order = model.means[:, 0].argsort()
    weights, means = torch.tensor([0.6, 0.4]).double(), torch.stack([x[:3].mean(0), x[3:].mean(0)])
    torch.testing.assert_close(model.weights[order], weights)
    torch.testing.assert_close(model.means[order], means)
    floor = (1e-3 * x.var(0, unbiased=False)).diag()  # far above (3 min_scale)^2
    full = torch.stack([part.T.cov(correction=0) for part in (x[:3], x[3:])])  # (C, D, D)
    variances = (full + floor).diagonal(dim1=1, dim2=2)  # (C, D)
    tied = (weights[:, None, None] * full).sum(0) + floor
    expected = {"full": full + floor, "tied": tied, "diag": variances, "spherical": variances.mean(1)}[covariance]
    got = model.covariances if covariance == "tied" else model.covariances[order]
    torch.testing.assert_close(got, expected)


def test_initialisation_depends_on_its_seed_only():
    x, models = clusters(), []
    for _ in range(2):
        torch.rand(1)
        models.append(GaussianMixture(5, D).initialize(x.float(), seed=3))
    assert models[0].means.dtype == torch.float32
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


@KINDS
def test_a_component_cannot_collapse_onto_a_datum(covariance):
    model = GaussianMixture(2, D, covariance, min_scale=0.1).double()
    assert not model.at_floor().any()
    with torch.no_grad():
        model.log_scale[:1] = -50.0
    assert model.at_floor().tolist() == ([True, True] if covariance == "tied" else [True, False])
    with torch.no_grad():
        model.log_scale.fill_(-50.0)
    assert model.at_floor().all()
    bound = -math.log(2 * math.pi * 0.1**2)  # log of (2 pi min_scale^2)^(-D/2), D = 2
    assert model.log_prob(model.means).max() <= bound + 1e-9
    gradients = torch.autograd.grad(model.log_prob(model.means.detach()).sum(), list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.statistical
def test_samples_have_the_moments_of_the_mixture():
    model, draws = make(), 20_000
    torch.manual_seed(3)
    x, z = model.sample(draws)
    assert not x.requires_grad
    share = z.bincount(minlength=C) / draws
    weights = model.weights.detach()
    assert ((share - weights).abs() < 5 * (weights * (1 - weights) / draws).sqrt()).all()
    for k in range(C):
        part, covariance = x[z == k], model.covariances[k].detach()
        error = (covariance.diagonal() / len(part)).sqrt()
        assert ((part.mean(0) - model.means[k].detach()).abs() < 5 * error).all()
        # var of an entry of the sample covariance of normals: (C_ii C_jj + C_ij^2) / N
        diagonal = covariance.diagonal()
        error = ((torch.outer(diagonal, diagonal) + covariance**2) / len(part)).sqrt()
        assert ((part.T.cov() - covariance).abs() < 5 * error).all()


def test_one_dimension_and_one_component_are_a_normal():
    model, x = make("full", 1, 1), data(data_dim=1)
    expected = torch.distributions.Normal(model.means[0], model.covariances[0, 0].sqrt()).log_prob(x)[:, 0]
    torch.testing.assert_close(model.log_prob(x), expected)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3


def test_parameters_are_in_the_param_store_by_class_name():
    make()(data())
    names = {f"GaussianMixture$$${name}" for name in ("logits", "means", "log_scale", "coefficients")}
    assert set(pyro.get_param_store().keys()) == names


@KINDS
def test_every_parameter_has_a_gradient(covariance):
    model = make(covariance)
    model.log_prob(data()).sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@KINDS
def test_a_datum_that_is_not_a_number_leaves_the_others_alone(covariance):
    model, x = make(covariance), data()
    expected = model.log_prob(x)
    x[2, 0] = math.nan
    assert list(pyro_lvm.log_marginal(model, None, x).status) == ["exact"] * 2 + ["nonfinite"] + ["exact"] * (N - 3)
    torch.testing.assert_close(model.log_prob(x)[3:], expected[3:])


@KINDS
def test_initial_clusters_of_one_datum_stand_above_the_floor(covariance):
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    model = GaussianMixture(3, D, covariance, min_scale=0.2).double().initialize(x)
    assert not model.at_floor().any()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (0, ShapeError, "num_components: expected 1 or more, got 0"),
        (-2, ShapeError, "num_components: expected 1 or more, got -2"),
        (2.0, DataTypeError, "num_components: expected an integer, got 2.0 of type float"),
    ],
)
def test_wrong_number_of_components_is_refused(count, error, message):
    with pytest.raises(error, match=message):
        GaussianMixture(count, D)


def test_wrong_options_are_refused():
    with pytest.raises(DataTypeError, match="covariance: expected one of .*'tied'.* got 'diagonal'"):
        GaussianMixture(C, D, "diagonal")
    with pytest.raises(ParameterError, match="min_scale: expected a positive number, got 0"):
        GaussianMixture(C, D, min_scale=0)


def test_wrong_data_shape_is_refused():
    model = make()
    for call in (model, model.log_prob, model.responsibilities, model.posterior_guide, model.initialize):
        with pytest.raises(ShapeError, match=r"x: expected shape \(N, 2\), got \(7, 1\)"):
            call(data()[:, :1])


def test_more_components_than_data_are_refused():
    with pytest.raises(ShapeError, match="x: expected at least num_components=3 distinct data, got 2"):
        make().initialize(data()[[0, 1, 0, 1, 0]])


@pytest.mark.parametrize(
    ("covariance", "stretch"), [("full", (1, 0)), ("tied", (1, 0)), ("diag", (1, 0)), ("spherical", (1e-5, 0))]
)
def test_singular_data_are_refused(covariance, stretch):
    with pytest.raises(ParameterError, match="x: expected data that vary by more than min_scale=0.001"):
        make(covariance).initialize(data() * torch.tensor(stretch))
    assert make("spherical").initialize(data() * torch.tensor([1, 0])).covariances.isfinite().all()


def test_data_that_are_not_finite_are_refused():
    x = data()
    x[0, 0] = math.nan
    with pytest.raises(ParameterError, match="x: expected finite numbers"):
        make().initialize(x)


def test_impossible_parameters_are_refused():
    model = make("full", 1)
    weights, means, covariances = torch.ones(1), torch.zeros(1, D), torch.eye(D)[None]
    with pytest.raises(ShapeError, match=r"covariances: expected shape \(1, 2, 2\), got \(2, 2\)"):
        model.set_parameters(weights, means, covariances[0])
    with pytest.raises(ParameterError, match="weights: expected positive"):
        model.set_parameters(0 * weights, means, covariances)
    for wrong in (-covariances, torch.ones(1, D, D), 1e-7 * covariances):
        with pytest.raises(ParameterError, match="covariances: expected positive definite"):
            model.set_parameters(weights, means, wrong)
    lopsided = torch.tensor([[[2.0, 1.9], [0.0, 2.0]]])
    with pytest.raises(ParameterError, match="covariances: expected symmetric"):
        model.set_parameters(weights, means, lopsided)
    means[0, 0] = math.nan
    with pytest.raises(ParameterError, match="means: expected finite numbers"):
        model.set_parameters(weights, means, covariances)


def test_arrays_and_labels_found_elsewhere_are_taken():
    x, labels = data(), torch.arange(7) % 3
    model = make().initialize(x.numpy(), labels=labels.numpy())
    for k in range(3):
        torch.testing.assert_close(model.means[k].detach(), x[labels == k].mean(0).to(model.means.dtype))
    with pytest.raises(ParameterError, match=r"labels: expected all of 0 to 2, got none of \[2\]"):
        make().initialize(x, labels=labels % 2)
