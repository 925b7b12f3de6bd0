"""`ProvingPair`: a model, a guide, data, and the log p(x) that an estimator of them should find."""

from dataclasses import dataclass

import torch

from pyro_lvm._typing import Guide, Model

__all__ = ["ProvingPair"]


@dataclass(frozen=True, eq=False)
class ProvingPair:
    """A pair whose answer is known.

    Attributes:
        name: short and unique.
        tags: what is hard about it, e.g. ``"missed mode"``; ``"easy"`` if nothing is.
        model: p(x, z), a plain function of x with the data plate ``data``.
        guide: q(z | x), likewise; how good it is, is for an estimator to find out.
        x: data ``(N, ...)``, float64, drawn from the model unless the builder says otherwise.
        log_prob: exact log p(x), ``(N,)``, nats.
        source: how log_prob is known.
        latent_dim: continuous dimensions of the latents, unconstrained; of a discrete pair the number of its sites.
        continuous: whether all latents that the guide draws are continuous.
        misled: whether the guide alone is expected to be wrong by more than 0.1 nats for some data, however many
            particles below a million it draws.
        guides: further proposals, good where the guide is not; for estimators that pool several.
        posterior: p(z | x) as a guide, where it is known: its weights are all equal.
        mean: exact E[z | x] of the site ``z``, ``(N, *event)``; None where it is not known, or z is a label.
        square: exact E[z^2 | x], likewise.
    """

    name: str
    tags: tuple[str, ...]
    model: Model
    guide: Guide
    x: torch.Tensor
    log_prob: torch.Tensor
    source: str
    latent_dim: int
    continuous: bool = True
    misled: bool = False
    guides: tuple[Guide, ...] = ()
    posterior: Guide | None = None
    mean: torch.Tensor | None = None
    square: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"ProvingPair({self.name!r}, {', '.join(self.tags)}: {len(self.x)} data, {self.latent_dim}-D)"
