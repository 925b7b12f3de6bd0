r"""A guide with several modes: q(z|x) is a mixture of diagonal Gaussians, differentiable through its draws.

A draw has no gradient of its own, for which component it comes from jumps. But with the distribution function of each
coordinate given those before it,

.. math:: F_d(z_d \mid z_{<d}) = \sum_c w_c(z_{<d}) \, \Phi\Big(\frac{z_d - m_{cd}}{s_{cd}}\Big), \qquad
          w_c(z_{<d}) \propto \pi_c \prod_{j < d} N(z_j; m_{cj}, s_{cj}^2)

the same draw is the solution of F(z; phi) = u, u uniform. Held there, it moves with phi by

.. math:: \frac{dz}{d\phi} = - \Big(\frac{\partial F}{\partial z}\Big)^{-1} \frac{\partial F}{\partial \phi}

where dF/dz is triangular with the conditional densities on its diagonal (Figurnov, Mohamed and Mnih 2018, Implicit
Reparameterization Gradients; Graves 2016, Stochastic Backpropagation through Mixture Density Distributions).
"""

from typing import Any, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import pad
from torch.special import ndtr

from pyro_lvm._checks import check_positive_int
from pyro_lvm.guides.base import VariationalParameters, sample_latent
from pyro_lvm.guides.normal import positive

__all__ = ["DifferentiableMixture", "MixtureOfNormals"]

Shape: TypeAlias = torch.Size | list[int] | tuple[int, ...]


class MixtureOfNormals(nn.Module):
    r"""Guide that is a mixture of C diagonal Gaussians over the whole of z; with C = 1 it is ``DiagonalNormal``.

    .. math:: q(z \mid x) = \sum_c \pi_c(x) \, N(z; m_c(x), \text{diag}(s_c(x))^2)

    Its draws are differentiable, so any ELBO of Pyro trains it. At parameters of zero the weights are equal, the scales
    one, and the means C draws from N(0, I) less their average, always the same ones: components that start alike would
    have equal gradients and stay alike.

    The weights stay equal, unless ``learn_weights``: a mode of much mass then gets more of the components. The gradient
    of weights is unbiased too, but it reads from draws between the components what moving mass from one to the other
    would gain. Once two of them are so far apart that few draws fall between, it is noise of large variance, in which
    weights drift: of a posterior with two equal modes, learned weights can end further away than equal ones. For modes
    of unequal mass take more components.

    Args:
        num_components: C.
        latent_dim: L.
        encoder: maps x to ``(N, 2 C L)``: the means less where they start, component after component, then the raw
            scales alike; with ``learn_weights`` ``(N, C (2 L + 1))``, the logits of pi at the end.
        num_data: N, for local parameters, in the place of ``encoder``.
        shared: one phi for every datum, in the place of ``encoder``.
        learn_weights: whether pi is a parameter too, at first uniform.
        site: the latent's name in the model.

    Raises:
        DataTypeError: not exactly one of ``encoder``, ``num_data`` and ``shared`` is given.
        ShapeError: (when used) the encoder's output has another size, or x has not ``num_data`` rows.

    Source: Bishop, Lawrence, Jaakkola and Jordan (1998), Approximating Posterior Distributions in Belief Networks Using
    Mixtures, for the family.

    Example:
        >>> guide = MixtureOfNormals(3, latent_dim=2, shared=True)
        >>> q = guide.distribution(torch.zeros(5, 64))
        >>> q.batch_shape, q.event_shape, q.rsample().requires_grad
        (torch.Size([5]), torch.Size([2]), True)
    """

    start: torch.Tensor

    def __init__(
        self,
        num_components: int,
        latent_dim: int,
        encoder: nn.Module | None = None,
        *,
        num_data: int | None = None,
        shared: bool = False,
        learn_weights: bool = False,
        site: str = "z",
    ) -> None:
        super().__init__()
        self.num_components = check_positive_int("num_components", num_components)
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.learn_weights = learn_weights
        size = num_components * (2 * latent_dim + bool(learn_weights))
        self.phi = VariationalParameters(size, encoder, num_data, shared)
        # The same ones in every process and dtype, so that the parameters alone tell what q is.
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(num_components, latent_dim, generator=generator, dtype=torch.float32, device="cpu")
        self.register_buffer("start", (start - start.mean(0)).to(torch.zeros(())), persistent=False)  # (C, L)
        self.site = site

    def distribution(self, x: torch.Tensor) -> "DifferentiableMixture":
        """q(z|x): batch shape ``(N,)``, event shape ``(L,)``."""
        phi, size = self.phi(x), self.start.numel()
        means = phi[..., :size].unflatten(-1, self.start.shape)  # (N, C, L)
        raw = phi[..., size : 2 * size].unflatten(-1, self.start.shape)  # (N, C, L)
        logits = phi[..., 2 * size :] if self.learn_weights else phi.new_zeros(len(phi), self.num_components)  # (N, C)
        components = dist.Normal(self.start + means, positive(raw)).to_event(1)
        return DifferentiableMixture(dist.Categorical(logits=logits), components)

    def forward(self, x: torch.Tensor, *_args: Any) -> torch.Tensor:
        """The Pyro guide, which reads nothing but x; returns z, ``(N, L)``."""
        pyro.module("MixtureOfNormals", self)  # whose names begin with phi, unlike those of the prior of that name
        return sample_latent(self.distribution(x), x, self.site)


class DifferentiableMixture(dist.MixtureSameFamily):
    """A mixture of ``Normal(...).to_event(1)`` whose draws have pathwise gradients; see the module."""

    has_rsample = True

    @property
    def support(self) -> constraints.Constraint:
        """All of R^L."""
        return constraints.real_vector

    def rsample(self, sample_shape: Shape = ()) -> torch.Tensor:
        """Draws ``(..., L)`` with gradients to weights, means and scales."""
        z = self.sample(torch.Size(sample_shape))
        return z - self._lag(z) if torch.is_grad_enabled() else z

    def _lag(self, z: torch.Tensor) -> torch.Tensor:
        """Zero, whose gradient is that of -z(phi) at fixed u: ``(..., L)``."""
        normal = self.component_distribution.base_dist
        epsilon = (z[..., None, :] - normal.loc) / normal.scale  # (..., C, L)
        each = normal.log_prob(z[..., None, :])  # (..., C, L)
        before = pad(each[..., :-1].cumsum(-1), (1, 0))  # of the coordinates before, (..., C, L)
        weights = (self.mixture_distribution.logits[..., None] + before).softmax(-2)  # w_c(z before d), (..., C, L)
        below = ndtr(epsilon)  # (..., C, L)
        u = (weights * below).sum(-2)  # (..., L)
        with torch.no_grad():
            density = (weights * each.exp()).sum(-2)  # (..., L)
            # dF_d/dz_j for j < d: the weights move, by dlog N(z_j)/dz_j = -epsilon / s.
            reweighted = (weights * (below - u[..., None, :])).mT @ (-epsilon / normal.scale)  # (..., L, L)
            slope = reweighted.tril(-1) + density.diag_embed()
        return torch.linalg.solve_triangular(slope, (u - u.detach())[..., None], upper=False)[..., 0]
