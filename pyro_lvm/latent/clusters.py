"""Sorting data by a discrete latent, and how well that agrees with classes that are known."""

from dataclasses import dataclass
from typing import Any

import torch

from pyro_lvm._checks import data_tensor, refuse
from pyro_lvm._typing import Chunks, Data, DataPlate, Guide, Model, TensorLike, Vectorize
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.evidence import Expectation
from pyro_lvm.latent.posterior import attribute
from pyro_lvm.tracing.batch import DataArgs

__all__ = ["ClusterScores", "Clustering", "cluster"]


@dataclass(frozen=True)
class ClusterScores:
    """Agreement of clusters with classes; 1 is perfect in all three.

    Attributes:
        accuracy: share of the data that are right when each cluster stands for one class, by the best matching.
        nmi: normalised mutual information, 0 for independent labels.
        ari: adjusted Rand index, about 0 for random labels.
    """

    accuracy: float
    nmi: float
    ari: float


@dataclass(frozen=True, eq=False)
class Clustering:
    """Data sorted by a discrete latent.

    Attributes:
        posterior: p(y = k | x), an `Expectation` with values ``(N, C)``.
    """

    posterior: Expectation

    @property
    def probs(self) -> torch.Tensor:
        """p(y = k | x), ``(N, C)``."""
        return self.posterior.value

    @property
    def labels(self) -> torch.Tensor:
        """The most probable cluster of each datum, ``(N,)``."""
        return self.probs.argmax(1)

    def table(self, classes: TensorLike) -> torch.Tensor:
        """How many data of each class a cluster holds: ``(C, number of classes)``.

        Args:
            classes: of the data, ``(N,)`` integers from 0 on.

        Raises:
            ShapeError: there is not one class for each datum.
            DataTypeError: the classes are no integers from 0 on.
        """
        known = self._checked(classes)
        counts = torch.zeros(self.probs.shape[1], int(known.max()) + 1, dtype=torch.long)
        ones = torch.ones(len(known), dtype=torch.long)
        return counts.index_put_((self.labels.cpu(), known), ones, accumulate=True)

    def scores(self, classes: TensorLike) -> ClusterScores:
        """Accuracy after the best matching, normalised mutual information and adjusted Rand index.

        Args:
            classes: of the data, ``(N,)`` integers from 0 on. They choose nothing but the matching.
        """
        from scipy.optimize import linear_sum_assignment
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        counts, known = self.table(classes).numpy(), self._checked(classes).numpy()
        matched = counts[linear_sum_assignment(-counts)].sum() / len(known)
        labels = self.labels.cpu().numpy()
        nmi, ari = normalized_mutual_info_score(known, labels), adjusted_rand_score(known, labels)
        return ClusterScores(float(matched), float(nmi), float(ari))

    def _checked(self, classes: TensorLike) -> torch.Tensor:
        known = data_tensor("classes", classes).cpu()
        if known.shape != (len(self.probs),):
            cure = "Pass one class for each datum."
            raise ShapeError(refuse("classes", f"shape ({len(self.probs)},)", tuple(known.shape), cure))
        if known.is_floating_point() or bool((known < 0).any()):
            raise DataTypeError(refuse("classes", "integers from 0 on", known.dtype, "Pass classes.long()."))
        return known.long()


def cluster(
    model: Model,
    guide: Guide | None,
    x: Data,
    *args: Any,
    site: str | None = None,
    num_particles: int = 1000,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    chunks: Chunks = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Clustering:
    """Sort data by a discrete latent: `attribute`, and what can be asked of it.

    Args, errors and warnings are those of `attribute`.

    Example:
        >>> from pyro_lvm.models import GaussianMixture
        >>> mixture, x = GaussianMixture(2, 1), torch.tensor([[-2.0], [-1.0], [2.0]])
        >>> mixture = mixture.initialize(x)
        >>> found = cluster(mixture, None, x)
        >>> found.table(torch.tensor([0, 0, 1])).sum(), found.scores(torch.tensor([0, 0, 1])).accuracy
        (tensor(3), 1.0)
    """
    posterior = attribute(
        model,
        guide,
        x,
        *args,
        site=site,
        num_particles=num_particles,
        data_plate=data_plate,
        data_args=data_args,
        vectorize=vectorize,
        chunks=chunks,
        seed=seed,
        device=device,
        progress=progress,
    )
    return Clustering(posterior)
