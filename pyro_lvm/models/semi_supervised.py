r"""Semi-supervised learning: the Gaussian-mixture VAE whose components are classes, some of whose labels are known.

y ~ Cat(pi), z | y = k ~ N(mu_k, Sigma_k), x | z ~ p(x | f(z)). A datum with a label contributes log p(x, y), one
without contributes log p(x), both through the same bound.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn
from torch.nn.functional import nll_loss

from pyro_lvm._checks import check_positive_int, data_tensor, refuse
from pyro_lvm.errors import DataTypeError, ParameterError, ShapeError, SupportError
from pyro_lvm.models.likelihoods import Likelihood
from pyro_lvm.models.mixture_vae import GaussianMixtureVAE, check_posterior, draw_latents

__all__ = ["SemiSupervisedVAE"]

#: The label of a datum whose class is not known.
_UNKNOWN = -1


class SemiSupervisedVAE(nn.Module):
    r"""Deep latent model p(x, y, z) of data whose classes y are known for some.

    .. math:: y \sim \text{Cat}(\pi), \qquad z \mid y = k \sim N(\mu_k, \Sigma_k), \qquad x \mid z \sim p(x \mid f(z))

    Called with x, or with x and labels, it is a Pyro model with the latents ``y`` and ``z`` and the observed ``x`` in
    the plate ``data``; labels are observed in the site ``label``, which says that y is what it was found to be.
    So ``log_marginal(model, guide, x)`` is log p(x), and with labels it is log p(x, y) of the data that have one. The
    guide samples z and reads x alone, as ``guides.DiagonalNormal`` does.

    Labels are integers ``(N,)`` from 0 to C-1, and -1 where the class is not known. Train in three steps: a
    ``DeepGaussian`` with this decoder and guide on x; `initialize`; then all together with ``loss=model.loss(guide)``.

    Args:
        decoder: maps z ``(..., L)`` to what the likelihood reads. The networks of ``pyro_lvm.nn`` take any leading
            dimensions.
        latent_dim: L.
        num_classes: C.
        likelihood: ``"bernoulli"``, ``"normal"``, ``"categorical"``, ``"poisson"``, or an object of
            ``models.likelihoods``.
        covariance: that of `GaussianMixture`.
        min_scale: floor of the standard deviations in z.

    Attributes:
        generative: the `GaussianMixtureVAE` p(x, y, z).
        temperature: T of `class_probs`, 1 until `calibrate`.

    Raises:
        DataTypeError: ``likelihood`` or ``covariance`` is no known name, a count is not an integer, or (when used)
            labels are not integers.
        ShapeError: a count is less than 1, or (when used) labels are not ``(N,)`` or the decoder's output does not fit.
        SupportError: (when used) a label is outside of -1 to C-1.

    Source: Kingma et al. (2014), Semi-supervised Learning with Deep Generative Models, for the two bounds and the
    classification term; there x depends on y directly, here through z alone.

    Example:
        >>> from pyro_lvm.guides import DiagonalNormal
        >>> from pyro_lvm.nn import MLP
        >>> model, guide = SemiSupervisedVAE(MLP(2, [32], 64), 2, num_classes=3), DiagonalNormal(2, MLP(64, [32], 4))
        >>> model.class_probs(guide.distribution(torch.zeros(5, 64))).shape
        torch.Size([5, 3])
    """

    temperature: torch.Tensor

    def __init__(
        self,
        decoder: nn.Module,
        latent_dim: int,
        num_classes: int,
        likelihood: Literal["bernoulli", "normal", "categorical", "poisson"] | Likelihood = "bernoulli",
        covariance: Literal["full", "tied", "diag", "spherical"] = "full",
        min_scale: float = 1e-2,
    ) -> None:
        super().__init__()
        self.num_classes = check_positive_int("num_classes", num_classes)
        self.generative = GaussianMixtureVAE(
            decoder, latent_dim, num_classes, likelihood, covariance, learn_weights=True, min_scale=min_scale
        )
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """The Pyro model of x, and of the labels y where there are any; returns z, ``(N, L)``."""
        labels = None if y is None else self._checked(y, len(x))
        pyro.module("SemiSupervisedVAE", self)
        with pyro.plate("data", len(x)):
            z, classes = self.generative.sites(x)
            if labels is not None:
                pyro.sample("label", dist.Delta(classes).mask(labels != _UNKNOWN), obs=labels)
        return z

    def notes(self) -> list[str]:
        """What `fit` tells the user: components that rest on the floor."""
        return self.generative.notes()

    def loss(self, guide: Any, classification_weight: float = 30.0) -> Callable[..., torch.Tensor]:
        r"""What ``fit(model, guide, (x, y), loss=...)``, or Pyro's ``SVI``, minimises.

        .. math::
            -\frac1N \sum_n \mathcal L(x_n[, y_n]) \;-\; \frac{\alpha}{M} \sum_{m \text{ labelled}}
            E_{q(z \mid x_m)} \log p(y_m \mid z)

        The second term makes q(z|x) tell the classes apart: a few labels alone hardly weigh against the bounds of all
        x. With it this is no bound on log p(x, y) any more. A batch without labels has the bound alone.

        Args:
            guide: a module with ``distribution(x)``.
            classification_weight: alpha, nats per datum.

        Raises:
            DataTypeError: the guide has no ``distribution``.
            ParameterError: alpha is negative, or no number.
        """
        if not callable(getattr(guide, "distribution", None)):
            cure = "Pass e.g. guides.DiagonalNormal(latent_dim, encoder)."
            raise DataTypeError(refuse("guide", "a module with distribution(x)", type(guide).__name__, cure))
        if not (isinstance(classification_weight, int | float) and 0 <= classification_weight < math.inf):
            cure = "Pass 0 to leave the term out."
            raise ParameterError(refuse("classification_weight", "a number >= 0", repr(classification_weight), cure))
        bound = TraceEnum_ELBO(max_plate_nesting=1)

        def loss(
            model: Callable[..., Any], guide_: Callable[..., Any], x: torch.Tensor, y: torch.Tensor | None = None
        ) -> torch.Tensor:
            if y is None:
                return bound.differentiable_loss(model, guide_, x)
            total = bound.differentiable_loss(model, guide_, x, y)
            labels = self._checked(y, len(x))
            known = labels != _UNKNOWN  # (N,)
            if not bool(known.any()):
                return total
            # Of all x: the encoder may normalise over the batch, or have a row for each datum.
            z = guide.distribution(x).rsample()[known]  # (M, L)
            log_p = self.generative.mixture.log_joint(z).log_softmax(1)  # (M, C)
            return total + classification_weight * len(x) * nll_loss(log_p, labels[known])

        return loss

    def class_probs(
        self, q: torch.distributions.Distribution, num_draws: int = 100, seed: int | None = None
    ) -> torch.Tensor:
        r"""q(y = k | x) = E_q(z|x) p(y = k | z), raised to 1/T and normalised: ``(N, C)``.

        Args:
            q: q(z|x) of N data, such as ``guide.distribution(x)``.
            num_draws: draws of each z.
            seed: forks the global random state; None draws from it.
        """
        return self._tempered(self.generative.component_probs(q, num_draws, seed).log(), self.temperature)

    @torch.no_grad()
    def calibrate(
        self, q: torch.distributions.Distribution, y: torch.Tensor, num_draws: int = 100, seed: int = 0
    ) -> "SemiSupervisedVAE":
        """Set T so that `class_probs` fits labels that were held out from training, and return the model.

        Maximises their log-likelihood. T > 1 makes probabilities more cautious, and no class changes place with
        another. On labels that were trained on, T would come out too small.

        Args:
            q: q(z|x) of held-out data, such as ``guide.distribution(x)``.
            y: their labels ``(N,)``; those of -1 are left out.
            num_draws: draws of each z.
            seed: of the draws.

        Raises:
            DataTypeError: q is not a distribution.
            ShapeError: q is not one over z for each datum.
            ParameterError: there is no label.

        Source: Guo et al. (2017), On Calibration of Modern Neural Networks, Section 4.2.
        """
        from scipy.optimize import minimize_scalar

        labels = self._checked(y, check_posterior(q, self.generative.mixture))
        known = labels != _UNKNOWN
        if not bool(known.any()):
            raise ParameterError(refuse("y", "held-out labels", "none", "Pass the classes of some data."))
        log_p = self.generative.component_probs(q, num_draws, seed).log()[known]  # (M, C)

        def cost(log_temperature: float) -> float:
            tempered = self._tempered(log_p, torch.tensor(log_temperature).exp())
            return float(nll_loss(tempered.log().clamp(min=-100.0), labels[known]))

        self.temperature.fill_(minimize_scalar(cost, bounds=(-3.0, 3.0), method="bounded").x).exp_()
        return self

    def initialize(self, q: torch.distributions.Distribution, y: torch.Tensor, seed: int = 0) -> "SemiSupervisedVAE":
        """Start each class at the data that are likely to be of it, and return the model.

        scikit-learn's label spreading gives every datum the class of the labelled ones that it is connected to by near
        neighbours among the means of q(z|x); each component starts at the moments of draws from its group's q(z|x). A
        datum that no label reaches is left out.

        Args:
            q: q(z|x) of the training data, batch shape ``(N,)``, such as ``guide.distribution(x)`` of a guide that was
                trained with a ``DeepGaussian`` with this decoder.
            y: their labels ``(N,)``, each class at least once.
            seed: of the draws of z.

        Raises:
            DataTypeError: q is not a distribution.
            ShapeError: q is not one over z for each datum, or of fewer data than classes.
            ParameterError: a class has no label, or draws of q are not finite.
        """
        from sklearn.semi_supervised import LabelSpreading

        mixture = self.generative.mixture
        draws = draw_latents(q, mixture, seed)  # (S, N, L)
        labels = self._checked(y, draws.shape[1])
        missing = sorted(set(range(self.num_classes)) - set(labels.tolist()))
        if missing:
            cure = "Label at least one datum of each class, or take fewer classes."
            raise ParameterError(refuse("y", f"every class from 0 to {self.num_classes - 1}", f"no {missing}", cure))
        known = labels.cpu().numpy()  # (N,)
        spreading = LabelSpreading(kernel="knn", n_neighbors=min(7, len(known)), alpha=0.8, max_iter=200)
        spreading.fit(draws.mean(0).double().cpu().numpy(), known)
        spread = np.where(known == _UNKNOWN, spreading.transduction_, known)  # spreading may overrule a label
        # What no label reaches would otherwise count as of class 0.
        reached = torch.as_tensor((known != _UNKNOWN) | (spreading.label_distributions_.sum(1) > 0))  # (N,)
        draws, classes = draws[:, reached.to(draws.device)], torch.as_tensor(spread)[reached]
        mixture.initialize(draws.flatten(0, 1), labels=classes.repeat(len(draws)))
        return self

    @torch.no_grad()
    def sample(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws x ~ p(x), ``(num_samples, D)`` or ``(num_samples, C, H, W)``, and their classes y."""
        return self.generative.sample(num_samples)

    @staticmethod
    def _tempered(log_probs: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        return (log_probs / temperature).softmax(-1)

    def _checked(self, y: torch.Tensor, num_data: int) -> torch.Tensor:
        """Labels as integers ``(N,)``."""
        y = data_tensor("y", y)
        if y.is_floating_point() or y.dtype == torch.bool:
            cure = "Pass y.long(), -1 where it is not known."
            raise DataTypeError(refuse("y", "a tensor of integers", y.dtype, cure))
        if y.shape != (num_data,):
            cure = "Pass one label a datum, -1 where it is not known."
            raise ShapeError(refuse("y", f"shape ({num_data},)", tuple(y.shape), cure))
        outside = y[(y < _UNKNOWN) | (y >= self.num_classes)]
        if len(outside):
            cure = "Classes count from 0; make the model with as many as there are."
            raise SupportError(refuse("y", f"classes 0 to {self.num_classes - 1}, or -1", outside[0].item(), cure))
        return y.long()
