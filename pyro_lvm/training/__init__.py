"""Training: `fit`, its record, restarts, callbacks, and trained pairs as files."""

from pyro_lvm.training import callbacks
from pyro_lvm.training.fit import fit
from pyro_lvm.training.history import History
from pyro_lvm.training.restarts import best_of
from pyro_lvm.training.saved import load, save
from pyro_lvm.training.state import FitResult, TrainingState

__all__ = ["FitResult", "History", "TrainingState", "best_of", "callbacks", "fit", "load", "save"]
