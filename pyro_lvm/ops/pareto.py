"""Pareto-smoothed importance sampling for all data at once: the tail index k-hat of the weights of each datum.

The largest M weights of a datum are fitted by a generalized Pareto distribution; its shape k-hat says how many moments
of the weights exist (fewer than 1 / k), and so whether their mean can be trusted. Vehtari, Simpson, Gelman, Yao & Gabry
2024 ("Pareto smoothed importance sampling"); the fit is that of Zhang & Stephens 2009. The smoothed weights are a
diagnostic: they lower log p-hat where k-hat is high, so the evidence stays the raw log mean weight.

One datum never spoils another: what cannot be fitted is NaN, and degenerate weights are +inf. The work is done in
float64, and the grid of the fit in chunks of data, so that it stays within a fixed memory.
"""

import math

import torch

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import ShapeError
from pyro_lvm.ops.log_space import check_table, log_weight_table

__all__ = [
    "MIN_TAIL",
    "fit_generalized_pareto",
    "khat_from_tail",
    "khat_threshold",
    "largest",
    "pareto_khat",
    "pareto_smooth",
    "tail_size",
]

# Fewer exceedances than these are not fitted, as in ArviZ and loo.
MIN_TAIL = 5
# Largest number of float64 elements in one temporary: 2 MiB, what a cache holds.
_MAX_ELEMENTS = 2**18
# exp of less is subnormal in float64.
_LOG_TINY = math.log(torch.finfo(torch.float64).tiny)


def tail_size(num_particles: int) -> int:
    r"""Number M of weights in the tail, :math:`\lfloor \min(K / 5, 3 \sqrt K) \rfloor`.

    Programs differ by one: ArviZ 1.x rounds down, ArviZ 0.x and loo round up. Down is taken here: it is what ArviZ does
    now, and it makes K = 25 the first K with the five exceedances that a fit needs.

    Args:
        num_particles: Number of particles K.

    Returns:
        M; the (M+1)-th largest weight is the cut-off.

    Raises:
        ShapeError: K < 1.

    Example:
        >>> tail_size(24), tail_size(25), tail_size(1000)
        (4, 5, 94)
    """
    particles = check_positive_int("num_particles", num_particles)
    return min(particles // 5, math.isqrt(9 * particles))


def khat_threshold(num_particles: int) -> float:
    r"""Largest k-hat at which K particles suffice, :math:`\min(1 - 1 / \log_{10} K, 0.7)` (Vehtari et al. 2024).

    Args:
        num_particles: Number of particles K.

    Returns:
        The threshold; at or below zero for K <= 10 and -inf for K = 1.

    Raises:
        ShapeError: K < 1.

    Example:
        >>> khat_threshold(100), khat_threshold(100_000)
        (0.5, 0.7)
    """
    particles = check_positive_int("num_particles", num_particles)
    return -math.inf if particles == 1 else min(1 - 1 / math.log10(particles), 0.7)


def fit_generalized_pareto(exceedances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Shape and scale of a generalized Pareto distribution, one fit per column.

    .. math::
        P(y > t) = (1 + k t / \sigma)^{-1/k}

    The quasi-Bayesian estimate of Zhang & Stephens 2009: the posterior mean of b = -k / sigma over a grid of
    30 + sqrt(M) points under a data-dependent prior, and k as the mean of log(1 - b y). The shape is then drawn towards
    0.5 as if by ten more observations (Vehtari et al. 2024): (M k + 5) / (M + 10). The scale is not.

    Args:
        exceedances: Weights less the cut-off, ``(M, N)``, each column ascending and >= 0, M >= 5, in any unit.

    Returns:
        k-hat ``(N,)`` and sigma ``(N,)`` in the unit of the exceedances, float64. Both are NaN for a column whose first
        quartile is zero (ties with the cut-off) or which holds a NaN.

    Raises:
        DataTypeError: not a floating tensor.
        ShapeError: not ``(M, N)``, or M < 5.

    Example:
        >>> p = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        >>> khat, sigma = fit_generalized_pareto((((1 - p) ** -0.3 - 1) / 0.3)[:, None])  # k = 0.3, sigma = 1
        >>> print(f"{khat.item():.2f} {sigma.item():.2f}")
        0.30 1.00
    """
    table = log_weight_table(exceedances, "exceedances").detach()  # (M, N)
    size = len(table)
    if size < MIN_TAIL:
        cure = "Use more particles: 25 give a tail of five."
        raise ShapeError(refuse("exceedances", f"{MIN_TAIL} rows or more", size, cure))
    grid_size = 30 + math.isqrt(size)
    width = max(1, _MAX_ELEMENTS // (grid_size * size))
    fits = [_fit_columns(part, grid_size) for part in table.split(width, dim=1)]
    return torch.cat([khat for khat, _ in fits]), torch.cat([sigma for _, sigma in fits])


def khat_from_tail(log_tail: torch.Tensor, noise: torch.Tensor | float = 0.0) -> torch.Tensor:
    """k-hat from the M+1 largest log-weights alone, as kept while streaming.

    Args:
        log_tail: The M+1 largest log-weights of each datum in nats, ``(M+1, N)``, sorted *descending* as
            ``torch.topk`` returns them; the last row is the cut-off.
        noise: Rounding error of a log-weight in nats, ``(N,)`` or one number. A tail that is no wider than this is
            taken for constant.

    Returns:
        k-hat, ``(N,)`` float64. NaN: no fit (M < 5, constant tail, too many ties with the cut-off, or a log-weight
        that is NaN or +inf). +inf: degenerate (fewer than M+1 weights are positive, or most of the tail is more than
        708 nats below the largest weight).

    Raises:
        DataTypeError: not a floating tensor.
        ShapeError: not ``(M+1, N)``.

    Example:
        >>> khat_from_tail(torch.full((6, 1), -3.0))
        tensor([nan], dtype=torch.float64)
    """
    table = log_weight_table(log_tail, "log_tail").detach()  # (M+1, N)
    if len(table) <= MIN_TAIL:
        return table.new_full((table.shape[1],), math.nan)
    return _fit_tail(table, noise)[0]


def pareto_khat(log_weights: torch.Tensor, noise: torch.Tensor | float = 0.0) -> torch.Tensor:
    """k-hat of the weights of each datum.

    Bias: low where q misses part of the posterior; weights that were never drawn leave no tail. The ten prior
    observations draw it towards 0.5, visibly so for K in the hundreds.

    Args:
        log_weights: Log-weights in nats, ``(K, N)``; normalised or not makes no difference.
        noise: Rounding error of a log-weight in nats, ``(N,)`` or one number.

    Returns:
        k-hat, ``(N,)`` float64, with the NaN and +inf of :func:`khat_from_tail`; NaN for K < 25.

    Raises:
        DataTypeError: not a floating tensor.
        ShapeError: not ``(K, N)`` with K, N >= 1.

    Example:
        >>> p = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        >>> log_weights = -0.6 * torch.log1p(-p)[:, None]  # Pareto weights of tail index 0.6
        >>> print(f"{pareto_khat(log_weights).item():.2f}")
        0.59
    """
    table = check_table(log_weights).detach()  # (K, N)
    return khat_from_tail(largest(table, tail_size(len(table)) + 1), noise)


def largest(table: torch.Tensor, count: int) -> torch.Tensor:
    """The largest entries of each column in float64, ``(count, N)`` descending: the values of ``torch.topk``.

    On a CPU NumPy selects them: vectorised, and several times as fast. Both take NaN for larger than all numbers.

    Args:
        table: Log-weights, ``(K, N)``, without a graph.
        count: How many, at most K.

    Example:
        >>> largest(torch.tensor([[1.0], [3.0], [2.0]]), 2).flatten()
        tensor([3., 2.], dtype=torch.float64)
    """
    if table.device.type != "cpu":
        return table.topk(count, dim=0).values.double()
    table = table if table.dtype in (torch.float32, torch.float64) else table.double()
    parts = []
    for part in table.split(max(1, _MAX_ELEMENTS // len(table)), dim=1):
        rows = part.T.clone(memory_format=torch.contiguous_format).numpy()  # (n, K), its own memory
        if count < len(table):
            rows.partition(len(table) - count, axis=1)
        top = rows[:, len(table) - count :]  # (n, count)
        top.sort(axis=1)
        parts.append(torch.from_numpy(top).T.flip(0).double())
    return torch.cat(parts, dim=1)


def pareto_smooth(log_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Pareto-smoothed log-weights and k-hat.

    The i-th smallest of the M tail weights becomes the quantile :math:`u + F^{-1}((i - 1/2) / M)` of the fit above the
    cut-off u, no larger than the largest raw weight (Vehtari et al. 2024).

    Bias: :func:`log_mean_exp` of the result is the smoothed evidence, biased low where k-hat is high. Report the raw
    :func:`log_evidence`; smoothing is a diagnostic.

    Args:
        log_weights: Log-weights in nats, ``(K, N)``.

    Returns:
        Smoothed log-weights in nats, ``(K, N)`` float64, not self-normalised, in the order given; the raw ones where
        k-hat is NaN or +inf. And k-hat, ``(N,)``.

    Raises:
        DataTypeError: not a floating tensor.
        ShapeError: not ``(K, N)`` with K, N >= 1.

    Example:
        >>> log_weights = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None] ** 2
        >>> smoothed, khat = pareto_smooth(log_weights)
        >>> bool((smoothed[:-10] == log_weights[:-10]).all())  # the body is left alone
        True
    """
    table = log_weight_table(log_weights).detach()  # (K, N)
    size = tail_size(len(table))
    log_tail, particle = table.topk(size + 1, dim=0)  # (M+1, N)
    if size < MIN_TAIL:
        return table.clone(), khat_from_tail(log_tail)
    khat, sigma = _fit_tail(log_tail, 0.0)
    top, cutoff = log_tail[0], log_tail[-1]  # (N,)
    rank = torch.arange(size - 0.5, 0, -1, dtype=table.dtype, device=table.device)[:, None]  # (M, 1) descending
    weights = torch.exp(cutoff - top) + _quantile(rank / size, khat, sigma)  # (M, N), in units of the largest
    smoothed = torch.where(khat.isfinite(), top + weights.log().clamp(max=0), log_tail[:-1])  # (M, N)
    return table.scatter(0, particle[:-1], smoothed), khat


def _fit_tail(log_tail: torch.Tensor, noise: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    """k-hat, and sigma in units of the largest weight, of a descending ``(M+1, N)`` tail."""
    top, cutoff = log_tail[0], log_tail[-1]  # (N,)
    tail = log_tail[:-1].flip(0)  # (M, N) ascending
    # w - u, written so that neither a small difference nor a small weight loses digits.
    exceedances = torch.exp(tail - top) * -torch.expm1(cutoff - tail)  # (M, N)
    khat, sigma = fit_generalized_pareto(exceedances)
    degenerate = cutoff.isneginf() | (tail[_quartile(len(tail))] - top < _LOG_TINY)  # (N,)
    khat = torch.where(degenerate, math.inf, khat)
    unfit = log_tail.isnan().any(dim=0) | top.isposinf() | (top - cutoff <= noise)  # (N,)
    return torch.where(unfit, math.nan, khat), sigma


def _fit_columns(exceedances: torch.Tensor, grid_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The fit of Zhang & Stephens 2009 for ``(M, n)`` exceedances and its grid of b = -k / sigma."""
    size, mean = len(exceedances), exceedances.mean(dim=0)  # (n,)
    quartile = exceedances[_quartile(size)]  # (n,)
    points = torch.arange(0.5, grid_size, dtype=exceedances.dtype, device=exceedances.device)[:, None]  # (m, 1)
    # A quartile of zero makes the grid infinite, 0 x inf NaN, and so the fit NaN.
    grid = 1 / exceedances[-1] + (1 - (grid_size / points).sqrt()) / (3 * quartile)  # (m, n)
    shape = (-grid[:, None] * exceedances).log1p_().mean(dim=1)  # (m, n)
    log_likelihood = -size * (_scale(grid, shape, mean).log() + shape + 1)  # (m, n)
    best = (grid * log_likelihood.softmax(dim=0)).sum(dim=0)  # (n,)
    shape = torch.log1p(-best * exceedances).mean(dim=0)  # (n,)
    return (size * shape + 5) / (size + 10), _scale(best, shape, mean)


def _scale(b: torch.Tensor, shape: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Sigma = -k / b, and its limit at b = 0, the exponential distribution."""
    return torch.where(b == 0, mean, -shape / b)


def _quartile(size: int) -> int:
    """Row of the first quartile among ``size`` ascending ones."""
    return int(size / 4 + 0.5) - 1


def _quantile(probability: torch.Tensor, khat: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Inverse distribution function of the generalized Pareto distribution."""
    hazard = -torch.log1p(-probability)  # the quantile for k = 0, in units of sigma
    return sigma * torch.where(khat == 0, hazard, torch.expm1(khat * hazard) / khat)
