"""Training objectives: Pyro ``ELBO`` objects, for ``loss=`` in `pyro_lvm.fit` and in any `pyro.infer.SVI`."""

from pyro_lvm.objectives.importance_weighted import ImportanceWeightedELBO

__all__ = ["ImportanceWeightedELBO"]
