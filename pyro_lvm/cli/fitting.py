"""How the command line trains: losses by name, the learning rate, what comes before the pair itself."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from pyro_lvm import models
from pyro_lvm._checks import refuse
from pyro_lvm._typing import Guide, Model
from pyro_lvm.cli.data import Data
from pyro_lvm.cli.pairs import DISCRETE
from pyro_lvm.errors import DataTypeError, ParameterError, PyroLVMError
from pyro_lvm.objectives import ImportanceWeightedELBO
from pyro_lvm.tracing.params import anchor
from pyro_lvm.training import FitResult, callbacks, fit

__all__ = ["decay", "default_loss", "few_threads", "in_range", "make_loss", "prepare", "train"]

_SMALL = 256  # numbers


def few_threads(data: Data) -> None:
    """One thread where a datum is that small that more would wait for one another, unless the user says how many."""
    if data.test[0].numel() <= _SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def default_loss(guide: str) -> str:
    """The loss that is taken if none is named: the gradient of the ELBO is too noisy for discrete latents."""
    return "iw:5" if guide in DISCRETE else "elbo"


def make_loss(loss: str, guide: str) -> Any:
    """The loss of a name: ``elbo``, ``mean_field`` or ``iw:K``, as `fit` takes it.

    Raises:
        DataTypeError: the loss is not for this guide.

    Example:
        >>> make_loss("iw:5", "bernoulli").num_particles
        5
    """
    if loss == "elbo":
        return None
    if guide == "none":
        cure = "Leave --loss out: log p(x) itself is trained."
        raise DataTypeError(refuse("--loss", "elbo, where there is no guide", loss, cure))
    if loss == "mean_field" and guide in DISCRETE:
        cure = "Bits are no reparameterised draws: take one of the two."
        raise DataTypeError(refuse("--loss", f"elbo or iw:K with guide {guide}", loss, cure))
    if loss == "mean_field":
        return TraceMeanField_ELBO()
    return ImportanceWeightedELBO(int(loss.partition(":")[2]), "vimco" if guide in DISCRETE else "standard")


def decay(num_steps: int) -> callbacks.Schedule:
    """The learning rate as it is for half of the steps, then down a line to 2 % of it.

    Example:
        >>> decay(100).every
        'step'
    """
    return callbacks.Schedule(
        lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, 0.02 + 1.96 * max(0.0, 1 - step / num_steps)))
    )


def num_steps(options: Mapping[str, Any], data: Data) -> int:
    """All steps of a run that is limited by ``steps`` or by ``epochs``."""
    return options["steps"] or options["epochs"] * -(-len(data.train) // options["batch_size"])


def train(
    model: Model,
    guide: Guide | None,
    data: Data,
    options: Mapping[str, Any],
    *,
    loss: Any = None,
    steps: int | None = None,
    extra: Sequence[Any] = (),
    **rest: Any,
) -> FitResult:
    """`fit` with the options of the command line.

    Args:
        model: the model.
        guide: its guide, or None.
        data: what is trained on is ``data.train``.
        options: ``steps`` or ``epochs``, ``batch_size``, ``lr``, ``seed``, ``device``, ``compile``.
        loss: a loss object.
        steps: in the place of those in the options.
        extra: callbacks besides the schedule.
        rest: further options of `fit`.

    Raises:
        KeyboardInterrupt: training was interrupted.
        ParameterError: a distribution of a library pair was refused by torch, as a scale that became zero is.
    """
    total = steps or num_steps(options, data)
    limit = {"num_epochs": options["epochs"]} if options["epochs"] and not steps else {"num_steps": total}
    common = {name: options[name] for name in ("batch_size", "seed", "device", "compile")}
    adam = partial(Adam, lr=options["lr"])
    schedule = [*extra, decay(total)]
    with in_range(model, guide):
        result = fit(model, guide, data.train, loss=loss, optim=adam, callbacks=schedule, **limit, **common, **rest)
    if result.stop_reason == "interrupted":
        raise KeyboardInterrupt
    return result


@contextmanager
def in_range(*programs: Any) -> Iterator[None]:
    """Of library pairs, what torch says of a distribution whose parameters left their range is a refusal.

    What a user's own code raises passes as it is.

    Raises:
        ParameterError: as a scale that has become zero.
    """
    try:
        yield
    except ValueError as error:
        owners = [anchor(program) for program in programs if program is not None]
        own = not all(type(owner).__module__.startswith("pyro_lvm.") for owner in owners)
        if own or isinstance(error, PyroLVMError):
            raise
        got = str(error).splitlines()[0].rstrip(":")
        cure = "Train with a smaller --lr, or scale the data."
        raise ParameterError(refuse("parameters", "such that all densities exist", got, cure)) from error


def prepare(model: Any, guide: Any, name: str, data: Data, options: Mapping[str, Any]) -> None:
    """What comes before the training of a library model: a start from the data.

    Mixtures start from clusters, a flow from means and standard deviations. For a ``mixture_vae`` a VAE with the same
    decoder and guide is trained first, for as many steps as the pair itself; the mixture starts from clusters of its
    latents.
    """
    x = data.rows.to(options["device"] or "cpu")
    if name == "mixture":
        model.initialize(x, options["seed"])
    elif name == "normalizing_flow":
        model.initialize(x)
    elif name == "mixture_vae":
        latent_dim = model.mixture.data_dim
        with pyro.get_param_store().scope():  # nothing of the VAE but its networks goes on
            train(models.DeepGaussian(model.decoder, latent_dim, model.likelihood), guide, data, options)
        with torch.no_grad():
            q = guide.distribution(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn, on a start that the gradient steps improve on
            model.initialize(q, options["seed"])
