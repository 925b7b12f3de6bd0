"""From latents to data: the model run forwards at given latents, at those of a guide, or at its own."""

from collections.abc import Mapping
from typing import Any

import torch

from pyro_lvm._checks import check_positive_int, check_program, data_tensor, refuse
from pyro_lvm._typing import DataPlate, Guide, Model, TensorLike
from pyro_lvm.errors import ShapeError, SiteError, SupportError
from pyro_lvm.tracing.batch import make_batch
from pyro_lvm.tracing.classes import summed_out_values
from pyro_lvm.tracing.forward import forward, has_values, observed_site, one_of, template
from pyro_lvm.tracing.intercept import Trace, is_latent, run
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.probe import empty_guide, probe_pair
from pyro_lvm.tracing.weights import evaluation

__all__ = ["decode", "reconstruct", "sample"]


def decode(
    model: Model, latents: TensorLike | Mapping[str, TensorLike], x: TensorLike, *args: Any, site: str | None = None
) -> Any:
    """p(x | z) at given latents, as a distribution: ``.mean``, ``.sample()``.

    Args:
        model: generative program p(x, z).
        latents: z of M rows as the model draws it, ``(M, *event)``, where it has one latent site; else a dictionary
            from sites to values. Latents that are left out are drawn.
        x: tells the model what to make, as data of the right shape. With M rows each goes with its row of z; otherwise
            the first row stands for all.
        *args: further arguments of the model, in rows as x.
        site: the observed site; None for the only one.

    Returns:
        A Pyro distribution over M rows, without gradients.

    Raises:
        SiteError: ``latents`` or ``site`` names what the model does not have, or does not name one of several.
        ShapeError: a latent has another shape than the model draws.
        PlateError: the model does not follow the number of rows.

    Example:
        >>> from pyro_lvm.models import DeepGaussian
        >>> from pyro_lvm.nn import MLP
        >>> model = DeepGaussian(MLP(2, [16], 64), 2)
        >>> decode(model, torch.zeros(5, 2), torch.zeros(1, 64)).mean.shape
        torch.Size([5, 64])
    """
    check_program("model", model)
    batch = make_batch(data_tensor("x", x), args)
    with evaluation(model, None), torch.no_grad(), validation(False):
        with evaluation_rng(0):
            trace = run(model, batch.args)
            values, name = _given(trace, latents), observed_site(trace, site)
            rows = template(batch, len(next(iter(values.values()))))
            drawn = forward(model, rows)
        values = {latent: _fitting(latent, value, drawn[latent]["value"]) for latent, value in values.items()}
        return forward(model, rows, values)[name]["fn"]


def _given(trace: Trace, latents: Any) -> dict[str, torch.Tensor]:
    """The values by site."""
    there = [name for name, site in trace.items() if is_latent(site)]
    if not isinstance(latents, Mapping):
        latents = {one_of(None, there, "latent sites"): latents}
    unknown = [name for name in latents if name not in there]
    if unknown or not latents:
        cure = "Pass a dictionary from latent sites to values."
        raise SiteError(refuse("latents", f"values of some of {there}", unknown or "none", cure))
    return {name: data_tensor(f"latents[{name!r}]", value) for name, value in latents.items()}


def _fitting(name: str, value: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """A latent of the shape that the model draws; whole numbers where that draws real ones are such."""
    if value.shape != drawn.shape:
        expected = f"shape {tuple(drawn.shape)}, as the model draws it"
        cure = "One row for each point; flatten a grid of points first."
        raise ShapeError(refuse(f"latents[{name!r}]", expected, tuple(value.shape), cure))
    return value.to(drawn.dtype) if drawn.is_floating_point() and not value.is_floating_point() else value


def reconstruct(
    model: Model,
    guide: Guide | None,
    x: TensorLike,
    *args: Any,
    num_draws: int = 10,
    site: str | None = None,
    data_plate: DataPlate = "auto",
    seed: int | None = None,
) -> torch.Tensor:
    r"""What the pair makes of x when it has been through the latents: the mean of p(x' | z) over q(z | x).

    .. math:: E_{q(z \mid x)}\, E[x' \mid z]

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x), or None. Discrete latents that it lacks are drawn from p(y | x, z).
        x: data ``(N, ...)``.
        *args: further arguments of both programs.
        num_draws: draws of z to average over.
        site: the observed site; None for the only one.
        data_plate: the plate that holds the data.
        seed: forks the global random state; None draws from it.

    Returns:
        ``(N, *event)``, in the units of x, without gradients.

    Raises:
        SupportError: p(x | z) has no mean, as that of classes.
        SiteError, PlateError: as `log_marginal`.

    Example:
        >>> from pyro_lvm.models import LinearGaussian
        >>> model = LinearGaussian(2, 5)
        >>> reconstruct(model, model.posterior_guide, torch.zeros(3, 5), seed=0).shape
        torch.Size([3, 5])
    """
    num_draws = check_positive_int("num_draws", num_draws)
    guide = guide or empty_guide
    batch = make_batch(data_tensor("x", x), args)
    with evaluation(model, guide), torch.no_grad():
        with evaluation_rng(0):
            plan = probe_pair(model, guide, batch, data_plate)
            name = observed_site(run(model, batch.args), site)
        total: Any = 0.0
        with evaluation_rng(seed), validation(False):
            for _ in range(num_draws):
                values = {n: s["value"] for n, s in run(guide, batch.args).items() if is_latent(s)}
                values |= summed_out_values(plan, model, batch, values)
                total = total + _mean(name, forward(model, batch, values)[name]["fn"])
    return total / num_draws


def _mean(name: str, fn: Any) -> torch.Tensor:
    """The mean of p(x | z); classes have none, and torch says NaN."""
    try:
        mean: torch.Tensor = fn.mean
    except NotImplementedError:
        mean = torch.tensor(torch.nan)
    if bool(mean.isnan().all()):
        cure = "Take decode(model, latents, x), which gives the distribution."
        raise SupportError(refuse(f"site {name!r}", "a distribution with a mean", type(fn).__name__, cure))
    return mean


def sample(
    model: Model, x: TensorLike, num_samples: int, *args: Any, seed: int | None = None
) -> dict[str, torch.Tensor]:
    """Draws of all that the model draws: latents, and what it would observe.

    Args:
        model: generative program p(x, z).
        x: tells the model what to make, as data of the right shape; its first row stands for all, unless there are
            ``num_samples`` rows.
        num_samples: how many data.
        *args: further arguments of the model, in rows as x.
        seed: forks the global random state; None draws from it.

    Returns:
        Site -> draws, those inside the data plate with ``num_samples`` rows.

    Raises:
        PlateError: the model does not follow the number of rows.

    Example:
        >>> from pyro_lvm.models import GaussianMixture
        >>> draws = sample(GaussianMixture(3, 2), torch.zeros(1, 2), 100, seed=0)
        >>> draws["z"].shape, draws["x"].shape
        (torch.Size([100]), torch.Size([100, 2]))
    """
    check_program("model", model)
    batch = template(make_batch(data_tensor("x", x), args), check_positive_int("num_samples", num_samples))
    with (
        evaluation(model, None),
        torch.no_grad(),
        validation(False),
        evaluation_rng(seed),
    ):
        trace = forward(model, batch)
    return {name: site["value"] for name, site in trace.items() if site["type"] == "sample" and has_values(site)}
