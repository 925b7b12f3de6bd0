r"""Signal-to-noise ratio of a stochastic gradient, parameter by parameter, beside how much of the latents is used.

.. math:: \mathrm{SNR}(g) = \frac{\lVert E[g] \rVert}{\sqrt{\sum_i \mathrm{Var}(g_i)}}
"""

from typing import Any

import torch

from pyro_lvm._checks import check_positive_int, data_tensor, refuse
from pyro_lvm._typing import DataPlate, Guide, Model, TensorLike
from pyro_lvm.errors import ParameterError
from pyro_lvm.objectives.default import check_loss
from pyro_lvm.objectives.gradients import gradient_moments, gradients_put_aside, program_and_loss
from pyro_lvm.objectives.snr_record import GradientGroup, GradientSNR, Part
from pyro_lvm.objectives.usage import latent_usage
from pyro_lvm.ops.running import RunningMoments
from pyro_lvm.tracing.batch import make_batch
from pyro_lvm.tracing.isolation import evaluation_rng
from pyro_lvm.tracing.params import current_params
from pyro_lvm.tracing.probe import empty_guide
from pyro_lvm.tracing.questions import parameter_names
from pyro_lvm.tracing.weights import evaluation

__all__ = ["gradient_snr"]

# Rounding error of a gradient, in units of eps x |loss|: a sum over N data of terms that cancel errs by sqrt(N) eps of
# their size, and the loss grows like N.
_NOISE_FACTOR = 4


def gradient_snr(
    model: Model,
    guide: Guide | None,
    x: TensorLike,
    *args: Any,
    loss: Any = None,
    num_repeats: int = 100,
    num_particles: int = 100,
    data_plate: DataPlate = "auto",
    seed: int | None = None,
) -> GradientSNR:
    r"""Signal-to-noise ratio of the gradient of a loss on x, for model and guide, and what the latents are used for.

    .. math:: \mathrm{SNR}(g_i) = \frac{|E[g_i]|}{\sigma[g_i]}, \qquad
              \mathrm{SNR}(g) = \frac{\lVert E[g] \rVert}{\sqrt{\sum_i \mathrm{Var}(g_i)}}

    The ratio of a number is that of Rainforth et al. (2018); that of a parameter, and of all of the model or guide,
    divides the norm of the expected gradient by the root of its total variance. From R repeats, the square of the norm
    of the mean is too large by the total variance over R, which is taken off; the ratio of a number is left as it is.
    Its standard error is about :math:`\sqrt{(1 + \mathrm{SNR}^2 / 2) / R}`.

    What varies is what the loss draws; x is one batch, all of it in each repeat, and no loss is scaled to a larger data
    set. Gradients are those of unconstrained parameters, as optimizers see them. Modules are in eval mode, as in all
    evaluations: neither dropout nor batch statistics add noise. Nothing is changed: param store, gradients, modes and,
    with a seed, the random state; ``loss`` is copied, so that a schedule in it does not go on.

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x).
        x: data ``(N, ...)``.
        *args: further arguments of both.
        loss: any loss that `fit` takes; None is what `fit` takes for None.
        num_repeats: R, gradients; 2 or more.
        num_particles: draws for `latent_usage`, 2 or more, not for the loss.
        data_plate: the plate that holds the data, for `latent_usage`.
        seed: forks the global random state; None draws from it.

    Returns:
        `GradientSNR`.

    Raises:
        DataTypeError: ``loss`` is a class, or cannot be called.
        ShapeError: ``num_repeats`` or ``num_particles`` is less than 2.
        ParameterError: neither model nor guide has a parameter with a gradient.
        PlateError, SiteError: see `latent_usage`, and what the loss raises.

    Source: Rainforth et al. (2018), Tighter Variational Bounds are Not Necessarily Better, Section 3.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(loc, 1.0))
        >>> pyro.clear_param_store()
        >>> _ = guide(torch.zeros(1))  # a parameter that is there already is no untrained one
        >>> result = gradient_snr(model, guide, torch.tensor([4.0]), seed=0, num_repeats=1000)
        >>> print(f"{result.guide.snr:.1f}")  # of 2 z - 4, z ~ N(0, 1)
        2.0
    """
    check_loss(loss)
    num_repeats = check_positive_int("num_repeats", num_repeats, minimum=2)
    num_particles = check_positive_int("num_particles", num_particles, minimum=2)
    batch = make_batch(data_tensor("x", x), args)
    guide = guide or empty_guide
    with evaluation(model, guide), torch.enable_grad():
        with evaluation_rng(0):
            names = parameter_names(model, guide, *batch.args)
            program, objective = program_and_loss(model, guide, batch, loss)
        leaves = {n: t for n, (t, _) in current_params().items() if n in names[0] | names[1] and t.requires_grad}
        if not leaves:
            cure = "Declare one by pyro.param, pyro.module or a PyroModule."
            raise ParameterError(refuse("model, guide", "a parameter with a gradient", "none", cure))
        with evaluation_rng(seed), gradients_put_aside(model, guide, objective):
            values, moments = gradient_moments(objective, program, guide, batch, leaves, num_repeats)
    eps = max(torch.finfo(leaf.dtype).eps for leaf in leaves.values())
    rounding = _NOISE_FACTOR * eps * max(1.0, float(values.mean.abs()))
    parameters = {n: _group(n, _part(n, names), [moments[n]], num_repeats, rounding) for n in sorted(leaves)}
    parts = [[moments[n] for n in sorted(leaves) if n in own] for own in names]
    usage = latent_usage(model, guide, x, *args, num_particles=num_particles, data_plate=data_plate, seed=seed)
    return GradientSNR(
        _group("", "model", parts[0], num_repeats, rounding) if parts[0] else None,
        _group("", "guide", parts[1], num_repeats, rounding) if parts[1] else None,
        parameters,
        usage,
        float(values.mean),
        getattr(objective, "__name__", type(objective).__name__),
        num_repeats,
    )


def _part(name: str, names: tuple[set[str], set[str]]) -> Part:
    if name in names[0] and name in names[1]:
        return "both"
    return "model" if name in names[0] else "guide"


def _group(name: str, part: Part, moments: list[RunningMoments], num_repeats: int, rounding: float) -> GradientGroup:
    mean = torch.cat([each.mean.flatten() for each in moments])  # (P,)
    std = torch.cat([each.variance.flatten() for each in moments]).sqrt()  # (P,)
    return GradientGroup(name, part, mean, std, num_repeats, rounding)
