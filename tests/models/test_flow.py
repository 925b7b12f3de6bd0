import math

import pyro
import pytest
import torch

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError
from pyro_lvm.models import NormalizingFlow

N, D = 6, 3


def make(data_dim=D, num_layers=4):
    """A flow that is far from the identity."""
    torch.manual_seed(0)
    model = NormalizingFlow(data_dim, num_layers, [8]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def data(num_data=N, data_dim=D):
    torch.manual_seed(1)
    return torch.randn(num_data, data_dim, dtype=torch.float64)


def ring(num_data=300):
    torch.manual_seed(2)
    angle = 2 * math.pi * torch.rand(num_data)
    return torch.stack([angle.cos(), angle.sin()], 1) * (3 + 0.3 * torch.randn(num_data, 1)) + 10


def test_density_integrates_to_one():
    model = make(2)
    # Far out in both columns, of which the first is wide: standard deviations of 3.4 and 0.4 in 10^5 draws.
    first, second = torch.linspace(-48, 48, 1201).double(), torch.linspace(-6, 6, 401).double()
    with torch.no_grad():
        total = model.log_prob(torch.cartesian_prod(first, second)).exp().sum() * 0.08 * 0.03
    torch.testing.assert_close(total.item(), 1.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("data_dim", [2, 3, 6])
def test_determinant_is_that_of_autograd(data_dim):
    model = make(data_dim)
    x = data(data_dim=data_dim)
    _, log_det = model.to_base(x)
    jacobians = torch.stack([torch.autograd.functional.jacobian(lambda x: model.to_base(x)[0], row) for row in x])
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobians).logabsdet, rtol=0, atol=1e-10)


@pytest.mark.parametrize("data_dim", [2, 3, 6])
def test_there_and_back(data_dim):
    model, x = make(data_dim), data(data_dim=data_dim)
    torch.testing.assert_close(model.from_base(model.to_base(x)[0]), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.to_base(model.from_base(x))[0], x, rtol=0, atol=1e-10)


def test_every_coordinate_of_x_depends_on_every_one_of_u():
    jacobian = torch.autograd.functional.jacobian(make(6).from_base, data(1, 6)[0])
    assert (jacobian != 0).all()


def test_it_starts_at_the_normal_of_the_data():
    x = ring().double()
    model = NormalizingFlow(2).double().initialize(x)
    expected = torch.distributions.Normal(x.mean(0), x.std(0, unbiased=False)).log_prob(x).sum(1)
    torch.testing.assert_close(model.log_prob(x), expected)


def test_the_program_has_the_density_and_draws_of_the_model():
    model, x = make(), data()
    loss = pyro.infer.Trace_ELBO().differentiable_loss(model, lambda x: None, x)
    torch.testing.assert_close(-loss, model.log_prob(x).sum())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with pyro.plate("particles", 3, dim=-2):
        assert model(x).shape == (N, D)
    torch.manual_seed(3)
    free = pyro.poutine.uncondition(model)(x)
    torch.manual_seed(3)
    torch.testing.assert_close(free, model.sample(N), rtol=0, atol=0)


def test_log_marginal_and_compare_use_the_exact_density():
    model, x = make(), data()
    result = pyro_lvm.log_marginal(model, None, x)
    assert set(result.status) == {"exact"}
    torch.testing.assert_close(result.value, model.log_prob(x).detach())
    assert pyro_lvm.compare({"flow": (model, None)}, x).rows[0].status_shares() == {"exact": 1.0}
    wrapped = pyro_lvm.log_marginal(lambda x: model(x), None, x)
    assert set(wrapped.status) == {"exact"}
    torch.testing.assert_close(wrapped.value, result.value, rtol=0, atol=1e-10)


def test_fit_finds_a_ring_that_no_normal_has():
    x = ring()
    torch.manual_seed(0)
    model = NormalizingFlow(2, 4, [32]).initialize(x)
    normal = model.log_prob(x).mean().item()
    pyro_lvm.fit(model, None, x, num_steps=150, batch_size=300, optim=lambda p: torch.optim.Adam(p, lr=1e-2))
    assert model.log_prob(x).mean().item() > normal + 0.2


@pytest.mark.statistical
def test_samples_have_the_entropy_of_the_density():
    model = make(2)
    torch.manual_seed(4)
    x = model.sample(20_000)
    u, _ = model.to_base(x)
    assert not x.requires_grad
    # u is standard normal: its mean has standard error N^(-1/2), its second moment (2 / N)^(1/2)
    assert (u.mean(0).abs() < 5 * 20_000**-0.5).all()
    assert ((u.square().mean(0) - 1).abs() < 5 * (2 / 20_000) ** 0.5).all()


def test_wrong_sizes_are_refused():
    with pytest.raises(ShapeError, match="data_dim: expected 2 or more, got 1"):
        NormalizingFlow(1)
    with pytest.raises(DataTypeError, match="num_layers: expected an integer, got 2.5"):
        NormalizingFlow(2, 2.5)
    for call in (make(), make().log_prob, make().initialize):
        with pytest.raises(ShapeError, match=r"x: expected shape \(N, 3\), got \(6, 2\)"):
            call(data()[:, :2])
    with pytest.raises(ShapeError, match=r"x: expected shape \(N, 3\), got \(2, 3, 3\)"):
        make()(data().reshape(2, 3, 3))


def test_a_datum_that_is_not_a_number_leaves_the_others_alone():
    x = data()
    x[0, 0] = math.nan
    assert list(pyro_lvm.log_marginal(make(), None, x).status) == ["nonfinite"] + ["exact"] * (N - 1)


def test_constant_columns_are_refused():
    with pytest.raises(ParameterError, match=r"x: expected finite columns that vary, got others, \[1\]"):
        make().initialize(data() * torch.tensor([1, 0, 1]))
