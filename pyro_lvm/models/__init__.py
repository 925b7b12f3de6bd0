"""Models p(x, z): modules that are called with x; latent site ``z``, observed site ``x``, plate ``data``."""

from pyro_lvm.models import likelihoods
from pyro_lvm.models.deep_gaussian import DeepGaussian
from pyro_lvm.models.linear_gaussian import LinearGaussian

__all__ = ["DeepGaussian", "LinearGaussian", "likelihoods"]
