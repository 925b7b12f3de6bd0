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

    S is lower triangular with diagonal ``min_scale`` + exp(.): the standard deviation of a dimension given those before
    it (for ``"diag"`` and ``"spherical"``: its standard deviation) stays above the floor. The likelihood of a mixture
    without one is unbounded, since a component can collapse onto a datum (Bishop, PRML, Section 9.2.1); with it no
    density exceeds :math:`(2 \pi\, \text{min\_scale}^2)^{-D/2}`. `at_floor` tells which components rest on it.

    Args:
        num_components: C.
        data_dim: D.
        covariance: as in scikit-learn, ``"full"``, one matrix a component; ``"tied"``, one for all; ``"diag"``, one
            variance a component and dimension; ``"spherical"``, one variance a component.
        min_scale: the floor, in the units of x.

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
        self.logits = nn.Parameter(torch.zeros(components))  # (C,)
        self.means = nn.Parameter(torch.randn(components, dim))  # (C, D)
        self.log_scale = nn.Parameter(torch.zeros(shape[covariance]))  # of the diagonal of S, above the floor
        if self._has_matrices:  # the entries of S below its diagonal, (C, D (D - 1) / 2) or without C
            self.lower = nn.Parameter(torch.zeros(*shape[covariance][:-1], dim * (dim - 1) // 2))

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro model; returns z, ``(N,)``."""
        self._check(x)
        pyro.module("GaussianMixture", self)
        with pyro.plate("data", len(x)):
            # Marked, so that TraceEnum_ELBO sums it out also where Pyro is used alone.
            z = pyro.sample("z", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})  # (N,)
            pyro.sample("x", self._component(z), obs=x)
        return z

    def posterior_guide(self, x: torch.Tensor) -> torch.Tensor:
        """A guide for this model that samples ``z`` from p(z|x) itself: every log-weight is log p(x)."""
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Categorical(logits=self._log_joint(x)))  # (N,)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log p(x) in nats, ``(N,)``, of x ``(N, D)`` (Eq. 9.12)."""
        return self._log_joint(x).logsumexp(1)

    def responsibilities(self, x: torch.Tensor) -> torch.Tensor:
        """Exact posterior p(z = k | x), ``(N, C)``, of x ``(N, D)`` (Eq. 9.13)."""
        return self._log_joint(x).softmax(1)

    @torch.no_grad()
    def sample(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws x ~ p(x), ``(num_samples, D)``, and the components z that they come from, ``(num_samples,)``."""
        prior = dist.Categorical(logits=self.logits)
        z = prior.sample((check_positive_int("num_samples", num_samples),))
        return self._component(z).sample(), z

    @torch.no_grad()
    def set_parameters(
        self, weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor
    ) -> "GaussianMixture":
        """Set pi ``(C,)``, mu ``(C, D)`` and Sigma, shaped as `covariances`, and return the model.

        Raises:
            ShapeError: a shape is another.
            ParameterError: a weight is not positive, or a covariance is not above the floor.
        """
        given = {"weights": weights, "means": means, "covariances": covariances}
        for name, value in given.items():
            if value.shape != getattr(self, name).shape:
                wanted = f"shape {tuple(getattr(self, name).shape)}"
                cure = f"That is its shape with {self.num_components} components, covariance={self.covariance!r}."
                raise ShapeError(refuse(name, wanted, tuple(value.shape), cure))
        if not bool((weights > 0).all()):
            raise ParameterError(refuse("weights", "positive numbers", weights.tolist(), "Leave empty components out."))
        if self._has_matrices:
            scale, info = torch.linalg.cholesky_ex(covariances)
            excess = torch.where(info[..., None] == 0, scale.diagonal(dim1=-2, dim2=-1) - self.min_scale, -1.0)
        else:
            scale = covariances.sqrt()
            excess = scale - self.min_scale
        if not bool((excess > 0).all()):
            wanted = f"positive definite, with standard deviations above min_scale={self.min_scale}"
            cure = "Add to the diagonal, or make the model with a smaller min_scale."
            raise ParameterError(refuse("covariances", wanted, "less", cure))
        self.logits.copy_(weights.log())
        self.means.copy_(means)
        self.log_scale.copy_(excess.log())
        if self._has_matrices:
            rows, columns = self._below_diagonal
            self.lower.copy_(scale[..., rows, columns])
        return self

    def initialize(self, x: torch.Tensor, seed: int = 0) -> "GaussianMixture":
        r"""Start from the clusters that k-means (with k-means++) finds in x ``(N, D)``, and return the model.

        The weights, means and covariances are those of the clusters. To the variance of dimension d of every cluster
        is added the larger of 0.001 var(x_d) and (3 ``min_scale``)^2, so that no component starts on the floor.

        Raises:
            ShapeError: there are fewer distinct data than components, or x is not ``(N, D)``.
            ParameterError: x is not finite or hardly varies in some direction (in some dimension for ``"diag"``, in all
                for ``"spherical"``): there the likelihood has no maximum but at the floor.
        """
        from sklearn.cluster import KMeans

        x = data_tensor("x", x).detach().double()
        self._check(x)
        self._check_can_be_fitted(x)
        found = KMeans(self.num_components, n_init=10, random_state=seed).fit_predict(x.cpu().numpy())
        label = torch.as_tensor(found, device=x.device)  # (N,)
        clusters = [x[label == k] for k in range(self.num_components)]
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
            scale[(..., *self._below_diagonal)] = self.lower
        return scale

    def _component(self, z: torch.Tensor, validate_args: bool | None = None) -> dist.TorchDistribution:
        """p(x|z): batch shape that of z, event shape ``(D,)``."""
        means, scale = self.means[z], self._scale if self.covariance == "tied" else self._scale[z]
        if self._has_matrices:
            return dist.MultivariateNormal(means, scale_tril=scale, validate_args=validate_args)
        scale = scale[..., None] if self.covariance == "spherical" else scale
        return dist.Normal(means, scale, validate_args=validate_args).to_event(1)

    def _log_joint(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x, z = k), ``(N, C)``."""
        self._check(x)
        # Not validated: a datum with NaN has the density NaN, and the others have theirs.
        component = self._component(torch.arange(self.num_components, device=self.means.device), validate_args=False)
        return self.logits.log_softmax(0) + component.log_prob(x[:, None])

    def _check(self, x: torch.Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.data_dim:
            cure = "Flatten each datum, x.flatten(1), or make the model with the data's dimension."
            raise ShapeError(refuse("x", f"shape (N, {self.data_dim})", tuple(x.shape), cure))

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
