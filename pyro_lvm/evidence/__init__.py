"""Estimators of log p(x), with the same signature and the same record; and means over p(z | x)."""

from pyro_lvm.evidence.closed_form import closed_form
from pyro_lvm.evidence.enumeration import enumeration
from pyro_lvm.evidence.expectation import Expectation, expectation
from pyro_lvm.evidence.importance import importance
from pyro_lvm.evidence.prior import prior, uniform
from pyro_lvm.evidence.quadrature import quadrature
from pyro_lvm.evidence.record import LogMarginal

__all__ = [
    "Expectation",
    "LogMarginal",
    "closed_form",
    "enumeration",
    "expectation",
    "importance",
    "prior",
    "quadrature",
    "uniform",
]
