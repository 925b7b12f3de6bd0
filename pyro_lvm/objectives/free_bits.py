r"""The ELBO with a floor under the KL of each latent dimension, so that a decoder does not do without it.

.. math:: \mathcal L_\lambda = \frac1B \sum_n E_q[\log p(x_n \mid z_n)] - \sum_j \max\Big(\lambda,
          \frac1B \sum_n KL_{nj}\Big)
"""

import math
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.infer import Trace_ELBO
from pyro.util import warn_if_nan
from torch.distributions import Independent, kl_divergence

from pyro_lvm._checks import check_positive_int, data_tensor, refuse
from pyro_lvm._typing import Guide, Model
from pyro_lvm.errors import DataTypeError, PlateError, SiteError
from pyro_lvm.objectives.closed_form_kl import not_its_own
from pyro_lvm.objectives.setting import needs_score, own_subsample, scale_of
from pyro_lvm.tracing.intercept import (
    Site,
    Trace,
    is_latent,
    is_observed,
    is_unobserved,
    site_log_prob,
    vectorised_frames,
)
from pyro_lvm.tracing.plates import find_plate

__all__ = ["FreeBits"]

_PARTICLES = "num_particles_vectorized"  # Pyro's name of its plate


class FreeBits(Trace_ELBO):
    r"""Minus the ELBO, where the KL of each latent dimension counts as at least :math:`\lambda` nats a datum.

    .. math:: \text{loss} = -\sum_n E_q[\log p(x_n \mid z_n)] + B \sum_j \max\Big(\lambda, \frac1B \sum_n KL_{nj}\Big)

    A dimension whose KL, averaged over the B data of the step, is below :math:`\lambda` costs the same whatever it
    carries: nothing pushes it to the prior. Minus the loss is at most the ELBO, in expectation, and equals it where
    every KL is above the floor: still a lower bound of log p(x), a looser one. It is what training sees and nothing
    else: `log_weights`, `elbo` and `log_marginal` know no floor, and the losses of `fit` are not minus the ELBO.

    A dimension j is each element of a site that is made of univariate distributions in guide and model (``Normal``,
    also with ``to_event``), without masks. The KL of any other site is one number a datum. That of a dimension is taken
    in closed form where there is one and the latents come in the same order in both programs (then no prior depends on
    what is drawn later); else it is log q - log p at the draws, averaged over particles before the floor is applied. A
    latent outside the data plate has one KL, which is not averaged over data.

    Args:
        nats: :math:`\lambda` >= 0, the floor of each dimension; 0 leaves the ELBO as it is.
        num_particles: draws for each datum.
        data_plate: the plate that holds the data, ``"auto"`` to find it.
        vectorize_particles: run all particles at once, in a plate of Pyro's.

    Raises:
        DataTypeError: an argument of the wrong kind, or (when used) the first argument of the pair is not a tensor.
        ShapeError: ``num_particles`` is less than 1.
        PlateError: (when used) no single tensor dimension holds the data.
        SiteError: (when used) the guide has not the latents of the model, one of them depends on parameters and is not
            reparameterised, or a latent is scaled differently in model and guide.

    Source: Kingma et al. (2016), Improved Variational Inference with Inverse Autoregressive Flow, eq. 15.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.tensor([2.0, 0.0]), 1.0).to_event(1))  # KL = 2 and 0
        >>> [round(FreeBits(nats).loss(model, guide, torch.zeros(1)), 4) for nats in (0.0, 0.5, 3.0)]
        [2.9189, 3.4189, 6.9189]
    """

    def __init__(
        self,
        nats: float,
        *,
        num_particles: int = 1,
        data_plate: str = "auto",
        vectorize_particles: bool = False,
    ) -> None:
        if isinstance(nats, bool) or not isinstance(nats, int | float) or not 0 <= nats < math.inf:
            cure = "Pass the floor of each dimension, e.g. 0.25."
            raise DataTypeError(refuse("nats", "a finite number >= 0", repr(nats), cure))
        if not isinstance(data_plate, str):
            raise DataTypeError(refuse("data_plate", "a name", repr(data_plate), 'Pass "auto" to find it.'))
        if not isinstance(vectorize_particles, bool):
            raise DataTypeError(refuse("vectorize_particles", "True or False", repr(vectorize_particles), "Pass one."))
        super().__init__(
            num_particles=check_positive_int("num_particles", num_particles), vectorize_particles=vectorize_particles
        )
        self.nats, self.data_plate = float(nats), data_plate

    def loss(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> float:
        """The loss of all data, in nats, without gradients."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> float:
        """`loss`, after adding its gradient to the parameters' ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(loss.detach())

    def differentiable_loss(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of all data, ``()``, in nats."""
        num_data = _num_data(args)
        likelihood = torch.zeros(())
        terms: dict[str, list[tuple[torch.Tensor, float]]] = {}
        for pair in self._get_traces(model, guide, args, kwargs):
            p, q = map(_sites, pair)
            plate = self._find_plate(p, num_data)
            likelihood = sum((s["log_prob_sum"] for s in p.values() if is_observed(s)), likelihood)
            for name, kl, weight in _divergences(p, q, plate):
                terms.setdefault(name, []).append((kl, weight))
        divergence = torch.zeros(())
        for found in terms.values():
            kl = torch.stack([kl for kl, _ in found]).mean(0)  # (J,), over particles
            kl = kl.clamp(min=self.nats) if self.nats > 0 else kl  # an estimate of a KL may be negative
            divergence = divergence + found[0][1] * kl.sum()
        loss = divergence - likelihood / self.num_particles
        warn_if_nan(loss.detach(), "loss")
        return loss

    def notes(self) -> list[str]:
        """What the losses of a run are."""
        return [
            f"in the losses the KL of each latent dimension counts as {self.nats:g} nats or more (FreeBits): they are "
            "not minus the ELBO; elbo, log_marginal and compare are not affected"
        ]

    def _find_plate(self, model: Trace, num_data: int) -> str:
        own = own_subsample(model, num_data, self.data_plate)
        plate = own[0] if own else find_plate([(model, num_data)], self.data_plate)
        if any(f.name == plate and f.dim is None for s in model.values() for f in s["cond_indep_stack"]):
            cure = "Write `with pyro.plate(...)`, not `for ... in pyro.plate(...)`."
            raise PlateError(refuse(f"data plate {plate!r}", "a tensor dimension", "a sequential plate", cure))
        return plate


def _num_data(args: tuple[Any, ...]) -> int:
    """N by the first argument, whose values are not looked at."""
    x = args[0] if args else None
    return len(x) if isinstance(x, torch.Tensor) and x.dim() else len(data_tensor("x, the first argument", x))


def _sites(trace: Any) -> Trace:
    """The random variables of one of Pyro's traces, as seen by the pair: without the plate of particles."""
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    for name, site in sites.items():
        stack = tuple(f for f in site["cond_indep_stack"] if f.name != _PARTICLES)
        sites[name] = {**site, "cond_indep_stack": stack, "_particles": stack != site["cond_indep_stack"]}
    return sites


def _divergences(model: Trace, guide: Trace, plate: str) -> list[tuple[str, torch.Tensor, float]]:
    """Name of each latent, the KL of its dimensions ``(J,)``, averaged over data, and the number of data it is for."""
    latents = [n for n, s in model.items() if is_latent(s) and not (is_unobserved(n) and n not in guide)]
    drawn = [n for n, s in guide.items() if is_latent(s) or is_observed(s)]
    if set(latents) != set(drawn):
        cure = (
            "Give the guide one site for each latent, and no other (AutoGuides with auxiliary sites: use Trace_ELBO)."
        )
        raise SiteError(refuse("guide", f"the latent sites {latents} of the model", drawn, cure))
    ordered = drawn == latents
    found = []
    for name in latents:
        p, q = model[name], guide[name]
        _check(name, p, q)
        kl = _elementwise(p, q, ordered)
        batch_dims = len(q["fn"].batch_shape)
        dims = [batch_dims + f.dim for f in vectorised_frames(q) if f.name == plate]
        size = math.prod(kl.shape[d] for d in dims)
        averaged = [0, *dims] if q["_particles"] else dims
        kl = kl.mean(averaged) if averaged else kl
        found.append((name, kl.reshape(-1), size * scale_of(name, q["scale"])))
    return found


def _check(name: str, p: Site, q: Site) -> None:
    if not math.isclose(scale_of(name, p["scale"]), scale_of(name, q["scale"]), rel_tol=1e-6):
        cure = "Declare the plate alike in both programs, with the same `subsample=` or `subsample_size=`."
        raise SiteError(refuse(f"guide site {name!r}", f"the model's scale {p['scale']:g}", f"{q['scale']:g}", cure))
    if torch.is_grad_enabled() and needs_score(q):
        cure = "Take a family with rsample, or use Trace_ELBO."
        raise SiteError(refuse(f"guide site {name!r}", "reparameterised draws", type(q["fn"]).__name__, cure))


def _elementwise(p: Site, q: Site, ordered: bool) -> torch.Tensor:
    """KL(q || p), ``(*batch, *event)`` where the elements are univariate, else ``(*batch,)``."""
    prior, posterior = _univariate(p), _univariate(q)
    shape = q["fn"].batch_shape + q["fn"].event_shape
    if prior is None or posterior is None or p["fn"].batch_shape + p["fn"].event_shape != shape:
        return site_log_prob(q) - site_log_prob(p)
    if ordered and not not_its_own(posterior, prior):
        try:
            return kl_divergence(posterior, prior).expand(shape)
        except NotImplementedError:
            pass
    return (posterior.log_prob(q["value"]) - prior.log_prob(q["value"])).expand(shape)


def _univariate(site: Site) -> Any:
    """The univariate distributions that a site is made of, or None."""
    fn = site["fn"]
    while isinstance(fn, Independent):
        fn = fn.base_dist
    masked = site["mask"] is not None or isinstance(fn, MaskedDistribution)
    return None if masked or len(fn.event_shape) else fn
