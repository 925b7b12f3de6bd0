"""Models p(x, z): modules that are called with x; latent site ``z``, observed site ``x``, plate ``data``."""

from pyro_lvm.models import likelihoods, priors
from pyro_lvm.models.autoregressive import Autoregressive
from pyro_lvm.models.binary import BinaryLatent
from pyro_lvm.models.deep_gaussian import DeepGaussian
from pyro_lvm.models.flow import NormalizingFlow
from pyro_lvm.models.hierarchical import HierarchicalGaussian
from pyro_lvm.models.linear_gaussian import LinearGaussian
from pyro_lvm.models.mixture import GaussianMixture
from pyro_lvm.models.mixture_vae import GaussianMixtureVAE
from pyro_lvm.models.semi_supervised import SemiSupervisedVAE

__all__ = [
    "Autoregressive",
    "BinaryLatent",
    "DeepGaussian",
    "GaussianMixture",
    "GaussianMixtureVAE",
    "HierarchicalGaussian",
    "LinearGaussian",
    "NormalizingFlow",
    "SemiSupervisedVAE",
    "likelihoods",
    "priors",
]
