"""Pairs and options that the importance-weighted bound refuses, and what it says."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import nn

from pyro_lvm.errors import DataTypeError, PlateError, ShapeError, SiteError
from pyro_lvm.objectives import ImportanceWeightedELBO
from tests.objectives.test_importance_weighted import GRADIENTS, PATHWISE, K, N, chain_model, rough_guide
from tests.references import ORACLES, SIGMA, data, normal_model


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_particles": 0}, ShapeError, "num_particles: expected 1 or more, got 0"),
        ({"num_particles": 2.5}, DataTypeError, "num_particles: expected an integer"),
        ({"gradient": "stl"}, DataTypeError, "gradient: expected one of"),
        ({"gradient": "vimco", "num_particles": 1}, ShapeError, "num_particles: expected 2 or more, got 1"),
        ({"gradient": "reweighted_wake_sleep", "num_particles": 1}, ShapeError, "num_particles: expected 2 or more"),
        ({"num_bounds": 0}, ShapeError, "num_bounds: expected 1 or more, got 0"),
        (
            {"baseline": len, "gradient": "reinforce"},
            DataTypeError,
            "baseline: expected a torch.nn.Module, got builtin",
        ),
        ({"baseline": nn.Linear(1, 1)}, DataTypeError, "baseline: expected None, got Linear"),
        (
            {"baseline": nn.Linear(1, 1), "gradient": "reinforce", "num_bounds": 2},
            DataTypeError,
            "baseline: expected None beside num_bounds > 1",
        ),
        (
            {"baseline": nn.Linear(1, 1), "gradient": "reinforce", "data_plate": None},
            DataTypeError,
            "baseline: expected None beside data_plate=None",
        ),
        ({"data_plate": 3}, DataTypeError, "data_plate: expected a name or None, got 3"),
        ({"vectorize_particles": "auto"}, DataTypeError, "vectorize_particles: expected True or False"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImportanceWeightedELBO(**options)


def refused(match: str, error: type[Exception], objective: Any, model: Any, guide: Any, *args: Any) -> None:
    with pytest.raises(error, match=match):
        objective.loss_and_grads(model, guide, *(args or (data(N),)))


def test_draws_without_reparameterisation_are_refused() -> None:
    logits = torch.zeros(3).double().requires_grad_()
    mixture = ORACLES["discrete_guide"](N)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=logits))

    message = r"guide sites \['c'\]: expected reparameterised draws, got .* without rsample.* gradient=\"vimco\""
    for gradient in PATHWISE:
        objective = ImportanceWeightedELBO(K, gradient)
        refused(message, SiteError, objective, mixture.model, guide)
        assert math.isfinite(objective.loss(mixture.model, guide, mixture.x))  # the value is right
    objective = ImportanceWeightedELBO(K)
    objective.loss_and_grads(mixture.model, mixture.guide, mixture.x)  # nothing depends on a parameter


def test_subsamples_inside_of_the_logarithm_are_refused() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", x.shape[1], subsample=torch.arange(2), dim=-1):
                pyro.sample("x", dist.Normal(z, SIGMA), obs=x[:, :2])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, :1], 1.0))

    refused(
        r"model plates \['pixels'\]: expected plates of full size",
        PlateError,
        ImportanceWeightedELBO(),
        model,
        guide,
        data(N, 3),
    )
    whole = ORACLES["subsample"](N)
    joint_weight = ImportanceWeightedELBO(data_plate=None)
    refused(
        r"model plates \['data'\]: expected plates of full size", PlateError, joint_weight, whole.model, whole.guide
    )


def test_unequal_scales_are_refused() -> None:
    def annealed(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    objective = ImportanceWeightedELBO()
    refused("scales of the model's sites: expected one for all", SiteError, objective, annealed, rough_guide)
    halved = poutine.scale(rough_guide, 0.5)
    refused("scales of the guide's sites: expected one for all", SiteError, objective, normal_model, halved)
    weighted = poutine.scale(normal_model, torch.ones(N))
    refused("site 'z': expected a scale that is one number", SiteError, objective, weighted, rough_guide)


def test_guides_without_a_score_are_refused() -> None:
    """A second run of the guide must give its draws the density that they were drawn with."""
    encoder = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()

    def dropout(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.3 * x, 0.5))
            pyro.sample("z2", dist.Normal(encoder(z[..., None])[..., 0], 0.5))

    def model(x: torch.Tensor) -> None:
        chain_model(torch.tensor([0.7, 1.2]).double())(x)

    torch.manual_seed(0)
    for gradient in GRADIENTS[1:]:
        objective = ImportanceWeightedELBO(K, gradient)
        refused(
            "guide: expected one density of the draws that it made, got one that differs",
            SiteError,
            objective,
            model,
            dropout,
        )
    ImportanceWeightedELBO(K).loss_and_grads(model, dropout, data(N))
    encoder.eval()
    ImportanceWeightedELBO(K, "sticking_the_landing").loss_and_grads(model, dropout, data(N))


def test_other_refusals() -> None:
    double = ImportanceWeightedELBO(gradient="doubly_reparameterized")
    pair = ORACLES["sequential_data"](N)
    refused(
        "data plate 'data': expected a tensor dimension, got a sequential plate",
        PlateError,
        double,
        pair.model,
        pair.guide,
    )
    refused(
        "x, the first argument: expected a tensor, got list", DataTypeError, double, normal_model, rough_guide, [1.0]
    )
    with pytest.raises(DataTypeError, match="x, the first argument: expected a tensor, got NoneType"):
        double.loss(normal_model, rough_guide)
    with pytest.raises(PlateError, match="AutoNormal has one site per latent"):
        ImportanceWeightedELBO().loss(normal_model, AutoDiagonalNormal(normal_model), data(N))
