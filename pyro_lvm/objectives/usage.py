r"""How much of its latents a pair uses: active units, and the KL term of each dimension.

.. math:: A_u = \mathrm{Var}_n\big(E_{q(z \mid x_n)}[z_u]\big), \qquad
          KL_u = \frac1N \sum_n E_q\Big[\log \frac{q(z_u \mid x_n)}{p(z_u)}\Big]
"""

from typing import Any, Literal

import torch
from torch.distributions import kl_divergence

from pyro_lvm._checks import check_positive_int, data_tensor
from pyro_lvm._typing import DataPlate, Guide, Model, TensorLike
from pyro_lvm.objectives.closed_form_kl import closed_forms, family
from pyro_lvm.objectives.dependence import parents
from pyro_lvm.objectives.usage_record import LatentSite, LatentUsage
from pyro_lvm.ops.running import RunningMoments
from pyro_lvm.tracing.batch import make_batch
from pyro_lvm.tracing.intercept import (
    Site,
    base_distribution,
    is_latent,
    is_unobserved,
    run,
    site_log_prob,
    vectorised_frames,
)
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.plates import find_guide_plate, find_plate
from pyro_lvm.tracing.probe import Run, empty_guide, run_or_explain, run_pair
from pyro_lvm.tracing.sites import is_delta, mask_of
from pyro_lvm.tracing.weights import evaluation

__all__ = ["latent_usage"]


def latent_usage(
    model: Model,
    guide: Guide | None,
    x: TensorLike,
    *args: Any,
    num_particles: int = 100,
    data_plate: DataPlate = "auto",
    seed: int | None = None,
) -> LatentUsage:
    r"""Active units A_u and the KL term of each latent dimension, over the data x.

    .. math:: A_u = \mathrm{Var}_n\big(E_{q(z \mid x_n)}[z_u]\big), \qquad
              KL_u = \frac1N \sum_n E_q\Big[\log \frac{q(z_u \mid x_n)}{p(z_u)}\Big]

    A unit that ignores the data has A_u = 0. The mean of q is that of the distribution where it has one; where a latent
    depends on draws of others, it is averaged over these. The variance which that leaves in the mean, at most 1/K of
    that of q, is estimated and taken off, so that A_u is unbiased and can come out slightly negative. KL terms of the
    dimensions add up to that of the site where guide and prior are products over dimensions; else there is one for the
    site. They are closed forms where torch has one that is right for the pair (see `analytic_kl`). Masks count, scales
    do not. Runs in eval mode, in a loop over particles; once, if a single latent has a mean and a closed form.

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x).
        x: data ``(N, ...)``.
        *args: further arguments of both.
        num_particles: K, draws of all latents, 2 or more; not used where all is exact in one run.
        data_plate: the plate that holds the data, ``"auto"`` to find it; None for one joint result.
        seed: forks the global random state; None draws from it.

    Returns:
        `LatentUsage`.

    Raises:
        PlateError: no single plate holds the data.
        ShapeError: ``num_particles`` is less than 2.
        SiteError: the model observes nothing.

    Source: Burda et al. (2016), Importance Weighted Autoencoders, on active units.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.stack([x, 0 * x], -1), 1.0).to_event(1))
        >>> print(latent_usage(model, guide, torch.tensor([-1.0, 1.0])))
        latent  active units  KL (nats)  KL of a dimension     KL by
        ------  ------------  ---------  -----------------  --------
        z             1 of 2        0.5           0 to 0.5  analytic
        2 data, exact in one run; KL: mean over the data; active: variance of E_q[z] over 0.01
    """
    num_particles = check_positive_int("num_particles", num_particles, minimum=2)  # one has no variance
    batch = make_batch(data_tensor("x", x), args)
    guide = guide or empty_guide
    with evaluation(model, guide), torch.no_grad():
        with evaluation_rng(0):
            pair = run_or_explain(model, guide, batch)
            names = [n for n, s in pair.model.items() if is_latent(s) and n in pair.guide]
            dims = _data_dims(pair, names, data_plate)
            lacking = _summed_out(pair)
            with validation(False):
                forms = closed_forms(model, guide, pair, names)
                blind = _given(model, pair, lacking) if names and lacking else set()
        exact = {n for n, (kl, fault) in forms.items() if kl is not None and not fault}
        with evaluation_rng(seed), validation(False):
            count = 1 if _reads_no_draw(pair, names, exact) else num_particles
            means, terms = _run_particles(model, guide, pair, dims, exact, count)
    for name in blind:
        terms[name] = RunningMoments()
        terms[name].add(torch.full((2,), torch.nan))  # one term for the site, and their sum
    sites = tuple(_site(n, pair, means[n], terms[n], n in exact, dims[n] is not None) for n in names)
    return LatentUsage(sites, len(batch), count, tuple(lacking))


def _summed_out(pair: Run) -> list[str]:
    """Latents that only the model has, and that are not determined by others or missing data."""
    only = [n for n, s in pair.model.items() if is_latent(s) and not is_delta(s) and n not in pair.guide]
    return [n for n in only if not is_unobserved(n)]


def _given(model: Model, pair: Run, lacking: list[str]) -> set[str]:
    """The sampled latents whose prior depends on one that is summed out: at a draw of that it is no prior of theirs."""
    values = {n: s["value"] for n, s in pair.model.items() if is_latent(s)}
    redraws = []
    for seed in (1, 2, 3):
        with evaluation_rng(seed):
            trace = run(model, pair.batch.args)
            redraws.append({n: s["value"] for n, s in trace.items() if is_latent(s)})
    found = parents(model, pair.batch.args, values, redraws)
    return {n for n, above in found.items() if n in pair.guide and above & set(lacking)}


def _data_dims(pair: Run, names: list[str], data_plate: DataPlate) -> dict[str, int | None]:
    """For each latent the batch dimension of the data in the guide, None where it belongs to all of them at once."""
    if data_plate is None:
        return dict.fromkeys(names)
    plate = find_plate([(pair.model, len(pair.batch))], data_plate)
    plate = find_guide_plate(plate, pair.model, pair.guide, names)
    frames = {n: {f.name: f.dim for f in vectorised_frames(pair.guide[n])} for n in names}
    return {n: frames[n].get(plate) for n in names}


def _run_particles(
    model: Model, guide: Guide, pair: Run, dims: dict[str, int | None], exact: set[str], num_particles: int
) -> tuple[dict[str, RunningMoments], dict[str, RunningMoments]]:
    """Moments over the draws: of the mean of q, ``(N, D)``, and of the data's mean of its KL terms and of their sum."""
    means, terms = ({n: RunningMoments() for n in dims} for _ in range(2))
    for _ in range(num_particles):
        drawn = run_pair(model, guide, pair.batch)
        found = {n: _terms(drawn.guide[n], drawn.model[n], dim, n in exact) for n, dim in dims.items()}
        for name, (mean, term) in found.items():
            means[name].add(mean)
            terms[name].add(torch.cat([term.mean(0), term.mean(0).sum()[None]]))
    return means, terms


def _reads_no_draw(pair: Run, names: list[str], exact: set[str]) -> bool:
    """Whether one run gives all there is: a single latent, with a mean and a closed form."""
    latents = [n for n, site in pair.guide.items() if is_latent(site)]
    return latents == names and len(names) == 1 and names[0] in exact and _mean(pair.guide[names[0]]) is not None


def _mean(site: Site) -> torch.Tensor | None:
    try:
        return site["fn"].mean.expand(site["value"].shape)
    except NotImplementedError:  # of most transformed distributions
        return None


def _terms(guide: Site, model: Site, dim: int | None, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of q, ``(N, D)``, and KL terms, ``(N, D)`` or ``(N, 1)``, at one draw."""
    mean = _mean(guide)
    mean = guide["value"] if mean is None else mean
    return _rows(mean, dim, guide["fn"].event_dim), _kl_terms(guide, model, dim, exact)


def _kl_terms(guide: Site, model: Site, dim: int | None, exact: bool) -> torch.Tensor:
    value, event_dim = guide["value"], guide["fn"].event_dim
    if is_delta(guide):
        return value.new_full((1, 1), torch.nan)
    q, p = base_distribution(guide["fn"]), base_distribution(model["fn"])
    split = len(q.event_shape) == 0 and len(p.event_shape) == 0 and event_dim == model["fn"].event_dim
    if not split:
        each = kl_divergence(guide["fn"], model["fn"]) if exact else site_log_prob(guide) - site_log_prob(model)
        mask = mask_of(guide) if exact else torch.tensor(True)
        each = (each * mask).expand(guide["fn"].batch_shape)
        return _rows(each, dim, 0).sum(1, keepdim=True)  # (N, 1)
    if exact:
        each = kl_divergence(q, p).expand(value.shape) * _over_event(mask_of(guide), event_dim)
    else:
        log_q = q.log_prob(value) * _over_event(mask_of(guide), event_dim)
        each = (log_q - p.log_prob(value) * _over_event(mask_of(model), event_dim)).expand(value.shape)
    return _rows(each, dim, event_dim)  # (N, D)


def _over_event(mask: torch.Tensor, event_dim: int) -> torch.Tensor:
    return mask.reshape(*mask.shape, *[1] * event_dim) if mask.dim() else mask


def _rows(values: torch.Tensor, dim: int | None, event_dim: int) -> torch.Tensor:
    """A datum a row, ``(N, D)``; one row for a latent that belongs to all data at once."""
    if dim is None:
        return values.reshape(1, -1)
    return values.movedim(dim - event_dim, 0).flatten(1) if values.dim() > 1 else values[:, None]


def _site(
    name: str, pair: Run, means: RunningMoments, terms: RunningMoments, exact: bool, per_datum: bool
) -> LatentSite:
    activity = torch.full_like(means.mean[0], torch.nan)  # (D,)
    if per_datum and len(means.mean) > 1:
        noise = means.variance / means.count if means.count > 1 else torch.zeros_like(means.mean)
        activity = means.mean.var(0) - noise.mean(0)
    error = (terms.variance / terms.count).sqrt() if terms.count > 1 else torch.zeros_like(terms.mean)
    families = f"{family(pair.guide[name]['fn'])} || {family(pair.model[name]['fn'])}"
    method: Literal["analytic", "Monte Carlo"] = "analytic" if exact else "Monte Carlo"
    return LatentSite(name, activity, terms.mean[:-1], error[:-1], float(error[-1]), method, families)
