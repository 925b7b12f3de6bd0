"""Models p(x, z): modules that are called with x; latent site ``z``, observed site ``x``, plate ``data``."""

from pyro_lvm.models import likelihoods
from pyro_lvm.models.autoregressive import Autoregressive
from pyro_lvm.models.binary import BinaryLatent
from pyro_lvm.models.deep_gaussian import DeepGaussian
from pyro_lvm.models.flow import NormalizingFlow
from pyro_lvm.models.linear_gaussian import LinearGaussian
from pyro_lvm.models.mixture import GaussianMixture

__all__ = [
    "Autoregressive",
    "BinaryLatent",
    "DeepGaussian",
    "GaussianMixture",
    "LinearGaussian",
    "NormalizingFlow",
    "likelihoods",
]
