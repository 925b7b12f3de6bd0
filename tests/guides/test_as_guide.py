import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.guides import as_guide

N, D = 5, 3


def test_as_guide_takes_densities_of_torch_and_of_pyro():
    x = torch.randn(N, D)
    torch_normal = torch.distributions.Independent(torch.distributions.Normal(x, 1.0), 1)
    for q in (torch_normal, dist.Normal(x, 1.0).to_event(1)):
        guide = as_guide(lambda x, q=q: q)
        torch.manual_seed(0)
        z = guide(x)
        torch.manual_seed(0)
        torch.testing.assert_close(z, x + torch.randn(N, D))
        with pyro.plate("particles", 4, dim=-2):
            assert guide(x).shape == (4, N, D)


def test_as_guide_passes_arguments_site_and_plate():
    guide = as_guide(lambda x, shift: dist.Normal(x + shift, 0.001).to_event(1), site="w", data_plate="rows")

    def model(x, shift):
        with pyro.plate("rows", len(x)):
            w = pyro.sample("w", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    x = torch.zeros(N, D)
    assert guide(x, 5.0).mean() > 4.9
    assert math.isfinite(Trace_ELBO().loss(model, guide, x, 5.0))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(D, 2)

    def forward(self, x):
        return dist.Normal(self.net(x), 1.0).to_event(1)


class PyroEncoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](D, 2)

    def forward(self, x):
        return dist.Normal(self.net(x), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("q", "names"),
    [
        (Encoder, {"Encoder$$$net.weight", "Encoder$$$net.bias"}),
        (PyroEncoder, {"net.weight", "net.bias"}),
    ],
)
def test_as_guide_registers_the_parameters_of_a_module_once(q, names):
    guide = as_guide(q())
    guide(torch.zeros(N, D))
    assert set(pyro.get_param_store().keys()) == names
    assert len(list(guide.parameters())) == 2


@pytest.mark.parametrize(
    ("q", "error", "message"),
    [
        (lambda x: x, DataTypeError, r"q\(x\): expected a distribution, got Tensor"),
        (lambda x: dist.Normal(x, 1.0), ShapeError, r"expected batch shape \(5,\).*got batch shape \(5, 3\).*to_event"),
        (lambda x: dist.Normal(x[0], 1.0).to_event(1), ShapeError, r"got batch shape \(\), event shape \(3,\)"),
    ],
)
def test_as_guide_names_what_is_wrong(q, error, message):
    with pytest.raises(error, match=message):
        as_guide(q)(torch.zeros(N, D))


def test_as_guide_wants_a_callable():
    with pytest.raises(DataTypeError, match="q: expected a callable, got Tensor"):
        as_guide(torch.zeros(2))
