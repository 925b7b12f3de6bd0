import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError, SupportError
from pyro_lvm.guides import DiagonalNormal, Flow
from pyro_lvm.models import GaussianMixtureVAE, SemiSupervisedVAE, likelihoods
from pyro_lvm.nn import MLP
from tests.models.test_mixture_vae import KINDS, C, D, L, N, adam, blobs, data, exact, moved, posterior, posterior_guide

LABELS = torch.tensor([2, -1, 0, 1, -1, 0, 2])  # (N,)


def linear(covariance="full"):
    """A model whose decoder is linear and whose noise is N(0, s^2 I)."""
    torch.manual_seed(1)
    model = SemiSupervisedVAE(nn.Linear(L, D), L, C, likelihoods.SharedNormal(initial_scale=0.6), covariance).double()
    moved(model.generative)
    return model


def make_guide(seed=4):
    torch.manual_seed(seed)
    return DiagonalNormal(L, MLP(D, [8], 2 * L)).double()


def log_joint(model, x, y):
    """Closed form: log p(x, y) where y is known, log p(x) where it is -1, ``(N,)``."""
    table = exact(model.generative, x)[0]  # (N, C)
    return torch.where(y == -1, table.logsumexp(1), table.gather(1, y.clamp(min=0)[:, None])[:, 0])


def labelled_blobs(num_data=240, labels_per_class=3):
    """x from three clusters in z, all classes, and the labels of few."""
    q, y = blobs(num_data)
    torch.manual_seed(7)
    x = q.mean @ torch.randn(L, D).double() + 0.1 * torch.randn(num_data, D).double()
    few = torch.where(torch.arange(num_data) < C * labels_per_class, y, -1)
    return x, y, few, q


# ---------------------------------------------------------------- exact


@KINDS
@pytest.mark.parametrize("vectorize", ["auto", False])
def test_exact_posterior_makes_all_weights_equal(covariance, vectorize):
    model, x = linear(covariance), data()
    guide = posterior_guide(model.generative)
    for args, y in (((), torch.full((N,), -1)), ((LABELS,), LABELS), ((LABELS.clamp(min=0),), LABELS.clamp(min=0))):
        table = pyro_lvm.log_weights(model, guide, x, *args, num_particles=3, vectorize=vectorize, seed=0)
        torch.testing.assert_close(table, log_joint(model, x, y).expand(3, N), rtol=0, atol=1e-10)
    result = pyro_lvm.log_marginal(model, guide, x, LABELS, num_particles=50, seed=0)
    assert set(result.status) == {"zero_variance"}


def test_integers_of_any_kind_are_labels():
    model, x = linear(), data()
    values = [pyro_lvm.evidence.quadrature(model, x, y).value for y in (LABELS, LABELS.numpy(), LABELS.to(torch.int8))]
    assert all(torch.equal(value, values[0]) for value in values)
    assert model(x, LABELS.numpy()).shape == (N, L)


@KINDS
def test_quadrature_is_the_closed_form(covariance):
    model, x = linear(covariance), data()
    for args, y in (((), torch.full((N,), -1)), ((LABELS,), LABELS)):
        result = pyro_lvm.evidence.quadrature(model, x, *args)
        assert set(result.status) == {"exact"}
        torch.testing.assert_close(result.value, log_joint(model, x, y).detach(), rtol=0, atol=1e-8)


@KINDS
@pytest.mark.parametrize("vectorize", ["auto", False])
def test_bounds_are_the_formula_at_their_draws(covariance, vectorize):
    model, guide, x, drawn = linear(covariance), make_guide(), data(), []

    model.generative.decoder.register_forward_pre_hook(lambda _, args: drawn.append(args[0].reshape(-1, L)))

    def by_hand(z):
        table = model.generative.mixture.log_joint(z)  # (N, C)
        own = table.gather(1, LABELS.clamp(min=0)[:, None])[:, 0]
        prior = torch.where(LABELS == -1, table.logsumexp(1), own)
        return model.generative.decode(z).log_prob(x) + prior - guide.distribution(x).log_prob(z)  # (N,)

    elbo = pyro_lvm.elbo(model, guide, x, LABELS, vectorize=vectorize, seed=0)
    torch.testing.assert_close(elbo, by_hand(drawn[-1]), rtol=0, atol=1e-10)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x, LABELS)  # Pyro alone
    expected = by_hand(drawn[-1]).sum()
    torch.testing.assert_close(-loss, expected, rtol=0, atol=1e-10)
    parameters = [*model.parameters(), *guide.parameters()]
    gradients = torch.autograd.grad(-loss, parameters, retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters), rtol=0, atol=1e-9)


def test_labels_of_a_vanishing_class_have_finite_gradients():
    model, guide, x = linear(), make_guide(), data()
    with torch.no_grad():
        model.generative.mixture.means[1] = 1e3  # every datum is some 1e6 nats from class 1
    loss = model.loss(guide)(model, guide, x, LABELS)
    gradients = torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("weight", [0.0, 30, 2.5])
def test_loss_is_the_bound_and_the_mean_cross_entropy(weight):
    model, guide, x = linear(), make_guide(), data()
    torch.manual_seed(8)
    bound = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x, LABELS)
    known = LABELS != -1
    z = guide.distribution(x).rsample()[known]
    probs = model.generative.mixture.responsibilities(z)  # (M, C)
    cross_entropy = -torch.stack([probs[m, k].log() for m, k in enumerate(LABELS[known])]).mean()
    torch.manual_seed(8)
    loss = model.loss(guide, weight)(model, guide, x, LABELS)
    torch.testing.assert_close(loss, bound + N * weight * cross_entropy, rtol=0, atol=1e-9)


def test_loss_without_labels_is_the_bound():
    model, guide, x = linear(), make_guide(), data()
    torch.manual_seed(8)
    bound = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)
    for args in ((), (None,), (torch.full((N,), -1),)):
        torch.manual_seed(8)
        torch.testing.assert_close(model.loss(guide)(model, guide, x, *args), bound, rtol=0, atol=1e-10)


@pytest.mark.parametrize("update", ["model", "guide"])
def test_fit_with_the_loss_trains_one_half(update):
    model, guide = linear(), make_guide()
    x, _, few, _ = labelled_blobs(60)
    before = copy.deepcopy({"model": model.state_dict(), "guide": guide.state_dict()})
    pyro_lvm.fit(model, guide, (x, few), loss=model.loss(guide), num_steps=5, batch_size=16, update=update, seed=0)
    for half, module in {"model": model, "guide": guide}.items():
        state = {name: value for name, value in module.state_dict().items() if name != "temperature"}
        assert {torch.equal(value, before[half][name]) for name, value in state.items()} == {half != update}


def test_kinds_of_data_train_alike():
    x, _, few, _ = labelled_blobs(20)
    trained = []
    for kind in ((x, few), (x.numpy(), few.numpy()), (x, few.int()), TensorDataset(x, few)):
        pyro.clear_param_store()
        model, guide = linear(), make_guide()
        result = pyro_lvm.fit(model, guide, kind, loss=model.loss(guide), num_steps=3, seed=0)
        trained.append(result.losses)
    assert all(torch.equal(losses, trained[0]) for losses in trained)
    loader = DataLoader(TensorDataset(x, few), batch_size=7)
    assert pyro_lvm.fit(model, guide, loader, loss=model.loss(guide), num_epochs=2).num_steps == 6


def test_own_svi_script_gives_the_steps_of_fit():
    x, _, few, _ = labelled_blobs(30)
    model, guide = linear(), make_guide()
    torch.manual_seed(0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), model.loss(guide))
    losses = [svi.step(x, few) / len(x) for _ in range(5)]
    pyro.clear_param_store()
    model, guide = linear(), make_guide()
    result = pyro_lvm.fit(model, guide, (x, few), loss=model.loss(guide), num_steps=5, optim=adam(0.01), seed=0)
    torch.testing.assert_close(result.losses, torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-9)


def test_training_with_few_labels_classifies_the_others():
    x, y, few, _ = labelled_blobs()
    x = x.float()
    torch.manual_seed(0)
    guide = DiagonalNormal(L, MLP(D, [16], 2 * L))
    model = SemiSupervisedVAE(MLP(L, [16], D), L, C, likelihoods.SharedNormal())

    def accuracy(model, guide):
        return (model.class_probs(guide.distribution(x), 20, seed=0).argmax(1) == y).double().mean()

    before = accuracy(model, guide)
    options = {"num_epochs": 50, "batch_size": 60, "optim": adam(0.01), "seed": 0}
    result = pyro_lvm.fit(model, guide, (x, few), loss=model.loss(guide), **options)
    assert before < 0.7
    assert accuracy(model, guide) > 0.95
    assert accuracy(result.model, result.guide) == accuracy(model, guide)
    values = [pyro_lvm.elbo(*pair, x, few, seed=0) for pair in ((model, guide), (result.model, result.guide))]
    assert torch.equal(*values)


# ---------------------------------------------------------------- probabilities


@pytest.mark.statistical
def test_class_probs_are_the_exact_posterior_and_its_powers():
    model, x, draws = linear(), data(), 4000
    q = posterior(model.generative, x)
    expected = exact(model.generative, x)[0].softmax(1).detach()  # the mean over p(z|x) is p(y|x)
    got = model.class_probs(q, draws, seed=0)
    # a mean of numbers in [0, 1] with mean p has a variance of at most p (1 - p) / S
    assert ((got - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()
    model.temperature.fill_(2.5)
    powers = got ** (1 / 2.5)
    tempered = model.class_probs(q, draws, seed=0)
    torch.testing.assert_close(tempered, powers / powers.sum(1, keepdim=True), rtol=0, atol=1e-12)
    assert torch.equal(tempered.argmax(1), got.argmax(1))


@pytest.mark.statistical
@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_calibrate_recovers_the_temperature(truth):
    model, num_data = linear(), 3000
    torch.manual_seed(9)
    q = dist.Normal(2 * torch.randn(num_data, L, dtype=torch.float64), 0.3).to_event(1)
    model.temperature.fill_(truth)
    probs = model.class_probs(q, 20, seed=1)
    y = dist.Categorical(probs).sample()
    y[::10] = -1
    model.temperature.fill_(1.0)
    assert model.calibrate(q, y, 20, seed=1) is model
    # With b = 1/T, log p = b l - log sum exp(b l): the information of a label on b is the variance of l under p.
    log_p = probs.log() * truth  # l up to a constant
    variance = (probs * log_p.square()).sum(1) - (probs * log_p).sum(1).square()
    error = 1 / variance[y != -1].sum().sqrt()
    assert abs(1 / model.temperature - 1 / truth) < 5 * error < 0.3 / truth


def test_calibration_raises_the_held_out_likelihood():
    model, (q, y) = linear(), blobs(400, scale=3.0)
    torch.manual_seed(10)
    model.generative.mixture.initialize(q.mean, labels=y)
    with torch.no_grad():
        model.generative.mixture.log_scale -= 1.5  # too sure of itself
    first = torch.where(torch.arange(400) < 200, y, -1)

    def held_out():
        return model.class_probs(q, 20, seed=0)[200:].gather(1, y[200:, None]).log().mean()

    before, state = held_out(), torch.get_rng_state()
    model.calibrate(q, first, 20)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.temperature > 1.5
    assert held_out() > before + 0.05
    chosen = model.temperature.clone()
    assert model.calibrate(q, first, 20).temperature == chosen  # from whatever temperature


def test_certain_probabilities_stay_numbers():
    model, (q, y) = linear(), blobs(60)
    with torch.no_grad():
        model.generative.mixture.means.mul_(1e3)
    assert model.calibrate(q, y.roll(1), 3).temperature.isfinite()
    probs = model.class_probs(q, 3, seed=0)
    torch.testing.assert_close(probs.sum(1), torch.ones(60).double())


# ---------------------------------------------------------------- starts


@KINDS
def test_initialize_finds_the_classes(covariance):
    _, y, few, q = labelled_blobs(150, labels_per_class=1)
    model = linear(covariance)
    assert model.initialize(q, few) is model
    assert torch.equal(model.class_probs(q, 10, seed=0).argmax(1), y)
    torch.manual_seed(0)
    draws = q.sample((100,))  # (S, N, L)
    means = torch.stack([draws[:, y == k].mean((0, 1)) for k in range(C)])
    torch.testing.assert_close(model.generative.mixture.means.detach(), means)
    again = linear(covariance).initialize(q, few.int().numpy())
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_data_that_no_label_reaches_are_left_out():
    _, _, few, q = labelled_blobs(150)
    far = dist.Normal(torch.cat([q.mean, q.mean + 1000]), 0.2).to_event(1)
    model = linear().initialize(far, torch.cat([few, torch.full_like(few, -1)]))
    expected = linear().initialize(q, few)
    means = [m.generative.mixture.means.detach() for m in (model, expected)]
    torch.testing.assert_close(*means, rtol=0, atol=0.1)  # other draws: 5000 of standard deviation 0.45 a mean


def test_a_label_is_not_overruled_by_its_neighbours():
    q, y = blobs(60)
    labels = torch.where(y == 2, 0, y)  # two clusters
    labels[0] = 2  # a class with one datum, in the middle of another
    model = linear().initialize(q, labels)
    expected = torch.tensor([int((labels == k).sum()) for k in range(C)]).double() / 60
    torch.testing.assert_close(model.generative.mixture.weights.detach(), expected)


def test_initialize_takes_few_data_and_a_flow():
    _, y = blobs(6)
    torch.manual_seed(0)
    guide = Flow(L, MLP(D, [5], 2 * L + 3), context_dim=3, hidden_dim=8).double()
    model = SemiSupervisedVAE(nn.Linear(L, D), L, C).initialize(guide.distribution(data(6)), y)
    assert model.generative.mixture.means.dtype == torch.float32
    assert model.class_probs(guide.distribution(data(6)), 3).shape == (6, C)


# ---------------------------------------------------------------- samples, copies, comparison


def test_samples_and_copies():
    model = linear("tied")
    torch.manual_seed(0)
    got = model.sample(500)
    torch.manual_seed(0)
    expected = model.generative.sample(500)  # its moments are tested with GaussianMixtureVAE
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert (got[0].dtype, got[0].requires_grad) == (torch.float64, False)
    model.temperature.fill_(1.7)
    q, _ = blobs(9)
    other = SemiSupervisedVAE(nn.Linear(L, D), L, C, likelihoods.SharedNormal(), "tied").double()
    for copied in (copy.deepcopy(model), other):
        copied.load_state_dict(model.state_dict())
        assert torch.equal(copied.class_probs(q, 3, seed=0), model.class_probs(q, 3, seed=0))
        assert float(copied.temperature) == 1.7


def test_comparison_with_the_model_without_labels():
    model, guide, x = linear(), make_guide(), data(40)
    twin = copy.deepcopy(model.generative)
    other = GaussianMixtureVAE(nn.Linear(L, D), L, C, likelihoods.SharedNormal()).double()
    rows = {"labels": (model, guide), "twin": (twin, guide), "other": (other, guide)}
    table = pyro_lvm.compare(rows, x, num_particles=100)
    values = {row.name: row.runs[0].value for row in table.rows}
    torch.testing.assert_close(values["labels"], values["twin"], rtol=0, atol=1e-10)
    assert table.ranked_by == "value"


# ---------------------------------------------------------------- refusals

WRONG_LABELS = [
    (LABELS.double(), DataTypeError, "a tensor of integers, got torch.float64. Pass y.long()"),
    (LABELS > 0, DataTypeError, "a tensor of integers, got torch.bool"),
    (LABELS.tolist(), DataTypeError, "a tensor, got list"),
    (LABELS[:5], ShapeError, r"shape \(7,\), got \(5,\)"),
    (LABELS[:, None], ShapeError, r"shape \(7,\), got \(7, 1\)"),
    (LABELS + 1, SupportError, "classes 0 to 2, or -1, got 3. Classes count from 0"),
    (LABELS - 1, SupportError, "classes 0 to 2, or -1, got -2"),
]


@pytest.mark.parametrize(("y", "error", "message"), WRONG_LABELS)
def test_wrong_labels_are_refused(y, error, message):
    model, guide, x = linear(), make_guide(), data()
    q = guide.distribution(x)
    calls = (
        lambda: model(x, y),
        lambda: model.loss(guide)(model, guide, x, y),
        lambda: model.initialize(q, y),
        lambda: model.calibrate(q, y),
        lambda: pyro_lvm.log_marginal(model, guide, x, y),
        lambda: pyro_lvm.fit(model, guide, (x, y), loss=model.loss(guide), num_steps=1),
    )
    for call in calls:
        with pytest.raises(error, match="y: expected " + message):
            call()


def test_missing_labels_are_refused():
    model, (q, y) = linear(), blobs(30)
    with pytest.raises(ParameterError, match=r"y: expected every class from 0 to 2, got no \[1\]. Label at least one"):
        model.initialize(q, torch.where(y == 1, -1, y))
    with pytest.raises(ParameterError, match="y: expected held-out labels, got none"):
        model.calibrate(q, torch.full_like(y, -1))


def test_wrong_distributions_are_refused():
    model, y = linear(), torch.arange(9) % C
    for call in (model.class_probs, lambda q: model.initialize(q, y), lambda q: model.calibrate(q, y)):
        with pytest.raises(DataTypeError, match="q: expected a distribution .* got Tensor. Pass guide.distribution"):
            call(torch.zeros(9, L))
        with pytest.raises(ShapeError, match=r"q: expected .* event shape \(2,\), got .* event shape \(3,\)"):
            call(dist.Normal(torch.zeros(9, L + 1), 1.0).to_event(1))
    with pytest.raises(ShapeError, match="q: expected at least as many data as components, 3, got 2"):
        model.initialize(dist.Normal(torch.zeros(2, L), 1.0).to_event(1), y[:2])


def test_wrong_losses_are_refused():
    for weight in (-1, math.nan, math.inf, "30"):
        with pytest.raises(ParameterError, match="classification_weight: expected a number >= 0, got .* Pass 0"):
            linear().loss(make_guide(), weight)
    with pytest.raises(DataTypeError, match=r"guide: expected a module with distribution\(x\), got function. Pass"):
        linear().loss(lambda x: None)


def test_wrong_counts_and_decoders_are_refused():
    for count, error in ((0, ShapeError), (-1, ShapeError), (2.5, DataTypeError)):
        with pytest.raises(error, match=f"num_classes: expected .* got {count}"):
            SemiSupervisedVAE(nn.Linear(L, D), L, count)
    model = SemiSupervisedVAE(nn.Linear(L, D + 1), L, C).double()
    with pytest.raises(ShapeError, match=r"decoder: expected p\(x\|z\) over data of shape \(4,\), got \(5,\)"):
        pyro_lvm.fit(model, make_guide(), (data(), LABELS), num_steps=1)
