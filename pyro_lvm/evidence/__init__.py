"""Estimators of log p(x): the same signature, the same record."""

from pyro_lvm.evidence.closed_form import closed_form
from pyro_lvm.evidence.enumeration import enumeration
from pyro_lvm.evidence.importance import importance
from pyro_lvm.evidence.prior import prior, uniform
from pyro_lvm.evidence.quadrature import quadrature
from pyro_lvm.evidence.record import LogMarginal

__all__ = ["LogMarginal", "closed_form", "enumeration", "importance", "prior", "quadrature", "uniform"]
