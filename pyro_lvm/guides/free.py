r"""Parameters of its own for each datum, in any guide: offsets on the unconstrained parameters of its distributions.

With T = transform_to(constraint of a parameter), a parameter value v becomes

.. math:: v' = T(T^{-1}(v) + \delta_n), \qquad \delta_n = 0 \text{ at first}

so that the guide starts exactly as it is, and a distribution that depends on another latent keeps its dependence.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import transform_to

from pyro_lvm.guides.leaves import Leaves
from pyro_lvm.guides.local_flow import with_flow
from pyro_lvm.guides.mixture import DifferentiableMixture
from pyro_lvm.tracing.intercept import base_distribution, bounds, is_real, support

__all__ = ["SHARED", "flowing", "is_plain", "offset"]

#: Why something has no leaves.
SHARED = "shared by all data, which counts as approximation"
#: Of parameters that say the same in several ways, those that are left out.
_TWINS = {"logits": ("probs",), "scale_tril": ("covariance_matrix", "precision_matrix")}
#: A location moves by so many standard deviations where another parameter moves by 1: encoders are off by many.
_DEVIATIONS = 4


def offset(leaves: Leaves, name: str, fn: Any) -> Any:
    """The distribution of site ``name`` with offsets on its parameters."""
    return _replaced(leaves, name, fn, lambda: _freed(fn, name, leaves, fn.batch_shape))


def flowing(leaves: Leaves, name: str, fn: Any) -> Any:
    """The distribution of site ``name`` pushed through a flow."""
    return _replaced(leaves, name, fn, lambda: with_flow(fn, partial(leaves.get, batch_shape=fn.batch_shape), name))


def is_plain(fn: Any) -> bool:
    """Whether a distribution is all in its parameters: no transform or mixture of others, and no class of a guide's."""
    base = base_distribution(fn)
    compound = torch.distributions.TransformedDistribution | torch.distributions.MixtureSameFamily
    return bool(_own_constraints(base)) and not (isinstance(base, compound) and not _own_constraints(base))


def _replaced(leaves: Leaves, name: str, fn: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` returns; at the first run, a site that cannot have leaves is noted and stays."""
    if isinstance(base_distribution(fn), dist.Delta):  # follows from other sites
        return fn
    if leaves.complete:
        return fn if name in leaves.fixed else make()
    before = dict(leaves.tensors)
    try:
        new = make()
        _check_same(fn, new)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        leaves.fixed[name] = str(error).split("\n")[0] or type(error).__name__
        leaves.tensors = before
        return fn
    return new


def _freed(fn: Any, name: str, leaves: Leaves, batch_shape: torch.Size) -> Any:
    """``fn`` with an offset on each of its unconstrained parameters.

    Raises:
        NotImplementedError: a distribution whose parameters cannot move on their own.
    """
    if isinstance(fn, dist.MaskedDistribution):
        return _freed(fn.base_dist, name, leaves, batch_shape).mask(fn._mask)
    if isinstance(fn, torch.distributions.Independent):
        return dist.Independent(_freed(fn.base_dist, name, leaves, batch_shape), fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        weights = _freed(fn.mixture_distribution, f"{name}.weights", leaves, batch_shape)
        components = _freed(fn.component_distribution, f"{name}.components", leaves, batch_shape)
        return _mixture(weights, components, type(fn))
    if isinstance(fn, torch.distributions.TransformedDistribution) and not _own_constraints(fn):
        if any(type(transform).__module__ != "torch.distributions.transforms" for transform in fn.transforms):
            leaves.fixed[f"{name}.transforms"] = SHARED
        return dist.TransformedDistribution(_freed(fn.base_dist, name, leaves, batch_shape), fn.transforms)
    if not _own_constraints(fn):
        raise NotImplementedError(f"{type(fn).__name__} has no parameters to free")
    allowed = support(fn)
    if not allowed.is_discrete and any(isinstance(bound, torch.Tensor) for bound in bounds(allowed) or ()):
        raise NotImplementedError(f"the support of {type(fn).__name__} would move")
    new = type(fn)(**_shifted(fn, name, leaves, batch_shape), validate_args=False)
    if f"{name}.loc" in leaves.tensors and is_real(allowed):
        _count_in_deviations(leaves, f"{name}.loc", new)
    return new


def _own_constraints(fn: Any) -> dict[str, Any]:
    constraints = getattr(fn, "arg_constraints", {})
    return constraints if isinstance(constraints, dict) else {}


def _mixture(weights: Any, components: Any, kind: type) -> Any:
    """A mixture, with differentiable draws where there are such."""
    normal = isinstance(components, torch.distributions.Independent) and components.reinterpreted_batch_ndims == 1
    if normal and isinstance(components.base_dist, torch.distributions.Normal):
        return DifferentiableMixture(weights, components, validate_args=False)
    return kind(weights, components, validate_args=False)


def _shifted(fn: Any, name: str, leaves: Leaves, batch_shape: torch.Size) -> dict[str, Any]:
    """The arguments that construct ``fn``, those with a continuous constraint shifted."""
    constraints = _own_constraints(fn)
    dropped = {twin for kept, twins in _TWINS.items() if kept in constraints for twin in twins}
    arguments = {}
    for argument in inspect.signature(type(fn).__init__).parameters:
        if argument in ("self", "validate_args", *dropped) or not hasattr(fn, argument):
            continue
        value, constraint = getattr(fn, argument), constraints.get(argument)
        if constraint is not None and not constraint.is_discrete:
            transform = transform_to(constraint)
            if value.shape[: len(fn.batch_shape)] != fn.batch_shape:  # one for all data
                value = value.expand(fn.batch_shape + value.shape[value.dim() - constraint.event_dim :])
            value = transform(leaves.shift(f"{name}.{argument}", transform.inv(value), batch_shape))
        arguments[argument] = value
    return arguments


def _count_in_deviations(leaves: Leaves, name: str, fn: Any) -> None:
    """Steps of a location are in standard deviations: latents may be of any size."""
    leaf = leaves.tensors[name]
    try:
        deviation = fn.variance.detach().sqrt()
    except NotImplementedError:
        return
    while deviation.dim() > leaf.dim():  # of several particles
        deviation = deviation.mean(0)
    if deviation.shape == leaf.shape and bool((deviation.isfinite() & (deviation > 0)).all()):
        leaves.units[name] = _DEVIATIONS * deviation


def _check_same(fn: Any, new: Any) -> None:
    """Without offsets yet, the density is what it was."""
    value = fn.sample()
    if not torch.allclose(new.log_prob(value), fn.log_prob(value), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise NotImplementedError(f"{type(fn).__name__} is not what its parameters say")
