"""Estimators of log p(x), with the same signature and the same record; and means over p(z | x)."""

from pyro_lvm.evidence.annealed import annealed
from pyro_lvm.evidence.closed_form import closed_form
from pyro_lvm.evidence.dataset_mean import dataset_mean
from pyro_lvm.evidence.defensive import defensive
from pyro_lvm.evidence.draws import PosteriorDraws, posterior_draws
from pyro_lvm.evidence.enumeration import enumeration
from pyro_lvm.evidence.expectation import Expectation, expectation
from pyro_lvm.evidence.importance import importance
from pyro_lvm.evidence.mean_record import DatasetMean
from pyro_lvm.evidence.pooled import pooled
from pyro_lvm.evidence.prior import prior, uniform
from pyro_lvm.evidence.quadrature import quadrature
from pyro_lvm.evidence.record import LogMarginal
from pyro_lvm.evidence.sandwich import Sandwich, sandwich

__all__ = [
    "DatasetMean",
    "Expectation",
    "LogMarginal",
    "PosteriorDraws",
    "Sandwich",
    "annealed",
    "closed_form",
    "dataset_mean",
    "defensive",
    "enumeration",
    "expectation",
    "importance",
    "pooled",
    "posterior_draws",
    "prior",
    "quadrature",
    "sandwich",
    "uniform",
]
