"""What estimators owe on the proving ground; docs/proving_ground.md has all of it in figures."""

import numpy as np
import pytest
import torch

import pyro_lvm as lvm
from pyro_lvm.ops import DOUBTFUL
from pyro_lvm.testing import proving_ground

PAIRS = {pair.name: pair for pair in proving_ground()}
quiet = pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")


def in_errors(error: torch.Tensor, stderr: torch.Tensor) -> np.ndarray:
    """In units of the stated error, of which five allow for 0.001 in addition, as in the benchmark."""
    return (error.abs() / (stderr + 2e-4)).numpy()


@pytest.mark.statistical
@quiet
@pytest.mark.parametrize("name", [n for n, p in PAIRS.items() if p.mean is not None and not p.misled])
def test_moments_by_guides_that_are_not_misled(name):
    """Within 5 standard errors wherever the status does not warn; K = 10,000, as heavy tails hide at less."""
    pair = PAIRS[name]
    num_particles = 10_000 if pair.latent_dim < 50 else 1000
    for moment, fn in ((pair.mean, lambda z: z), (pair.square, lambda z: z.square())):
        found = lvm.expectation(pair.model, pair.guide, pair.x, fn, num_particles=num_particles, seed=0)
        scores = in_errors(found.value.reshape(moment.shape) - moment, found.stderr.reshape(moment.shape))
        quoted = ~np.isin(found.status, DOUBTFUL)
        assert scores.reshape(len(pair.x), -1)[quoted].max(initial=0.0) < 5


@pytest.mark.statistical
@quiet
@pytest.mark.parametrize(
    "name", [n for n, p in PAIRS.items() if "missed mode" in p.tags and p.guides and p.latent_dim != 5]
)
def test_guides_that_have_it_all_together_are_right_when_pooled(name):
    pair = PAIRS[name]
    pooled = lvm.evidence.pooled(pair.model, [pair.guide, *pair.guides], pair.x, seed=0)
    assert in_errors(pooled.value - pair.log_prob, pooled.stderr).max() < 5
    assert (pooled.status == "disagreement").mean() >= 0.5


@quiet
@pytest.mark.parametrize("name", ["mirrored-1d", "mirrored-2d", "light-mode-10d"])
def test_each_of_them_alone_keeps_its_wrong_value(name):
    """By the mass of the far modes, hundreds of stated errors or more; log 2 and log 4 where all are alike."""
    pair = PAIRS[name]
    for guide in (pair.guide, *pair.guides):
        alone = lvm.evidence.importance(pair.model, guide, pair.x, seed=0)
        missed = pair.log_prob - alone.value
        assert float(missed.max()) > 0.6
        worst = int(missed.argmax())
        assert float(alone.stderr[worst]) < float(missed[worst]) / 100


@pytest.mark.slow
@pytest.mark.statistical
@quiet
@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("name", ["narrow-2d", "two-layers"])
def test_annealing_mends_what_importance_sampling_cannot(name, start):
    pair = PAIRS[name]
    alone = lvm.evidence.importance(pair.model, pair.guide, pair.x, seed=0)
    failed = torch.from_numpy(alone.status == "unreliable")
    assert int(failed.sum()) > 5
    guide = pair.guide if start == "guide" else None
    found = lvm.evidence.annealed(pair.model, guide, pair.x[failed], seed=0)
    assert in_errors(found.value - pair.log_prob[failed], found.stderr).max() < 5
