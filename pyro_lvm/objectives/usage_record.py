"""`LatentUsage`: active units and KL terms of each latent of a pair."""

from dataclasses import dataclass
from typing import Literal

import torch

from pyro_lvm._checks import refuse
from pyro_lvm.errors import SiteError
from pyro_lvm.table import TextTable

__all__ = ["LatentSite", "LatentUsage"]

#: Burda et al. (2016): their histograms of A_u have two modes, well apart, and this lies between them.
_ACTIVE = 0.01


@dataclass(frozen=True, eq=False)
class LatentSite:
    """What the data change in one latent; D is the number of its elements for each datum.

    Attributes:
        name: of the site.
        activity: variance over the data of E_q[z_u], ``(D,)``, float64. NaN where a latent belongs to all data at once,
            for one datum, and where a mean has no meaning (classes that are numbers).
        kl: mean over the data of the KL term of each element, nats, ``(D,)``; ``(1,)`` for the whole site where prior
            or guide is no product over elements. NaN for a `Delta`, whose density is that of other sites, and for a
            latent whose prior depends on one that the guide leaves to enumeration.
        kl_stderr: Monte Carlo standard error of ``kl``; 0 where it is exact.
        total_stderr: that of the sum of ``kl``, whose terms share their draws.
        method: of ``kl``: ``"analytic"``, or ``"Monte Carlo"``, log q(z) - log p(z) at the draws.
        families: those of guide and prior.
    """

    name: str
    activity: torch.Tensor
    kl: torch.Tensor
    kl_stderr: torch.Tensor
    total_stderr: float
    method: Literal["analytic", "Monte Carlo"]
    families: str

    @property
    def active(self) -> torch.Tensor:
        """Which elements are active units, A_u > 0.01; bool, ``(D,)``."""
        return self.activity > _ACTIVE

    def row(self) -> tuple[str, ...]:
        """Words for the table: name, units, active ones, KL and its error, range over dimensions, method."""
        size = len(self.activity)
        active = "-" if bool(self.activity.isnan().all()) else f"{int(self.active.sum())} of {size}"
        if bool(self.kl.isnan().all()):
            return self.name, active, "-", "-", "-"
        error = f" +- {self.total_stderr:.1g}" if self.total_stderr > 0 else ""
        total = f"{float(self.kl.sum()):.4g}{error}"
        split = len(self.kl) > 1
        extent = f"{float(self.kl.min()):.3g} to {float(self.kl.max()):.3g}" if split else "-"
        return self.name, active, total, extent, self.method


@dataclass(frozen=True, eq=False)
class LatentUsage:
    """Active units and KL terms of a pair, one `LatentSite` for each latent that both sample; prints as a table."""

    sites: tuple[LatentSite, ...]
    num_data: int
    num_particles: int
    summed_out: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LatentSite:
        sites = {site.name: site for site in self.sites}
        if name not in sites:
            raise SiteError(refuse("name", f"one of the latents {list(sites)}", repr(name), "Pass one of these."))
        return sites[name]

    def __str__(self) -> str:
        header = ("latent", "active units", "KL (nats)", "KL of a dimension", "KL by")
        rows = tuple(site.row() for site in self.sites) or (("none", "-", "-", "-", "-"),)
        draws = "exact in one run" if self.num_particles == 1 else f"{self.num_particles} draws each"
        notes = [f"{self.num_data} data, {draws}; KL: mean over the data; active: variance of E_q[z] over 0.01"]
        if self.summed_out:
            notes.append(f"summed out, not sampled: {', '.join(self.summed_out)}")
        return str(TextTable(header, rows, tuple(notes)))
