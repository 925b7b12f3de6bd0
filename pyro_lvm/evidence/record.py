"""`LogMarginal`: log p(x) of every datum, how far to trust it, and where it came from."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_lvm.ops import STATUSES

if TYPE_CHECKING:
    import xarray

__all__ = ["LogMarginal", "to_arviz"]


@dataclass(frozen=True, eq=False, repr=False)
class LogMarginal:
    r"""Estimates of log p(x_n), one a datum; tensors are float64, shape ``(N,)``, on the device of the data.

    With K weights :math:`w_k = p(x, z_k) / q(z_k \mid x)` the value is :math:`\log \frac1K \sum_k w_k`, whose
    expectation lies below log p(x) by about half its variance (Jensen): see ``bias``.

    Attributes:
        value: estimate of log p(x) in nats. Biased low.
        stderr: Monte Carlo standard error of ``value`` (delta method) in nats. Optimistic under a heavy tail.
        bias: about ``-stderr**2 / 2`` nats. It has one sign, so it does not average out over data.
        elbo: mean log-weight of the same draws, an unbiased estimate of the ELBO, in nats.
        ess: effective sample size in [1, K].
        khat: Pareto tail index of the weights: below 0.5 their variance exists. NaN where there is no tail to fit.
        status: NumPy array of words. ``exact``: enumerated or closed form. ``zero_variance``: all weights equal, exact
            only if the guide covers the posterior. ``no_fault_found``: k-hat below 0.5. ``heavy_tail``: value usable,
            standard error optimistic. ``unreliable``, ``no_support``, ``nonfinite``. None of them says "correct":
            draws from one guide cannot see a mode that the guide misses.
        num_particles: K.
        method: name of the estimator.
        provenance: whatever makes the number quotable: seed, dtype, device, versions, chunk sizes.
    """

    value: torch.Tensor
    stderr: torch.Tensor
    bias: torch.Tensor
    elbo: torch.Tensor
    ess: torch.Tensor
    khat: torch.Tensor
    status: np.ndarray
    num_particles: int
    method: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.value)

    @property
    def mean(self) -> float:
        """Mean of log p(x) over the data, nats per datum."""
        return float(self.value.mean())

    @property
    def total(self) -> float:
        """Sum of log p(x) over the data, nats."""
        return float(self.value.sum())

    @property
    def mean_stderr(self) -> float:
        """Monte Carlo standard error of `mean`: what more particles would reduce."""
        return float(self.stderr.square().sum().sqrt() / len(self))

    @property
    def data_stderr(self) -> float:
        """Standard error of `mean` as an estimate for the population that the data are a sample of."""
        return float(self.value.std() / math.sqrt(len(self))) if len(self) > 1 else math.nan

    @property
    def mean_bias(self) -> float:
        """Estimated bias of `mean`; unlike its standard error it does not shrink with N."""
        return float(self.bias.mean())

    @property
    def gap(self) -> torch.Tensor:
        """log p-hat(x) - ELBO, an estimate of KL(q || p(z | x)) in nats, ``(N,)``: too small where the value is low."""
        return self.value - self.elbo

    def bits_per_dim(self, num_dims: int) -> float:
        """Mean of -log2 p(x) per dimension of x; lower is better."""
        return -self.mean / (num_dims * math.log(2))

    def status_shares(self) -> dict[str, float]:
        """Share of the data in each status that occurs, from the best to the worst."""
        shares = {word: float((self.status == word).mean()) for word in STATUSES}
        return {word: share for word, share in shares.items() if share}

    @property
    def verdict(self) -> str:
        """One plain sentence on what may be said with these numbers."""
        shares = self.status_shares()
        bad = {w: s for w, s in shares.items() if w in ("unreliable", "no_support", "nonfinite")}
        if bad:
            words = ", ".join(f"{w} for {s:.1%}" for w, s in bad.items())
            return f"not to be quoted as log p(x): {words} of the data. More particles, or a guide that fits better."
        if "heavy_tail" in shares:
            return f"usable; the stated error is optimistic for the {shares['heavy_tail']:.1%} with heavy tails."
        if set(shares) == {"exact"}:
            return "exact."
        if set(shares) <= {"exact", "zero_variance"}:
            return "all weights are equal: exact, if the guide covers the whole posterior."
        return "no fault found; draws of one guide cannot show a mode that it misses."

    def __repr__(self) -> str:
        khat = self.khat[~self.khat.isnan()]
        tail = "no k-hat"
        if len(khat):
            tail = f"k-hat median {khat.median():.2f}, above 0.7 for {float((khat > 0.7).double().mean()):.1%}"
        efficiency = float(self.ess.median()) / self.num_particles
        shares = ", ".join(f"{word} {share:.1%}" for word, share in self.status_shares().items())
        return "\n".join(
            [
                f"LogMarginal: {len(self)} data, {self.method}, K = {self.num_particles}",
                f"  log p(x)  {self.mean_with_error()} nats a datum",
                f"  ELBO      {float(self.elbo.mean()):.4f};  ESS/K median {efficiency:.2f};  {tail}",
                f"  status    {shares}",
                f"  verdict   {self.verdict}",
            ]
        )

    def mean_with_error(self) -> str:
        """The mean with its error, or with its bias where a +- would hide it."""
        if not math.isfinite(self.mean_stderr) or not math.isfinite(self.mean):
            return f"{self.mean:.4f} (no error estimate)"
        data = f"data +- {self.data_stderr:.2g}" if len(self) > 1 else "one datum"
        if self.mean_stderr == 0:
            return f"{self.mean:.4f} ({data})"
        if abs(self.mean_bias) > 0.25 * self.mean_stderr:
            return f"{self.mean:.4f} (bias about {self.mean_bias:.2g}; {data})"
        return f"{self.mean:.4f} +- {self.mean_stderr:.2g} ({data})"

    def to_datatree(self) -> "xarray.DataTree":
        """The record as an ``xarray.DataTree`` with one group, ``importance``, over the dimension ``datum``."""
        import xarray as xr

        names = ("value", "stderr", "bias", "elbo", "ess", "khat")
        columns = {name: ("datum", getattr(self, name).cpu().numpy()) for name in names}
        columns["status"] = ("datum", self.status)
        attributes = {"num_particles": self.num_particles, "method": self.method} | {
            key: str(value) for key, value in self.provenance.items()
        }
        dataset = xr.Dataset(columns, coords={"datum": np.arange(len(self))}, attrs=attributes)
        return xr.DataTree.from_dict({"/importance": dataset})

    def to_arviz(self) -> Any:
        """The record as ArviZ's own container: ``InferenceData`` in 0.x, ``DataTree`` in 1.x."""
        return to_arviz(self.to_datatree())


def to_arviz(tree: "xarray.DataTree") -> Any:
    """A data tree as the container of the installed ArviZ."""
    import arviz

    convert = getattr(arviz, "from_datatree", None)  # 0.x has it, 1.x works on trees themselves
    return convert(tree) if convert else tree
