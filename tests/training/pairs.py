"""Pairs, losses and runs of `fit` that the tests of captured steps share."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import constraints

from pyro_lvm.objectives import FreeBits, ImportanceWeightedELBO, KLAnnealing, warm_up
from pyro_lvm.training import fit

X = (torch.rand(52, 6, generator=torch.Generator().manual_seed(1)) < 0.5).float()
BATCH = 20  # the last batch of an epoch has 12


class Pair(nn.Module):
    """A small VAE; ``noise`` adds dropout, ``statistics`` batch normalisation."""

    def __init__(self, noise=False, statistics=False, discrete=False):
        super().__init__()
        torch.manual_seed(0)
        middle = [nn.Dropout(0.3)] if noise else [nn.BatchNorm1d(8)] if statistics else []
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *middle, nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6))
        self.discrete = discrete

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            if self.discrete:
                z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            q = dist.Bernoulli(logits=loc) if self.discrete else dist.Normal(loc, log_scale.exp())
            pyro.sample("z", q.to_event(1))


def functions():
    """Constrained parameters of plain functions, and a Gamma latent."""

    def model(x):
        rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
        weight = pyro.param("weight", torch.tensor([0.3, 0.6, 0.1]), constraint=constraints.simplex)
        low = pyro.param("low", torch.tensor(0.2), constraint=constraints.interval(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, rate))
            p = (low + weight.max()) / 2 * torch.exp(-z)
            pyro.sample("x", dist.Bernoulli(p.unsqueeze(-1)).expand([len(x), 6]).to_event(1), obs=x)

    def guide(x):
        shape = pyro.param("shape", torch.tensor(2.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(shape + x.sum(-1), 2.0))

    return model, guide


def subsampled():
    """A pair that draws its own rows, and a latent outside of the plate."""

    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            pyro.sample("x", dist.Bernoulli(logits=w).to_event(1), obs=x[rows])

    def guide(x):
        loc, scale = (
            pyro.param("loc", torch.zeros(6)),
            pyro.param("scale", torch.ones(6), constraint=constraints.positive),
        )
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    return model, guide


def mixture():
    """A latent that the model sums out."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=pyro.param("weights", torch.zeros(3))))
            logits = pyro.param("logits", torch.eye(3, 6))[k]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    return model, None


def component(enumerate):
    """A mixture of latents, over whose component the guide sums; some of its probabilities are 0."""

    def make():
        torch.manual_seed(0)
        encoder, decoder = nn.Linear(6, 7), nn.Linear(2, 6)

        def model(x):
            pyro.module("decoder", decoder)
            centers = pyro.param("centers", torch.tensor([[-1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(logits=pyro.param("weights", torch.zeros(3))))
                z = pyro.sample("z", dist.Normal(centers[k], 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

        def guide(x):
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                loc, log_scale, logits = encoder(x).split([2, 2, 3], -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
                possible = torch.cat([x.new_ones(len(x), 1), x[:, :2]], -1) > 0
                logits = torch.where(possible, logits, -torch.inf)
                pyro.sample("k", dist.Categorical(logits=logits), infer={"enumerate": enumerate})

        return model, guide

    return make


def hidden_markov():
    """A chain of latents that are summed out one after the other."""

    def model(x):
        change, emit = pyro.param("change", torch.eye(3) * 2), pyro.param("emit", torch.linspace(-1, 1, 3))
        with pyro.plate("data", len(x)):
            k = 0
            for t in pyro.markov(range(6)):
                k = pyro.sample(f"k_{t}", dist.Categorical(logits=change[k]), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Bernoulli(logits=emit[k]), obs=x[:, t])

    return model, lambda x: None


def own(**options):
    def make():
        pair = Pair(**options)
        return pair.model, pair.guide

    return make


PAIRS = {
    "plain": (own(), Trace_ELBO),
    "mean field": (own(), TraceMeanField_ELBO),
    "particles": (own(), lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)),
    "particles in a loop": (own(), lambda: Trace_ELBO(num_particles=2)),
    "dropout": (own(noise=True), Trace_ELBO),
    "batch statistics": (own(statistics=True), Trace_ELBO),
    "score function": (own(discrete=True), Trace_ELBO),
    "functions": (functions, Trace_ELBO),
    "subsampled": (subsampled, Trace_ELBO),
    "annealed": (own(), lambda: KLAnnealing(warm_up(30))),
    "annealed mean field": (own(), lambda: KLAnnealing(warm_up(30), TraceMeanField_ELBO())),
    "free bits": (own(), lambda: FreeBits(0.2)),
    "importance weighted": (own(), lambda: ImportanceWeightedELBO(4)),
    "doubly reparameterized": (own(), lambda: ImportanceWeightedELBO(4, "doubly_reparameterized")),
    "VIMCO": (own(discrete=True), lambda: ImportanceWeightedELBO(4, "vimco")),
    "baseline": (
        own(discrete=True),
        lambda: ImportanceWeightedELBO(2, "reinforce", baseline=nn.Sequential(nn.Linear(6, 1))),
    ),
    "mixture": (mixture, lambda: None),
    "guide that sums": (component("parallel"), lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "guide that sums, particles": (
        component("parallel"),
        lambda: TraceEnum_ELBO(max_plate_nesting=1, num_particles=3, vectorize_particles=True),
    ),
    "guide that sums in a loop": (component("sequential"), lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "hidden Markov": (hidden_markov, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "a function": (own(), lambda: lambda model, guide, x: Trace_ELBO().differentiable_loss(model, guide, x) * 2),
}


def trained(make, loss, compile, num_steps=50, batch_size=BATCH, x=X, **options):
    """What a run of ``num_steps`` leaves behind."""
    pyro.clear_param_store()
    model, guide = make()
    torch.manual_seed(5)
    objective = loss()
    result = fit(
        model,
        guide,
        x,
        loss=objective,
        num_steps=num_steps,
        batch_size=batch_size,
        compile=compile,
        progress=False,
        seed=2,
        **options,
    )
    owner = getattr(model, "__self__", None)
    buffers = {} if owner is None else {name: buffer.clone() for name, buffer in owner.named_buffers()}
    return result, buffers


def assert_equal(one, other, tolerance=2e-5):
    assert one.params.keys() == other.params.keys()
    for name, value in one.params.items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, other.params[name], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one.losses, other.losses, rtol=tolerance, atol=tolerance)
