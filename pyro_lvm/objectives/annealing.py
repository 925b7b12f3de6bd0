r"""The ELBO with its KL weighed: warm-up, beta-VAE, any schedule.

.. math:: \mathcal L_\beta(x) = E_q[\log p(x \mid z) + \beta\,(\log p(z) - \log q(z \mid x))]
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, TraceTailAdaptive_ELBO

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm._typing import Guide, Model
from pyro_lvm.errors import DataTypeError, SiteError
from pyro_lvm.tracing.handlers import weighed_latents

__all__ = ["KLAnnealing", "warm_up"]

_SUMS = (Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO)  # of one term a site


def warm_up(num_steps: int, start: float = 0.0) -> Callable[[int], float]:
    r"""A weight that rises in a straight line to exactly 1, and stays there.

    .. math:: \beta_t = \min(1, \beta_0 + (1 - \beta_0)\, t / T)

    Args:
        num_steps: T, updates until the weight is 1.
        start: :math:`\beta_0`, the weight of the first update.

    Returns:
        The weight as a function of the number of updates before, for `KLAnnealing`.

    Raises:
        DataTypeError: ``start`` is no number from 0.
        ShapeError: ``num_steps`` is less than 1.

    Source: Bowman et al. (2016), Generating Sentences from a Continuous Space; Sonderby et al. (2016), Ladder
    Variational Autoencoders.

    Example:
        >>> beta = warm_up(4, start=0.2)
        >>> [round(beta(step), 3) for step in range(6)]
        [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    """
    num_steps, start = check_positive_int("num_steps", num_steps), _weight("start", start)
    return partial(_line, num_steps, start)


class KLAnnealing(ELBO):
    r"""A Pyro ELBO whose terms of latents, log p(z) and log q(z | x), are multiplied by :math:`\beta`.

    .. math:: \text{loss} = -E_q[\log p(x \mid z) + \beta_t\,(\log p(z) - \log q(z \mid x))]

    Where :math:`\beta = 1` it is the wrapped loss itself, value and gradient. With :math:`\beta \ge 1` minus the loss
    is a lower bound of log p(x) in expectation, with :math:`\beta < 1` it is no bound. It is what training sees and
    nothing else: `log_weights`, `elbo`, `log_marginal` and what is made of them know no :math:`\beta`. The losses of
    `fit` (its history, ``FitResult.losses``) are minus the ELBO only where :math:`\beta` is 1, and those of two steps
    with unlike :math:`\beta` cannot be compared; ``FitResult.notes`` says so.

    t counts gradients: calls of ``loss_and_grads``, and of ``differentiable_loss`` where gradients are on; not those of
    ``loss``, which takes the weight of the next update. The object keeps its count: make a new one for a new run.

    A factor or an observed site belongs to the likelihood; so does a latent that the guide lacks and
    ``TraceEnum_ELBO`` sums out.

    Args:
        beta: a number >= 0, or a function of the number of updates before that returns one: `warm_up`, or a lambda.
        loss: the Pyro loss to weigh, a sum of one term a site: ``Trace_ELBO`` (None), ``TraceMeanField_ELBO``,
            ``TraceGraph_ELBO``, ``TraceEnum_ELBO``, `FreeBits`. A bound with weights inside a logarithm has no KL.

    Attributes:
        wrapped: the loss that is weighed.
        step: t, gradients so far.

    Raises:
        DataTypeError: ``beta`` is neither; ``loss`` cannot be weighed; (when used) the function returns no number >= 0,
            or the guide is a ``GuideMessenger``, which runs its own model.
        SiteError: (when used) a latent depends on one that is summed out, whose terms cannot have different weights.

    Source: Higgins et al. (2017), beta-VAE, eq. 4; for schedules see `warm_up`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(2.0, 1.0))  # KL = 2
        >>> loss = KLAnnealing(warm_up(2), TraceMeanField_ELBO())
        >>> [round(loss.loss_and_grads(model, guide, torch.zeros(1)), 4) for _ in range(4)]
        [0.9189, 1.9189, 2.9189, 2.9189]
    """

    def __init__(self, beta: float | Callable[[int], float], loss: ELBO | None = None) -> None:
        self.wrapped: Any = Trace_ELBO() if loss is None else _weighable(loss)
        super().__init__(num_particles=self.wrapped.num_particles, vectorize_particles=self.wrapped.vectorize_particles)
        self.schedule: Callable[[int], float] | float = beta if callable(beta) else _weight("beta", beta)
        self.step = 0

    @property
    def beta(self) -> float:
        """The weight of the next update."""
        return _weight("beta(step)", self.schedule(self.step)) if callable(self.schedule) else self.schedule

    def state_dict(self) -> dict[str, int]:
        """How many updates it has counted."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a `state_dict`."""
        self.step = state["step"]

    def loss(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> float:
        """The loss of all data with the weight of the next update, in nats."""
        return self._run(self.wrapped.loss, self.beta, model, guide, args, kwargs)

    def loss_and_grads(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> float:
        """`loss`, after adding its gradient to the parameters' ``grad``; counts as a step."""
        value = self._run(self.wrapped.loss_and_grads, self.beta, model, guide, args, kwargs)
        self.step += 1
        return value

    def differentiable_loss(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of all data, ``()``, in nats; counts as a step where gradients are on."""
        value = self._run(self.wrapped.differentiable_loss, self.beta, model, guide, args, kwargs)
        self.step += torch.is_grad_enabled()
        return value

    def notes(self) -> list[str]:
        """What the losses of a run are."""
        weight = f"{self.beta:g}"
        what = f"by a schedule, {weight} after {self.step} steps" if callable(self.schedule) else f"by {weight}"
        return [
            f"the losses weigh the KL terms {what} (KLAnnealing): they are minus the ELBO only where the weight is 1; "
            "elbo, log_marginal and compare are not affected"
        ]

    def weighed_loss(self, beta: float | torch.Tensor, model: Model, guide: Guide, *args: Any) -> torch.Tensor:
        """`differentiable_loss` with a weight that is given; no step is counted."""
        return self._run(self.wrapped.differentiable_loss, beta, model, guide, args, {})

    def _run(
        self, run: Callable[..., Any], beta: float | torch.Tensor, model: Model, guide: Guide, args: Any, kwargs: Any
    ) -> Any:
        if hasattr(guide, "get_traces"):
            cure = "It runs the model itself, out of reach: write the guide as a function."
            raise DataTypeError(refuse("guide", "a guide apart from its model", type(guide).__name__, cure))
        if isinstance(beta, torch.Tensor) or beta != 1.0:
            model, guide = weighed_latents(model, guide, beta)
        try:
            return run(model, guide, *args, **kwargs)
        except ValueError as error:
            if "enumerated sample sites to share a common" not in str(error):
                raise
            cure = "Sample the latent that is summed out in the guide too, or do not anneal this pair."
            expected = "no latent of the guide to depend on one that is summed out"
            raise SiteError(refuse("model", expected, "terms of unlike weight inside of one sum", cure)) from error

    def _get_trace(self, model: Model, guide: Guide, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("the wrapped loss makes the traces")


def _line(num_steps: int, start: float, step: int) -> float:
    """A function of the module, so that a loss with a schedule can be pickled."""
    return 1.0 if step >= num_steps else start + (1 - start) * step / num_steps


def _weighable(loss: Any) -> ELBO:
    compiled = type(loss).__name__.startswith("Jit")  # which would keep the first weight for good
    if isinstance(loss, _SUMS) and not isinstance(loss, TraceTailAdaptive_ELBO) and not compiled:
        return loss
    cure = (
        "A weight inside a logarithm, or in compiled code, has no KL term to weigh, and a function keeps its terms to "
        "itself: anneal one of these first, then train on with the other loss."
    )
    names = ", ".join(each.__name__ for each in _SUMS)
    raise DataTypeError(refuse("loss", f"one of {names}", type(loss).__name__, cure))


def _weight(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        cure = "Pass a float, or a function of the step that returns one, e.g. warm_up(1000)."
        raise DataTypeError(refuse(argument, "a finite number >= 0", repr(value), cure))
    return float(value)
