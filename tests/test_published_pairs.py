"""Pairs in the shape of Pyro's published variational autoencoder, unmodified through the whole road."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_lvm as lvm


class Decoder(nn.Module):
    def __init__(self, z_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(z_dim, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, 64)

    def forward(self, z):
        return torch.sigmoid(self.fc21(nn.functional.softplus(self.fc1(z))))


class Encoder(nn.Module):
    def __init__(self, z_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(64, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, z_dim)
        self.fc22 = nn.Linear(hidden_dim, z_dim)

    def forward(self, x):
        hidden = nn.functional.softplus(self.fc1(x.reshape(-1, 64)))
        return self.fc21(hidden), torch.exp(self.fc22(hidden))


class VAE(nn.Module):
    """Bound methods, sites of its own names, ``pyro.module`` inside, images that it reshapes itself."""

    def __init__(self, z_dim=4, hidden_dim=24):
        super().__init__()
        self.encoder, self.decoder, self.z_dim = Encoder(z_dim, hidden_dim), Decoder(z_dim, hidden_dim), z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], self.z_dim, dtype=x.dtype)
            z = pyro.sample("latent", dist.Normal(z_loc, torch.ones_like(z_loc)).to_event(1))
            image = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(image, validate_args=False).to_event(1), obs=x.reshape(-1, 64))
            return image

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("latent", dist.Normal(*self.encoder(x)).to_event(1))


@pytest.fixture(scope="module")
def images():
    data = lvm.datasets.digits()
    return data.train.reshape(-1, 1, 8, 8), data.test[:60].reshape(-1, 1, 8, 8)


def trained(images, seed, loss):
    torch.manual_seed(seed)
    vae = VAE()
    optim = lambda params: torch.optim.Adam(params, lr=5e-3)  # noqa: E731
    return vae, lvm.fit(vae.model, vae.guide, images, num_steps=150, loss=loss, optim=optim, seed=seed)


def test_it_is_trained_measured_and_compared(images):
    train, test = images
    (one, fitted), (two, _) = trained(train, 0, Trace_ELBO()), trained(train, 1, TraceMeanField_ELBO())
    assert fitted.losses[-20:].mean() < 0.7 * fitted.losses[0]
    rows = {"one": (one.model, one.guide), "two": (two.model, two.guide)}
    result = lvm.compare(rows, test, num_particles=300)
    assert {row.num_parameters for row in result.rows} == {sum(p.numel() for p in one.parameters())}
    for name, pair in rows.items():
        row = next(row for row in result.rows if row.name == name)
        bound = lvm.elbo(*pair, test, num_particles=300, seed=0).mean().detach()
        assert row.log_marginal > row.elbo
        # Two estimates of one bound, 60 x 300 draws of log-weights that spread by less than 3 nats: error below 0.05.
        assert abs(row.elbo - float(bound)) < 0.25


def test_predictive_sees_the_fitted_values(images):
    train, test = images
    vae, fitted = trained(train, 0, None)
    pyro.set_rng_seed(0)
    seen = Predictive(vae.model, guide=vae.guide, num_samples=2)(test[:3])
    assert seen["obs"].shape == (2, 3, 64)
    name = "encoder$$$fc21.weight"
    assert torch.equal(pyro.param(name), fitted.params[name])
    assert torch.equal(vae.encoder.fc21.weight, fitted.params[name])
