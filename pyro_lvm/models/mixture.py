r"""The Gaussian mixture: the discrete model whose log p(x) and posterior are exact.

z ~ Cat(pi), x | z = k ~ N(mu_k, Sigma_k), so that p(x) = sum_k pi_k N(x; mu_k, Sigma_k) (Bishop, PRML, Eqs. 9.10 to
9.13).
"""

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_lvm._checks import check_positive_int, data_tensor, refuse
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError

__all__ = ["GaussianMixture"]

_COVARIANCES = ("full", "tied", "diag", "spherical")
_START_SHARE = 1e-3  # of each dimension's variance, what `initialize` adds to that of a cluster


class GaussianMixture(nn.Module):
    r"""Mixture of C Gaussians p(x, z) with a discrete latent.

    .. math:: z \sim \text{Cat}(\pi), \qquad x \mid z = k \sim N(\mu_k, \Sigma_k), \qquad \Sigma_k = S_k S_k^T

    Called with x it is a Pyro model with the latent ``z`` and the observed ``x`` in the plate ``data``. Train it with
    ``fit(model, None, x)``, which sums z out, or give a guide that samples z.

    S is lower triangular with diagonal s = ``min_scale`` + exp(.): the standard deviation of a dimension given those
    before it (for ``"diag"`` and ``"spherical"``: its standard deviation) stays above the floor. The likelihood of a
    mixture without one is unbounded, since a component can collapse onto a datum (Bishop, PRML, Section 9.2.1); with it
    no density exceeds :math:`(2 \pi\, \text{min\_scale}^2)^{-D/2}`. `at_floor` tells which components rest on it, and
    `fit` says so. What is trained besides s are the coefficients B, strictly lower triangular, of the regression of
    each dimension on those before it, which gradients find more easily than entries of S:

    .. math:: x = \mu + B (x - \mu) + s \odot \epsilon, \quad \epsilon \sim N(0, I), \qquad S = (I - B)^{-1} diag(s)

    The objective is not convex: train from several starts and keep the best, with `pyro_lvm.best_of`. Means and
    coefficients have the units of x, so data of about unit scale train best.

    Args:
        num_components: C.
        data_dim: D.
        covariance: as in scikit-learn, ``"full"``, one matrix a component; ``"tied"``, one for all; ``"diag"``, one
            variance a component and dimension; ``"spherical"``, one variance a component.
        min_scale: the floor, in the units of x.
        learn_weights: train pi; otherwise it stays as it is set, at first uniform.

    Attributes:
        logits: log pi up to a constant, ``(C,)``.
        means: mu, ``(C, D)``.

    Raises:
        DataTypeError: ``covariance`` is none of the names, or a count is not an integer.
        ShapeError: a count is less than 1, or (when used) x is not ``(N, D)``.
        ParameterError: ``min_scale`` is not a positive number.

    Example:
        >>> x = torch.tensor([[0.0], [0.2], [5.0], [5.2]])
        >>> model = GaussianMixture(2, data_dim=1).initialize(x)
        >>> model.means.sort(0).values.detach()
        tensor([[0.1000],
                [5.1000]])
        >>> model.responsibilities(x).argmax(1).bincount()
        tensor([2, 2])
    """

    def __init__(
        self,
        num_components: int,
        data_dim: int,
        covariance: Literal["full", "tied", "diag", "spherical"] = "full",
        min_scale: float = 1e-3,
        learn_weights: bool = True,
    ) -> None:
        super().__init__()
        if covariance not in _COVARIANCES:
            raise DataTypeError(refuse("covariance", f"one of {_COVARIANCES}", repr(covariance), "Pass one of these."))
        if not (isinstance(min_scale, int | float) and 0 < min_scale < math.inf):
            cure = "It is a standard deviation in the units of x."
            raise ParameterError(refuse("min_scale", "a positive number", repr(min_scale), cure))
        components = check_positive_int("num_components", num_components)
        dim = check_positive_int("data_dim", data_dim)
        self.num_components, self.data_dim, self.covariance, self.min_scale = components, dim, covariance, min_scale
        shape = {"full": (components, dim), "tied": (dim,), "diag": (components, dim), "spherical": (components,)}
        if learn_weights:
            self.logits = nn.Parameter(torch.zeros(components))  # (C,)
        else:
            self.register_buffer("logits", torch.zeros(components))  # (C,)
        self.means = nn.Parameter(torch.randn(components, dim))  # (C, D)
        self.log_scale = nn.Parameter(torch.zeros(shape[covariance]))  # of the diagonal of S, above the floor
        if self._has_matrices:  # the entries of B below its diagonal, (C, D (D - 1) / 2) or without C
            self.coefficients = nn.Parameter(torch.zeros(*shape[covariance][:-1], dim * (dim - 1) // 2))

    @property
    def weights(self) -> torch.Tensor:
        """The probabilities pi of the components, ``(C,)``."""
        return self.logits.softmax(0)

    @property
    def covariances(self) -> torch.Tensor:
        """Sigma as scikit-learn shapes it: ``(C, D, D)``, ``(D, D)`` tied, ``(C, D)`` diag, ``(C,)`` spherical."""
        return self._scale @ self._scale.mT if self._has_matrices else self._scale.square()

    def at_floor(self) -> torch.Tensor:
        """Which components rest on the floor, ``(C,)``: it makes up more than half of a diagonal entry of S."""
        low = self.log_scale.detach().exp() < self.min_scale
        if self.covariance in ("full", "diag"):
            low = low.any(1)
        return low.any().expand(self.num_components) if self.covariance == "tied" else low

    def notes(self) -> list[str]:
        """What `fit` tells the user about the model that it has trained: components that rest on the floor."""
        low = self.at_floor().nonzero().flatten().tolist()
        if not low:
            return []
        return [
            f"components {low} of the mixture rest on the floor, min_scale={self.min_scale}: they have collapsed onto "
            "few or dependent data, where the likelihood has no other maximum. Take fewer components, a simpler "
            "covariance, another start (seed), or a min_scale below which no difference matters."
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro model; returns z, ``(N,)``."""
        self._check(x)
        pyro.module("GaussianMixture", self)
        with pyro.plate("data", len(x)):
            # Marked, so that TraceEnum_ELBO sums it out also where Pyro is used alone.
            z = pyro.sample("z", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})  # (N,)
            pyro.sample("x", self.component(z), obs=x)
        return z

    def posterior_guide(self, x: torch.Tensor) -> torch.Tensor:
        """A guide for this model that samples ``z`` from p(z|x) itself: every log-weight is log p(x)."""
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Categorical(logits=self.log_joint(x)))  # (N,)

    def component(self, z: torch.Tensor, validate_args: bool | None = None) -> dist.TorchDistribution:
        """p(x|z) of components z: batch shape that of z, event shape ``(D,)``."""
        means, scale = self.means[z], self._scale if self.covariance == "tied" else self._scale[z]
        if self._has_matrices:
            return dist.MultivariateNormal(means, scale_tril=scale, validate_args=validate_args)
        scale = scale[..., None] if self.covariance == "spherical" else scale
        return dist.Normal(means, scale, validate_args=validate_args).to_event(1)

    def log_joint(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x, z = k) in nats, ``(N, C)``, of x ``(N, D)``."""
        self._check(x)
        # Not validated: a datum with NaN has the density NaN, and the others have theirs.
        component = self.component(torch.arange(self.num_components, device=self.means.device), validate_args=False)
        return self.logits.log_softmax(0) + component.log_prob(x[:, None])

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log p(x) in nats, ``(N,)``, of x ``(N, D)`` (Eq. 9.12)."""
        return self.log_joint(x).logsumexp(1)

    def responsibilities(self, x: torch.Tensor) -> torch.Tensor:
        """Exact posterior p(z = k | x), ``(N, C)``, of x ``(N, D)`` (Eq. 9.13)."""
        return self.log_joint(x).softmax(1)

    @torch.no_grad()
    def sample(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws x ~ p(x), ``(num_samples, D)``, and the components z that they come from, ``(num_samples,)``."""
        prior = dist.Categorical(logits=self.logits)
        z = prior.sample((check_positive_int("num_samples", num_samples),))
        return self.component(z).sample(), z

    @torch.no_grad()
    def set_parameters(
        self, weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor
    ) -> "GaussianMixture":
        """Set pi ``(C,)``, mu ``(C, D)`` and Sigma, shaped as `covariances`, and return the model.

        Raises:
            ShapeError: a shape is another.
            ParameterError: a weight is not positive, a covariance not symmetric or not above the floor, or a number
                not finite.
        """
        given = {"weights": weights, "means": means, "covariances": covariances}
        for name, value in given.items():
            now = getattr(self, name)
            given[name] = value = data_tensor(name, value).to(now.device)
            if value.shape != now.shape:
                cure = f"That is its shape with {self.num_components} components, covariance={self.covariance!r}."
                raise ShapeError(refuse(name, f"shape {tuple(now.shape)}", tuple(value.shape), cure))
            if not bool(value.isfinite().all()):
                raise ParameterError(refuse(name, "finite numbers", "NaN or infinity", "Check how they were computed."))
        weights, means, covariances = given.values()
        if not bool((weights > 0).all()):
            raise ParameterError(refuse("weights", "positive numbers", weights.tolist(), "Leave empty components out."))
        if self._has_matrices:
            if not torch.allclose(covariances, covariances.mT, rtol=1e-4):
                raise ParameterError(refuse("covariances", "symmetric matrices", "others", "Pass (S + S.mT) / 2."))
            scale, info = torch.linalg.cholesky_ex(covariances)
            excess = torch.where(info[..., None] == 0, scale.diagonal(dim1=-2, dim2=-1) - self.min_scale, -1.0)
        else:
            scale = covariances.sqrt()
            excess = scale - self.min_scale
        if not bool((excess > 0).all()):
            wanted = f"positive definite, with standard deviations above min_scale={self.min_scale}"
            cure = "Add to the diagonal, or make the model with a smaller min_scale."
            low = (excess <= 0) if self.covariance in ("tied", "spherical") else (excess <= 0).any(1)
            got = "less" if self.covariance == "tied" else f"less in components {low.nonzero().flatten().tolist()}"
            raise ParameterError(refuse("covariances", wanted, got, cure))
        self.logits.copy_(weights.log())
        self.means.copy_(means)
        self.log_scale.copy_(excess.log())
        if self._has_matrices:
            rows, columns = self._below_diagonal
            identity = torch.eye(self.data_dim, dtype=scale.dtype, device=scale.device)
            whitened = torch.linalg.solve_triangular(scale, identity, upper=False)  # (I - B) over the diagonal of S
            self.coefficients.copy_(-(scale.diagonal(dim1=-2, dim2=-1)[..., None] * whitened)[..., rows, columns])
        return self

    def initialize(self, x: torch.Tensor, seed: int = 0, labels: torch.Tensor | None = None) -> "GaussianMixture":
        r"""Start from the clusters that one run of k-means finds in x ``(N, D)``, and return the model.

        The run starts by k-means++ with ``seed``: another seed may give other clusters, and these lead to another local
        maximum of the likelihood. With ``labels``, ``(N,)`` from 0 to C-1, the clusters are theirs. The weights, means
        and covariances are those of the clusters. To the variance of dimension d of every cluster is added the larger
        of 0.001 var(x_d) and (3 ``min_scale``)^2, so that no component starts on the floor.

        Raises:
            ShapeError: there are fewer distinct data than components, or x is not ``(N, D)``, or labels not ``(N,)``.
            ParameterError: a component has no label, or x is not finite or hardly varies in some direction (in some
                dimension for ``"diag"``, in all for ``"spherical"``): there the likelihood has no maximum but at the
                floor.
        """
        x = data_tensor("x", x).detach().double()
        self._check(x)
        self._check_can_be_fitted(x)
        found = self._clusters(x, seed) if labels is None else data_tensor("labels", labels, x.device)  # (N,)
        clusters = self._split(x, found)
        weights = torch.stack([x.new_tensor(len(cluster) / len(x)) for cluster in clusters])  # (C,)
        means = torch.stack([cluster.mean(0) for cluster in clusters])  # (C, D)
        within = torch.stack([_covariance(cluster) for cluster in clusters])  # (C, D, D)
        floor = (_START_SHARE * x.var(0, unbiased=False)).clamp(min=(3 * self.min_scale) ** 2)  # (D,)
        covariances = within + floor.diag()
        if self.covariance == "tied":
            covariances = (weights[:, None, None] * covariances).sum(0)
        elif self.covariance != "full":
            covariances = covariances.diagonal(dim1=1, dim2=2)  # (C, D)
        return self.set_parameters(
            weights, means, covariances.mean(1) if self.covariance == "spherical" else covariances
        )

    @property
    def _has_matrices(self) -> bool:
        return self.covariance in ("full", "tied")

    @property
    def _below_diagonal(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = torch.tril_indices(self.data_dim, self.data_dim, -1, device=self.means.device)
        return rows, columns

    @property
    def _scale(self) -> torch.Tensor:
        """S as a triangular matrix, or what there is of its diagonal; shaped as the covariances."""
        scale = self.min_scale + self.log_scale.exp()
        if self._has_matrices:
            scale = torch.diag_embed(scale)
            residual = torch.zeros_like(scale)  # I - B; its diagonal of ones is implied
            residual[(..., *self._below_diagonal)] = -self.coefficients
            scale = torch.linalg.solve_triangular(residual, scale, upper=False, unitriangular=True)
        return scale

    def _check(self, x: torch.Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.data_dim:
            cure = "Flatten each datum, x.flatten(1), or make the model with the data's dimension."
            raise ShapeError(refuse("x", f"shape (N, {self.data_dim})", tuple(x.shape), cure))

    def _clusters(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        """Labels ``(N,)`` by k-means."""
        from sklearn.cluster import KMeans

        found = KMeans(self.num_components, n_init=1, random_state=seed).fit_predict(x.cpu().numpy())
        return torch.as_tensor(found, device=x.device)

    def _split(self, x: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        """The data of each component."""
        if labels.shape != x.shape[:1]:
            raise ShapeError(refuse("labels", f"shape ({len(x)},)", tuple(labels.shape), "Pass one label a datum."))
        found, wanted = set(labels.tolist()), set(range(self.num_components))
        if found != wanted:
            got = f"none of {sorted(wanted - found)}, and others, {sorted(found - wanted)}"
            cure = "Labels count from 0; leave empty components out."
            raise ParameterError(refuse("labels", f"all of 0 to {self.num_components - 1}", got, cure))
        return [x[labels == k] for k in range(self.num_components)]

    def _check_can_be_fitted(self, x: torch.Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise ParameterError(refuse("x", "finite numbers", "NaN or infinity", "Leave such data out."))
        distinct = len(x.unique(dim=0))
        if distinct < self.num_components:
            wanted = f"at least num_components={self.num_components} distinct data"
            raise ShapeError(refuse("x", wanted, distinct, "Take fewer components or more data."))
        variances = torch.linalg.eigvalsh(_covariance(x)) if self._has_matrices else x.var(0, unbiased=False)
        smallest = variances.mean() if self.covariance == "spherical" else variances.min()
        if not smallest > self.min_scale**2:
            wanted = f"data that vary by more than min_scale={self.min_scale} in every direction"
            got = f"a standard deviation of {float(smallest.clamp(min=0).sqrt()):.2g}"
            cure = "Drop constant or dependent columns, or take a simpler covariance or a smaller min_scale."
            raise ParameterError(refuse("x", wanted, got, cure))


def _covariance(x: torch.Tensor) -> torch.Tensor:
    """Of x ``(N, D)``, divided by N: ``(D, D)``."""
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)
