"""Guides q(z|x): modules that are called with x; latent site ``z``, plate ``data``; or any density by ``as_guide``."""

from pyro_lvm.guides.base import as_guide
from pyro_lvm.guides.density import log_prob
from pyro_lvm.guides.discrete import AutoregressiveBernoulli, Bernoulli, Categorical
from pyro_lvm.guides.flow import Flow
from pyro_lvm.guides.hierarchical import BottomUp, Ladder, TopDown
from pyro_lvm.guides.mixture import MixtureOfNormals
from pyro_lvm.guides.normal import DiagonalNormal, FullRankNormal, LowRankNormal
from pyro_lvm.guides.refine import refine

__all__ = [
    "AutoregressiveBernoulli",
    "Bernoulli",
    "BottomUp",
    "Categorical",
    "DiagonalNormal",
    "Flow",
    "FullRankNormal",
    "Ladder",
    "LowRankNormal",
    "MixtureOfNormals",
    "TopDown",
    "as_guide",
    "log_prob",
    "refine",
]
