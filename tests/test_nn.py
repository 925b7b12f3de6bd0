import itertools

import pytest
import torch
from torch import nn

from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.nn import MLP, ConvDecoder, ConvEncoder, GatedMLP, MaskedMLP


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


@pytest.mark.parametrize("network", [MLP, GatedMLP])
@pytest.mark.parametrize(("widths", "error"), [((0, [4], 2), ShapeError), ((3, [4.5], 2), DataTypeError)])
def test_a_bad_width_is_named(network, widths, error):
    with pytest.raises(error, match="in_dim|hidden_dims"):
        network(*widths)


def test_gated_mlp_is_the_written_out_composition():
    net = GatedMLP(3, [4, 5], 2).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    h = x
    for layer in (net.layers[0], net.layers[2]):
        width = layer.out_features // 2
        h = (h @ layer.weight[:width].T + layer.bias[:width]) * torch.sigmoid(
            h @ layer.weight[width:].T + layer.bias[width:]
        )
    torch.testing.assert_close(net(x), h @ net.layers[4].weight.T + net.layers[4].bias)


def test_gated_mlp_without_hidden_layers_is_linear():
    assert [type(layer) for layer in GatedMLP(3, [], 2).layers] == [nn.Linear]


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dim", "hidden_dims", "outputs"), [(5, [11], 1), (5, [7, 9], 3), (5, [], 2), (1, [4], 2)])
def test_masked_outputs_see_all_coordinates_before_and_none_else(dim, hidden_dims, outputs, reverse):
    torch.manual_seed(0)
    net = MaskedMLP(dim, hidden_dims, outputs, context_dim=2, reverse=reverse).double()
    context = torch.randn(2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda u: net(u, context), torch.randn(dim, dtype=torch.float64))
    for seen in jacobian.unflatten(0, (outputs, dim)):  # (output, input)
        place = {coordinate: i for i, coordinate in enumerate(net.order)}
        expected = [[place[i] < place[o] for i in range(dim)] for o in range(dim)]
        assert ((seen != 0) == torch.tensor(expected)).all()
    assert list(net.order) == (list(range(dim))[::-1] if reverse else list(range(dim)))


def test_every_masked_output_sees_the_context():
    torch.manual_seed(0)
    net, u = MaskedMLP(4, [9], 2, context_dim=3).double(), torch.randn(6, 4, dtype=torch.float64)
    context = torch.randn(6, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda c: net(u, c), context)  # (N, P D, N, C)
    own = jacobian[torch.arange(6), :, torch.arange(6)]
    assert (own != 0).all()
    many = net(u.expand(7, 6, 4), context)  # the context has no particles
    torch.testing.assert_close(many, net(u, context).expand(7, 6, 8))


def test_masked_network_without_context_is_the_written_out_composition():
    net, u = MaskedMLP(3, [5], 2).double(), torch.randn(6, 3, dtype=torch.float64)
    first, last = net.layers
    hidden = nn.functional.elu(u @ (first.weight * first.mask).T + first.bias)
    torch.testing.assert_close(net(u), hidden @ (last.weight * last.mask).T + last.bias)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, [4]), ShapeError, "dim: expected 1 or more, got 0"),
        ((3, [0]), ShapeError, "hidden_dims: expected 1 or more, got 0"),
        ((3, [4], 0), ShapeError, "outputs_per_coordinate: expected 1 or more, got 0"),
        ((3, [4.0]), DataTypeError, "hidden_dims: expected an integer"),
    ],
)
def test_a_bad_size_of_a_masked_network_is_named(sizes, error, message):
    with pytest.raises(error, match=message):
        MaskedMLP(*sizes)


# --- images -----------------------------------------------------------------------------------------------------------

SIZES = [(1, 8, 8), (1, 28, 28), (3, 25, 25), (1, 7, 10), (2, 1, 1)]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("channels", [(8,), (8, 4), (8, 4, 4)])
def test_images_of_any_size_go_through(shape, channels):
    image = ConvDecoder(3, shape, channels, outputs_per_value=2)(torch.randn(5, 3))
    assert image.shape == (5, 2 * shape[0], *shape[1:])
    assert ConvEncoder(shape, 6, channels)(torch.randn(5, *shape)).shape == (5, 6)


@pytest.mark.parametrize("leading", [(), (4,), (2, 4), (3, 2, 4), (0,), (2, 0)], ids=str)
def test_leading_dimensions_of_images_are_rows(leading):
    """Any leading dimensions, none and empty ones too: the same as one row at a time."""
    decoder, encoder = ConvDecoder(3, (2, 5, 6), (8, 4)).double(), ConvEncoder((2, 5, 6), 7, (4, 8)).double()
    z = torch.randn(*leading, 3, dtype=torch.float64)
    images = decoder(z)
    assert images.shape == (*leading, 2, 5, 6)
    codes = encoder(images)
    assert codes.shape == (*leading, 7)
    for index in itertools.product(*map(range, leading)):
        one = decoder(z[index])
        torch.testing.assert_close(images[index], one)
        torch.testing.assert_close(codes[index], encoder(one))


def test_encoder_reads_flat_images():
    encoder, x = ConvEncoder((2, 5, 6), 7), torch.randn(3, 4, 2, 5, 6)
    torch.testing.assert_close(encoder(x.flatten(2)), encoder(x))


def test_every_pixel_sees_the_latent():
    """Also the last row and column, of a size that had to be cut."""
    decoder = ConvDecoder(3, (1, 9, 11))
    assert (decoder(torch.zeros(3)) != decoder(torch.ones(3))).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConvDecoder(3, (8, 8)), ShapeError, r"image_shape: expected \(C, H, W\), got \(8, 8\)"),
        (lambda: ConvEncoder((1, 0, 8), 4), ShapeError, "image_shape: expected 1 or more, got 0"),
        (lambda: ConvDecoder(3, (1, 8, 8), channels=()), ShapeError, "channels: expected one layer or more"),
        (lambda: ConvDecoder(3, (1, 8, 8), outputs_per_value=0), ShapeError, "outputs_per_value: expected 1 or more"),
        (lambda: ConvEncoder((1, 8, 8), 4, channels=(2.5,)), DataTypeError, "channels: expected an integer, got 2.5"),
        (lambda: ConvDecoder(3, (1, 8, 8))(torch.zeros(5, 4)), ShapeError, r"z: expected .*3\), got \(5, 4\)"),
        (
            lambda: ConvEncoder((1, 8, 8), 4)(torch.zeros(5, 8, 8)),
            ShapeError,
            r"x: expected shape \(..., 1, 8, 8\) or \(..., 64\), got \(5, 8, 8\)",
        ),
    ],
)
def test_wrong_images_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
