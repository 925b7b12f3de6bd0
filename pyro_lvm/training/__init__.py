"""Training: `fit`, its record, restarts, and callbacks."""

from pyro_lvm.training import callbacks
from pyro_lvm.training.fit import fit
from pyro_lvm.training.restarts import best_of
from pyro_lvm.training.state import FitResult, History, TrainingState

__all__ = ["FitResult", "History", "TrainingState", "best_of", "callbacks", "fit"]
