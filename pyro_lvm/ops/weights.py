r"""What a table of log-weights says about log p(x): the raw estimate, its error, its bias, and the bounds.

With :math:`w_k = p(x, z_k) / q(z_k \mid x)` and :math:`z_k \sim q`, :math:`\hat p = \frac1K \sum_k w_k` is unbiased
for p(x). All functions take ``(K, N)`` log-weights and return ``(N,)`` float64 tensors, attached to the graph.
NaN and +inf in the weights of a datum spoil that datum alone.
"""

import torch

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import ShapeError
from pyro_lvm.ops.log_space import log_mean_exp, log_weight_table
from pyro_lvm.ops.moments import weight_moments

__all__ = [
    "delta_bias",
    "effective_sample_size",
    "elbo",
    "importance_weighted_bound",
    "log_evidence",
    "standard_error",
]


def log_evidence(log_weights: torch.Tensor) -> torch.Tensor:
    r"""The raw importance-sampling estimate, :math:`\log \hat p(x) = \log \frac1K \sum_k w_k`.

    Bias: low in expectation (Jensen); see :func:`delta_bias`.

    Args:
        log_weights: Log-weights in nats, ``(K, N)``.

    Returns:
        log p-hat in nats, ``(N,)``; -inf where every weight is zero.

    Raises:
        DataTypeError: not a floating tensor.
        ShapeError: not ``(K, N)`` with K, N >= 1.

    Example:
        >>> log_evidence(torch.tensor([[1.0], [3.0]]).log()).exp()
        tensor([2.0000], dtype=torch.float64)
    """
    return log_mean_exp(log_weight_table(log_weights))


def effective_sample_size(log_weights: torch.Tensor) -> torch.Tensor:
    r"""Effective sample size, :math:`(\sum_k w_k)^2 / \sum_k w_k^2 \in [1, K]` (Kong 1992).

    Bias: high where q misses part of the posterior. Weights that were never drawn are not counted.

    Args:
        log_weights: Log-weights in nats, ``(K, N)``.

    Returns:
        A number of particles, ``(N,)``; K for equal weights, NaN where every weight is zero.

    Raises:
        DataTypeError: not a floating tensor.
        ShapeError: not ``(K, N)`` with K, N >= 1.

    Example:
        >>> effective_sample_size(torch.tensor([[1.0], [1.0], [2.0]]).log())  # 4^2 / 6
        tensor([2.6667], dtype=torch.float64)
    """
    return weight_moments(log_weights).effective_sample_size


def standard_error(log_weights: torch.Tensor) -> torch.Tensor:
    r"""Standard error of log p-hat by the delta method.

    .. math::
        \mathrm{se}^2 = \frac{\widehat{\mathrm{Var}}(w)}{K \hat p^2}
                      = \frac{1}{K - 1} \Big( \frac{K \sum_k w_k^2}{(\sum_k w_k)^2} - 1 \Big)

    Bias: low where the weights have a heavy tail; trust it only as far as k-hat allows.

    Args:
        log_weights: Log-weights in nats, ``(K, N)``.

    Returns:
        Standard error in nats, ``(N,)``, between 0 and 1; NaN for K = 1 and where every weight is zero.

    Raises:
        DataTypeError: not a floating tensor.
        ShapeError: not ``(K, N)`` with K, N >= 1.

    Example:
        >>> standard_error(torch.tensor([[1.0], [3.0]]).log())  # sqrt(2 * 10 / 16 - 1)
        tensor([0.5000], dtype=torch.float64)
    """
    return weight_moments(log_weights).relative_variance.sqrt()


def delta_bias(log_weights: torch.Tensor) -> torch.Tensor:
    r"""Estimated bias of log p-hat, :math:`\mathbb{E}[\log \hat p] - \log p \approx -\mathrm{se}^2 / 2`.

    The leading term is :math:`-\mathrm{Var}(w) / (2 K p(x)^2)`. It has one sign for every datum, so it does not
    average out over data as the standard error does: a mean over N data keeps it in full. It is an estimate, not a
    correction, and far too small where the tail is heavy. Sources: Nowozin 2018 (debiasing evidence
    approximations); Domke & Sheldon 2018; Maddison et al. 2017, for estimators of p(x) in general.

    Args:
        log_weights: Log-weights in nats, ``(K, N)``.

    Returns:
        Bias in nats, ``(N,)``, never positive; NaN for K = 1 and where every weight is zero.

    Raises:
        DataTypeError: not a floating tensor.
        ShapeError: not ``(K, N)`` with K, N >= 1.

    Example:
        >>> delta_bias(torch.tensor([[1.0], [3.0]]).log())
        tensor([-0.1250], dtype=torch.float64)
    """
    return -0.5 * weight_moments(log_weights).relative_variance


def elbo(log_weights: torch.Tensor) -> torch.Tensor:
    r"""Evidence lower bound, the mean log-weight :math:`\frac1K \sum_k \log w_k`.

    Bias: none for the ELBO; the ELBO lies below log p(x) by KL(q(z|x) || p(z|x)).

    Args:
        log_weights: Log-weights in nats, ``(K, N)``.

    Returns:
        ELBO in nats, ``(N,)``; -inf as soon as one weight is zero, which is the ELBO of such a q.

    Raises:
        DataTypeError: not a floating tensor.
        ShapeError: not ``(K, N)`` with K, N >= 1.

    Example:
        >>> elbo(torch.tensor([[-1.0], [-3.0]]))
        tensor([-2.], dtype=torch.float64)
    """
    return log_weight_table(log_weights).mean(dim=0)


def importance_weighted_bound(log_weights: torch.Tensor, num_particles: int) -> torch.Tensor:
    r"""Importance-weighted bound of k particles, :math:`\mathbb{E} \log \frac1k \sum_{j=1}^k w_j`.

    The mean over the K / k disjoint groups of consecutive particles (Burda et al. 2016, equation 8); k = 1 is the
    ELBO and k = K the raw log p-hat.

    Bias: none for the bound, which lies below log p(x) and rises with k.

    Args:
        log_weights: Log-weights in nats, ``(K, N)``.
        num_particles: Size k of a group; it must divide K.

    Returns:
        The bound in nats, ``(N,)``.

    Raises:
        DataTypeError: not a floating tensor, or k is not an integer.
        ShapeError: not ``(K, N)`` with K, N >= 1, or k does not divide K.

    Example:
        >>> importance_weighted_bound(torch.tensor([[1.0], [3.0], [2.0], [2.0]]).log(), num_particles=2).exp()
        tensor([2.0000], dtype=torch.float64)
    """
    table = log_weight_table(log_weights)  # (K, N)
    size = check_positive_int("num_particles", num_particles)
    if len(table) % size:
        cure = "Choose a divisor, or draw a multiple of it."
        raise ShapeError(refuse("num_particles", f"a divisor of K = {len(table)}", size, cure))
    groups = table.unflatten(0, (-1, size))  # (K / k, k, N)
    return log_mean_exp(groups, dim=1).mean(dim=0)
