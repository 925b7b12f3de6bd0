"""Likelihoods by name, and the one that fits some data."""

from pyro_lvm._checks import refuse
from pyro_lvm.cli.data import Data, nearest
from pyro_lvm.errors import DataTypeError
from pyro_lvm.models import likelihoods
from pyro_lvm.models.likelihoods import Likelihood

__all__ = ["NAMES", "fitting_likelihood", "make_likelihood", "numbers_per_value"]

#: name -> numbers that a decoder puts out for each value, and whether the name is followed by ``:N``.
_KINDS = {
    "bernoulli": (1, False),
    "normal": (2, False),
    "shared_normal": (1, False),
    "poisson": (1, False),
    "binomial": (1, True),
    "categorical": (0, True),  # N of them
    "discretized_logistic": (2, True),
}

#: As they are written.
NAMES = tuple(f"{name}:N" if counted else name for name, (_, counted) in _KINDS.items())


def fitting_likelihood(data: Data) -> str:
    """The likelihood that is taken if none is named.

    Zeros and ones are Bernoulli, grey levels of 0 to 16 binomial, images of uint8 a discretized logistic, other counts
    Poisson; images of real numbers have one standard deviation for all pixels, other real numbers one each.

    Example:
        >>> from pyro_lvm.cli.data import load_data
        >>> fitting_likelihood(load_data({"data": "digits", "split_seed": 0}))
        'bernoulli'
    """
    x = data.rows
    if bool(((x == 0) | (x == 1)).all()):
        return "bernoulli"
    if data.levels == "counts":
        return "binomial:16"
    if data.levels == "bytes":
        return "discretized_logistic:256"
    if bool(((x >= 0) & (x == x.round())).all()):
        return "poisson"
    return "shared_normal" if data.images else "normal"


def make_likelihood(name: str) -> Likelihood:
    """The likelihood of a name.

    Raises:
        DataTypeError: it is none of `NAMES`, or its number is none.

    Example:
        >>> make_likelihood("binomial:16")
        Binomial(total_count=16)
    """
    kind, colon, number = name.partition(":")
    if kind not in _KINDS:
        raise DataTypeError(refuse("--likelihood", f"one of {', '.join(NAMES)}", repr(name), nearest(kind, _KINDS)))
    counted = _KINDS[kind][1]
    if counted != bool(colon) or (counted and not (number.isdecimal() and 1 < int(number) <= 65536)):
        cure = f"Pass e.g. {kind}:16." if counted else f"Pass {kind}."
        expected = f"{kind}:N with N from 2 to 65536" if counted else f"{kind} without a number"
        raise DataTypeError(refuse("--likelihood", expected, repr(name), cure))
    if kind == "binomial":
        return likelihoods.Binomial(int(number))
    if kind == "categorical":
        return likelihoods.Categorical(int(number))
    if kind == "discretized_logistic":
        return likelihoods.DiscretizedLogistic(int(number))
    return likelihoods.SharedNormal() if kind == "shared_normal" else likelihoods.as_likelihood(kind)


def numbers_per_value(name: str) -> int:
    """How many numbers the decoder puts out for each value of x.

    Example:
        >>> numbers_per_value("normal"), numbers_per_value("categorical:17")
        (2, 17)
    """
    kind, _, number = name.partition(":")
    return _KINDS[kind][0] or int(number)
