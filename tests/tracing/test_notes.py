"""What evaluators say of arguments that do not fit the programs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import TensorDataset

import pyro_lvm as lvm

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 4


def plain_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 3]).to_event(1), obs=x)


def plain_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.mean(-1), 0.5))


def labelled_model(x, y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def labelled_guide(x, y):
    plain_guide(x)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("data", [(TensorDataset(X, LABELS),), (X, LABELS)])
def test_an_argument_too_many(data, fitted):
    pair = plain_model, plain_guide
    if fitted:
        pair = [lvm.fit(lvm.models.LinearGaussian(1, 3), None, X, num_steps=1).model, plain_guide]
    with pytest.raises(TypeError, match="positional argument") as info:
        lvm.log_marginal(*pair, *data, num_particles=10)
    (note,) = info.value.__notes__
    assert note.startswith("The data give float32 (N, 3) and int64 (N,); the model takes (x")
    assert note.endswith("Give both programs a second argument, or wrap the data set so that it returns x alone.")


def test_an_argument_too_few():
    with pytest.raises(TypeError, match="missing 1 required positional argument") as info:
        lvm.log_marginal(labelled_model, labelled_guide, X, num_particles=10)
    note = "The data give float32 (N, 3); the model takes (x, y), the guide takes (x, y). Pass the rest beside x."
    assert info.value.__notes__ == [note]


@pytest.mark.parametrize("evaluate", [lvm.elbo, lvm.log_marginal])
def test_a_companion_that_lacks_rows(evaluate):
    with pytest.raises((RuntimeError, ValueError)) as info:
        evaluate(labelled_model, labelled_guide, X, LABELS[:30].float(), num_particles=10)
    note = "y has 30 rows and x has 40: every batch is given all of it. If it belongs to the data, give it 40 rows."
    assert info.value.__notes__ == [note]


def test_other_errors_get_no_note():
    def broken(x, offset):
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing") as info:
        lvm.log_marginal(broken, labelled_guide, X, torch.zeros(3), num_particles=10)
    assert not hasattr(info.value, "__notes__")
