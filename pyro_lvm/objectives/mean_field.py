r"""What Pyro's ``TraceMeanField_ELBO`` makes of a pair: which KL terms are closed forms, and when their sum is wrong.

.. math:: \mathcal L = E_q\Big[\log p(x \mid z)
          - \sum_i KL\big(q(z_i \mid \text{pa}_q) \,\|\, p(z_i \mid \text{pa}_p)\big)\Big]

is the ELBO only if no latent in :math:`\text{pa}_p(z_i)` is drawn from :math:`z_i` by the guide, and if model and guide
weigh and mask :math:`z_i` alike; Pyro takes the weight and mask of the guide for both.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.infer import ELBO, TraceMeanField_ELBO

from pyro_lvm._checks import data_tensor, refuse
from pyro_lvm._typing import Guide, Model, TensorLike
from pyro_lvm.errors import SiteError
from pyro_lvm.objectives.closed_form_kl import closed_forms, family
from pyro_lvm.objectives.setting import needs_score
from pyro_lvm.table import TextTable
from pyro_lvm.tracing.batch import Batch, make_batch
from pyro_lvm.tracing.intercept import Site, Trace, is_latent, is_unobserved
from pyro_lvm.tracing.isolation import eval_mode, evaluation_rng, validation
from pyro_lvm.tracing.params import own_store
from pyro_lvm.tracing.probe import Run, empty_guide, run_or_explain, run_pair
from pyro_lvm.tracing.sites import is_delta

__all__ = ["AnalyticKL", "SiteKL", "analytic_kl", "check_mean_field", "uses_mean_field"]


@dataclass(frozen=True)
class SiteKL:
    """How ``TraceMeanField_ELBO`` takes the KL term of one latent.

    Attributes:
        name: the latent.
        method: ``"analytic"``, or ``"Monte Carlo"``: log q(z) - log p(z) at one draw, as in ``Trace_ELBO``; also where
            a `Delta` takes that draw from an auxiliary site, as in AutoGuides.
        families: those of the guide and of the model; an analytic term exists for some pairs of them only.
        fault: what makes the value or its gradient wrong, with the cure; empty if nothing was found.
    """

    name: str
    method: Literal["analytic", "Monte Carlo"]
    families: str
    fault: str = ""


@dataclass(frozen=True)
class AnalyticKL:
    """The KL terms of a pair, one a latent, in the order of the model; prints as a table."""

    sites: tuple[SiteKL, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, one sentence a latent; empty if nothing was found."""
        return tuple(site.fault for site in self.sites if site.fault)

    @property
    def monte_carlo(self) -> tuple[str, ...]:
        """The latents whose KL term is an estimate from one draw."""
        return tuple(site.name for site in self.sites if site.method == "Monte Carlo")

    def __str__(self) -> str:
        rows = tuple((s.name, s.method, s.families, "fault" if s.fault else "none found") for s in self.sites)
        notes = self.faults or ("TraceMeanField_ELBO: no fault found",)
        return str(TextTable(("latent", "KL", "families", "fault"), rows or (("none", "-", "-", "-"),), notes))


def analytic_kl(model: Model, guide: Guide | None, x: TensorLike, *args: Any) -> AnalyticKL:
    r"""Which KL terms ``TraceMeanField_ELBO`` takes in closed form, and what makes its value wrong.

    .. math:: KL(q(z_i) \,\|\, p(z_i)) = E_q[\log q(z_i) - \log p(z_i)]

    Pyro takes it in closed form where torch has one for the two families, and from the draw otherwise, without a word.
    Faults are found from the structure of the pair, not from its value: a latent that the guide feeds into another on
    which its prior depends; scales or masks that model and guide do not share; a closed form that is not that of the
    distribution (a `Delta` with a log-density, a transform that is not one-to-one, a subclass that changes what it
    inherits); shapes that do not fit; draws that carry no gradient. A gate that is closed for all draws looks open.

    Nothing is changed, and parameters need not be trained.

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x).
        x: data ``(N, ...)``; a few rows are enough.
        *args: further arguments of both.

    Returns:
        `AnalyticKL`. `fit` raises its faults before training, if its loss is a ``TraceMeanField_ELBO``.

    Raises:
        SiteError: the two do not have the same latents.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> print(analytic_kl(model, guide, torch.zeros(2)))
        latent        KL          families       fault
        ------  --------  ----------------  ----------
        z       analytic  Normal || Normal  none found
        TraceMeanField_ELBO: no fault found
    """
    batch = make_batch(data_tensor("x", x), args)
    guide = guide or empty_guide
    with own_store(model, guide), eval_mode(model, guide), evaluation_rng(0), torch.enable_grad():
        return _look(model, guide, run_or_explain(model, guide, batch))


def check_mean_field(model: Model, guide: Guide, args: tuple[Any, ...]) -> AnalyticKL:
    """`analytic_kl` of a pair as it is, in the current param store and mode.

    Raises:
        SiteError: the value of ``TraceMeanField_ELBO`` or its gradient would be wrong.
    """
    with torch.enable_grad():
        record = _look(model, guide, run_pair(model, guide, Batch(args, (True,) * len(args))))
    if record.faults:
        raise SiteError("\n".join(record.faults), finding="mean-field")
    return record


def uses_mean_field(loss: Any) -> bool:
    """Whether a loss is a ``TraceMeanField_ELBO``, or wraps one."""
    wrapped = vars(loss).values() if isinstance(loss, ELBO) else ()
    return isinstance(loss, TraceMeanField_ELBO) or any(map(uses_mean_field, wrapped))


def _look(model: Model, guide: Guide, pair: Run) -> AnalyticKL:
    latents = _shared_latents(pair.model, pair.guide)
    needing_score = [n for n in latents if needs_score(pair.guide[n])]
    with validation(False), torch.no_grad():
        found = closed_forms(model, guide, pair, latents)
    auxiliary = any(is_latent(site) and site["infer"].get("is_auxiliary") for site in pair.guide.values())
    sites = []
    for name, (kl, fault) in found.items():
        families = f"{family(pair.guide[name]['fn'])} || {family(pair.model[name]['fn'])}"
        score = _score_fault(name, pair.guide[name]) if name in needing_score else ""
        drawn = kl is None or (is_delta(pair.guide[name]) and auxiliary)
        method: Literal["analytic", "Monte Carlo"] = "Monte Carlo" if drawn else "analytic"
        sites.append(SiteKL(name, method, families, fault or score))
    return AnalyticKL(tuple(sites))


def _shared_latents(model: Trace, guide: Trace) -> list[str]:
    """The latents of the model, all of which the guide has to sample, and no other."""
    latents = [n for n, s in model.items() if is_latent(s) and not (is_unobserved(n) and n not in guide)]
    sampled = [n for n, s in guide.items() if is_latent(s) and not s["infer"].get("is_auxiliary")]
    if set(latents) != set(sampled):
        cure = "TraceMeanField_ELBO enumerates nothing: sample the same latents in both, or pass another loss."
        message = refuse("guide", f"the latent sites {latents} of the model", sampled, cure)
        raise SiteError(message, finding="missing-site")
    return latents


def _score_fault(name: str, guide: Site) -> str:
    cure = "Its gradient would be wrong: take a family with rsample, or pass loss=Trace_ELBO()."
    return refuse(f"guide site {name!r}", "reparameterised draws", f"{family(guide['fn'])} without rsample", cure)
