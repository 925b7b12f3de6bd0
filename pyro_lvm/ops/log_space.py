"""Sums of weights that are kept as logarithms.

A log-weight is log w_k = log p(x, z_k) - log q(z_k | x) in nats; its exponential under- or overflows for most
models, so nothing here leaves log space. Tables of log-weights are ``(K, N)``: particles first, then data.
"""

import math

import torch

from pyro_lvm._checks import refuse
from pyro_lvm.errors import DataTypeError, ShapeError

__all__ = ["check_table", "log_mean_exp", "log_normalize", "log_weight_table"]


def log_mean_exp(log_weights: torch.Tensor, dim: int = 0) -> torch.Tensor:
    r"""Logarithm of the mean weight, :math:`\log \frac1K \sum_k w_k`.

    Args:
        log_weights: Log-weights in nats, e.g. ``(K, N)``.
        dim: The dimension to average over; K is its size.

    Returns:
        ``log_weights`` without ``dim``, in nats and in the same dtype. It is -inf where every weight is zero;
        NaN and +inf propagate.

    Raises:
        ShapeError: ``dim`` is empty: the mean of no weights does not exist.

    Example:
        >>> log_mean_exp(torch.tensor([[1.0, 2.0], [3.0, 6.0]]).log()).exp()
        tensor([2., 4.])
    """
    _refuse_empty(log_weights, dim)
    return torch.logsumexp(log_weights, dim=dim) - math.log(log_weights.shape[dim])


def log_normalize(log_weights: torch.Tensor, dim: int = 0) -> torch.Tensor:
    r"""Logarithm of the self-normalised weights, :math:`\log (w_k / \sum_j w_j)`.

    Args:
        log_weights: Log-weights in nats, e.g. ``(K, N)``.
        dim: The dimension along which the weights shall sum to one.

    Returns:
        A tensor of the shape and dtype of ``log_weights``. Where every weight is zero there is nothing to
        normalise and the result is NaN.

    Raises:
        ShapeError: ``dim`` is empty.

    Example:
        >>> log_normalize(torch.tensor([1.0, 3.0]).log()).exp()
        tensor([0.2500, 0.7500])
    """
    _refuse_empty(log_weights, dim)
    return log_weights - torch.logsumexp(log_weights, dim=dim, keepdim=True)


def log_weight_table(log_weights: torch.Tensor, argument: str = "log_weights") -> torch.Tensor:
    """``log_weights`` in float64, once it is sure that it is a ``(K, N)`` table.

    Args:
        log_weights: Log-weights in nats, ``(K, N)``, of any floating dtype.
        argument: What an error message shall call it.

    Returns:
        The table in float64, ``(K, N)``, still attached to the graph: sums of thousands of weights lose digits in
        float32.

    Raises:
        DataTypeError: not a tensor of a floating dtype.
        ShapeError: not two-dimensional, or no particle, or no datum.

    Example:
        >>> log_weight_table(torch.zeros(3, 2)).dtype
        torch.float64
    """
    return check_table(log_weights, argument).double()


def check_table(log_weights: torch.Tensor, argument: str = "log_weights") -> torch.Tensor:
    """``log_weights`` as they are, once it is sure that they are a ``(K, N)`` table.

    Args:
        log_weights: Log-weights in nats, ``(K, N)``, of any floating dtype.
        argument: What an error message shall call it.

    Raises:
        DataTypeError: not a tensor of a floating dtype.
        ShapeError: not two-dimensional, or no particle, or no datum.
    """
    if not isinstance(log_weights, torch.Tensor) or not log_weights.is_floating_point():
        got = log_weights.dtype if isinstance(log_weights, torch.Tensor) else type(log_weights).__name__
        raise DataTypeError(refuse(argument, "a floating tensor", got, "Pass log p(x, z) - log q(z | x) in nats."))
    if log_weights.dim() != 2 or log_weights.numel() == 0:
        cure = "Put the particles first and the data second; a single datum is log_weights[:, None]."
        raise ShapeError(refuse(argument, "shape (K, N) with K, N >= 1", tuple(log_weights.shape), cure))
    return log_weights


def _refuse_empty(log_weights: torch.Tensor, dim: int) -> None:
    if log_weights.shape[dim] == 0:
        cure = "Draw at least one particle."
        raise ShapeError(refuse("log_weights", f"K >= 1 along dim={dim}", tuple(log_weights.shape), cure))
