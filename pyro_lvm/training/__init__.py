"""Training: `fit`, its record, and callbacks."""

from pyro_lvm.training import callbacks
from pyro_lvm.training.fit import fit
from pyro_lvm.training.state import FitResult, History, TrainingState

__all__ = ["FitResult", "History", "TrainingState", "callbacks", "fit"]
