"""What the importance-weighted bound keeps of a pair: when it looks again, what is pickled, and names in the store."""

import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.errors import SiteError, SupportError
from pyro_lvm.objectives import ImportanceWeightedELBO, gradient_snr
from tests.objectives.test_importance_weighted import K, N, chain_model, rough_guide
from tests.references import SIGMA, data, normal_model

# ---------------------------------------------------------------- looking again


@pytest.mark.parametrize("factors", [(1.0, 3.0), (1, 3)])
def test_a_scale_that_is_an_argument_is_read_for_each_value(factors: Any) -> None:
    def scaled(program: Any) -> Any:
        def run(x: torch.Tensor, factor: float) -> None:
            with poutine.scale(scale=factor):
                program(x)

        return run

    objective, pair, x, losses = ImportanceWeightedELBO(K), (scaled(normal_model), scaled(rough_guide)), data(N), []
    for factor in factors:
        torch.manual_seed(0)
        losses.append(objective.loss(*pair, x, factor))
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-10)


class DropoutGuide(nn.Module):
    """Dropout between two latents: in training mode the draws get another density at each run."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()

    def forward(self, x: torch.Tensor) -> None:
        pyro.module("DropoutGuide", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.3 * x, 0.5))
            pyro.sample("z2", dist.Normal(self.net(z[..., None])[..., 0], 0.5))


def test_densities_are_checked_again_after_a_change_of_mode() -> None:
    torch.manual_seed(0)
    model, guide, x = chain_model(torch.tensor([0.7, 1.2]).double()), DropoutGuide().eval(), data(N)
    objective = ImportanceWeightedELBO(K, "sticking_the_landing")
    objective.loss_and_grads(model, guide, x)
    guide.train()
    with pytest.raises(SiteError, match="expected one density of the draws that it made"):
        objective.loss_and_grads(model, guide, x)
    guide.eval()
    objective.loss_and_grads(model, guide, x)


def test_a_used_loss_is_pickled_without_its_pair() -> None:
    objective, local = ImportanceWeightedELBO(K, "reinforce"), lambda x: rough_guide(x)
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        values.append(objective.loss_and_grads(normal_model, local, data(N)))
        objective = pickle.loads(pickle.dumps(objective))
    assert values[0] == values[1]


# ---------------------------------------------------------------- in fit


def learned_guide(x: torch.Tensor) -> None:
    gain = pyro.param("gain", torch.tensor(0.1).double())
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(gain * x[:, :1], 0.9))


def masked_model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", x.shape[1], dim=-1):
            filled = pyro.sample("x", dist.Normal(z, SIGMA), obs=x, obs_mask=x > -0.5)
        pyro.sample("label", dist.Normal(filled.sum(-1, keepdim=True), 1.0), obs=x[:, :1])


def test_missing_values_are_left_out() -> None:
    """The loss of `fit` is that of the loss alone, also where more is observed of what the model fills in."""
    x = data(N, 3)
    result = lvm.fit(masked_model, learned_guide, x, loss=ImportanceWeightedELBO(K), num_steps=1, seed=3)
    pyro.clear_param_store()
    pyro.param("gain", torch.tensor(0.1).double())
    pyro.set_rng_seed(3)
    assert float(result.losses[0]) == pytest.approx(
        ImportanceWeightedELBO(K).loss(masked_model, learned_guide, x) / N, rel=1e-10
    )
    assert gradient_snr(masked_model, learned_guide, x, loss=ImportanceWeightedELBO(K), num_repeats=2).num_repeats == 2


@pytest.mark.parametrize("first", [0, 5])  # grey from the first batch on, or in a later one
def test_grey_pixels_under_a_bernoulli_are_named(first: int) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", x.shape[1], dim=-1):
                pyro.sample("x", dist.Bernoulli(logits=z), obs=x)

    x = torch.zeros(8, 3).double()
    x[first:] = 0.25
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    with pytest.raises(SupportError, match=r"observed site 'x': expected values in Boolean\(\), got 0.25.* binarise"):
        lvm.fit(model, learned_guide, loader, loss=ImportanceWeightedELBO(K), num_epochs=1)


class Mean(nn.Module):
    """One number for each datum, whatever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value.expand(len(x))


@pytest.mark.parametrize("by_fit", [True, False])
def test_a_model_may_have_a_baseline_of_its_own(by_fit: bool) -> None:
    own, learned = Mean(), Mean()

    def model(x: torch.Tensor) -> None:
        pyro.module("baseline", own)
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(own(x)[:, None], 1.0))
            with pyro.plate("pixels", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    loss = ImportanceWeightedELBO(K, "reinforce", baseline=learned)
    x = data(N, 3)
    if by_fit:
        result = lvm.fit(model, learned_guide, x, loss=loss, num_steps=2)
        assert set(result.params) == {"baseline$$$value", "gain", "ImportanceWeightedELBO.baseline$$$value"}
    else:
        SVI(model, learned_guide, pyro.optim.Adam({"lr": 0.01}), loss).step(x)
    assert float(own.value.detach()) != 0.5
    assert float(learned.value.detach()) != 0.5
    assert pyro.get_param_store()._params["baseline$$$value"] is own.value
