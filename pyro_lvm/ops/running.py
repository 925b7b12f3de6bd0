"""Mean and variance of tensors that come one after the other, without keeping them."""

import torch

__all__ = ["RunningMoments"]


class RunningMoments:
    """Centred sums of tensors of one shape, in float64 (Welford 1962).

    Example:
        >>> moments = RunningMoments()
        >>> for value in (1.0, 2.0, 6.0):
        ...     moments.add(torch.tensor(value))
        >>> moments.mean, moments.variance
        (tensor(3., dtype=torch.float64), tensor(7., dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, value: torch.Tensor) -> None:
        """Take one tensor more."""
        self.count += 1
        step = value.detach().double() - self.mean.to(value.device)
        self.mean = self.mean.to(value.device) + step / self.count
        self.squares = self.squares.to(value.device) + step * (value.detach().double() - self.mean)

    @property
    def variance(self) -> torch.Tensor:
        """Unbiased; NaN for one tensor."""
        return self.squares / (self.count - 1) if self.count > 1 else torch.full_like(self.squares, torch.nan)
