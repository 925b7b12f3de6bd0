"""`LogMarginal`: log p(x) of every datum, how far to trust it, and where it came from."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_lvm._checks import refuse
from pyro_lvm._files import numbers, read_json, write_json
from pyro_lvm._version import versions
from pyro_lvm.errors import DataTypeError
from pyro_lvm.evidence.columns import COLUMNS
from pyro_lvm.evidence.verdict import data_in_words, doubt, is_joint, status_shares, verdict
from pyro_lvm.ops import khat_threshold

if TYPE_CHECKING:
    import xarray

__all__ = ["LogMarginal", "check_reference", "concatenate", "exact_record", "to_arviz"]

_NUMBERS = (*(name for name in COLUMNS if name != "status"), "particles")

_SMALL = 0.25  # of a standard error: what adds 3 % to it in quadrature


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
        elbo_stderr: Monte Carlo standard error of ``elbo`` in nats; NaN for one draw.
        ess: effective sample size in [1, K].
        khat: Pareto tail index of the weights: below 0.5 their variance exists. NaN where there is no tail to fit.
        status: NumPy array of words. ``exact``: enumerated or closed form. ``zero_variance``: all weights equal, exact
            only if the guide covers the posterior. ``no_fault_found``: k-hat below 0.5. ``heavy_tail``: value usable,
            standard error optimistic. ``disagreement``: a guide of several misses mass that another sees; the value
            holds both. ``unreliable``, ``no_support``, ``nonfinite``. None of them says "correct": draws cannot show a
            mode that no guide proposes.
        num_particles: K; with ``target_stderr`` the most that a datum could take.
        method: name of the estimator.
        particles: K of each datum, from which ``ess``, ``khat`` and ``status`` are; all ``num_particles`` if left out.
        provenance: whatever makes the number quotable: seed, dtype, device, versions, chunk sizes; ``sha256`` of the
            data that were used, in their order, and of the parameters; what half precision moves (``model_dtype``),
            and after how many data a resumed run went on (``resumed_at``).
    """

    value: torch.Tensor
    stderr: torch.Tensor
    bias: torch.Tensor
    elbo: torch.Tensor
    elbo_stderr: torch.Tensor
    ess: torch.Tensor
    khat: torch.Tensor
    status: np.ndarray
    num_particles: int
    method: str
    provenance: dict[str, Any] = field(default_factory=dict)
    particles: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if not self.particles.numel():
            object.__setattr__(self, "particles", torch.full_like(self.value, self.num_particles))

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
    def mean_corrected(self) -> float:
        r"""`mean` less `mean_bias`: the delta-method correction, of which a bias of the order of :math:`1/K^2` is left.

        It needs a variance of the weights that is known; `evidence.dataset_mean` has no bias.
        """
        return self.mean - self.mean_bias

    @property
    def efficiency(self) -> torch.Tensor:
        """ESS / K of each datum, by its own K, ``(N,)``."""
        return self.ess / self.particles

    @property
    def particles_in_words(self) -> str:
        """K, or its range over the data."""
        if not len(self):
            return str(self.num_particles)
        least, most = (f"{each:.0f}" for each in self.particles.aminmax())
        return most if least == most else f"{least} to {most}"

    @property
    def gap(self) -> torch.Tensor:
        """log p-hat(x) - ELBO, an estimate of KL(q || p(z | x)) in nats, ``(N,)``: too small where the value is low."""
        return self.value - self.elbo

    def bits_per_dim(self, num_dims: int) -> float:
        """Mean of -log2 p(x) per dimension of x; lower is better."""
        return -self.mean / (num_dims * math.log(2))

    def status_shares(self) -> dict[str, float]:
        """Share of the data in each status that occurs, from the best to the worst."""
        return status_shares(self.status)

    @property
    def doubt(self) -> str:
        """Words on the data whose value is not to be quoted; empty if there are none."""
        return doubt(self.status)

    @property
    def rounding(self) -> str:
        """Words on half precision of the model, where what it moves is not small against the errors; else empty."""
        found = self.provenance.get("model_dtype")
        if not found or not len(self):
            return ""
        of_a_datum, of_the_mean = found["rms_log_p"], abs(found["mean_log_p"])
        if (
            of_a_datum <= _SMALL * float(self.stderr.square().mean().sqrt())
            and of_the_mean <= _SMALL * self.mean_stderr
        ):
            return ""
        dtype = found["dtype"].removeprefix("torch.")
        return f" {dtype} moves log p-hat of a datum by {of_a_datum:.1g} nats, the mean by {found['mean_log_p']:.1g}."

    @property
    def verdict(self) -> str:
        """What may be said with these numbers, in a plain sentence, and one on half precision where it matters."""
        return verdict(self.status, "log p(x)") + self.rounding

    def __repr__(self) -> str:
        khat = self.khat[~self.khat.isnan()]
        tail = "no k-hat"
        if len(khat):
            limit = khat_threshold(int(self.particles.min()))  # as in `plots.khat`
            above = float((khat > limit).double().mean())
            tail = f"k-hat median {khat.median():.2f}, above {limit:.2g} for {above:.1%}"
        efficiency = f"ESS/K median {float(self.efficiency.median()):.2f};  " if self.num_particles > 1 else ""
        shares = ", ".join(f"{word} {share:.1%}" for word, share in self.status_shares().items())
        data = data_in_words(len(self), self.provenance)
        return "\n".join(
            [
                f"LogMarginal: {data}, {self.method}, K = {self.particles_in_words}",
                f"  log p(x)  {self.mean_with_error()} nats{'' if is_joint(self.provenance) else ' a datum'}",
                f"  ELBO      {float(self.elbo.mean()):.4f};  {efficiency}{tail}",
                f"  status    {shares}",
                f"  verdict   {self.verdict}",
            ]
        )

    def mean_with_error(self, digits: int = 4) -> str:
        """The mean with its error, or with its bias where a +- would hide it."""
        mean = f"{self.mean:.{digits}f}"
        if not math.isfinite(self.mean_stderr) or not math.isfinite(self.mean):
            return f"{mean} (no error estimate)"
        data = "" if len(self) == 1 else f"data +- {self.data_stderr:.2g}"
        if self.mean_stderr == 0:
            return f"{mean} ({data})" if data else mean
        if abs(self.mean_bias) > _SMALL * self.mean_stderr:
            # Where weights are unreliable their variance, and so the bias, is underestimated.
            about = "at least" if self.doubt else "about"
            return f"{mean} (bias {about} {self.mean_bias:.2g}{'; ' if data else ''}{data})"
        return f"{mean} +- {self.mean_stderr:.2g}{' (' + data + ')' if data else ''}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as a JSON file, over what was there: all columns to the last bit, status and provenance.

        Example:
            >>> import tempfile, torch
            >>> from pyro_lvm.evidence import LogMarginal, closed_form
            >>> from pyro_lvm.models import LinearGaussian
            >>> record = closed_form(LinearGaussian(1, 3), torch.zeros(2, 3))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     record.save(f"{folder}/record.json")
            ...     again = LogMarginal.load(f"{folder}/record.json")
            >>> again.value.equal(record.value)
            True
        """
        write_json(path, "LogMarginal", self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LogMarginal":
        """Read what `save` wrote; tensors are on the CPU, and tuples in the provenance have become lists.

        Raises:
            CheckpointError: there is no such file, it is damaged, of another kind, or of a newer format.
        """
        return read_json(path, "LogMarginal", cls.from_dict)

    def to_dict(self) -> dict[str, Any]:
        """The record in lists, numbers and words."""
        columns = {name: getattr(self, name).tolist() for name in _NUMBERS}
        words = {"method": self.method, "num_particles": self.num_particles, "provenance": self.provenance}
        return words | {"status": self.status.tolist()} | columns

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "LogMarginal":
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it did not.
        """
        there = [name for name in _NUMBERS if name in content or name != "particles"]  # older files lack it
        columns: dict[str, Any] = {name: torch.tensor(numbers(content[name]), dtype=torch.float64) for name in there}
        status = np.array(content["status"], dtype=str)
        if {len(column) for column in columns.values()} != {len(status)}:
            raise ValueError("columns are of different lengths")
        words = {name: content[name] for name in ("num_particles", "method", "provenance")}
        return cls(**columns, **words, status=status)

    def to_datatree(self) -> "xarray.DataTree":
        """The record as an ``xarray.DataTree`` with one group, ``importance``, over the dimension ``datum``."""
        import xarray as xr

        columns = {name: ("datum", getattr(self, name).cpu().numpy()) for name in _NUMBERS}
        columns["status"] = ("datum", self.status)
        attributes = {"num_particles": self.num_particles, "method": self.method} | {
            key: str(value) for key, value in self.provenance.items()
        }
        dataset = xr.Dataset(columns, coords={"datum": np.arange(len(self))}, attrs=attributes)
        return xr.DataTree.from_dict({"/importance": dataset})

    def to_arviz(self) -> Any:
        """The record as ArviZ's own container: ``InferenceData`` in 0.x, ``DataTree`` in 1.x."""
        return to_arviz(self.to_datatree())


def check_reference(reference: Any) -> None:
    """What gaps are measured from is a record, or None."""
    if reference is not None and not isinstance(reference, LogMarginal):
        cure = "Pass what an estimator of `evidence` returned for the same x."
        raise DataTypeError(refuse("reference", "a LogMarginal", type(reference).__name__, cure))


def concatenate(records: Sequence[LogMarginal]) -> LogMarginal:
    """One record of data that were estimated piece by piece, with the provenance of the first; no digest is of all."""
    first = records[0]
    provenance = dict(first.provenance)
    if len(records) > 1 and "sha256" in provenance:
        provenance["sha256"] = {name: digest for name, digest in provenance["sha256"].items() if name != "data"}
    columns: dict[str, Any] = {
        f.name: torch.cat([getattr(r, f.name) for r in records]) for f in fields(first) if f.type is torch.Tensor
    }
    num_data = sum(r.provenance.get("num_data", len(r)) for r in records)
    status = np.concatenate([r.status for r in records])
    return replace(first, **columns, status=status, provenance=provenance | {"num_data": num_data})


def exact_record(value: torch.Tensor, method: str, num_terms: int, provenance: dict[str, Any]) -> LogMarginal:
    """A record without error: status ``exact``, ``no_support`` at -inf, ``nonfinite`` at NaN and infinity."""
    value = value.double()
    zero = torch.zeros_like(value)
    status = np.where(value.isneginf().cpu().numpy(), "no_support", "nonfinite")
    return LogMarginal(
        value=value,
        stderr=zero,
        bias=zero,
        elbo=value,
        elbo_stderr=zero,
        ess=torch.full_like(value, num_terms),
        khat=torch.full_like(value, math.nan),
        status=np.where(value.isfinite().cpu().numpy(), "exact", status),
        num_particles=num_terms,
        method=method,
        provenance={"num_data": len(value), "device": str(value.device), "versions": versions()} | provenance,
    )


def to_arviz(tree: "xarray.DataTree") -> Any:
    """A data tree as the container of the installed ArviZ."""
    import arviz

    convert = getattr(arviz, "from_datatree", None)  # 0.x has it, 1.x works on trees themselves
    return convert(tree) if convert else tree
