"""Models and guides by name: which there are, which fit together, and how they are built for some data."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from pyro_lvm import guides, models
from pyro_lvm._checks import refuse
from pyro_lvm._typing import Guide, Model
from pyro_lvm.cli.data import Data, nearest
from pyro_lvm.cli.likelihoods import fitting_likelihood, make_likelihood, numbers_per_value
from pyro_lvm.cli.own import is_own, own_program
from pyro_lvm.errors import DataTypeError
from pyro_lvm.nn import MLP

__all__ = ["DISCRETE", "GUIDES", "build_guide", "build_pair", "check_names", "complete"]

_CONTINUOUS = ("diagonal", "low_rank", "full_rank", "mixture", "flow")
DISCRETE = ("bernoulli", "autoregressive_bernoulli")
_LAYERED = ("top_down", "bottom_up", "ladder")

#: The guides of each model, first the one that is taken if none is named; ``none`` is the model's own exact log p(x).
GUIDES = {
    "vae": _CONTINUOUS,
    "linear_gaussian": (*_CONTINUOUS, "none"),
    "mixture_vae": _CONTINUOUS,
    "hierarchical": _LAYERED,
    "binary": (*DISCRETE, "none"),
    "mixture": ("none",),
    "normalizing_flow": ("none",),
    "autoregressive": ("none",),
}
_OF_OWN_MODELS = (*_CONTINUOUS, *DISCRETE, "none")
_WITH_LIKELIHOOD = ("vae", "hierarchical", "mixture_vae")
_WITH_COMPONENTS = ("mixture", "mixture_vae")
_WITH_NETWORK = (*_WITH_LIKELIHOOD, "normalizing_flow", "autoregressive")
_WITHOUT_LATENT_DIM = ("mixture", "normalizing_flow", "autoregressive")
_CONTEXT = 32  # numbers that the networks of a guide see of x


def check_names(model: str, guide: str | None, option: str = "--guide") -> str:
    """The guide of a model, its first where none is named.

    Raises:
        DataTypeError: an unknown name, or a guide that does not fit the model.

    Example:
        >>> check_names("vae", None)
        'diagonal'
        >>> check_names("vae", "ladder")
        Traceback (most recent call last):
        pyro_lvm.errors.DataTypeError: --guide: expected one that fits vae, of diagonal, low_rank, full_rank, mixture,
        flow or module:name, got 'ladder'. That one fits hierarchical.
    """
    if not is_own(model) and model not in GUIDES:
        expected = f"one of {', '.join(GUIDES)} or module:name"
        raise DataTypeError(refuse("--model", expected, repr(model), nearest(model, GUIDES)))
    if guide is None:
        if is_own(model):
            expected = f"one of {', '.join(_OF_OWN_MODELS)} or module:name"
            raise DataTypeError(refuse(option, expected, "none", "Name the guide of a model of your own."))
        return GUIDES[model][0]
    fitting = _OF_OWN_MODELS if is_own(model) else GUIDES[model]
    if is_own(guide) or guide in fitting:
        return guide
    whose = "a model of your own" if is_own(model) else model
    expected = f"one that fits {whose}, of {', '.join(fitting)} or module:name"
    others = [name for name, own in GUIDES.items() if guide in own]
    cure = f"That one fits {', '.join(others)}." if others else nearest(guide, fitting)
    raise DataTypeError(refuse(option, expected, repr(guide), cure))


def complete(options: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """The options of a pair, with what was not given chosen from the data.

    Raises:
        DataTypeError: an option that the model does not have, or an unknown likelihood.
    """
    model, guide = options["model"], check_names(options["model"], options.get("guide"))
    own_only = is_own(model) and (is_own(guide) or guide == "none")
    refused = {
        "likelihood": model not in _WITH_LIKELIHOOD,
        "components": model not in _WITH_COMPONENTS,
        "latent_dim": own_only or model in _WITHOUT_LATENT_DIM,
        "hidden": own_only or (guide == "none" and model not in _WITH_NETWORK),
    }
    for name, no_use in refused.items():
        if options.get(name) is not None and no_use:
            option, got = f"--{name.replace('_', '-')}", f"{model} with {guide}"
            raise DataTypeError(refuse(option, "a pair that has it", got, "Leave the option out."))
    size = prod(data.shape)
    latent_dim = 8 if size >= 16 else 2
    chosen: dict[str, Any] = {
        "likelihood": fitting_likelihood(data),
        "components": 10,
        "latent_dim": max(1, min(latent_dim, size - 1)) if model == "linear_gaussian" else latent_dim,
        "hidden": [64, 64] if size < 256 else [200, 200],
    }
    result: dict[str, Any] = {"model": model, "guide": guide}
    for name, value in chosen.items():
        if not refused[name]:
            given = options.get(name)
            result[name] = value if given is None else given
    if "likelihood" in result:
        make_likelihood(result["likelihood"])  # refuses what is none
    return result


def build_pair(pair: Mapping[str, Any], shape: tuple[int, ...], scale: float = 1.0) -> tuple[Model, Guide | None]:
    """Make a pair from what `complete` returned.

    Args:
        pair: the options.
        shape: that of one datum.
        scale: the size of the largest value in the data, by which encoders divide at the start.

    Example:
        >>> pair = {"model": "vae", "guide": "flow", "latent_dim": 2, "hidden": [8], "likelihood": "bernoulli"}
        >>> model, guide = build_pair(pair, (64,))
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 2])
    """
    name, size = pair["model"], prod(shape)
    model = own_program("--model", name) if is_own(name) else _make_model(name, pair, size)
    return model, build_guide(pair, model, size, scale)


def build_guide(pair: Mapping[str, Any], model: Any, size: int, scale: float = 1.0) -> Any:
    """The guide of `build_pair` alone; None for ``none``."""
    if is_own(pair["guide"]):
        return own_program("--guide", pair["guide"])
    return None if pair["guide"] == "none" else _make_guide(pair, model, size, scale)


def _make_model(name: str, pair: Mapping[str, Any], size: int) -> nn.Module:
    latent_dim, hidden = pair.get("latent_dim", 0), pair.get("hidden", [])
    if name == "linear_gaussian":
        return models.LinearGaussian(latent_dim, size)
    if name == "binary":
        return models.BinaryLatent(latent_dim, size)
    if name == "mixture":
        return models.GaussianMixture(pair["components"], size)
    if name == "normalizing_flow":
        return models.NormalizingFlow(size, hidden_dims=hidden)
    if name == "autoregressive":
        return models.Autoregressive(size, hidden)
    likelihood = make_likelihood(pair["likelihood"])
    decoder = MLP(latent_dim, hidden, numbers_per_value(pair["likelihood"]) * size)
    if name == "hierarchical":
        return models.HierarchicalGaussian(decoder, _layers(latent_dim), likelihood, hidden)
    if name == "mixture_vae":
        return models.GaussianMixtureVAE(decoder, latent_dim, pair["components"], likelihood)
    return models.DeepGaussian(decoder, latent_dim, likelihood)


def _layers(latent_dim: int) -> list[int]:
    """Sizes of the two layers of latents, from the data upwards."""
    return [latent_dim, max(1, latent_dim // 2)]


def _make_guide(pair: Mapping[str, Any], model: Any, size: int, scale: float) -> nn.Module:
    dim, hidden = pair["latent_dim"], pair["hidden"]
    full, layers = dim + dim * (dim + 1) // 2, _layers(dim)  # numbers of a mean and a triangle
    rank, features = min(2, dim), 2 * (hidden[-1] if hidden else _CONTEXT)

    def encoder(outputs: int) -> _Encoder:
        return _Encoder(size, [2 * width for width in hidden], outputs, scale)

    makers: dict[str, Callable[[], nn.Module]] = {
        "diagonal": lambda: guides.DiagonalNormal(dim, encoder(2 * dim)),
        "low_rank": lambda: guides.LowRankNormal(dim, rank, encoder((2 + rank) * dim)),
        "full_rank": lambda: guides.FullRankNormal(dim, encoder(full)),
        "mixture": lambda: guides.MixtureOfNormals(4, dim, encoder(8 * dim)),
        "flow": lambda: guides.Flow(dim, encoder(full + _CONTEXT), base="full", context_dim=_CONTEXT),
        "bottom_up": lambda: guides.BottomUp(layers, encoder(2 * dim), hidden_dims=hidden),
        "top_down": lambda: guides.TopDown(layers, encoder(features), feature_dim=features, hidden_dims=hidden),
        "ladder": lambda: guides.Ladder(model, encoder(2 * sum(layers))),
        "bernoulli": lambda: guides.Bernoulli(dim, encoder(dim)),
        "autoregressive_bernoulli": lambda: guides.AutoregressiveBernoulli(
            dim, 64, encoder(dim + _CONTEXT), context_dim=_CONTEXT
        ),
    }
    return makers[pair["guide"]]()


class _Encoder(nn.Module):
    """A perceptron of each datum as one row; what it puts out is small at first, so that q starts near the prior."""

    def __init__(self, size: int, hidden: list[int], outputs: int, scale: float) -> None:
        super().__init__()
        self.network = MLP(size, hidden, outputs)
        layers: Any = self.network.layers
        with torch.no_grad():
            layers[0].weight /= scale
            layers[-1].weight *= 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, ...)`` to ``(N, outputs)``."""
        return self.network(x.reshape(len(x), -1))
