r"""log p(x) without bias, by a randomised number of particles (single-term multilevel Monte Carlo).

The log of a mean of K weights is biased low. Twice as many particles are less biased, and the differences between one
level and the next add up to what is missing:

.. math:: \log p(x) = E \log \hat p_K + \sum_{l=1}^\infty E \Delta_l, \qquad
          \Delta_l = \log \frac{a + b}2 - \frac{\log a + \log b}2

with a and b the mean weights of two halves of :math:`2^l K` fresh particles. One level drawn at random stands for the
sum: :math:`\Delta_L / P(L)`. The halves make the error of :math:`\Delta_l` cancel in the first order, so that its
square decays like :math:`4^{-l}` where weights have three moments and more; with a tail index k it decays like
:math:`2^{-l (1/k - 1)}`. Levels of probability :math:`\propto 2^{-3l/2}` then have a finite mean cost, and a finite
variance for k below 0.4; no levels of finite mean cost have one from k = 0.5 on.

Rhee & Glynn 2015 for the single term; Goda & Ishikawa 2019 ("Multilevel Monte Carlo estimation of log marginal
likelihood", arXiv 1912.10636) for the halves; Shi & Cornish 2021 ("On multilevel Monte Carlo unbiased gradient
estimation for deep latent variable models").
"""

import math

import torch

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import ShapeError
from pyro_lvm.ops.log_space import check_table, log_weight_table

__all__ = ["HalfSums", "antithetic_difference", "draw_levels", "jackknife", "level_probability"]

_DECAY = (
    1.5  # P(l) is proportional to 2^(-1.5 l): halfway between the decay of variances, 2, and the growth of costs, 1
)


def level_probability(level: int | torch.Tensor) -> torch.Tensor:
    r"""P(l), proportional to :math:`2^{-3l/2}` for l = 1, 2, ... without end.

    Example:
        >>> level_probability(1)
        tensor(0.6464, dtype=torch.float64)
    """
    level = torch.as_tensor(level, dtype=torch.float64)
    return (1 - 2**-_DECAY) * torch.exp2(-_DECAY * (level - 1))


def draw_levels(*shape: int) -> torch.Tensor:
    """Independent levels with `level_probability`, int64; the mean cost of one is 4.4 times that of a base estimate.

    The uniform numbers that they are made of end at 2^-53: levels beyond 35, of 2^35 K particles, never come.
    """
    uniform = 1 - torch.rand(*shape, dtype=torch.float64)  # above zero
    return 1 + (uniform.log2() / -_DECAY).floor().long()


def antithetic_difference(log_first: torch.Tensor, log_second: torch.Tensor) -> torch.Tensor:
    r"""log of the mean of a and b less the mean of their logs, :math:`\log \cosh \frac{\log a - \log b}2 \ge 0`.

    Args:
        log_first: Log mean weight of one half of the particles, nats.
        log_second: Of the other half.

    Returns:
        Nats, of the same shape; infinite where one half has no weight, NaN where neither has.

    Example:
        >>> antithetic_difference(torch.tensor(1.0).log(), torch.tensor(4.0).log()).exp()  # 2.5 / 2
        tensor(1.2500)
    """
    half = (log_first - log_second).abs() / 2
    return half + torch.log1p(torch.exp(-2 * half)) - math.log(2)


class HalfSums:
    """The log mean weights of the first and of the second half of K particles, over chunks of them.

    Args:
        num_data: Number of data N.
        num_particles: K, even.
        device: Where the log-weights come from.

    Example:
        >>> halves = HalfSums(1, 4)
        >>> halves.update(torch.tensor([[1.0], [1.0], [3.0]]).log())
        >>> halves.update(torch.tensor([[5.0]]).log())
        >>> halves.difference().exp()  # 2.5 / sqrt(1 * 4)
        tensor([1.2500], dtype=torch.float64)
    """

    def __init__(self, num_data: int, num_particles: int, device: torch.device | str = "cpu") -> None:
        self.num_particles = check_positive_int("num_particles", num_particles, 2)
        if self.num_particles % 2:
            raise ShapeError(refuse("num_particles", "an even number", num_particles, "Pass one more."))
        self._seen = 0
        shape = (2, check_positive_int("num_data", num_data))
        self._log_sums = torch.full(shape, -math.inf, dtype=torch.float64, device=device)  # (2, N)

    def update(self, log_weights: torch.Tensor, noise_scale: torch.Tensor | None = None) -> None:
        """Take in log-weights in nats, ``(k, N)``; ``noise_scale`` is for other collectors."""
        table = check_table(log_weights).detach().double()  # (k, N)
        of_first = min(len(table), max(0, self.num_particles // 2 - self._seen))
        self._seen += len(table)
        for half, part in enumerate((table[:of_first], table[of_first:])):
            if len(part):
                self._log_sums[half] = torch.logaddexp(self._log_sums[half], part.logsumexp(0))

    def difference(self) -> torch.Tensor:
        """`antithetic_difference` of the halves, ``(N,)`` nats.

        Raises:
            ShapeError: the number of particles taken in is not ``num_particles``.
        """
        if self._seen != self.num_particles:
            cure = "Every particle counts once: call update until the chunks add up."
            raise ShapeError(refuse("num_particles", f"{self.num_particles} particles", self._seen, cure))
        return antithetic_difference(self._log_sums[0], self._log_sums[1])  # log K / 2 cancels


def jackknife(log_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""log p-hat corrected by the jackknife: without the bias of the order 1/K.

    .. math:: K \log \hat p - \frac{K - 1}K \sum_k \log \hat p_{-k}

    with :math:`\hat p_{-k}` the mean of all weights but the k-th: the jackknife of order one of Nowozin 2018
    ("Debiasing evidence approximations: on importance-weighted autoencoders and jackknife variational inference").

    Args:
        log_weights: Log-weights in nats, ``(K, N)``, K >= 2.

    Returns:
        Value and jackknife standard error, each ``(N,)`` float64, in nats; infinite where all but one weight are zero.

    Raises:
        ShapeError: K < 2.

    Example:
        >>> value, stderr = jackknife(torch.tensor([[1.0], [3.0]]).log())
        >>> value.exp()  # 2^2 / sqrt(1 * 3)
        tensor([2.3094], dtype=torch.float64)
    """
    table = log_weight_table(log_weights)  # (K, N)
    size = check_positive_int("the number of rows of log_weights", len(table), 2)
    log_sum = table.logsumexp(0)  # (N,)
    share = (table - log_sum).exp()  # (K, N)
    left_out = torch.log1p(-share.clamp(max=1.0))  # (K, N) log p-hat without each, less log(sum / (K - 1))
    value = log_sum - math.log(size) + (size - 1) * (math.log1p(-1 / size) - left_out.mean(0))
    return value, (left_out.var(0) * (size - 1) ** 2 / size).sqrt()
