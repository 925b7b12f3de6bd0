r"""The Gaussian-mixture VAE: clusters in a latent space that a decoder bends into the data.

y ~ Cat(pi), z | y = k ~ N(mu_k, Sigma_k), x | z ~ p(x | f(z)). A guide proposes z alone: given z, the sum over y is a
Gaussian mixture's log-density, so y is summed out exactly, in training and in log p(x).
"""

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_lvm._checks import check_positive_int, refuse
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError
from pyro_lvm.models.likelihoods import Likelihood, as_likelihood, observe
from pyro_lvm.models.mixture import GaussianMixture
from pyro_lvm.tracing.isolation import forked_rng

__all__ = ["GaussianMixtureVAE", "check_posterior", "draw_latents"]

#: Pseudo-counts of each weight that hold all of them equal.
_EQUAL = 1e6
#: Draws of z for each datum, where q(z|x) is averaged over.
_DRAWS = 100


class GaussianMixtureVAE(nn.Module):
    r"""Deep latent model p(x, y, z) whose latent space is a mixture of C Gaussians.

    .. math:: y \sim \text{Cat}(\pi), \qquad z \mid y = k \sim N(\mu_k, \Sigma_k), \qquad x \mid z \sim p(x \mid f(z))

    Called with x it is a Pyro model with the latents ``y`` (discrete) and ``z``, and the observed ``x``, in the plate
    ``data``. Its guide samples z alone, as ``guides.DiagonalNormal`` does; y is enumerated by ``fit`` (with
    ``TraceEnum_ELBO``) and by every estimator, which makes the bound

    .. math:: E_{q(z \mid x)}\Big[\log p(x \mid z) + \log \sum_k \pi_k N(z; \mu_k, \Sigma_k) - \log q(z \mid x)\Big].

    The objective has many poor optima, in which one component covers two clusters and two share one. Train a
    ``DeepGaussian`` with the same decoder and guide first, then `initialize`, then train the whole.

    Args:
        decoder: maps z ``(..., L)`` to what the likelihood reads. The networks of ``pyro_lvm.nn`` take any leading
            dimensions.
        latent_dim: L.
        num_components: C.
        likelihood: ``"bernoulli"``, ``"normal"``, ``"categorical"``, ``"poisson"``, or an object of
            ``models.likelihoods``.
        covariance: that of `GaussianMixture`.
        learn_weights: train pi; otherwise it stays uniform, which keeps one component from covering two clusters of
            like size.
        min_scale: floor of the standard deviations in z.

    Attributes:
        mixture: the `GaussianMixture` over z.

    Raises:
        DataTypeError: ``likelihood`` or ``covariance`` is no known name, or a count is not an integer.
        ShapeError: a count is less than 1, or (when used) the decoder's output does not fit x.

    Source: Jiang et al. (2017), Variational Deep Embedding, for the model; here y is summed out, where they
    approximate q(y|x).

    Example:
        >>> from pyro_lvm.nn import MLP
        >>> model = GaussianMixtureVAE(MLP(2, [32], 64), latent_dim=2, num_components=10)
        >>> x, y = model.sample(3)
        >>> x.shape, y.shape, model.responsibilities(torch.zeros(5, 2)).shape
        (torch.Size([3, 64]), torch.Size([3]), torch.Size([5, 10]))
    """

    def __init__(
        self,
        decoder: nn.Module,
        latent_dim: int,
        num_components: int,
        likelihood: Literal["bernoulli", "normal", "categorical", "poisson"] | Likelihood = "bernoulli",
        covariance: Literal["full", "tied", "diag", "spherical"] = "full",
        learn_weights: bool = False,
        min_scale: float = 1e-2,
    ) -> None:
        super().__init__()
        latent_dim = check_positive_int("latent_dim", latent_dim)
        self.learn_weights = learn_weights
        self.mixture = GaussianMixture(num_components, latent_dim, covariance, min_scale, learn_weights)
        self.decoder = decoder
        self.likelihood = as_likelihood(likelihood)

    def decode(self, z: torch.Tensor) -> dist.TorchDistribution:
        """p(x|z) for z ``(..., L)``: batch shape ``(...)``, event shape that of one datum."""
        return self.likelihood(self.decoder(z), z.dim() - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The Pyro model; returns z, ``(N, L)``."""
        pyro.module("GaussianMixtureVAE", self)
        with pyro.plate("data", len(x)):
            return self.sites(x)[0]

    def sites(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample z and y and observe x, inside the data plate: z ``(N, L)``, and y ``(N,)``, enumerated ``(C, 1)``."""
        y = pyro.sample("y", dist.Categorical(logits=self.mixture.logits), infer={"enumerate": "parallel"})
        z = pyro.sample("z", self.mixture.component(y))
        observe(self.decode(z), x)
        return z, y

    def notes(self) -> list[str]:
        """What `fit` tells the user: components that rest on the floor."""
        return self.mixture.notes()

    def responsibilities(self, z: torch.Tensor) -> torch.Tensor:
        """Exact p(y = k | z), ``(N, C)``, of z ``(N, L)``. Given x it is the mean of these over p(z|x)."""
        return self.mixture.responsibilities(z)

    @torch.no_grad()
    def component_probs(
        self, q: torch.distributions.Distribution, num_draws: int = _DRAWS, seed: int | None = None
    ) -> torch.Tensor:
        """q(y = k | x) = E_q(z|x) p(y = k | z), ``(N, C)``, by the mean over draws; its argmax is the cluster.

        Args:
            q: q(z|x) of N data, such as ``guide.distribution(x)``.
            num_draws: draws of each z.
            seed: forks the global random state; None draws from it.

        Raises:
            DataTypeError: q is not a distribution.
            ShapeError: q is not one over z for each datum.
        """
        check_posterior(q, self.mixture)
        total = torch.zeros(())
        with forked_rng(seed):
            for _ in range(check_positive_int("num_draws", num_draws)):
                total = total + self.responsibilities(q.sample())
        return total / num_draws

    def initialize(self, q: torch.distributions.Distribution, seed: int = 0) -> "GaussianMixtureVAE":
        """Start the components from the clusters of q(z|x), and return the model.

        scikit-learn's variational mixture, the best of 20 starts, groups the data by the means of q(z|x); each
        component starts at the moments of draws from the q(z|x) of its group.

        Args:
            q: q(z|x) of the training data, batch shape ``(N,)``, such as ``guide.distribution(x)`` of a guide that was
                trained with a ``DeepGaussian`` with this decoder.
            seed: of the starts.

        Raises:
            DataTypeError: q is not a distribution.
            ShapeError: q is not one over z for each datum, or of fewer data than components.
            ParameterError: draws of q are not finite, or there are fewer clusters than components.
        """
        from sklearn.mixture import BayesianGaussianMixture

        draws = draw_latents(q, self.mixture, seed)  # (S, N, L)
        found = BayesianGaussianMixture(
            n_components=self.mixture.num_components,
            covariance_type=self.mixture.covariance,
            weight_concentration_prior_type="dirichlet_distribution",
            weight_concentration_prior=None if self.learn_weights else _EQUAL,
            n_init=20,
            max_iter=300,
            random_state=seed,
        ).fit_predict(draws.mean(0).double().cpu().numpy())
        if len(set(found)) < self.mixture.num_components:
            cure = "Take fewer components, or more data."
            raise ParameterError(refuse("q", f"{self.mixture.num_components} clusters", len(set(found)), cure))
        labels = torch.as_tensor(found, device=draws.device).repeat(len(draws))
        self.mixture.initialize(draws.flatten(0, 1), labels=labels)
        if not self.learn_weights:
            nn.init.zeros_(self.mixture.logits)
        return self

    @torch.no_grad()
    def sample(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws x ~ p(x), ``(num_samples, D)`` or ``(num_samples, C, H, W)``, and the components y they come from."""
        z, y = self.mixture.sample(num_samples)
        return self.decode(z).sample(), y


def check_posterior(q: torch.distributions.Distribution, mixture: GaussianMixture) -> int:
    """The number of data of q(z|x).

    Raises:
        DataTypeError: q is not a distribution.
        ShapeError: its batch shape is not ``(N,)``, or its event shape not ``(L,)``.
    """
    cure = "Pass guide.distribution(x)."
    if not isinstance(q, torch.distributions.Distribution):
        raise DataTypeError(refuse("q", "a distribution q(z|x)", type(q).__name__, cure))
    if len(q.batch_shape) != 1 or tuple(q.event_shape) != (mixture.data_dim,):
        got = f"batch shape {tuple(q.batch_shape)}, event shape {tuple(q.event_shape)}"
        raise ShapeError(refuse("q", f"batch shape (N,), event shape ({mixture.data_dim},)", got, cure))
    return q.batch_shape[0]


@torch.no_grad()
def draw_latents(q: torch.distributions.Distribution, mixture: GaussianMixture, seed: int) -> torch.Tensor:
    """Draws of z from each q(z|x), ``(S, N, L)``.

    Raises:
        DataTypeError: q is not a distribution.
        ShapeError: q is not one over z for each datum, or of fewer data than components.
        ParameterError: a draw is not finite.
    """
    num_data = check_posterior(q, mixture)
    if num_data < mixture.num_components:
        wanted = f"at least as many data as components, {mixture.num_components}"
        raise ShapeError(refuse("q", wanted, num_data, "Take fewer components or more data."))
    with forked_rng(seed):
        draws = q.sample(torch.Size([_DRAWS]))
    if not bool(draws.isfinite().all()):
        raise ParameterError(refuse("q", "finite draws of z", "NaN or infinity", "Check x and the guide's training."))
    return draws
