"""`DatasetMean`: the mean of log p(x) over a data set, how far to trust it, and where it came from."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pyro_lvm._files import read_json, write_json

__all__ = ["LARGE_SHARE", "DatasetMean"]

LARGE_SHARE = 0.25  # of the variance: from there on it rests on one datum, and says little


@dataclass(frozen=True)
class DatasetMean:
    r"""Estimates of :math:`\frac1N \sum_n \log p(x_n)`, nats per datum.

    Attributes:
        value: the unbiased one.
        stderr: Monte Carlo standard error of ``value``, given these data: from two independent replicates of each
            datum, so that neither the data nor the delta method have a part in it; about N degrees of freedom.
        data_stderr: standard error of the mean as an estimate for the population that the data are a sample of; the
            variance of the draws is taken out of it.
        plain: mean of log p-hat with K particles a datum, of the same draws. Biased low.
        plain_stderr: its Monte Carlo standard error (delta method), which does not see the bias.
        delta: ``plain`` with the bias taken out that the delta method estimates.
        jackknife: the mean of log p-hat with the jackknife of order one.
        jackknife_stderr: its standard error by the jackknife.
        num_data: N.
        num_particles: K.
        particles: weights drawn in all.
        levels: of how many terms each level 1, 2, ... was drawn.
        status_shares: share of the data in each status, of K weights a datum.
        infinite_variance: share of the data with a k-hat above 0.5.
        largest_share: of the Monte Carlo variance of ``value``, what the largest of its N terms has.
        provenance: seed, dtype, device, versions, chunk sizes; ``sha256`` of data and parameters.
    """

    value: float
    stderr: float
    data_stderr: float
    plain: float
    plain_stderr: float
    delta: float
    jackknife: float
    jackknife_stderr: float
    num_data: int
    num_particles: int
    particles: int
    levels: tuple[int, ...]
    status_shares: dict[str, float]
    infinite_variance: float
    largest_share: float
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def bias(self) -> float:
        """Estimated bias of ``plain``, in nats."""
        return self.plain - self.value

    def bits_per_dim(self, num_dims: int) -> float:
        """Mean of -log2 p(x) per dimension of x; lower is better."""
        return -self.value / (num_dims * math.log(2))

    @property
    def verdict(self) -> str:
        """What may be said with these numbers, in a plain sentence."""
        if not math.isfinite(self.value):
            return "not to be quoted: some weights are zero, or not finite, and then no mean of logs exists."
        if set(self.status_shares) == {"zero_variance"}:
            return "all weights are equal: exact, if the guide covers the whole posterior."
        if self.largest_share > LARGE_SHARE:
            words = f"one of {self.num_data} data has {self.largest_share:.0%} of the variance"
            return f"unbiased, but the error says little: {words}. More data or particles, or a guide that fits better."
        if self.infinite_variance:
            words = f"k-hat is above 0.5 for {self.infinite_variance:.1%} of the data"
            return f"unbiased; the error is optimistic if tails are as heavy as they look: {words}."
        if "unreliable" in self.status_shares:
            few = f"K = {self.num_particles} is too few to see a heavy tail"
            return f"unbiased; {few}, with which the error is optimistic."
        return "unbiased, and the error is that of these draws; draws of one guide cannot show a mode that it misses."

    def __repr__(self) -> str:
        particles = f"{self.particles / self.num_data:.0f} particles a datum, levels up to {len(self.levels)}"
        jackknife = f"jackknife {self.jackknife:.4f} +- {self.jackknife_stderr:.2g}"
        plain = f"plain {self.plain:.4f} +- {self.plain_stderr:.2g} (bias {self.bias:.2g})"
        shares = ", ".join(f"{word} {share:.1%}" for word, share in self.status_shares.items())
        return "\n".join(
            [
                f"DatasetMean: {self.num_data} data, K = {self.num_particles}, {particles}",
                f"  log p(x)  {self.value:.4f} +- {self.stderr:.2g} nats a datum (data +- {self.data_stderr:.2g})",
                f"  biased    {plain}, delta {self.delta:.4f}, {jackknife}",
                f"  status    {shares}",
                f"  verdict   {self.verdict}",
            ]
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as a JSON file, over what was there."""
        write_json(path, "DatasetMean", asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DatasetMean":
        """Read what `save` wrote; tuples in the provenance have become lists.

        Raises:
            CheckpointError: there is no such file, it is damaged, of another kind, or of a newer format.
        """
        return read_json(path, "DatasetMean", cls._from_dict)

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any]) -> "DatasetMean":
        found = {f.name: content[f.name] for f in fields(cls)}
        numbers = {
            f.name: math.nan if found[f.name] is None else float(found[f.name]) for f in fields(cls) if f.type is float
        }
        return cls(**found | numbers | {"levels": tuple(found["levels"])})
