"""Estimators of log p(x): one a file, the same signature, the same record."""

from pyro_lvm.evidence.closed_form import closed_form
from pyro_lvm.evidence.importance import importance
from pyro_lvm.evidence.record import LogMarginal

__all__ = ["LogMarginal", "closed_form", "importance"]
