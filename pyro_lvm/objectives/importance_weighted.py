r"""The importance-weighted bound of each datum as a Pyro loss, with six estimators of its gradient.

.. math:: \mathcal L_K(x_n) = E_{z_1 \dots z_K \sim q}\Big[\log \frac1K \sum_k w_{kn}\Big], \qquad
          w_{kn} = \frac{p(x_n, z_{kn})}{q(z_{kn} \mid x_n)}
"""

from typing import Any, Literal, get_args

import pyro
import torch
from pyro.infer import ELBO
from pyro.params import param_with_module_name
from pyro.util import warn_if_nan

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm._typing import DataPlate, Guide, Model
from pyro_lvm.errors import DataTypeError, ShapeError, SiteError
from pyro_lvm.objectives.estimators import ESTIMATORS, Reinforce
from pyro_lvm.objectives.setting import Setting, look, modes, signature
from pyro_lvm.tracing.handlers import noted_rows
from pyro_lvm.tracing.params import current_params
from pyro_lvm.tracing.weights import weight_table

__all__ = ["BASELINE", "ImportanceWeightedELBO", "register_baseline"]

#: Name of the baseline in the param store; no program of a user has a module of this name.
BASELINE = "ImportanceWeightedELBO.baseline"

Gradient = Literal[
    "standard", "sticking_the_landing", "doubly_reparameterized", "vimco", "reweighted_wake_sleep", "reinforce"
]

_COMPARING = ("vimco", "reweighted_wake_sleep")  # nothing is left of these for one particle


class ImportanceWeightedELBO(ELBO):
    r"""Minus the importance-weighted bound, summed over the data; K = 1 is minus the ELBO.

    .. math:: \text{loss} = -\frac NB \sum_{n=1}^B \frac1M \sum_{m=1}^M \log \frac1K \sum_{k=1}^K w_{mkn}, \qquad
              \log w_{mkn} = \log p(x_n, z_{mkn}) - \log q(z_{mkn} \mid x_n)

    The means over particles are taken datum by datum, inside the data plate, and the scale N / B of a plate that
    subsamples multiplies the sum, so that a mini-batch is unbiased for the bound of all data. Masks count. A discrete
    latent that the guide lacks is summed out exactly. Bias: low for log p(x), by less the larger K; whatever M.

    With :math:`\bar w_{mk} = w_{mk} / \sum_j w_{mj}`, the gradient of the bound with respect to the model's parameters
    is :math:`\frac1M \sum_{mk} \bar w_{mk} \nabla_\theta \log p(x, z_{mk})`. With respect to those of the guide,
    :math:`z_k = z(\epsilon_k, \phi)`, where :math:`d \log w_k / dz` holds them fixed, it is estimated for each m by

    * ``"standard"``: :math:`\sum_k \bar w_k (\frac{d \log w_k}{dz} \frac{dz}{d\phi} - \nabla_\phi \log q(z_k))`.
      Unbiased; its signal-to-noise ratio falls as K grows and rises with M (Rainforth et al. 2018).
    * ``"sticking_the_landing"``: without the score :math:`\nabla_\phi \log q` (Roeder et al. 2017). For K = 1 unbiased
      and, at the exact posterior, without variance; for K > 1 biased, for the weights depend on the draws
      (by quadrature on a Gaussian example with K = 3: 2.00 for the guide's mean, where the gradient is 1.16).
    * ``"doubly_reparameterized"``: :math:`\sum_k \bar w_k^2 \frac{d \log w_k}{dz} \frac{dz}{d\phi}` (Tucker et al.
      2019). Unbiased; its signal-to-noise ratio grows with K. For K = 1 the same as sticking the landing.

    or, from scores at draws without gradient, for guides that draw discrete latents too:

    * ``"vimco"``: a leave-one-out baseline for each particle (Mnih and Rezende 2016). Unbiased; K >= 2.
    * ``"reinforce"``: :math:`\sum_k (\hat L_m - b_m - \bar w_k + \frac1K) \nabla_\phi \log q(z_k)` for the m-th bound
      :math:`\hat L_m`. Unbiased for any K and M: b is the ``baseline`` that is learned, or with M > 1 the mean of the
      other bounds, or 0. Its noise is the largest of all.
    * ``"reweighted_wake_sleep"``: :math:`\sum_k \bar w_k \nabla_\phi \log q(z_k)` (Bornschein and Bengio 2015: the wake
      phase of q). It climbs another hill, :math:`-KL(p(z \mid x) \,\|\, q(z \mid x))` for the guide, so that its signal
      does not die as K grows; K >= 2. Biased for that gradient by order 1 / K (by quadrature on the Gaussian example
      with K = 2, 3, 4: 0.59, 0.84, 0.98 for the guide's mean, where the gradient is 1.33). A parameter that model and
      guide share gets the sum of the gradients of two objectives, which is that of neither.

    A pair is looked at once for each shape of its arguments, each value of those that are numbers or strings, and each
    mode (train or eval) of its modules. That finds the data plate, how to run particles (vectorised; folded into the
    batch, as convolutions need; one by one) and the scales; no step pays for it again. What multiplies the loss is the
    scale that the pair had then: one that changes otherwise, or a handler (scale, mask) around the step, is not seen.

    Args:
        num_particles: K.
        gradient: one of the above.
        num_bounds: M, independent bounds whose mean is taken; M * K particles are drawn. Between M = 1, the tightest
            bound of so many particles, and K = 1, the best gradient of the guide.
        baseline: for ``"reinforce"`` with M = 1, a module that takes x, the data of the step, and returns ``(N,)`` or
            ``(N, 1)``: what the bound of each datum is expected to be, in nats. It learns by its squared error, which
            enters the gradient and not the value; it is in the param store as ``"ImportanceWeightedELBO.baseline"``,
            and `fit` trains it with the guide. The gradient of the pair is unbiased whatever it returns.
        data_plate: the plate that holds the data, ``"auto"`` to find it. A latent outside of it leaves no bound per
            datum. None takes one joint weight of all data then, :math:`\log \frac1K \sum_k \prod_n w_{kn}`: a bound on
            the log-density of all data together, which a subsample of them cannot bound (by Jensen's inequality a
            scaled log-weight comes out too high on average), so that it is refused there.
        vectorize_particles: False runs one particle at a time, for programs whose Python control flow sees latents.

    Raises:
        DataTypeError: an argument of the wrong kind, options that do not go together, or (when used) the first argument
            of the pair is not a tensor.
        ShapeError: a number of particles or bounds that is too small, or (when used) a baseline without one number per
            datum.
        PlateError: (when used) no bound per datum exists, or an inner plate, or a joint weight, is subsampled.
        SiteError: (when used) guide sites without reparameterised draws under one of the first three gradients, sites
            that are scaled unlike one another, or a guide that has no density at given draws.

    Source: Burda et al. (2016), Importance Weighted Autoencoders; Roeder et al. (2017), Sticking the Landing; Tucker et
    al. (2019), Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives; Mnih and Rezende (2016),
    Variational Inference for Monte Carlo Objectives; Mnih and Gregor (2014), Neural Variational Inference and Learning
    in Belief Networks, for the baseline; Bornschein and Bengio (2015), Reweighted Wake-Sleep, and Le et al. (2020),
    Revisiting Reweighted Wake-Sleep; Rainforth et al. (2018), Tighter Variational Bounds are Not Necessarily Better,
    for M bounds (MIWAE).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the posterior: each weight is p(x)
        >>> loss = ImportanceWeightedELBO(num_particles=5, gradient="doubly_reparameterized")
        >>> round(loss.loss(model, guide, torch.zeros(2)), 4)
        2.531
    """

    def __init__(
        self,
        num_particles: int = 5,
        gradient: Gradient = "standard",
        *,
        num_bounds: int = 1,
        baseline: torch.nn.Module | None = None,
        data_plate: DataPlate = "auto",
        vectorize_particles: bool = True,
    ) -> None:
        if gradient not in get_args(Gradient):
            raise DataTypeError(refuse("gradient", f"one of {get_args(Gradient)}", repr(gradient), "Choose one."))
        if not (data_plate is None or isinstance(data_plate, str)):
            raise DataTypeError(refuse("data_plate", "a name or None", repr(data_plate), 'Pass "auto" to find it.'))
        if not isinstance(vectorize_particles, bool):
            raise DataTypeError(refuse("vectorize_particles", "True or False", repr(vectorize_particles), "Pass one."))
        if gradient in _COMPARING and check_positive_int("num_particles", num_particles) == 1:
            cure = f"gradient={gradient!r} weighs the particles against one another: pass more."
            raise ShapeError(refuse("num_particles", "2 or more", 1, cure))
        super().__init__(
            num_particles=check_positive_int("num_particles", num_particles), vectorize_particles=vectorize_particles
        )
        self.num_bounds = check_positive_int("num_bounds", num_bounds)
        self.gradient, self.data_plate, self.baseline = gradient, data_plate, baseline
        if baseline is not None:
            self._check_baseline()
        self._pair: tuple[Model, Guide] | None = None
        self._settings: dict[Any, Setting] = {}

    def _check_baseline(self) -> None:
        if not isinstance(self.baseline, torch.nn.Module):
            cure = "Pass a module that takes x and returns (N,) or (N, 1)."
            raise DataTypeError(refuse("baseline", "a torch.nn.Module", type(self.baseline).__name__, cure))
        if self.gradient != "reinforce":
            cure = f'Only gradient="reinforce" has a baseline that is learned; leave it out of {self.gradient!r}.'
            raise DataTypeError(refuse("baseline", "None", type(self.baseline).__name__, cure))
        if self.num_bounds > 1:
            cure = "The mean of the other bounds takes its place, in which a baseline cancels: pass num_bounds=1."
            raise DataTypeError(refuse("baseline", "None beside num_bounds > 1", type(self.baseline).__name__, cure))
        if self.data_plate is None:
            cure = "A joint weight has one bound for all data: pass num_bounds=2 or more in its place."
            raise DataTypeError(refuse("baseline", "None beside data_plate=None", type(self.baseline).__name__, cure))

    def loss(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> float:
        """Minus the bound of all data, in nats, without gradients."""
        with torch.no_grad():
            return _number(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> float:
        """`loss`, after adding its gradient to the parameters' ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return _number(loss)

    def differentiable_loss(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Minus the bound of all data, ``()``, in nats; its gradient is the estimator that was asked for."""
        setting = self._setting(model, guide, args, kwargs)
        estimator = ESTIMATORS[self.gradient if torch.is_grad_enabled() else "standard"]
        if torch.is_grad_enabled() and estimator.needs_rsample and setting.not_reparameterized:
            raise SiteError(_why_not_reparameterized(setting.not_reparameterized))
        model, guide = setting.program(model, kwargs), setting.program(guide, kwargs)
        model, chosen = noted_rows(model, setting.subsample[0]) if setting.subsample else (model, [])
        proposal = estimator(setting.plan, guide, setting.batch(args), check=not setting.checked)
        table = weight_table(setting.plan, model, proposal, self.num_bounds * self.num_particles).total
        log_weights = table.unflatten(0, (self.num_bounds, self.num_particles))  # (M, K, N)
        if self.baseline is not None and isinstance(proposal, Reinforce):
            proposal.level = _level(self.baseline, args[0][chosen[0]] if chosen else args[0], table.shape[1])
        setting.checked |= torch.is_grad_enabled()
        return -setting.scale * proposal.bound(log_weights).sum()

    def _setting(self, model: Model, guide: Guide, args: Any, kwargs: Any) -> Setting:
        """What there is to know of a pair in this mode on arguments like these; found out once."""
        if self._pair != (model, guide):
            self._pair, self._settings = (model, guide), {}
        key = signature(args, kwargs), modes(model, guide)
        if key not in self._settings:
            self._settings[key] = look(model, guide, args, kwargs, self.data_plate, self.vectorize_particles)
        return self._settings[key]

    def __getstate__(self) -> dict[str, Any]:
        """What can be pickled: without the pair, which may be made of local functions, and what is known of it."""
        return {**vars(self), "_pair": None, "_settings": {}}

    def _get_trace(self, model: Model, guide: Guide, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("the bound is made of tables of log-weights, not of one trace")


def _number(loss: torch.Tensor) -> float:
    return float(warn_if_nan(loss.detach(), "loss"))


def register_baseline(baseline: torch.nn.Module) -> None:
    """Put a baseline where `SVI` looks for parameters."""
    held = current_params()
    for name, param in baseline.named_parameters():
        full_name = param_with_module_name(BASELINE, name)
        if full_name in held and held[full_name][0] is not param:
            del pyro.get_param_store()[full_name]  # another baseline's, which would be trained in the place of this one
    pyro.module(BASELINE, baseline)


def _level(baseline: torch.nn.Module, x: torch.Tensor, num_data: int) -> torch.Tensor:
    """b(x), ``(N,)``."""
    register_baseline(baseline)
    level = torch.as_tensor(baseline(x))
    if level.shape not in ((num_data,), (num_data, 1)):
        cure = "Return one number per datum: the bound that is expected for it, in nats."
        raise ShapeError(refuse("baseline", f"({num_data},) or ({num_data}, 1)", tuple(level.shape), cure))
    return level.reshape(num_data)


def _why_not_reparameterized(sites: list[str]) -> str:
    cure = (
        "The gradient of a parameter that they depend on would be wrong without any sign of it. Pass "
        'gradient="vimco" or another that works by scores, take a family with rsample, or leave a discrete site out of '
        "the guide: it is summed out."
    )
    return refuse(f"guide sites {sites}", "reparameterised draws", "distributions without rsample", cure)
