"""The proving ground: all pairs with exact answers, from easy to adversarial."""

from pyro_lvm.testing.conjugate import conjugate_pairs
from pyro_lvm.testing.discrete import discrete_pairs
from pyro_lvm.testing.gaussian import gaussian_pairs
from pyro_lvm.testing.layered import layered_pairs
from pyro_lvm.testing.multimodal import multimodal_pairs
from pyro_lvm.testing.pair import ProvingPair
from pyro_lvm.testing.shapes import shape_pairs
from pyro_lvm.testing.tails import tail_pairs

__all__ = ["proving_ground"]


def proving_ground() -> tuple[ProvingPair, ...]:
    """Pairs whose log p(x) is known: closed forms, sums, or line integrals by formula, never by an estimator of ours.

    They are built afresh at each call, from fixed seeds, without touching the random state.

    Returns:
        Pairs with names of their own, 16 or 32 data each, in float64.

    Example:
        >>> import pyro_lvm as lvm
        >>> pairs = {pair.name: pair for pair in lvm.testing.proving_ground()}
        >>> pair = pairs["missed-class"]
        >>> pair
        ProvingPair('missed-class', discrete, missed mode: 32 data, 1-D)
        >>> record = lvm.log_marginal(pair.model, pair.guide, pair.x, seed=0)
        >>> error = (record.value - pair.log_prob).median()
        >>> print(f"{error:.1f} nats;", *record.status_shares())  # what the guide leaves out, nobody sees
        -1.6 nats; zero_variance
    """
    return tuple(
        [
            *gaussian_pairs(),
            *multimodal_pairs(),
            *tail_pairs(),
            *shape_pairs(),
            *conjugate_pairs(),
            *discrete_pairs(),
            *layered_pairs(),
        ]
    )
