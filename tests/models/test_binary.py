import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ShapeError, SupportError
from pyro_lvm.models import BinaryLatent, binary
from pyro_lvm.nn import MLP

N, D = 5, 4


def make(latent_dim, data_dim=D, decoder=None):
    torch.manual_seed(0)
    model = BinaryLatent(latent_dim, data_dim, decoder).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter))
    return model


def data(num_data=N, data_dim=D):
    torch.manual_seed(1)
    return torch.randint(2, (num_data, data_dim)).double()


def all_binary(size):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)), dtype=torch.float64)  # (2^size, size)


def brute_force(model, x):
    """log p(x) of one datum: a loop over z and over the dimensions, in probabilities."""
    prior, total = model.logits.sigmoid().tolist(), 0.0
    for z in all_binary(model.latent_dim):
        term = math.prod(p if bit else 1 - p for p, bit in zip(prior, z.tolist(), strict=True))
        likelihood = model.decoder(z).sigmoid().tolist()
        total += term * math.prod(p if bit else 1 - p for p, bit in zip(likelihood, x.tolist(), strict=True))
    return math.log(total)


@pytest.mark.parametrize("latent_dim", [1, 2, 5, 10])
@pytest.mark.parametrize("chunk", [7 * N, 2**22])  # chunks of 7 codes, that do not divide 2^L, or all at once
def test_log_prob_is_the_sum_over_all_latents(latent_dim, chunk, monkeypatch):
    monkeypatch.setattr(binary, "_CHUNK", chunk)
    model, x = make(latent_dim), data()
    expected = torch.tensor([brute_force(model, datum) for datum in x], dtype=torch.float64)
    torch.testing.assert_close(model.log_prob(x).detach(), expected, rtol=0, atol=1e-10)


def test_log_prob_with_a_decoder_of_ones_own():
    model, x = make(4, decoder=MLP(4, [6], D)), data()
    expected = torch.tensor([brute_force(model, datum) for datum in x], dtype=torch.float64)
    torch.testing.assert_close(model.log_prob(x).detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("data_dim", [1, 8])
def test_density_sums_to_one(data_dim):
    model = make(6, data_dim)
    torch.testing.assert_close(model.log_prob(all_binary(data_dim)).logsumexp(0).item(), 0.0, rtol=0, atol=1e-10)


def test_log_joint_broadcasts_and_adds_up_to_log_prob():
    model, x = make(3), data()
    table = model.log_joint(x, all_binary(3)[:, None])  # (2^L, N)
    assert table.shape == (8, N)
    torch.testing.assert_close(table.logsumexp(0), model.log_prob(x))
    assert model.log_joint(x[0], all_binary(3)[0]).shape == ()


def test_log_joint_is_what_the_program_says():
    model, x, z = make(3), data(), all_binary(3)[:N]

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z, event_dim=1))

    loss = Trace_ELBO().loss(model, guide, x)
    torch.testing.assert_close(-loss, model.log_joint(x, z).sum().item())


def test_extreme_logits_give_finite_numbers():
    model = make(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(500.0)
    assert model.log_prob(data()).isfinite().all()


def test_gradients_through_chunks_are_those_of_the_whole_sum(monkeypatch):
    model, x = make(5), data()
    parameters = list(model.parameters())
    whole = model.log_joint(x, all_binary(5)[:, None]).logsumexp(0).sum()
    monkeypatch.setattr(binary, "_CHUNK", 7 * N)
    got = torch.autograd.grad(model.log_prob(x).sum(), parameters)
    torch.testing.assert_close(got, torch.autograd.grad(whole, parameters), rtol=0, atol=1e-10)


def test_no_table_is_larger_than_a_chunk(monkeypatch):
    monkeypatch.setattr(binary, "_CHUNK", 64)
    model, sizes = make(9), []
    model.decoder.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    model.log_prob(data())
    assert max(sizes) <= 64
    assert sum(sizes) == 2**9 * D


def test_2_to_the_16_terms_at_once():
    torch.manual_seed(0)
    model, x = BinaryLatent(16, 64), torch.randint(2, (20, 64)).float()
    with torch.no_grad():
        got, expected = model.log_prob(x), model.double().log_prob(x.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


def test_log_marginal_and_compare_use_the_exact_density():
    model, x = make(3), data()
    result = pyro_lvm.log_marginal(model, None, x)
    assert set(result.status) == {"exact"}
    torch.testing.assert_close(result.value, model.log_prob(x).detach())
    assert pyro_lvm.compare({"binary": (model, None)}, x).rows[0].status_shares() == {"exact": 1.0}


@pytest.mark.statistical
def test_importance_sampling_finds_the_exact_value():
    torch.manual_seed(0)
    model, x = BinaryLatent(3, D).double(), data()

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=model.logits).to_event(1))

    result = pyro_lvm.log_marginal(model, prior, x, num_particles=5000, seed=0)
    assert ((result.value - model.log_prob(x).detach()).abs() < 5 * result.stderr).all()


def test_model_runs_under_an_outer_particle_plate():
    with pyro.plate("particles", 3, dim=-2):
        assert make(3)(data()).shape == (3, N, 3)


def test_fit_with_a_guide_improves_the_likelihood():
    torch.manual_seed(0)
    x = torch.cat([torch.ones(20, D), torch.zeros(20, D)])
    model, encoder = BinaryLatent(2, D), nn.Linear(D, 2)
    guide = pyro_lvm.guides.as_guide(lambda x: dist.Bernoulli(logits=encoder(x)).to_event(1))
    before = model.log_prob(x).mean().item()
    pyro_lvm.fit(model, guide, x, num_steps=60, update="model", seed=0, optim=lambda p: torch.optim.Adam(p, lr=0.05))
    assert model.log_prob(x).mean().item() > before + 0.1


def test_exact_gradients_train_without_a_guide():
    x = torch.cat([torch.ones(20, D), torch.zeros(20, D)])
    torch.manual_seed(0)
    model = BinaryLatent(2, D)
    optim = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(150):
        optim.zero_grad()
        (-model.log_prob(x).mean()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optim.step()
    # Two equally likely data: no model exceeds log(1/2).
    assert -math.log(2) - 0.1 < model.log_prob(x).mean().item() < -math.log(2)


@pytest.mark.statistical
def test_samples_have_the_probabilities_of_the_model():
    model, everything, draws = make(3, 3), all_binary(3), 20_000
    torch.manual_seed(2)
    x = model.sample(draws)
    assert x.shape == (draws, 3)
    share = (x[:, None] == everything).all(2).double().mean(0)
    exact = model.log_prob(everything).exp().detach()
    assert ((share - exact).abs() < 5 * (exact * (1 - exact) / draws).sqrt()).all()


def test_parameters_are_in_the_param_store_by_class_name():
    make(3)(data())
    names = {f"BinaryLatent$$${name}" for name in ("logits", "decoder.weight", "decoder.bias")}
    assert set(pyro.get_param_store().keys()) == names


# ---------------------------------------------------------------- refusals


def test_too_many_terms_are_refused_with_their_number_and_time():
    message = r"latent_dim: expected at most max_terms=4194304 terms, got 2\^23 = 8388608, about \d+ s for these data"
    with pytest.raises(ShapeError, match=message):
        make(23).log_prob(data())
    model = make(5)
    with pytest.raises(ShapeError, match=r"Call log_prob\(x, max_terms=32\) to wait"):
        model.log_prob(data(), max_terms=31)
    assert model.log_prob(data(), max_terms=32).isfinite().all()


@pytest.mark.parametrize(("size", "error"), [(0, ShapeError), (2.0, DataTypeError)])
def test_wrong_sizes_are_refused(size, error):
    with pytest.raises(error, match="latent_dim: expected"):
        BinaryLatent(size, D)
    with pytest.raises(error, match="data_dim: expected"):
        BinaryLatent(2, size)


def test_wrong_data_are_refused():
    model = make(2)
    for call in (model, model.log_prob):
        with pytest.raises(ShapeError, match=r"x: expected shape \(N, 4\), got \(5, 1\)"):
            call(data()[:, :1])
    with pytest.raises(SupportError, match="x: expected values 0 and 1, got 0.5. Binarise"):
        model.log_prob(data() / 2 + 0.5)


def test_decoder_that_does_not_fit_the_data_is_named():
    model = make(2, decoder=nn.Linear(2, 3))
    for call in (model, model.log_prob):
        with pytest.raises(ShapeError, match=r"decoder: expected logits of shape .*4\), got .*3\)"):
            call(data())
