"""The verdict on each datum's estimate of log p(x), one word out of :data:`STATUSES`.

None of the words says "correct": particles of one guide cannot see a mode that this guide misses.
"""

import torch

from pyro_lvm._checks import check_positive_int
from pyro_lvm.ops.pareto import khat_threshold

__all__ = ["DOUBTFUL", "STATUSES", "classify", "status_names"]

#: Statuses from the best to the worst; a code is an index into this tuple. ``exact`` is never given by weights.
STATUSES = ("exact", "zero_variance", "no_fault_found", "heavy_tail", "unreliable", "no_support", "nonfinite")


#: Statuses of a value that is not to be quoted.
DOUBTFUL = ("unreliable", "no_support", "nonfinite")


def classify(
    value: torch.Tensor,
    spread: torch.Tensor,
    noise: torch.Tensor,
    khat: torch.Tensor,
    flat_tail: torch.Tensor,
    even: torch.Tensor,
    num_particles: int,
) -> torch.Tensor:
    r"""Status code of each datum.

    In this order, and with t the :func:`~pyro_lvm.ops.khat_threshold` of K particles:

    - ``nonfinite``: a log-weight is NaN or +inf;
    - ``no_support``: all log-weights are -inf;
    - ``zero_variance``: K >= 2 and spread <= noise, equal weights up to rounding. Exact only if the guide covers the
      posterior;
    - ``no_fault_found``: k-hat < min(0.5, t), or a flat tail: weights that are bounded by a value that many of them
      have, as those of a guide of discrete latents, have all moments, and no k-hat;
    - ``heavy_tail``: 0.5 <= k-hat <= t. The value is usable, its standard error optimistic. So is it with a larger
      k-hat where the weights are so even that what their tail adds cannot matter: that of a nearly exact guide is a
      tail of differences next to nothing;
    - ``unreliable``: all else, k-hat = NaN (too few particles, or no tail to fit) included.

    Args:
        value: Log mean weight in nats, ``(N,)``. It is NaN or +inf exactly where a log-weight is.
        spread: Largest less smallest log-weight in nats, ``(N,)``.
        noise: Rounding error of a log-weight in nats, ``(N,)``; not finite means unknown.
        khat: Tail index, ``(N,)``.
        flat_tail: Whether there are enough particles for a tail and its weights are all equal, ``(N,)``.
        even: Whether ESS / K is at least 0.99, ``(N,)``.
        num_particles: Number of particles K.

    Returns:
        Indices into :data:`STATUSES`, ``(N,)`` int64.

    Raises:
        ShapeError: K < 1.

    Example:
        >>> value, spread, khat = torch.zeros(2), torch.tensor([3.0, 0.0]), torch.tensor([0.6, torch.nan])
        >>> no = torch.zeros(2, dtype=bool)
        >>> status_names(classify(value, spread, torch.zeros(2), khat, no, no, num_particles=1000))
        ('heavy_tail', 'zero_variance')
    """
    particles = check_positive_int("num_particles", num_particles)
    threshold = khat_threshold(particles)
    code = torch.full_like(value, STATUSES.index("unreliable"), dtype=torch.int64)  # (N,)
    rules = {  # later rules win
        "heavy_tail": ((khat >= 0.5) & (khat <= threshold)) | (even & khat.isfinite()),
        "no_fault_found": (khat < min(0.5, threshold)) | flat_tail,
        "zero_variance": (spread <= noise) & noise.isfinite() & (particles >= 2),
        "no_support": value.isneginf(),
        "nonfinite": value.isnan() | value.isposinf(),
    }
    for name, holds in rules.items():
        code = code.masked_fill(holds, STATUSES.index(name))
    return code


def status_names(codes: torch.Tensor) -> tuple[str, ...]:
    """The words for status codes.

    Args:
        codes: Indices into :data:`STATUSES`, ``(N,)``.

    Returns:
        N words.

    Example:
        >>> status_names(torch.tensor([0, 4]))
        ('exact', 'unreliable')
    """
    return tuple(STATUSES[code] for code in codes.tolist())
