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


# --- an estimate that is killed, and one over more rows than memory should hold ---------------------------------------

PAIR = """
import os, signal, sys, threading, time, warnings
import numpy as np, pyro, pyro.distributions as dist, torch
from torch.utils.data import Dataset
import pyro_lvm as lvm

torch.set_num_threads(1)
warnings.simplefilter("ignore", lvm.errors.UnreliableEstimateWarning)

def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None] * torch.ones(x.shape[-1]), 1.0).to_event(1), obs=x)

def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.mean(-1), 0.7))
"""

KILLED = (
    PAIR
    + """
path, kill_at = sys.argv[1], int(sys.argv[2])
chunks_done = 0

class Rows(Dataset):
    def __len__(self):
        return 200

    def __getitems__(self, indices):
        global chunks_done
        if len(indices) == 10:
            chunks_done += 1
            time.sleep(0.1 if kill_at >= 0 else 0)
            print(indices[0], flush=True)
            if indices[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return list(torch.linspace(-1, 1, 200 * 3).reshape(200, 3)[indices])

seed = None if sys.argv[3] == "None" else int(sys.argv[3])
pyro.set_rng_seed(5)
resume = path if path != "None" else None
record = lvm.log_marginal(model, guide, Rows(), num_particles=50, chunks=(10, 50), seed=seed, resume=resume)
print("digest", record.value.numpy().tobytes().hex(), record.khat.numpy().tobytes().hex())
"""
)


def killed_run(path, kill_at, seed):
    command = [sys.executable, "-W", "error", "-c", KILLED, str(path), str(kill_at), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -9), done.stderr
    lines = done.stdout.splitlines()
    return [int(line) for line in lines if line.isdigit()], [line for line in lines if line.startswith("digest")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, None])
def test_a_killed_estimate_goes_on_and_ends_with_the_same_numbers(tmp_path, seed):
    whole, expected = killed_run(None, -1, seed)
    assert whole == list(range(0, 200, 10))
    rows, digest = killed_run(tmp_path / "run", 150, seed)
    assert (rows[-1], digest) == (150, [])
    rows, digest = killed_run(tmp_path / "run", -1, seed)
    # a chunk takes a tenth of a second: it lost the one in progress, and those of less than a second or a slow one
    assert 150 - 110 <= rows[0] <= 150
    assert rows == list(range(rows[0], 200, 10))
    assert digest == expected
    assert killed_run(tmp_path / "run", -1, seed) == ([], expected)


MILLION = (
    PAIR
    + """
num_data, width, path, kind = 1_000_000, 64, sys.argv[1], sys.argv[2]

def pattern(start, stop):
    n = np.arange(start, stop)[:, None]
    return ((n * 7 + np.arange(width) * 13) % 251).astype(np.uint8)

file = np.lib.format.open_memmap(path, "w+", np.uint8, (num_data, width))
for start in range(0, num_data, 100_000):
    file[start : start + 100_000] = pattern(start, start + 100_000)
file.flush()
del file

class Rows(Dataset):
    def __init__(self):
        self.array = np.load(path, mmap_mode="r")

    def __len__(self):
        return len(self.array)

    def __getitem__(self, i):
        return torch.from_numpy(self.array[i].astype(np.float32)) / 255

def guide(x):  # the posterior
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.sum(-1) / (width + 1), (width + 1) ** -0.5))

def cast_model(x):
    model(x.float() / 255)

def cast_guide(x):
    guide(x.float() / 255)

def used():  # MB; pages of the mapped file belong to the system, which takes them back when it needs them
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

peak = 0.0

def watch():
    global peak
    while True:
        peak = max(peak, used())
        time.sleep(0.01)

pair, x = ((model, guide), Rows()) if kind == "items" else ((cast_model, cast_guide), np.load(path, mmap_mode="r"))
options = {"num_particles": 2, "chunks": (5000, 2)}
lvm.log_marginal(*pair, x[:5000] if kind == "array" else torch.utils.data.Subset(x, range(5000)), **options)
before = used()
threading.Thread(target=watch, daemon=True).start()
record = lvm.log_marginal(*pair, x, seed=0, **options)
rows = torch.from_numpy(pattern(0, 5000)).float() / 255
first = lvm.log_marginal(model, guide, rows, seed=0, **options)
results = sum(getattr(record, n).nbytes for n in ("value", "stderr", "bias", "elbo", "elbo_stderr", "ess", "khat"))
results += record.status.nbytes
print(peak - before, results / 2**20, bool(first.value.equal(record.value[:5000])), len(record))
z = torch.tensor([0, 499_999, 999_999])
exact = torch.from_numpy(np.concatenate([pattern(int(i), int(i) + 1) for i in z])).double() / 255
print(*(lvm.log_marginal(model, guide, exact, num_particles=2).value - record.value[z]).abs().tolist())
"""
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["items", "array"])
def test_a_million_rows_on_disk_need_no_memory_but_for_their_results(tmp_path, kind):
    """64 MB as bytes, 256 MB as float32: neither is ever held."""
    command = [sys.executable, "-c", MILLION, str(tmp_path / "x.npy"), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    grown, results, equal, num_data = first.split()
    assert (equal, num_data) == ("True", "1000000")
    # results and, for a moment, the codes of the statuses; 40 MB are a chunk and what the allocator keeps
    assert float(grown) < float(results) + 8 + 8 + 40
    # the guide is the posterior, so both are log p(x), the first in float32: about 70 nats times its eps, a few times
    assert all(float(difference) < 1e-4 for difference in second.split())
