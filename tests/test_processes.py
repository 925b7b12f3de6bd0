"""Pairs that are trained in one process end as they would in processes of their own, bit for bit."""

import subprocess
import sys

import pytest

SCRIPT = """
import hashlib, sys
import pyro, pyro.distributions as dist, torch
import pyro_lvm as lvm

x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))

def functions():  # parameters of functions, under names that the other pairs use too
    def model(x):
        weight = pyro.param("weight", torch.ones(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(weight * z, 1.0).to_event(1), obs=x)

    def guide(x):
        scale = pyro.param("scale", lambda: torch.rand(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("weight_q", torch.zeros(2)) * x, scale).to_event(1))

    return model, guide

def modules(seed):
    torch.manual_seed(seed)
    model = lvm.models.DeepGaussian(lvm.nn.MLP(2, [8], 4), latent_dim=2, likelihood="normal")
    return model, lvm.guides.DiagonalNormal(2, encoder=lvm.nn.MLP(2, [8], 4))

pairs = {"a": functions, "b": functions, "c": lambda: modules(1), "d": lambda: modules(2)}
for name in sys.argv[1:]:
    result = lvm.fit(*pairs[name](), x, num_steps=40, batch_size=16, seed=3)
    digest = hashlib.sha256()
    for key, value in result.params.items():
        digest.update(key.encode() + value.numpy().tobytes())
    print(name, digest.hexdigest())
"""


def run(*names):
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *names]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
def test_one_process_is_four_processes():
    together = run("a", "b", "c", "d")
    assert together == [line for name in "abcd" for line in run(name)]
    assert len({line.split()[1] for line in together}) == 3  # a and b are the same pair twice
