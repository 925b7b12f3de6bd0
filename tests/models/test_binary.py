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


def make(latent_dim, data_dim=D, decoder=None, prior=None):
    torch.manual_seed(0)
    model = BinaryLatent(latent_dim, data_dim, decoder, prior=prior).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter))
    return model


def deep(latent_dim, top_dim, data_dim=D, decoder=None, top_decoder=None):
    return make(latent_dim, data_dim, decoder, BinaryLatent(top_dim, latent_dim, top_decoder))


def data(num_data=N, data_dim=D):
    torch.manual_seed(1)
    return torch.randint(2, (num_data, data_dim)).double()


def all_binary(size):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)), dtype=torch.float64)  # (2^size, size)


def product(probabilities, bits):
    return math.prod(p if bit else 1 - p for p, bit in zip(probabilities.tolist(), bits.tolist(), strict=True))


def brute_force(model, x):
    """log p(x) of one datum: a loop over z and over the dimensions, in probabilities."""
    total = 0.0
    for z in all_binary(model.latent_dim):
        total += product(model.logits.sigmoid(), z) * product(model.decoder(z).sigmoid(), x)
    return math.log(total)


def brute_force_deep(model, x):
    """log p(x) of one datum under two layers: a loop over z2, and in it one over z."""
    total = 0.0
    for z2 in all_binary(model.prior.latent_dim):
        for z in all_binary(model.latent_dim):
            p_z = product(model.prior.decoder(z2).sigmoid(), z)
            total += product(model.prior.logits.sigmoid(), z2) * p_z * product(model.decoder(z).sigmoid(), x)
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


@pytest.mark.parametrize(("latent_dim", "top_dim"), [(1, 1), (3, 2), (2, 5), (4, 4)])
@pytest.mark.parametrize("chunk", [7 * N, 2**17])
def test_two_layers_are_the_sum_over_both(latent_dim, top_dim, chunk, monkeypatch):
    monkeypatch.setattr(binary, "_CHUNK", chunk)
    model, x = deep(latent_dim, top_dim), data()
    expected = torch.tensor([brute_force_deep(model, datum) for datum in x], dtype=torch.float64)
    torch.testing.assert_close(model.log_prob(x).detach(), expected, rtol=0, atol=1e-10)


def test_two_layers_with_decoders_of_ones_own():
    model, x = deep(4, 3, decoder=MLP(4, [6], D), top_decoder=MLP(3, [5], 4)), data()
    expected = torch.tensor([brute_force_deep(model, datum) for datum in x], dtype=torch.float64)
    torch.testing.assert_close(model.log_prob(x).detach(), expected, rtol=0, atol=1e-10)


MODELS = pytest.mark.parametrize(
    "model",
    [
        make(5),
        deep(5, 5),
        deep(5, 4, decoder=MLP(5, [6], D), top_decoder=MLP(4, [5], 5)),
        make(3, prior=BinaryLatent(3, 3, prior=BinaryLatent(2, 3))),
    ],
    ids=["one layer", "two layers", "networks", "three layers"],
)


@MODELS
def test_enumeration_of_the_program_agrees(model):
    result = pyro_lvm.evidence.enumeration(model, data())
    assert result.num_particles == 2**model._num_bits
    torch.testing.assert_close(result.value, model.log_prob(data()).detach(), rtol=0, atol=1e-10)


@MODELS
def test_density_of_any_depth_sums_to_one(model):
    torch.testing.assert_close(model.log_prob(all_binary(D)).logsumexp(0).item(), 0.0, rtol=0, atol=1e-10)


def test_many_pixels_overflow_no_product():
    model, x = make(3, 3000), data(2, 3000)
    whole = model.log_joint(x, all_binary(3)[:, None]).logsumexp(0)
    torch.testing.assert_close(model.log_prob(x), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.float().log_prob(x.float()).double(), whole, rtol=1e-5, atol=0)


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


def test_log_joint_of_two_layers_adds_up_to_log_prob():
    model, x = deep(3, 2), data()
    table = model.log_joint(x, all_binary(3)[:, None], all_binary(2)[:, None, None])  # (2^T, 2^L, N)
    assert table.shape == (4, 8, N)
    torch.testing.assert_close(table.logsumexp((0, 1)), model.log_prob(x))


@pytest.mark.parametrize("model", [make(3), deep(3, 2)])
def test_log_joint_is_what_the_program_says(model):
    x, latents = data(), {"z": all_binary(3)[:N], "z2": all_binary(2)[[0, 1, 2, 3, 1]]}
    if model.prior is None:
        del latents["z2"]

    def guide(x):
        with pyro.plate("data", len(x)):
            for name, value in latents.items():
                pyro.sample(name, dist.Delta(value, event_dim=1))

    loss = Trace_ELBO().loss(model, guide, x)
    torch.testing.assert_close(-loss, model.log_joint(x, *latents.values()).sum().item())


def test_extreme_logits_give_finite_numbers():
    model = make(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(500.0)
    assert model.log_prob(data()).isfinite().all()


@pytest.mark.parametrize("model", [make(5), deep(4, 3), deep(4, 3, decoder=MLP(4, [6], D))])
def test_gradients_through_chunks_are_those_of_the_whole_sum(model, monkeypatch):
    x, parameters = data(), list(model.parameters())
    above = [] if model.prior is None else [all_binary(3)[:, None, None]]
    whole = model.log_joint(x, all_binary(model.latent_dim)[:, None], *above).flatten(0, -2).logsumexp(0)
    slopes = torch.linspace(-1, 2, N, dtype=torch.float64)  # data count differently
    monkeypatch.setattr(binary, "_CHUNK", 7 * N)
    got = torch.autograd.grad(slopes @ model.log_prob(x), parameters)
    torch.testing.assert_close(got, torch.autograd.grad(slopes @ whole, parameters), rtol=0, atol=1e-10)


def test_gradients_where_every_logit_is_zero():
    model, x = make(3), data()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    whole = model.log_joint(x, all_binary(3)[:, None]).logsumexp(0).sum()
    got = torch.autograd.grad(model.log_prob(x).sum(), list(model.parameters()))
    torch.testing.assert_close(got, torch.autograd.grad(whole, list(model.parameters())), rtol=0, atol=1e-10)


def test_gradients_reach_only_what_is_trained():
    model = deep(3, 2)
    model.decoder.requires_grad_(False)
    model.log_prob(data()).sum().backward()
    assert model.decoder.weight.grad is None
    assert model.prior.decoder.weight.grad.abs().min() > 0
    assert not model.requires_grad_(False).log_prob(data()).requires_grad


def test_gradients_keep_none_of_the_chunks(monkeypatch):
    monkeypatch.setattr(binary, "_CHUNK", 64)
    model, x, kept = deep(8, 3), data(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        model.log_prob(x)
    assert sum(kept) == x.numel() + N + sum(p.numel() for p in model.parameters())  # x, log p(x), the parameters


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


@pytest.mark.statistical
def test_samples_of_two_layers_have_the_probabilities_of_the_model():
    model, everything, draws = deep(3, 2, 3), all_binary(3), 20_000
    torch.manual_seed(2)
    share = (model.sample(draws)[:, None] == everything).all(2).double().mean(0)
    exact = model.log_prob(everything).exp().detach()
    assert ((share - exact).abs() < 5 * (exact * (1 - exact) / draws).sqrt()).all()


def test_two_layers_under_an_outer_particle_plate():
    with pyro.plate("particles", 3, dim=-2):
        assert deep(3, 2)(data()).shape == (3, N, 3)


def test_two_layers_train_with_a_guide():
    torch.manual_seed(0)
    x = torch.cat([torch.ones(20, D), torch.zeros(20, D)])
    model, encoder = BinaryLatent(2, D, prior=BinaryLatent(1, 2)), nn.Linear(D, 3)

    def guide(x):
        logits, top = encoder(x).split([2, 1], dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))
            pyro.sample("z2", dist.Bernoulli(logits=top).to_event(1))

    before = model.log_prob(x).mean().item()
    pyro_lvm.fit(model, guide, x, num_steps=60, update="model", seed=0, optim=lambda p: torch.optim.Adam(p, lr=0.05))
    assert model.log_prob(x).mean().item() > before + 0.1


def test_parameters_are_in_the_param_store_by_class_name():
    make(3)(data())
    names = {f"BinaryLatent$$${name}" for name in ("logits", "decoder.weight", "decoder.bias")}
    assert set(pyro.get_param_store().keys()) == names


# ---------------------------------------------------------------- refusals


def test_too_many_terms_are_refused_with_their_number_and_time():
    message = r"latent_dim: expected at most max_terms=4194304 terms, got 2\^23, about [\d.e+-]+ s for these data"
    with pytest.raises(ShapeError, match=message):
        make(23).log_prob(data())
    model = make(5)
    with pytest.raises(ShapeError, match=r"Call log_prob\(x, max_terms=2\*\*5\) to wait"):
        model.log_prob(data(), max_terms=31)
    assert model.log_prob(data(), max_terms=32).isfinite().all()


def test_terms_of_both_layers_count():
    with pytest.raises(ShapeError, match=r"got 2\^7, about [\d.e+-]+ s"):
        deep(4, 3).log_prob(data(), max_terms=127)
    assert deep(4, 3).log_prob(data(), max_terms=128).isfinite().all()


def test_wrong_prior_is_refused():
    with pytest.raises(DataTypeError, match=r"prior: expected a BinaryLatent, got Linear. Pass BinaryLatent\(T, 3\)"):
        BinaryLatent(3, D, prior=nn.Linear(2, 3))
    with pytest.raises(ShapeError, match="prior: expected data_dim=3, this model's latent_dim, got 2"):
        BinaryLatent(3, D, prior=BinaryLatent(3, 2))


def test_latents_of_other_layers_are_refused():
    with pytest.raises(ShapeError, match="above: expected none, got 1 tensors"):
        make(3).log_joint(data(), all_binary(3)[0], all_binary(2)[0])
    with pytest.raises(ShapeError, match="above: expected z2 and so on, got 0 tensors"):
        deep(3, 2).log_joint(data(), all_binary(3)[0])


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
