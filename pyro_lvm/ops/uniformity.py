"""Exact tests of numbers between 0 and 1: whether they are symmetric about 1/2, and whether they are uniform.

Both p-values are those of finite samples, and both tests see any departure. Of many, `holm` keeps the probability of a
single false alarm.
"""

import numpy as np
import torch

__all__ = ["holm", "symmetry_test", "uniformity_test"]


def symmetry_test(values: torch.Tensor) -> torch.Tensor:
    r"""p-values of symmetry about 1/2, one a column, by the Kolmogorov-Smirnov distance between v and 1 - v.

    .. math:: D = \sup_t |F_n(t) - (1 - F_n((1 - t)^-))| = \max_j |S_j| / n

    where S_j adds up the signs of v - 1/2, those farthest from 1/2 first. Under symmetry the signs are coins whatever
    the distances, so that D is the largest excursion of a random walk, whose distribution follows by reflection. The
    two samples are one, and the two-sample p-value would be wrong.

    Args:
        values: ``(n, D)``, from a continuous distribution.

    Returns:
        ``(D,)`` float64, to an absolute 1e-15.

    References:
        Butler (1969), A test for symmetry using the sample distribution function.

    Example:
        >>> symmetry_test(torch.tensor([[0.1], [0.3], [0.6], [0.95]]))  # |S| is at most 1, as it is at once
        tensor([1.], dtype=torch.float64)
    """
    from scipy.stats import binom

    centred = values.double().cpu() - 0.5  # (n, D)
    order = centred.abs().argsort(0, descending=True)
    walk = centred.sign().gather(0, order).cumsum(0)
    count, highest = len(walk), walk.abs().amax(0).clamp(min=1)
    found = []
    for height in highest.tolist():
        turns = np.arange(-(count // (2 * height) + 2), count // (2 * height) + 3)
        low, high = ((2 * turns + side) * height for side in (-1, 1))  # of open intervals for the end of the walk
        inside = binom.cdf(np.ceil((high + count) / 2) - 1, count, 0.5) - binom.cdf((low + count) // 2, count, 0.5)
        found.append(1.0 - float(((-1.0) ** np.abs(turns) * inside).sum()))
    return torch.tensor(found, dtype=torch.float64).clamp(0, 1)


def uniformity_test(values: torch.Tensor) -> torch.Tensor:
    """p-values of a uniform distribution on (0, 1), one a column, by the Kolmogorov-Smirnov distance from it.

    Args:
        values: ``(n, D)``.

    Returns:
        ``(D,)`` float64.

    Example:
        >>> uniformity_test(torch.tensor([[0.25], [0.75]]))
        tensor([1.], dtype=torch.float64)
    """
    from scipy.stats import kstwo

    ordered = values.double().cpu().sort(0).values  # (n, D)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64)[:, None] / len(ordered)
    distance = torch.maximum((steps[1:] - ordered).amax(0), (ordered - steps[:-1]).amax(0))
    return torch.from_numpy(np.atleast_1d(kstwo.sf(distance.numpy(), len(ordered))))


def holm(p_values: torch.Tensor) -> torch.Tensor:
    """p-values adjusted for their number: below a level with at most that probability for all together (Holm 1979).

    Args:
        p_values: ``(D,)``, dependent in any way.

    Example:
        >>> holm(torch.tensor([0.01, 0.5, 0.02]))
        tensor([0.0300, 0.5000, 0.0400])
    """
    ordered, order = p_values.sort()
    factors = torch.arange(len(ordered), 0, -1, dtype=ordered.dtype)
    adjusted = (ordered * factors).cummax(0).values.clamp(max=1)
    return torch.empty_like(adjusted).scatter(0, order, adjusted)
