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

__all__ = ["ClusterScores", "Clustering", "cluster", "cluster_scores"]


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
        return _table(self.labels, classes, self.probs.shape[1])

    def scores(self, classes: TensorLike) -> ClusterScores:
        """`cluster_scores` of the labels."""
        return cluster_scores(self.labels, classes)


def cluster_scores(labels: TensorLike, classes: TensorLike) -> ClusterScores:
    """Accuracy after the best matching, normalised mutual information and adjusted Rand index.

    Args:
        labels: cluster of each datum, ``(N,)`` integers from 0 on.
        classes: what they are compared with, ``(N,)`` integers from 0 on.

    Raises:
        ShapeError: there is not one class for each datum.
        DataTypeError: labels or classes are no integers from 0 on.

    Source: scikit-learn for the last two.

    Example:
        >>> cluster_scores(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 0])).accuracy
        0.75
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    counts = _table(labels, classes).numpy()
    matched = counts[linear_sum_assignment(-counts)].sum() / counts.sum()
    found, known = _integers("labels", labels).numpy(), _integers("classes", classes).numpy()
    nmi, ari = normalized_mutual_info_score(known, found), adjusted_rand_score(known, found)
    return ClusterScores(float(matched), float(nmi), float(ari))


def _table(labels: TensorLike, classes: TensorLike, num_clusters: int = 0) -> torch.Tensor:
    """Counts of pairs, ``(number of clusters, number of classes)``."""
    found, known = _integers("labels", labels), _integers("classes", classes)
    if known.shape != found.shape:
        cure = "Pass one class for each datum."
        raise ShapeError(refuse("classes", f"shape {tuple(found.shape)}", tuple(known.shape), cure))
    counts = torch.zeros(max(num_clusters, int(found.max()) + 1), int(known.max()) + 1, dtype=torch.long)
    return counts.index_put_((found, known), torch.ones_like(known), accumulate=True)


def _integers(argument: str, value: TensorLike) -> torch.Tensor:
    found = data_tensor(argument, value).cpu()
    if found.is_floating_point() or bool((found < 0).any()):
        raise DataTypeError(refuse(argument, "integers from 0 on", found.dtype, f"Pass {argument}.long()."))
    if found.dim() != 1:
        raise ShapeError(refuse(argument, "shape (N,)", tuple(found.shape), "Pass one for each datum."))
    return found.long()


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
