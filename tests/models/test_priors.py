"""Learned priors: joint densities that integrate to one, trained with their model, and the one made of the guide."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError
from pyro_lvm.guides import DiagonalNormal, Flow, FullRankNormal
from pyro_lvm.models import DeepGaussian
from pyro_lvm.models.priors import FlowPrior, MixtureOfNormals, StandardNormal, VampPrior
from pyro_lvm.nn import MLP

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shaken(module, scale=0.3):
    """With noise on every parameter, so that nothing is where it started."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def guide_of(kind, data_dim=3):
    """An amortised guide of two latents."""
    sizes = {DiagonalNormal: 4, FullRankNormal: 5, Flow: 4 + 3}
    options = {"context_dim": 3, "hidden_dim": 6} if kind is Flow else {}
    return shaken(kind(2, MLP(data_dim, [4], sizes[kind]), **options).double())


def vamp_of(kind, data_dim=3, num=5):
    guide = guide_of(kind, data_dim)
    return VampPrior(guide, torch.randn(num, data_dim, dtype=F64))


MAKERS = {
    "standard": lambda: StandardNormal(2).double(),
    "mixture": lambda: shaken(MixtureOfNormals(4, 2).double()),
    "vamp-diagonal": lambda: vamp_of(DiagonalNormal),
    "vamp-full": lambda: vamp_of(FullRankNormal),
    "vamp-flow": lambda: vamp_of(Flow),
    "flow": lambda: shaken(FlowPrior(2, num_layers=4, hidden_dims=(8,)).double(), 0.2),
}
PRIORS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@PRIORS
def test_a_prior_is_one_joint_distribution(make):
    prior = make()()
    assert (prior.batch_shape, prior.event_shape) == ((), (2,))
    assert prior.sample().dtype == F64
    z = prior.sample((3, 4))
    assert z.shape == (3, 4, 2)
    log_prob = prior.log_prob(z)  # (3, 4)
    torch.testing.assert_close(log_prob[1, 2], prior.log_prob(z[1, 2]))
    wide = prior.expand((3, 4))
    assert (wide.batch_shape, wide.sample((5,)).shape) == ((3, 4), (5, 3, 4, 2))
    torch.testing.assert_close(wide.log_prob(z), log_prob)
    assert torch.distributions.biject_to(prior.support)(z).shape == z.shape


@PRIORS
def test_a_prior_integrates_to_one(make):
    """By the trapezoidal rule on [-12, 12]^2, beyond which no mass is left; spacing 0.05."""
    line = torch.linspace(-12, 12, 481, dtype=F64)
    with torch.no_grad():
        total = make()().log_prob(torch.cartesian_prod(line, line)).exp().sum() * 0.05**2
    assert float(total) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.statistical
@PRIORS
def test_a_prior_draws_from_its_density(make):
    """Mean and mean square of the draws against the same moments by the trapezoidal rule."""
    with torch.no_grad():
        prior = make()()
        line = torch.linspace(-12, 12, 241, dtype=F64)
        nodes = torch.cartesian_prod(line, line)
        weights = prior.log_prob(nodes).exp() * 0.1**2
        z = prior.sample((20_000,))
        for f in (lambda z: z[..., 0], lambda z: z[..., 1], lambda z: z[..., 0] * z[..., 1], lambda z: z[..., 0] ** 2):
            error = f(z).std() / 20_000**0.5
            assert abs(f(z).mean() - (weights * f(nodes)).sum()) <= 5 * error


def test_a_mixture_chooses_one_component_for_all_of_z():
    """Two components on a diagonal: a mixture for each coordinate would have four, two of them off it."""
    module = MixtureOfNormals(2, 2).double()
    with torch.no_grad():
        module.means.copy_(torch.tensor([[-2.0, -2.0], [2.0, 2.0]]))
        module.log_scales.fill_(math.log(0.5))
        module.logits.copy_(torch.tensor([0.7, 0.3]).log())
    prior = module()
    z = torch.tensor([[2.0, 2.0], [-2.0, -2.0], [2.0, -2.0], [0.3, 0.1]], dtype=F64)
    parts = torch.stack([dist.Normal(mean, 0.5).log_prob(z).sum(-1) for mean in module.means])  # (C, N)
    expected = (parts + torch.tensor([[0.7], [0.3]], dtype=F64).log()).logsumexp(0)
    torch.testing.assert_close(prior.log_prob(z), expected, rtol=1e-7, atol=0)  # the weights are in float32
    assert prior.log_prob(z)[2] < prior.log_prob(z)[0] - 30
    assert float(prior.sample((2000,)).T.corrcoef()[0, 1]) > 0.9  # 16 * .84 / (16 * .84 + .5^2 * 4) = 0.93


@pytest.mark.parametrize("kind", [DiagonalNormal, FullRankNormal, Flow])
def test_vamp_prior_is_the_mean_of_the_guide_over_pseudo_inputs(kind):
    """Tomczak and Welling (2018), Eq. (9), by a loop."""
    vamp, z = vamp_of(kind), torch.randn(7, 2, dtype=F64)
    terms = [vamp.guide.distribution(u[None]).log_prob(z[:, None])[:, 0] for u in vamp.pseudo_inputs]  # each (N,)
    torch.testing.assert_close(vamp().log_prob(z), torch.stack(terms).logsumexp(0) - math.log(5))


def test_flow_prior_is_the_density_of_its_flow():
    module, z = MAKERS["flow"](), torch.randn(7, 2, dtype=F64)
    torch.testing.assert_close(module().log_prob(z), module.flow.log_prob(z))


def test_pseudo_inputs_stay_within_their_bounds_and_start_where_they_can_move():
    x = torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 0.5]])
    vamp = VampPrior(DiagonalNormal(2, MLP(3, [], 4)), x, bounds=(0, 2))
    torch.testing.assert_close(vamp.pseudo_inputs.detach(), 0.04 + 0.96 * x)
    (gradient,) = torch.autograd.grad(vamp().log_prob(torch.ones(2)), vamp.raw_inputs)
    assert bool((gradient != 0).all())
    with torch.no_grad():
        vamp.raw_inputs.add_(100.0)
        at_bound = vamp.guide.distribution(torch.full((1, 3), 2.0)).log_prob(torch.zeros(2))[0]
        torch.testing.assert_close(vamp().log_prob(torch.zeros(2)), at_bound)


def test_whole_numbers_may_be_pseudo_inputs():
    vamp = VampPrior(DiagonalNormal(2, MLP(3, [], 4)), torch.eye(3, dtype=torch.long))
    assert vamp.pseudo_inputs.dtype == torch.float32


class _Scalar(nn.Module):
    def distribution(self, u):
        return dist.Normal(u, 1.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FlowPrior(1), ShapeError, "latent_dim: expected 2 or more, got 1. .*MixtureOfNormals"),
        (lambda: MixtureOfNormals(0, 2), ShapeError, "num_components: expected 1 or more, got 0"),
        (lambda: StandardNormal(1.5), DataTypeError, "latent_dim: expected an integer"),
        (
            lambda: VampPrior(lambda x: x, torch.zeros(2, 3)),
            DataTypeError,
            r"guide: expected a module with dist.*function",
        ),
        (lambda: VampPrior(MLP(3, [], 4), torch.zeros(2, 3)), DataTypeError, r"guide: expected a module .* got MLP"),
        (
            lambda: VampPrior(_Scalar(), torch.zeros(2, 3)),
            ShapeError,
            r"guide: expected q\(z\|u\) with batch.* got .*\(2, 3\)",
        ),
        (
            lambda: VampPrior(guide_of(DiagonalNormal), [[0.0]]),
            DataTypeError,
            "pseudo_inputs: expected a tensor, got list",
        ),
        (lambda: VampPrior(DiagonalNormal(2, num_data=9), torch.zeros(2, 3)), ShapeError, "num_data=9 data, got 2"),
        (
            lambda: VampPrior(guide_of(DiagonalNormal), torch.zeros(2, 3, dtype=F64), bounds=(1, 0)),
            ParameterError,
            r"bounds: expected \(low, high\) .* got \(1, 0\)",
        ),
    ],
)
def test_priors_that_cannot_be_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_pseudo_inputs_outside_of_their_bounds_are_refused():
    with pytest.raises(ParameterError, match=r"pseudo_inputs: expected values in bounds=\(0, 1\), got .* to 2.0"):
        VampPrior(DiagonalNormal(2, MLP(3, [], 4)), torch.tensor([[0.0, 1.0, 2.0]]), bounds=(0, 1))


# --- with a model -----------------------------------------------------------------------------------------------------


def adam(params):
    return torch.optim.Adam(params, lr=0.01)


def model_with(prior):
    return DeepGaussian(MLP(2, [8], 6, activation=nn.Tanh), 2, "normal", prior).double()


def vamp_pair(kind=DiagonalNormal):
    vamp = vamp_of(kind)
    return model_with(vamp), vamp.guide


X = torch.randn(40, 3, dtype=F64, generator=torch.Generator().manual_seed(1))


def snapshot(*modules):
    return [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]


def changed(before, *modules):
    """Names of the parameters that are not what they were."""
    pairs = zip(before, modules, strict=True)
    return {name for old, module in pairs for name, value in module.state_dict().items() if not value.equal(old[name])}


@PRIORS
def test_a_prior_is_trained_with_its_model(make):
    prior = make()
    model = model_with(prior)
    guide = prior.guide if isinstance(prior, VampPrior) else guide_of(DiagonalNormal)
    before = snapshot(prior)
    result = lvm.fit(model, guide, X, num_steps=3, optim=adam, seed=0)
    assert changed(before, prior) == set(dict(prior.named_parameters()))
    registered = {name.removeprefix("DeepGaussian$$$prior_fn.") for name in result.model.params}
    assert set(dict(prior.named_parameters())) <= registered


@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")
@PRIORS
def test_sampling_and_evaluation_leave_the_store_alone(make):
    prior = make()
    model, guide = model_with(prior), prior.guide if isinstance(prior, VampPrior) else guide_of(FullRankNormal)
    assert model.sample(7).shape == (7, 3)
    lvm.log_marginal(model, guide, X[:3], num_particles=10, seed=0)
    assert not pyro.get_param_store().keys()


@PRIORS
def test_every_way_of_running_particles_agrees(make):
    """One particle at a time and all at once, over draws of the prior: the same numbers from the same latents."""
    model = model_with(make())
    x, z = X[:4], torch.randn(6, 4, 2, dtype=F64)  # (K, N, L)
    together = model.prior.log_prob(z) + model.decode(z).log_prob(x)  # (K, N)
    for k in range(6):
        trace = pyro.poutine.trace(pyro.condition(model, {"z": z[k]})).get_trace(x)
        trace.compute_log_prob()
        total = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
        torch.testing.assert_close(total, together[k])


@PRIORS
def test_a_prior_follows_the_dtype(make):
    prior = make()
    model = model_with(prior)
    if isinstance(prior, VampPrior):
        prior.guide.float()
    model.float()
    assert model(X[:4].float()).dtype == torch.float32


def test_the_encoder_of_a_vamp_prior_is_one_parameter_of_both():
    model, guide = vamp_pair()
    assert not any("guide" in name or "encoder" in name for name in model.state_dict())
    result = lvm.fit(model, guide, X, num_steps=1, optim=adam, seed=0)
    encoder = {f"DiagonalNormal$$$phi.encoder.layers.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert set(result.guide.params) == encoder
    own = {f"DeepGaussian$$${name}" for name, _ in model.named_parameters()}
    assert set(result.model.params) == encoder | own
    tensors = [tensor for tensor, _ in result.model.params.values()]
    assert len({id(tensor) for tensor in tensors}) == len(tensors) == len(pyro.get_param_store().keys())


def test_one_step_moves_the_encoder_once_by_the_whole_gradient():
    """Plain gradient descent: the change is the rate times the gradient through q(z|x) and through the prior."""
    model, guide = vamp_pair()
    twin_model, twin_guide = copy.deepcopy((model, guide))
    assert twin_model.prior_fn.guide is twin_guide
    pyro.set_rng_seed(0)
    loss = pyro.infer.Trace_ELBO().differentiable_loss(twin_model, twin_guide, X)
    gradients = torch.autograd.grad(loss, [*twin_guide.parameters(), *twin_model.parameters()])
    pyro.clear_param_store()
    before = [parameter.detach().clone() for parameter in (*guide.parameters(), *model.parameters())]
    svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    pyro.set_rng_seed(0)
    svi.step(X)
    after = [*guide.parameters(), *model.parameters()]
    for old, gradient, new in zip(before, gradients, after, strict=True):
        torch.testing.assert_close(new.detach(), old - 1e-3 * gradient)
    through_prior = torch.autograd.grad(model.prior.log_prob(torch.ones(2, dtype=F64)), list(guide.parameters()))
    assert all(bool((gradient != 0).any()) for gradient in through_prior)


def test_updating_one_half_leaves_what_both_use():
    model, guide = vamp_pair()
    before = snapshot(model, guide)
    lvm.fit(model, guide, X, num_steps=3, optim=adam, update="model", seed=0)
    assert changed(before, model, guide) == set(dict(model.named_parameters()))
    with pytest.raises(ParameterError, match='what both halves use is trained by "both"'):
        lvm.fit(model, guide, X, num_steps=3, optim=adam, update="guide", seed=0)


def test_a_guide_of_another_class_is_trained_beside_a_vamp_prior():
    model, guide = vamp_pair()
    other = guide_of(FullRankNormal)
    before = snapshot(model, guide, other)
    lvm.fit(model, other, X, num_steps=3, optim=adam, update="guide", seed=0)
    assert changed(before, model, guide, other) == {"phi." + name for name, _ in other.phi.named_parameters()}
    before = snapshot(model, guide)
    lvm.fit(model, other, X, num_steps=3, optim=adam, seed=0)
    assert changed(before, model, guide) == {name for m in (model, guide) for name, _ in m.named_parameters()}


def test_another_guide_of_the_same_class_is_refused_with_the_cure():
    model, guide = vamp_pair()
    other = guide_of(DiagonalNormal)
    with pytest.raises(
        ParameterError, match="parameters: expected those of the module that registers them.*torch.no_grad"
    ):
        lvm.fit(model, other, X, num_steps=3, seed=0)
    with torch.no_grad():
        frozen = DeepGaussian(model.decoder, 2, "normal", prior=model.prior_fn())
    before = snapshot(model, guide, other)
    lvm.fit(frozen, other, X, num_steps=3, optim=adam, update="guide", seed=0)
    assert changed(before, model, guide, other) == {"phi." + name for name, _ in other.phi.named_parameters()}
    z = torch.randn(5, 2, dtype=F64)
    torch.testing.assert_close(frozen.prior.log_prob(z), model.prior.log_prob(z))


def test_nor_is_one_that_comes_after_a_fit():
    """The store then holds the first guide's parameters under the names of the second."""
    x = torch.rand(20, 6).round()
    first, second = (DiagonalNormal(2, MLP(6, [4], 4)) for _ in range(2))
    model = DeepGaussian(MLP(2, [4], 6), 2, prior=VampPrior(first, x[:5]))
    lvm.fit(model, first, x, num_steps=2)
    with pytest.raises(ParameterError, match="expected those of the module"):
        lvm.fit(model, second, x, num_steps=2)


def test_fitted_halves_of_a_vamp_pair_evaluate_as_the_pair():
    model, guide = vamp_pair()
    result = lvm.fit(model, guide, X, num_steps=3, optim=adam, seed=0)
    options = {"num_particles": 50, "seed": 0}
    pair = lvm.log_weights(model, guide, X[:3], **options)
    pyro.clear_param_store()
    torch.testing.assert_close(lvm.log_weights(result.model, result.guide, X[:3], **options), pair)
    z = lvm.log_weights(result.model, result.guide, X[:3], vectorize=False, **options)
    assert z.shape == pair.shape
