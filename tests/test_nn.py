import pytest
import torch
from torch import nn

from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.nn import MLP


def test_mlp_is_the_written_out_composition():
    net = MLP(3, [4], 2, activation=nn.Tanh).double()
    first, second = net.layers[0], net.layers[2]
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.tanh(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("leading", [(), (7,), (2, 7), (2, 1, 7)])
def test_mlp_keeps_leading_dimensions(leading):
    assert MLP(3, [4, 5], 2)(torch.zeros(*leading, 3)).shape == (*leading, 2)


def test_mlp_rows_do_not_mix():
    net, x = MLP(3, [4, 5], 2).double(), torch.randn(2, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(net(x)[1, 4], net(x[1, 4]))


def test_mlp_without_hidden_layers_is_linear():
    net = MLP(3, [], 2)
    assert [type(layer) for layer in net.layers] == [nn.Linear]


def test_mlp_starts_with_glorot_weights_and_no_bias():
    layer = MLP(30, [], 50).layers[0]
    assert layer.weight.abs().max() <= (6 / 80) ** 0.5  # Glorot and Bengio (2010), Eq. (16)
    assert not layer.bias.any()


@pytest.mark.parametrize(("widths", "error"), [((0, [4], 2), ShapeError), ((3, [4.5], 2), DataTypeError)])
def test_mlp_names_a_bad_width(widths, error):
    with pytest.raises(error, match="in_dim|hidden_dims"):
        MLP(*widths)
