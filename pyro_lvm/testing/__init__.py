"""Pairs with known answers, on which an estimator of log p(x) shows what it is worth."""

from pyro_lvm.testing.ground import proving_ground
from pyro_lvm.testing.pair import ProvingPair

__all__ = ["ProvingPair", "proving_ground"]
