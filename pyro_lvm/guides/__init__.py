"""Guides q(z|x): modules that are called with x; latent site ``z``, plate ``data``; or any density by ``as_guide``."""

from pyro_lvm.guides.base import as_guide
from pyro_lvm.guides.flow import Flow
from pyro_lvm.guides.hierarchical import BottomUp, TopDown
from pyro_lvm.guides.normal import DiagonalNormal, FullRankNormal

__all__ = ["BottomUp", "DiagonalNormal", "Flow", "FullRankNormal", "TopDown", "as_guide"]
