"""Neural networks in plain torch: perceptrons, masked ones for autoregressive densities, convolutions for images.

All of them take any number of leading dimensions, so that particles, data or both may come first.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import elu, linear

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import ShapeError

__all__ = ["MLP", "ConvDecoder", "ConvEncoder", "GatedMLP", "MaskedMLP"]


class MLP(nn.Module):
    r"""Fully connected network f: R^in -> R^out with a linear last layer.

    .. math:: h_0 = x, \quad h_l = a(W_l h_{l-1} + b_l), \quad f(x) = W_{last} h_{last-1} + b_{last}

    Only the last dimension is transformed, so particles and data may come in any number of leading dimensions.
    Weights start by Glorot and Bengio (2010), Eq. (16), and biases at zero.

    Args:
        in_dim: size of the last dimension of the input.
        hidden_dims: widths of the hidden layers; empty for one linear map.
        out_dim: size of the last dimension of the output.
        activation: makes the module between two layers, such as ``nn.ELU``.

    Raises:
        DataTypeError: a width is not an integer.
        ShapeError: a width is less than 1.

    Example:
        >>> net = MLP(64, [128, 128], 20)
        >>> net(torch.zeros(5, 100, 64)).shape
        torch.Size([5, 100, 20])
    """

    def __init__(
        self, in_dim: int, hidden_dims: Sequence[int], out_dim: int, activation: Callable[[], nn.Module] = nn.ELU
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(_widths(in_dim, hidden_dims, out_dim)):
            layers += [_linear(width_in, width_out), activation()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f(x): ``(..., in_dim)`` to ``(..., out_dim)``."""
        return self.layers(x)


class GatedMLP(nn.Module):
    r"""Fully connected network whose hidden layers are gated, with a linear last layer.

    .. math:: h_0 = x, \quad h_l = (W_l h_{l-1} + b_l) \odot \sigma(V_l h_{l-1} + c_l), \quad
              f(x) = W_{last} h_{last-1} + b_{last}

    Args:
        in_dim: size of the last dimension of the input.
        hidden_dims: widths of the hidden layers; empty for one linear map.
        out_dim: size of the last dimension of the output.

    Raises:
        DataTypeError: a width is not an integer.
        ShapeError: a width is less than 1.

    Source: Dauphin et al. (2017), Language modeling with gated convolutional networks, for the layer; Tomczak and
    Welling (2018), VAE with a VampPrior, for encoders and decoders made of it.

    Example:
        >>> net = GatedMLP(64, [300, 300], 20)
        >>> net(torch.zeros(5, 100, 64)).shape
        torch.Size([5, 100, 20])
    """

    def __init__(self, in_dim: int, hidden_dims: Sequence[int], out_dim: int) -> None:
        super().__init__()
        *widths, last = _widths(in_dim, hidden_dims, out_dim)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [_linear(width_in, 2 * width_out), nn.GLU(dim=-1)]  # W h + b, then V h + c
        self.layers = nn.Sequential(*layers, _linear(widths[-1], last))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f(x): ``(..., in_dim)`` to ``(..., out_dim)``."""
        return self.layers(x)


class MaskedMLP(nn.Module):
    r"""Network whose outputs for a coordinate see only the coordinates before it, and a context: MADE.

    .. math:: h_1 = a\big((W_1 \odot M_1) u + b_1 + V c\big), \quad h_l = a\big((W_l \odot M_l) h_{l-1} + b_l\big),
              \quad f(u, c) = (W \odot M) h_{last} + b, \qquad a = \text{ELU}

    Coordinates have degrees 1 to D, in their order; hidden units take the degrees 0 to D - 1 in turn. A hidden unit of
    degree m sees what lies below with a degree up to m, an output of coordinate d the hidden units of degrees below d.
    In a hidden layer with fewer than D units, the outputs of the last coordinates see less than all before them.

    Args:
        dim: D.
        hidden_dims: widths of the hidden layers; empty for one masked linear map.
        outputs_per_coordinate: P, numbers that belong to each coordinate.
        context_dim: C, size of a context that every unit of the first layer sees; 0 for none.
        reverse: whether the order of the coordinates is from the last to the first.

    Attributes:
        order: the coordinates, first the one that sees none.
        layers: the masked linear layers.

    Raises:
        DataTypeError: a size is not an integer.
        ShapeError: a size is too small.

    Source: Germain, Gregor, Murray and Larochelle (2015), MADE: Masked Autoencoder for Distribution Estimation,
    Section 4.

    Example:
        >>> network = MaskedMLP(3, [16])
        >>> torch.autograd.functional.jacobian(network, torch.zeros(3)) != 0
        tensor([[False, False, False],
                [ True, False, False],
                [ True,  True, False]])
    """

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int],
        outputs_per_coordinate: int = 1,
        *,
        context_dim: int = 0,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        check_positive_int("dim", dim)
        outputs = check_positive_int("outputs_per_coordinate", outputs_per_coordinate)
        check_positive_int("context_dim", context_dim, minimum=0)
        self.order = range(dim)[::-1] if reverse else range(dim)
        degree = torch.arange(1, dim + 1).flip(0) if reverse else torch.arange(1, dim + 1)  # (D,)
        hidden = [torch.arange(check_positive_int("hidden_dims", width)) % dim for width in hidden_dims]
        first, *others = pairwise([degree, *hidden, (degree - 1).repeat(outputs)])
        self.layers = nn.ModuleList([_MaskedLinear(*first)])
        self.context = nn.Linear(context_dim, len(first[1]), bias=False) if context_dim else None
        self.layers.extend(_MaskedLinear(*each) for each in others)

    def forward(self, u: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """f: u ``(..., D)`` and context ``(..., C)`` to ``(..., P D)``, the first numbers of all coordinates first."""
        first, *others = self.layers
        hidden = first(u)
        if self.context is not None:  # multiplied before it meets the particles of u
            hidden = hidden + self.context(context)
        for layer in others:
            hidden = layer(elu(hidden))
        return hidden


class ConvDecoder(nn.Module):
    """Convolutional network from a latent to what a likelihood reads for an image.

    A linear layer makes a small image of ``channels[0]`` channels; each further layer doubles its height and width by a
    transposed convolution (4x4, stride 2). A size that is not a multiple of ``2**len(channels)`` is met by making the
    next larger one, of which the last rows and columns are dropped.

    Args:
        latent_dim: L.
        image_shape: (C, H, W) of one datum.
        channels: before each doubling, from the smallest image on.
        outputs_per_value: numbers that the likelihood reads for each value of the image: 1 for Bernoulli, Poisson and
            Binomial, 2 for Normal and DiscretizedLogistic, the number of classes for Categorical(channels_first=True).
        activation: makes the module before each transposed convolution.

    Raises:
        DataTypeError: a size is not an integer.
        ShapeError: a size is less than 1, ``image_shape`` is not (C, H, W), ``channels`` is empty, or (when used) z is
            not ``(..., L)``.

    Example:
        >>> decoder = ConvDecoder(8, (1, 28, 28), outputs_per_value=2)
        >>> decoder(torch.zeros(5, 100, 8)).shape
        torch.Size([5, 100, 2, 28, 28])
    """

    def __init__(
        self,
        latent_dim: int,
        image_shape: tuple[int, int, int],
        channels: Sequence[int] = (64, 32),
        *,
        outputs_per_value: int = 1,
        activation: Callable[[], nn.Module] = nn.ELU,
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.image_shape = _image_shape(image_shape)
        channels = _channels(channels)
        out_channels = check_positive_int("outputs_per_value", outputs_per_value) * self.image_shape[0]
        small = [-(-size // 2 ** len(channels)) for size in self.image_shape[1:]]  # rounded up
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, channels[0] * small[0] * small[1]),
            nn.Unflatten(-1, (channels[0], *small)),
        ]
        for channels_in, channels_out in pairwise([*channels, out_channels]):
            layers += [activation(), nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z ``(..., L)`` to ``(..., outputs_per_value * C, H, W)``."""
        if z.shape[-1:] != (self.latent_dim,):
            cure = "Make the decoder with the latent_dim of the model."
            raise ShapeError(refuse("z", f"shape (..., {self.latent_dim})", tuple(z.shape), cure))
        _, height, width = self.image_shape
        images = self.layers(z.reshape(-1, self.latent_dim))[..., :height, :width]  # (rows, C_out, H, W)
        return images.reshape(*z.shape[:-1], *images.shape[1:])


class ConvEncoder(nn.Module):
    """Convolutional network from an image to ``out_dim`` numbers.

    Each layer halves height and width, rounded up, by a convolution (3x3, stride 2); a linear layer reads the last
    image.

    Args:
        image_shape: (C, H, W) of one datum.
        out_dim: size of the output.
        channels: after each halving.
        activation: makes the module after each convolution.

    Raises:
        DataTypeError: a size is not an integer.
        ShapeError: a size is less than 1, ``image_shape`` is not (C, H, W), ``channels`` is empty, or (when used) x is
            neither ``(..., C, H, W)`` nor ``(..., C * H * W)``.

    Example:
        >>> encoder = ConvEncoder((1, 28, 28), 16)
        >>> encoder(torch.zeros(100, 1, 28, 28)).shape, encoder(torch.zeros(100, 784)).shape
        (torch.Size([100, 16]), torch.Size([100, 16]))
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        out_dim: int,
        channels: Sequence[int] = (32, 64),
        *,
        activation: Callable[[], nn.Module] = nn.ELU,
    ) -> None:
        super().__init__()
        self.image_shape = _image_shape(image_shape)
        channels = _channels(channels)
        small = [-(-size // 2 ** len(channels)) for size in self.image_shape[1:]]  # rounded up
        layers: list[nn.Module] = []
        for channels_in, channels_out in pairwise([self.image_shape[0], *channels]):
            layers += [nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1), activation()]
        last = nn.Linear(channels[-1] * small[0] * small[1], check_positive_int("out_dim", out_dim))
        self.layers = nn.Sequential(*layers, nn.Flatten(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``(..., C, H, W)`` or ``(..., C * H * W)`` to ``(..., out_dim)``."""
        size = math.prod(self.image_shape)
        if x.shape[-3:] == self.image_shape:
            leading = x.shape[:-3]
        elif x.shape[-1:] == (size,):
            leading = x.shape[:-1]
        else:
            expected = f"shape (..., {', '.join(map(str, self.image_shape))}) or (..., {size})"
            cure = "Reshape x, or make the encoder with the shape of one image."
            raise ShapeError(refuse("x", expected, tuple(x.shape), cure))
        codes = self.layers(x.reshape(-1, *self.image_shape))  # (rows, out_dim)
        return codes.reshape(*leading, codes.shape[-1])


class _MaskedLinear(nn.Linear):
    """A linear layer whose units see those below of a degree that is no larger than their own."""

    mask: torch.Tensor

    def __init__(self, below: torch.Tensor, above: torch.Tensor) -> None:
        super().__init__(len(below), len(above))
        self.register_buffer("mask", above[:, None] >= below, persistent=False)  # (out, in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(W * mask) x + b."""
        return linear(x, self.weight * self.mask, self.bias)


def _widths(in_dim: int, hidden_dims: Sequence[int], out_dim: int) -> list[int]:
    hidden = [check_positive_int("hidden_dims", width) for width in hidden_dims]
    return [check_positive_int("in_dim", in_dim), *hidden, check_positive_int("out_dim", out_dim)]


def _image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3:
        cure = "A grey image has one channel: (1, H, W)."
        raise ShapeError(refuse("image_shape", "(C, H, W)", tuple(shape), cure))
    channels, height, width = (check_positive_int("image_shape", size) for size in shape)
    return channels, height, width


def _channels(channels: Sequence[int]) -> list[int]:
    if not channels:
        raise ShapeError(refuse("channels", "one layer or more", tuple(channels), "Pass e.g. channels=(32, 64)."))
    return [check_positive_int("channels", width) for width in channels]


def _linear(in_dim: int, out_dim: int) -> nn.Linear:
    layer = nn.Linear(in_dim, out_dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
