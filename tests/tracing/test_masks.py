"""Missing labels by ``obs_mask``: the weight of a latent has both of its densities, or none."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_lvm as lvm
from pyro_lvm.errors import SiteError

MEANS = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
X = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
Y, SEEN = torch.tensor([2, 1, 0]), torch.tensor([True, True, False])


def model(x, y, seen):
    with pyro.plate("data", len(x)):
        label = pyro.sample("y", dist.Categorical(logits=torch.zeros(3, dtype=torch.float64)), obs=y, obs_mask=seen)
        pyro.sample("x", dist.Normal(MEANS[label], 0.5), obs=x)


def guide(x, y, seen):
    with pyro.plate("data", len(x)), poutine.mask(mask=~seen):
        pyro.sample("y_unobserved", dist.Categorical(logits=dist.Normal(MEANS, 0.5).log_prob(x[:, None])))


def unmasked(x, y, seen):
    with pyro.plate("data", len(x)):
        pyro.sample("y_unobserved", dist.Categorical(logits=torch.zeros(len(x), 3, dtype=torch.float64)))


def exact():
    joint = dist.Normal(MEANS, 0.5).log_prob(X[:, None]) - torch.tensor(3.0).log()
    return torch.where(SEEN, joint.gather(1, Y[:, None])[:, 0], joint.logsumexp(1))


def test_a_guide_of_the_missing_labels_alone():
    """Its draws are the posterior's: all weights are log p(x), that of the label too where it is seen."""
    weights = lvm.log_weights(model, guide, X, Y, SEEN, num_particles=3, seed=0)
    torch.testing.assert_close(weights, exact().expand(3, -1), rtol=0, atol=1e-6)


def test_a_guide_that_weighs_seen_labels_too_is_refused():
    with pytest.raises(SiteError, match=r"'y_unobserved'.*one mask.*2 of 3.*mask=~obs_mask"):
        lvm.log_marginal(model, unmasked, X, Y, SEEN)


def test_any_latent_with_two_masks_is_refused():
    def half(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=x > 0):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def whole(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    with pytest.raises(SiteError, match=r"latent site 'z'.*one mask in model and guide"):
        lvm.elbo(half, whole, X)


def test_a_sum_over_values_does_not_leave_out_what_is_missing():
    with pytest.raises(SiteError, match=r"'y_unobserved'.*missing values that nothing depends on"):
        lvm.evidence.enumeration(model, X, Y, SEEN)
    prior = lvm.log_marginal(model, None, X, Y, SEEN, num_particles=20_000, seed=0)
    assert bool(((prior.value - exact()).abs() <= 5 * prior.stderr + 1e-6).all())


def test_a_summed_out_variable_that_is_masked_counts_one():
    """With `TraceEnum_ELBO`: p(x) of a datum that is not there is 1, not the number of classes."""
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def mixture(x, seen):
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            y = pyro.sample("y", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(MEANS[y], 1.0), obs=x)

    each = (dist.Normal(MEANS, 1.0).log_prob(X[:, None]) + weights.log()).logsumexp(1)
    expected = each.where(SEEN, 0.0)
    torch.testing.assert_close(lvm.evidence.enumeration(mixture, X, SEEN).value, expected)
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, lambda *_: None, X, SEEN)
    assert loss == pytest.approx(-float(expected.sum()))


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 1, 2]], ids=str)
def test_markov_chains_of_different_lengths(lengths):
    """The steps behind the end of a chain are masked, latent states and data alike."""
    lengths = torch.tensor(lengths)
    start, step = torch.tensor([0.6, 0.4]).double(), torch.tensor([[0.9, 0.1], [0.3, 0.7]]).double()
    x = torch.linspace(-1, 2, 12).double().reshape(3, 4)

    def chain(x, lengths):
        with pyro.plate("data", len(x)):
            state = None
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=t < lengths):
                    prior = dist.Categorical(start if state is None else step[state])
                    state = pyro.sample(f"z{t}", prior, infer={"enumerate": "parallel"})
                    pyro.sample(f"x{t}", dist.Normal(state.double(), 1.0), obs=x[:, t])

    expected = []
    emission = dist.Normal(torch.arange(2.0).double(), 1.0)
    for row, length in zip(x, lengths.tolist(), strict=True):
        forward = start
        for t in range(length):
            forward = (forward @ step if t else forward) * emission.log_prob(row[t]).exp()
        expected.append(forward.sum().log())
    torch.testing.assert_close(lvm.evidence.enumeration(chain, x, lengths).value, torch.stack(expected))
