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

from pyro_lvm._checks import refuse
from pyro_lvm.errors import ShapeError
from pyro_lvm.guides.local_flow import with_flow
from pyro_lvm.guides.mixture import DifferentiableMixture
from pyro_lvm.tracing.intercept import bounds, support

__all__ = ["Leaves", "freed"]

Shift = Callable[[str, torch.Tensor], torch.Tensor]

#: Of parameters that say the same in several ways, those that are left out.
_TWINS = {"logits": ("probs",), "scale_tril": ("covariance_matrix", "precision_matrix")}


class Leaves:
    """Tensors to optimise, a row of its own for each datum; made at the first run, of the shapes that are met there.

    Attributes:
        tensors: name -> leaf ``(*batch, ...)``, with the batch shape of its site.
        ranks: name -> number of its batch dimensions.
        fixed: site -> why it has no leaves.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.fixed: dict[str, str] = {}
        self.complete = False

    def get(self, name: str, initial: Callable[[], torch.Tensor], batch_shape: torch.Size) -> torch.Tensor:
        """The leaf ``name``, repeated where ``batch_shape`` has the data several times over."""
        if name not in self.tensors:
            if self.complete:
                raise NotImplementedError(f"{name} was not there in the first run")
            self.tensors[name] = initial().detach().clone().requires_grad_(True)
            self.ranks[name] = len(batch_shape)
        leaf, rank = self.tensors[name], self.ranks[name]
        sizes = batch_shape[len(batch_shape) - rank :]
        if any(size % own for size, own in zip(sizes, leaf.shape, strict=False)):
            cure = "Parameters of single data belong to the x that they were refined for: pass all of it, in its order."
            raise ShapeError(refuse("x", f"{tuple(leaf.shape[:rank])} data", tuple(sizes), cure))
        times = [size // own if size > own > 1 else 1 for size, own in zip(sizes, leaf.shape, strict=False)]
        return leaf.repeat(*times, *[1] * (leaf.dim() - rank)) if any(t > 1 for t in times) else leaf

    def shift(self, name: str, value: torch.Tensor, batch_shape: torch.Size) -> torch.Tensor:
        """``value`` plus the offset of this name."""
        return value + self.get(name, lambda: torch.zeros_like(value), batch_shape)

    def offsets(self, name: str, fn: Any) -> Any:
        """The distribution of site ``name`` with offsets on its parameters."""
        return self._replaced(name, fn, lambda: freed(fn, name, partial(self.shift, batch_shape=fn.batch_shape)))

    def flow(self, name: str, fn: Any) -> Any:
        """The distribution of site ``name`` pushed through a flow."""
        return self._replaced(name, fn, lambda: with_flow(fn, partial(self.get, batch_shape=fn.batch_shape), name))

    def copy(self) -> dict[str, torch.Tensor]:
        """The values of all leaves."""
        return {name: leaf.detach().clone() for name, leaf in self.tensors.items()}

    def restore(self, values: dict[str, torch.Tensor], rows: torch.Tensor | None = None, dim: int = -1) -> None:
        """Put ``values`` back, for those ``rows`` ``(N,)`` that are true; ``dim`` is that of the data plate."""
        with torch.no_grad():
            for name, leaf in self.tensors.items():
                value = values[name]
                if rows is not None:
                    shape = [1] * leaf.dim()
                    shape[self.ranks[name] + dim] = -1
                    value = torch.where(rows.reshape(shape), value, leaf)
                leaf.copy_(value)

    def _replaced(self, name: str, fn: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns; at the first run, a site that cannot have leaves is noted and stays."""
        if self.complete:
            return fn if name in self.fixed else make()
        before = dict(self.tensors)
        try:
            new = make()
            _check_same(fn, new)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            self.fixed[name] = str(error) or type(error).__name__
            self.tensors = before
            return fn
        return new


def freed(fn: Any, name: str, shift: Shift) -> Any:
    """``fn`` with ``shift(name.parameter, u)`` in the place of each unconstrained parameter u.

    Raises:
        NotImplementedError: a distribution whose parameters cannot move on their own.
    """
    if isinstance(fn, dist.MaskedDistribution):
        return freed(fn.base_dist, name, shift).mask(fn._mask)
    if isinstance(fn, torch.distributions.Independent):
        return dist.Independent(freed(fn.base_dist, name, shift), fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        weights = freed(fn.mixture_distribution, f"{name}.weights", shift)
        components = freed(fn.component_distribution, f"{name}.components", shift)
        return _mixture(weights, components, type(fn))
    if isinstance(fn, torch.distributions.TransformedDistribution) and not _own_constraints(fn):
        return dist.TransformedDistribution(freed(fn.base_dist, name, shift), fn.transforms)
    if isinstance(fn, dist.Delta) or not _own_constraints(fn):
        raise NotImplementedError(f"{type(fn).__name__} has no parameters to free")
    allowed = support(fn)
    if not allowed.is_discrete and any(isinstance(bound, torch.Tensor) for bound in bounds(allowed) or ()):
        raise NotImplementedError(f"the support of {type(fn).__name__} would move")
    return type(fn)(**_shifted(fn, name, shift), validate_args=False)


def _own_constraints(fn: Any) -> dict[str, Any]:
    constraints = getattr(fn, "arg_constraints", {})
    return constraints if isinstance(constraints, dict) else {}


def _mixture(weights: Any, components: Any, kind: type) -> Any:
    """A mixture, with differentiable draws where there are such."""
    normal = isinstance(components, torch.distributions.Independent) and components.reinterpreted_batch_ndims == 1
    if normal and isinstance(components.base_dist, torch.distributions.Normal):
        return DifferentiableMixture(weights, components, validate_args=False)
    return kind(weights, components, validate_args=False)


def _shifted(fn: Any, name: str, shift: Shift) -> dict[str, Any]:
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
            value = transform(shift(f"{name}.{argument}", transform.inv(value)))
        arguments[argument] = value
    return arguments


def _check_same(fn: Any, new: Any) -> None:
    """Without offsets yet, the density is what it was."""
    value = fn.sample()
    if not torch.allclose(new.log_prob(value), fn.log_prob(value), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise NotImplementedError(f"{type(fn).__name__} is not what its parameters say")
