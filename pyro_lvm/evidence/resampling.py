"""Equally weighted draws out of a stream of weighted ones."""

from collections.abc import Mapping

import torch

__all__ = ["Reservoir"]


class Reservoir:
    r"""M draws of each of N data, the m-th of them particle k with probability :math:`w_k / \sum_j w_j`.

    Particles come in chunks and are dropped again: M draws and one chunk are all that is kept. A chunk that holds the
    share s of the weight so far takes over the share s of the places, evenly spaced, and fills them by systematic
    resampling of its own weights. In one chunk each particle has M w / sum(w) places, rounded up or down.

    Sources: systematic resampling of Kitagawa (1996), Monte Carlo filter and smoother, appendix; a reservoir with
    weights of Chao (1982), A general purpose unequal probability sampling plan, here for M places of one draw each.

    Args:
        num_draws: M.

    Example:
        >>> reservoir = Reservoir(4)
        >>> weights = torch.tensor([[0.0], [0.5], [0.5]]).log()
        >>> reservoir.update(weights, {"z": torch.tensor([[1.0], [2.0], [3.0]])})
        >>> reservoir.values["z"].flatten()
        tensor([2., 2., 3., 3.])
    """

    def __init__(self, num_draws: int) -> None:
        self.num_draws = num_draws
        self.count = 0
        self.values: dict[str, torch.Tensor] = {}
        self.particle = self._log_total = torch.empty(0)

    def update(self, log_weights: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Take in k particles.

        Args:
            log_weights: in nats, ``(k, N)``; NaN and plus infinity count as no weight.
            values: name -> the particles, ``(k, N, ...)``.
        """
        table = log_weights.detach().double()
        table = table.masked_fill(~(table < torch.inf), -torch.inf)  # (k, N)
        own = table.logsumexp(0)  # (N,)
        taken = self._taken(own)  # (M, N)
        place, size = taken.cumsum(0) - 1, taken.sum(0).clamp(min=1)  # among those that are taken
        at = (place + torch.rand_like(own)) / size  # (M, N) in (0, 1), evenly spaced
        up_to = (table - torch.where(own.isfinite(), own, 0.0)).exp().cumsum(0)  # (k, N)
        index = torch.searchsorted(up_to.T.contiguous(), (at * up_to[-1]).T.contiguous(), right=True).T  # (M, N)
        index = torch.where(own.isfinite(), index, place % len(table)).clamp(0, len(table) - 1)
        column = torch.arange(table.shape[1], device=table.device)
        chosen = {name: value[index, column] for name, value in values.items()}  # (M, N, ...)
        particle = self.count + index
        if self.count:
            chosen = {name: _where(taken, new, self.values[name]) for name, new in chosen.items()}
            particle = torch.where(taken, particle, self.particle)
        self.values, self.particle, self.count = chosen, particle, self.count + len(table)

    def _taken(self, log_total: torch.Tensor) -> torch.Tensor:
        """The places that go to a chunk of this weight, ``(M, N)``; all of the first."""
        places = torch.arange(self.num_draws + 1, dtype=torch.float64, device=log_total.device)[:, None]
        if not self.count:
            self._log_total = log_total
            return (places[1:] > 0).expand(-1, len(log_total))
        both = torch.logaddexp(self._log_total, log_total)  # (N,)
        share = torch.where(log_total.isfinite(), (log_total - both).exp(), 0.0)
        self._log_total = both
        return (places * share + torch.rand_like(share)).floor().diff(dim=0) > 0

    def shuffle(self) -> None:
        """Put the draws of each datum in a random order, which that of the places is not."""
        order = torch.rand_like(self.particle, dtype=torch.float64).argsort(0)  # (M, N)
        column = torch.arange(order.shape[1], device=order.device)
        self.values = {name: value[order, column] for name, value in self.values.items()}
        self.particle = self.particle[order, column]


def _where(mask: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.reshape(*mask.shape, *(1,) * (new.dim() - 2)), new, old)
