"""Pictures of records, of densities and of images, with matplotlib; no global style is touched.

Each function draws into ``ax`` and returns it; without one it makes a figure, which is ``ax.figure`` and writes itself
with ``savefig``. `comparison` and `inference_gap` have several panels and return the figure.
"""

from pyro_lvm.plots.calibration import calibration
from pyro_lvm.plots.comparisons import bounds, comparison, differences, gaps, inference_gap, statuses
from pyro_lvm.plots.densities import density, posterior, responsibilities
from pyro_lvm.plots.pictures import images, latents
from pyro_lvm.plots.records import ess, history, khat, log_weights, reliability

__all__ = [
    "bounds",
    "calibration",
    "comparison",
    "density",
    "differences",
    "ess",
    "gaps",
    "history",
    "images",
    "inference_gap",
    "khat",
    "latents",
    "log_weights",
    "posterior",
    "reliability",
    "responsibilities",
    "statuses",
]
