"""Neural networks in plain torch: the multilayer perceptron that encoders and decoders start from."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from pyro_lvm._checks import check_positive_int

__all__ = ["MLP"]


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
        check_positive_int("in_dim", in_dim)
        check_positive_int("out_dim", out_dim)
        widths = [in_dim, *(check_positive_int("hidden_dims", width) for width in hidden_dims), out_dim]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [_linear(width_in, width_out), activation()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f(x): ``(..., in_dim)`` to ``(..., out_dim)``."""
        return self.layers(x)


def _linear(in_dim: int, out_dim: int) -> nn.Linear:
    layer = nn.Linear(in_dim, out_dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
