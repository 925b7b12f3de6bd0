import itertools
import math

import pyro
import pytest
import torch

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ShapeError, SupportError
from pyro_lvm.models import Autoregressive

N, D = 5, 8


def make(data_dim=D, hidden_dims=(13, 17)):
    torch.manual_seed(0)
    model = Autoregressive(data_dim, hidden_dims).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter))
    return model


def data(num_data=N, data_dim=D):
    torch.manual_seed(1)
    return torch.randint(2, (num_data, data_dim)).double()


def all_binary(size):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)), dtype=torch.float64)  # (2^size, size)


SIZES = pytest.mark.parametrize(
    ("data_dim", "hidden_dims"), [(D, [13, 17]), (D, [3]), (D, []), (1, [4]), (2, [5, 4, 3])]
)


@SIZES
def test_density_sums_to_one(data_dim, hidden_dims):
    total = make(data_dim, hidden_dims).log_prob(all_binary(data_dim)).logsumexp(0)
    torch.testing.assert_close(total.item(), 0.0, rtol=0, atol=1e-10)


@SIZES
def test_conditionals_see_only_what_comes_before(data_dim, hidden_dims):
    model = make(data_dim, hidden_dims)
    for x in data(3, data_dim):
        jacobian = torch.autograd.functional.jacobian(model.conditional_logits, x)  # (output, input)
        assert (jacobian.triu() == 0).all()


def test_conditionals_see_all_that_comes_before():
    jacobian = torch.autograd.functional.jacobian(make(D, [32, 32]).conditional_logits, data()[0])
    assert (jacobian[torch.tril_indices(D, D, -1).unbind()] != 0).all()


def test_log_prob_is_the_sum_of_the_conditionals():
    model, x = make(hidden_dims=[6]), data()
    for datum, value in zip(x, model.log_prob(x), strict=True):
        probabilities = model.conditional_logits(datum).sigmoid()
        expected = sum(math.log(p if bit else 1 - p) for p, bit in zip(probabilities.tolist(), datum, strict=True))
        assert value.item() == pytest.approx(expected, abs=1e-10)


def test_large_logits_keep_their_digits():
    model = make(1, [])
    with torch.no_grad():
        model.network.layers[0].bias.fill_(21.0)
    expected = torch.tensor([-21 - math.log1p(math.exp(-21)), -math.log1p(math.exp(-21))], dtype=torch.float64)
    torch.testing.assert_close(model.log_prob(all_binary(1)).detach(), expected, rtol=1e-12, atol=0)


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
    assert pyro_lvm.compare({"made": (model, None)}, x).rows[0].status_shares() == {"exact": 1.0}
    wrapped = pyro_lvm.log_marginal(lambda x: model(x), None, x)
    assert set(wrapped.status) == {"exact"}
    torch.testing.assert_close(wrapped.value, result.value, rtol=0, atol=1e-10)


def test_fit_learns_a_deterministic_pattern():
    torch.manual_seed(0)
    x = torch.randint(2, (200, 1)).float().repeat(1, D)  # all bits equal: log p(x) = log(1/2)
    model = Autoregressive(D, [32])
    pyro_lvm.fit(model, None, x, num_steps=200, batch_size=200, optim=lambda p: torch.optim.Adam(p, lr=0.03))
    assert -math.log(2) - 0.1 < model.log_prob(x).mean().item() < -math.log(2) + 0.01


@pytest.mark.statistical
def test_samples_have_the_probabilities_of_the_model():
    model, everything, draws = make(3, [6]), all_binary(3), 20_000
    torch.manual_seed(2)
    x = model.sample(draws)
    assert x.shape == (draws, 3)
    share = (x[:, None] == everything).all(2).double().mean(0)
    exact = model.log_prob(everything).exp().detach()
    assert ((share - exact).abs() < 5 * (exact * (1 - exact) / draws).sqrt()).all()


def test_wrong_sizes_are_refused():
    with pytest.raises(ShapeError, match="data_dim: expected 1 or more, got 0"):
        Autoregressive(0, [4])
    with pytest.raises(DataTypeError, match="hidden_dims: expected an integer, got 2.5"):
        Autoregressive(2, [2.5])
    for call in (make(), make().log_prob):
        with pytest.raises(ShapeError, match=r"x: expected shape \(N, 8\), got \(5, 2\)"):
            call(data()[:, :2])
    with pytest.raises(ShapeError, match=r"x: expected shape \(N, 8\), got \(2, 2, 8\)"):
        make()(data(4).reshape(2, 2, 8))


def test_data_that_are_not_binary_are_refused():
    with pytest.raises(SupportError, match="x: expected values 0 and 1, got 0.5. Binarise"):
        make().log_prob(data() / 2 + 0.5)
