"""Training objectives: Pyro ``ELBO`` objects, for ``loss=`` in `pyro_lvm.fit` and in any `pyro.infer.SVI`."""

from pyro_lvm.objectives.annealing import KLAnnealing, warm_up
from pyro_lvm.objectives.free_bits import FreeBits
from pyro_lvm.objectives.importance_weighted import ImportanceWeightedELBO
from pyro_lvm.objectives.mean_field import AnalyticKL, SiteKL, analytic_kl
from pyro_lvm.objectives.snr import gradient_snr
from pyro_lvm.objectives.snr_record import GradientGroup, GradientSNR
from pyro_lvm.objectives.usage import latent_usage
from pyro_lvm.objectives.usage_record import LatentSite, LatentUsage

__all__ = [
    "AnalyticKL",
    "FreeBits",
    "GradientGroup",
    "GradientSNR",
    "ImportanceWeightedELBO",
    "KLAnnealing",
    "LatentSite",
    "LatentUsage",
    "SiteKL",
    "analytic_kl",
    "gradient_snr",
    "latent_usage",
    "warm_up",
]
