import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.guides import DiagonalNormal, Flow, FullRankNormal, LowRankNormal, MixtureOfNormals
from pyro_lvm.models import LinearGaussian
from pyro_lvm.nn import MLP
from pyro_lvm.ops.gaussian import normal_kl

N, D = 5, 3


@pytest.fixture(autouse=True)
def _fresh_store():
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def diagonal(latent_dim, reading):
    return DiagonalNormal(latent_dim, **reading(2 * latent_dim))


def full(latent_dim, reading):
    return FullRankNormal(latent_dim, **reading(latent_dim + latent_dim * (latent_dim + 1) // 2))


def low_rank(latent_dim, reading):
    return LowRankNormal(latent_dim, 1, **reading(3 * latent_dim))


def mixture(latent_dim, reading):
    return MixtureOfNormals(3, latent_dim, learn_weights=True, **reading(3 * (2 * latent_dim + 1)))


def flow(latent_dim, reading):
    return Flow(latent_dim, **reading(2 * latent_dim + 4), hidden_dim=12, context_dim=4)


def full_flow(latent_dim, reading):
    size = latent_dim + latent_dim * (latent_dim + 1) // 2 + 4
    return Flow(latent_dim, **reading(size), base="full", num_steps=3, hidden_dim=12, context_dim=4)


def coupling(latent_dim, reading):
    return Flow(latent_dim, **reading(2 * latent_dim + 4), transform="coupling", hidden_dim=12, context_dim=4)


def full_spline(latent_dim, reading):
    size = latent_dim + latent_dim * (latent_dim + 1) // 2 + 4
    return Flow(latent_dim, **reading(size), transform="spline", base="full", hidden_dim=12, context_dim=4)


def amortised(size):
    return {"encoder": MLP(D, [8], size)}


def local(size):
    return {"num_data": N}


def shared(size):
    return {"shared": True}


FLOWS = pytest.mark.parametrize("family", [flow, full_flow, coupling, full_spline])
FAMILIES = pytest.mark.parametrize(
    "family", [diagonal, full, low_rank, mixture, flow, full_flow, coupling, full_spline]
)
READINGS = pytest.mark.parametrize("reading", [amortised, local, shared])


def make(family, latent_dim, reading=amortised, spread=0.3):
    guide = family(latent_dim, reading).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return guide, torch.randn(N, D, dtype=torch.float64)


# ---------------------------------------------------------------- densities


@READINGS
@FAMILIES
def test_density_normalises_in_one_dimension(family, reading):
    guide, x = make(family, 1, reading)
    grid = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    density = guide.distribution(x).log_prob(grid[:, None, None].expand(-1, N, 1)).exp()  # (6001, N)
    total, rtol = torch.trapezoid(density, grid, dim=0), 1e-5 if family is full_spline else 1e-7  # kinks at its knots
    torch.testing.assert_close(total, torch.ones(N, dtype=torch.float64), rtol=rtol, atol=0)


@FAMILIES
def test_density_normalises_in_two_dimensions(family):
    guide, x = make(family, 2, spread=0.1)  # wide enough for the grid
    with torch.no_grad():
        grid = torch.linspace(-12, 12, 241, dtype=torch.float64)
        z = torch.cartesian_prod(grid, grid)[:, None]  # (241^2, 1, L)
        total = guide.distribution(x).log_prob(z.expand(-1, N, 2)).exp().sum(0) * 0.1**2
    rtol = 1e-3 if family is full_spline else 1e-4  # kinks at its knots
    torch.testing.assert_close(total, torch.ones(N, dtype=torch.float64), rtol=rtol, atol=0)


@READINGS
@FAMILIES
def test_draws_are_scored_alike_with_and_without_memory(family, reading):
    guide, x = make(family, 4, reading)
    q = guide.distribution(x)
    for shape in [(), (3,), (2, 3)]:
        z = q.rsample(shape)
        assert z.shape == (*shape, N, 4)
        own = q.log_prob(z)
        torch.testing.assert_close(q.log_prob(z.detach().clone()), own)
        torch.testing.assert_close(guide.distribution(x).log_prob(z), own)


@READINGS
@FAMILIES
def test_density_of_a_datum_does_not_depend_on_the_others(family, reading):
    guide, x = make(family, 3, reading)
    z = torch.randn(N, 3, dtype=torch.float64)
    before = guide.distribution(x).log_prob(z)
    x[1:], z[1:] = 7.0, 2.0
    torch.testing.assert_close(guide.distribution(x).log_prob(z)[0], before[0])


@FLOWS
def test_flow_density_is_the_change_of_variables(family):
    guide, x = make(family, 3)
    q = guide.distribution(x[:1])

    def push(u):
        for step in q.transforms:
            u = step(u)
        return u

    u = torch.randn(1, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(push, u).reshape(3, 3)
    expected = q.base_dist.log_prob(u) - jacobian.det().abs().log()
    torch.testing.assert_close(q.log_prob(push(u)), expected)
    torch.testing.assert_close(q.log_prob(push(u).clone()), expected)


def test_flow_steps_are_triangular_in_alternating_order():
    guide, x = make(flow, 4)
    u = torch.randn(1, 4, dtype=torch.float64)
    first, second = (
        torch.autograd.functional.jacobian(step, u).reshape(4, 4) for step in guide.distribution(x[:1]).transforms
    )
    assert not first.triu(1).any()
    assert not second.tril(-1).any()
    assert (first[torch.tril_indices(4, 4, -1).unbind()] != 0).all()
    assert (second[torch.triu_indices(4, 4, 1).unbind()] != 0).all()


def test_flow_starts_near_its_base():
    guide = Flow(3, MLP(D, [8], 6 + 32)).double()
    q = guide.distribution(torch.randn(N, D, dtype=torch.float64))
    for step in q.transforms:
        log_det = step.log_abs_det_jacobian(torch.zeros(N, 3, dtype=torch.float64), None)
        # sigma(2) = 0.88 a coordinate; the networks start with gates within 1 of 2
        assert ((log_det / 3).exp() > 1 / (1 + math.exp(-1))).all()


@pytest.mark.parametrize("reading", [local, shared])
@pytest.mark.parametrize("family", [coupling, full_spline])
def test_couplings_start_at_the_normal_of_their_location_and_scale(family, reading):
    z = 2 * torch.randn(N, 3)
    standard = dist.Normal(torch.zeros(N, 3), 1.0).to_event(1)
    torch.testing.assert_close(family(3, reading).distribution(torch.zeros(N, D)).log_prob(z), standard.log_prob(z))


@pytest.mark.parametrize("reading", [local, shared])
@pytest.mark.parametrize("family", [diagonal, full, low_rank, flow, full_flow])
def test_parameters_of_zero_are_the_prior(family, reading):
    guide = family(3, reading)
    q = guide.distribution(torch.zeros(N, D))
    base = getattr(q, "base_dist", q) if family in (flow, full_flow) else q
    torch.testing.assert_close(base.mean, torch.zeros(N, 3))
    torch.testing.assert_close(base.variance, torch.ones(N, 3))


def test_full_rank_contains_diagonal():
    phi = torch.randn(N, 9, dtype=torch.float64)
    phi[:, 6:] = 0
    z = torch.randn(N, 3, dtype=torch.float64)
    small = DiagonalNormal(3, encoder=_Constant(phi[:, :6])).distribution(phi)
    large = FullRankNormal(3, encoder=_Constant(phi)).distribution(phi)
    torch.testing.assert_close(large.log_prob(z), small.log_prob(z))


def test_full_rank_reads_means_diagonal_and_rows_below():
    phi = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 30.0, 60.0, 90.0]])
    q = FullRankNormal(3, encoder=_Constant(phi)).distribution(phi)
    torch.testing.assert_close(q.loc, torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(q.scale_tril, torch.tensor([[[1.0, 0, 0], [10, 1, 0], [20, 30, 1]]]))


def test_diagonal_reads_means_then_raw_scales():
    phi = torch.tensor([[1.0, 2.0, 0.0, 50.0]])
    q = DiagonalNormal(2, encoder=_Constant(phi)).distribution(phi)
    torch.testing.assert_close(q.mean, torch.tensor([[1.0, 2.0]]))
    # softplus(0 + log(e - 1)) = 1, and softplus(y) = y for a large y
    torch.testing.assert_close(q.stddev, torch.tensor([[1.0, 50.0 + math.log(math.e - 1)]]))


class _Constant(nn.Module):
    def __init__(self, phi):
        super().__init__()
        self.phi = phi

    def forward(self, x):
        return self.phi


# ---------------------------------------------------------------- gradients and memory


@READINGS
@FAMILIES
def test_gradients_reach_every_parameter(family, reading):
    guide, x = make(family, 3, reading)
    q = guide.distribution(x)
    z = q.rsample((2,))
    (q.log_prob(z) + z.square().sum(-1)).sum().backward()
    for name, parameter in guide.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@FLOWS
def test_score_of_a_draw_without_gradients_has_gradients(family):
    guide, x = make(family, 3)
    q = guide.distribution(x)
    z = q.sample()  # remembered under no_grad
    parameters = list(guide.parameters())
    remembered = torch.autograd.grad(q.log_prob(z).sum(), parameters)
    stored = torch.autograd.grad(guide.distribution(x).log_prob(z.clone()).sum(), parameters)
    torch.testing.assert_close(remembered, stored)


@FLOWS
def test_flow_holds_no_tensors_after_use(family):
    guide, x = make(family, 3)
    gc.collect()
    gc.disable()
    try:
        q = guide.distribution(x)
        z = q.rsample()
        loss = q.log_prob(z).sum()
        ghost = weakref.ref(z)
        del q, z, loss
        assert ghost() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- as Pyro guides


@READINGS
@FAMILIES
def test_outer_particle_plate_gives_k_n_l(family, reading):
    guide, x = make(family, 3, reading)
    with pyro.plate("particles", 2, dim=-2):
        assert guide(x).shape == (2, N, 3)
    assert guide(x).shape == (N, 3)


@READINGS
@FAMILIES
def test_particles_of_trace_elbo_agree_with_the_density(family, reading):
    """The loss of one seeded draw is the mean over particles of log q - log p, by hand from the same draw."""
    guide, x = make(family, 2, reading)
    model = LinearGaussian(2, D).double()
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(3)
    loss = elbo.differentiable_loss(model, guide, x)
    torch.manual_seed(3)
    q = guide.distribution(x)
    z = q.expand((3, N)).rsample().detach().clone()
    prior = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    likelihood = dist.Normal(z @ model.weight.T + model.mean, model.variance.sqrt()).to_event(1)
    expected = q.log_prob(z) - prior.log_prob(z) - likelihood.log_prob(x)  # (K, N)
    torch.testing.assert_close(loss, expected.mean(0).sum())


@FAMILIES
def test_guide_registers_its_parameters_and_uses_its_site(family):
    guide = family(2, amortised)
    guide.site = "latent"
    guide(torch.zeros(N, D))
    name = type(guide).__name__
    assert set(pyro.get_param_store().keys()) == {f"{name}$$${key}" for key, _ in guide.named_parameters()}
    assert family(2, lambda size: {"num_data": N, "site": "w"}).site == "w"


def train(model, guide, x, num_steps, loss):
    model.eval().requires_grad_(False)  # eval() says that the frozen parameters are meant
    optim = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.985})
    svi = SVI(model, guide, optim, loss)
    for _ in range(num_steps):
        svi.step(x)
        optim.step()


def linear_case(orthogonal, num_data=N):
    model = LinearGaussian(2, D).double()
    columns = [[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]] if orthogonal else [[1.0, 1.0, 0.0], [1.0, 0.5, -0.5]]
    model.weight.data = torch.tensor(columns, dtype=torch.float64).T  # orthogonal: the posterior is diagonal
    return model, model.sample(num_data)


def kl_to_posterior(model, q, x):
    scale_tril = getattr(q, "scale_tril", None)
    scale_tril = q.stddev.diag_embed() if scale_tril is None else scale_tril
    posterior = model.posterior(x)
    return normal_kl(q.mean, scale_tril, posterior.loc, posterior.scale_tril)


def linear(size):
    return {"encoder": nn.Linear(D, size)}


@pytest.mark.parametrize("reading", [linear, local])
@pytest.mark.parametrize(("family", "orthogonal"), [(diagonal, True), (full, True), (full, False)])
def test_family_that_contains_the_posterior_finds_it(family, orthogonal, reading):
    model, x = linear_case(orthogonal, N if reading is local else 50)
    guide = family(2, reading).double()
    train(model, guide, x, 300, Trace_ELBO(num_particles=20, vectorize_particles=True))
    assert kl_to_posterior(model, guide.distribution(x), x).max() < 0.01


def test_mean_field_stops_at_its_closed_form_gap():
    model, x = linear_case(orthogonal=False)
    guide = diagonal(2, local).double()
    train(model, guide, x, 300, TraceMeanField_ELBO(num_particles=20, vectorize_particles=True))
    precision = model.posterior(x[:1]).precision_matrix[0]
    # the best factorised normal: 1/2 (sum_l log Lambda_ll - log det Lambda); Bishop, PRML, Section 10.1.2
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    assert gap > 0.02
    torch.testing.assert_close(kl_to_posterior(model, guide.distribution(x), x), gap.expand(N), rtol=0, atol=0.01)


# ---------------------------------------------------------------- refusals


@FAMILIES
def test_exactly_one_reading_is_given(family):
    message = "encoder, num_data, shared: expected exactly one of the three, got none.*shared=True"
    with pytest.raises(DataTypeError, match=message):
        family(2, lambda size: {})
    with pytest.raises(DataTypeError, match="got encoder and num_data"):
        family(2, lambda size: {"encoder": MLP(D, [], size), "num_data": N})
    with pytest.raises(DataTypeError, match="got num_data and shared"):
        family(2, lambda size: {"num_data": N, "shared": True})


@FAMILIES
def test_local_guide_wants_its_own_data(family):
    with pytest.raises(ShapeError, match="x: expected num_data=5 data, got 4"):
        family(2, local)(torch.zeros(4, D))


@pytest.mark.parametrize(("guide", "size"), [(DiagonalNormal, 4), (FullRankNormal, 5), (Flow, 36)])
def test_encoder_of_another_size_is_told_the_right_one(guide, size):
    with pytest.raises(
        ShapeError, match=rf"encoder: expected output of shape \(5, {size}\), got \(5, 7\).* {size} numbers"
    ):
        guide(2, MLP(D, [], 7))(torch.zeros(N, D))


def test_unknown_base_is_refused():
    with pytest.raises(DataTypeError, match="base: expected 'diagonal' or 'full', got 'low_rank'"):
        Flow(2, num_data=N, base="low_rank")


def test_unknown_transform_is_refused():
    with pytest.raises(DataTypeError, match="transform: expected 'autoregressive', 'coupling' or 'spline', got 'iaf'"):
        Flow(2, num_data=N, transform="iaf")
