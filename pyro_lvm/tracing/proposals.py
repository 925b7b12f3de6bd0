"""Guides that are made from a model alone: its prior, and distributions that know no more than the supports."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_lvm._checks import check_program
from pyro_lvm._typing import Guide, Model
from pyro_lvm.errors import SupportError
from pyro_lvm.tracing.intercept import base_distribution, bijection, is_unobserved, support, without

__all__ = ["finite_left_out", "normal_guide", "prior_guide", "uniform_guide"]


def _every(fn: Any) -> bool:
    return True


def prior_guide(model: Model, wanted: Callable[[Any], bool] = _every) -> Guide:
    """q(z) = p(z) on every latent for whose distribution ``wanted`` holds; the others are left to enumeration.

    What is missing in the data (``obs_mask``) is left to the model, as in any guide.
    """
    check_program("model", model)
    guide = poutine.block(without(model, is_unobserved), hide_fn=lambda msg: _hidden(msg, wanted))
    guide.__qualname__ = "prior"  # what records call it
    return guide


def finite_left_out(model: Model) -> Guide:
    """q(z) = p(z) on the latents that cannot be summed out."""
    return prior_guide(model, lambda fn: not getattr(fn, "has_enumerate_support", False))


def uniform_guide(model: Model, wanted: Callable[[Any], bool] = _every) -> Guide:
    """q(z) = 1 / |Z| on every latent for whose distribution ``wanted`` holds; the others are left to enumeration.

    Raises:
        SupportError: (when run) a latent has no finite support.
    """
    return _replaced(model, wanted, _uniform)


def normal_guide(model: Model, wanted: Callable[[Any], bool] = _every) -> Guide:
    """q(z): a standard normal in the unconstrained coordinates of every latent for which ``wanted`` holds.

    Raises:
        SupportError: (when run) a latent is not continuous.
    """
    return _replaced(model, wanted, _standard_normal)


def _replaced(model: Model, wanted: Callable[[Any], bool], make: Callable[[str, Any], Any]) -> Guide:
    check_program("model", model)

    def guide(*args: Any) -> None:
        with poutine.block(hide_fn=lambda msg: _hidden(msg, wanted)), _Replace(wanted, make):
            model(*args)

    return guide


def _prior(msg: Any) -> Any:
    return (msg["infer"] or {}).get("_prior", msg["fn"])


def _hidden(msg: Any, wanted: Callable[[Any], bool]) -> bool:
    """Observed, or left to enumeration; parameters are never hidden."""
    return bool(msg["type"] == "sample" and (msg["is_observed"] or not wanted(_prior(msg))))


class _Replace(Messenger):
    """Replaces the distribution of each latent for which ``wanted`` holds by ``make(name, distribution)``."""

    def __init__(self, wanted: Callable[[Any], bool], make: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self.wanted, self.make = wanted, make

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg)) and self.wanted(msg["fn"]):
            msg["infer"]["_prior"] = msg["fn"]
            msg["fn"] = self.make(msg["name"], msg["fn"])


def _uniform(name: str, fn: Any) -> Any:
    base = base_distribution(fn)
    if isinstance(base, dist.Bernoulli):
        uniform = dist.Bernoulli(torch.full_like(base.probs, 0.5))
    elif isinstance(base, dist.Categorical | dist.OneHotCategorical):
        uniform = type(base)(torch.ones_like(base.probs))
    else:
        raise SupportError(
            f"latent site {name!r}: expected a finite support, got {type(base).__name__}. There is no uniform "
            "distribution over its values: use evidence.quadrature, evidence.prior or a guide."
        )
    return uniform.to_event(fn.event_dim - base.event_dim)


def _standard_normal(name: str, fn: Any) -> Any:
    constraint = support(fn)
    if constraint is None or constraint.is_discrete:
        raise SupportError(
            f"latent site {name!r}: expected a continuous latent, got {type(base_distribution(fn)).__name__}. Use "
            "evidence.enumeration for finite latents, or a guide."
        )
    transform = bijection(constraint)
    if transform is None:
        raise SupportError(
            f"latent site {name!r}: expected a support with a bijection to the real numbers, got {constraint}. Write "
            "the latent with such a support, or estimate log p(x) with a guide."
        )
    zeros = fn.sample().new_zeros(transform.inverse_shape(fn.batch_shape + fn.event_shape))
    return dist.TransformedDistribution(
        dist.Normal(zeros, 1.0).to_event(zeros.dim() - len(fn.batch_shape)), [transform]
    )
