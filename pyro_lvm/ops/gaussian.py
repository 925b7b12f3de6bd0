r"""Closed forms of the linear-Gaussian model, the yardstick of every estimator.

.. math::
    z \sim N(0, I_L), \qquad x \mid z \sim N(W z + \mu, \mathrm{diag}(\psi))

Probabilistic PCA is psi = sigma^2 1, factor analysis any psi > 0 (Bishop 2006, section 12.2). Only L x L matrices are
factorised; no D x D matrix is built.
"""

import math

import torch

from pyro_lvm._checks import refuse
from pyro_lvm.errors import ShapeError

__all__ = ["linear_gaussian_elbo", "linear_gaussian_log_marginal", "linear_gaussian_posterior", "normal_kl"]


def linear_gaussian_log_marginal(
    x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
) -> torch.Tensor:
    r"""Exact log p(x) of the linear-Gaussian model.

    With m the posterior mean and :math:`\Lambda = I + W^T \Psi^{-1} W` the posterior precision, Woodbury's identity
    in a form without cancellation:

    .. math::
        \log p(x) = -\tfrac12 \big[ D \log 2\pi + \log|\Psi| + \log|\Lambda|
                    + \|x - W m - \mu\|^2_{\Psi^{-1}} + \|m\|^2 \big]

    Args:
        x: Data, ``(N, D)``.
        weight: W, ``(D, L)``.
        mean: mu, ``(D,)``.
        variance: psi > 0, ``(D,)``.

    Returns:
        log p(x) in nats, ``(N,)``, exact.

    Raises:
        ShapeError: the shapes do not fit together.

    Example:
        >>> zero, one = torch.zeros(1, 1), torch.ones(1)
        >>> linear_gaussian_log_marginal(zero, torch.ones(1, 1), torch.zeros(1), one)  # log N(0; 0, 2)
        tensor([-1.2655])
    """
    loc, scale_tril = linear_gaussian_posterior(x, weight, mean, variance)  # (N, L), (L, L)
    misfit = _squared_misfit(x, weight, mean, variance, loc) + loc.square().sum(dim=1)  # (N,)
    log_det = variance.log().sum() - 2 * _log_diagonal(scale_tril)
    return -0.5 * (misfit + log_det + x.shape[1] * math.log(2 * math.pi))


def linear_gaussian_posterior(
    x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Exact posterior :math:`p(z \mid x) = N(m, \Lambda^{-1})` of the linear-Gaussian model.

    .. math::
        \Lambda = I + W^T \Psi^{-1} W, \qquad m = \Lambda^{-1} W^T \Psi^{-1} (x - \mu)

    Args:
        x: Data, ``(N, D)``.
        weight: W, ``(D, L)``.
        mean: mu, ``(D,)``.
        variance: psi > 0, ``(D,)``.

    Returns:
        The mean m, ``(N, L)``, and the lower Cholesky factor of the covariance, ``(L, L)``, which x does not enter.

    Raises:
        ShapeError: the shapes do not fit together.

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> linear_gaussian_posterior(torch.tensor([[4.0]]), torch.ones(1, 1), zero, one)
        (tensor([[2.0000]]), tensor([[0.7071]]))
    """
    _check_model(x, weight, mean, variance)
    scaled = weight / variance[:, None]  # (D, L)
    identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    precision = identity + weight.mT @ scaled  # (L, L)
    # Factorise in reversed order: precision = U U^T with U upper, so U^{-T} is the lower factor of the covariance.
    upper = torch.linalg.cholesky(precision.flip(0, 1)).flip(0, 1)  # (L, L)
    scale_tril = torch.linalg.solve_triangular(upper, identity, upper=True).mT  # (L, L)
    loc = (x - mean) @ scaled @ scale_tril @ scale_tril.mT  # (N, L)
    return loc, scale_tril


def normal_kl(
    loc_q: torch.Tensor, scale_tril_q: torch.Tensor, loc_p: torch.Tensor, scale_tril_p: torch.Tensor
) -> torch.Tensor:
    r"""KL divergence between multivariate normals, :math:`\mathrm{KL}(q \| p)`.

    .. math::
        \tfrac12 \big[ \|L_p^{-1} L_q\|_F^2 + \|L_p^{-1} (m_q - m_p)\|^2 - L \big] + \log|L_p| - \log|L_q|

    Args:
        loc_q: Mean of q, ``(N, L)`` or ``(L,)``.
        scale_tril_q: Lower Cholesky factor of the covariance of q, ``(N, L, L)`` or ``(L, L)``.
        loc_p: Mean of p, like ``loc_q``.
        scale_tril_p: Lower Cholesky factor of the covariance of p, like ``scale_tril_q``.

    Returns:
        KL in nats, ``(N,)``; a scalar if no argument has N.

    Raises:
        ShapeError: the last dimensions are not L, or the leading ones do not broadcast.

    Example:
        >>> one = torch.eye(1)
        >>> normal_kl(torch.tensor([[2.0]]), one, torch.zeros(1, 1), one)
        tensor([2.])
    """
    _check_normals(loc_q, scale_tril_q, loc_p, scale_tril_p)
    latent_dim = loc_q.shape[-1]
    whitened = torch.linalg.solve_triangular(scale_tril_p, scale_tril_q, upper=False)  # (..., L, L)
    shift = torch.linalg.solve_triangular(scale_tril_p, (loc_q - loc_p)[..., None], upper=False)  # (..., L, 1)
    squares = whitened.square().sum(dim=(-2, -1)) + shift.square().sum(dim=(-2, -1))  # (N,)
    return 0.5 * (squares - latent_dim) + _log_diagonal(scale_tril_p) - _log_diagonal(scale_tril_q)


def linear_gaussian_elbo(
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    loc: torch.Tensor,
    scale_tril: torch.Tensor,
) -> torch.Tensor:
    r"""Closed-form ELBO of the Gaussian q(z|x) = N(m, S S^T) in the linear-Gaussian model.

    .. math::
        \mathbb{E}_q \log p(x \mid z) - \mathrm{KL}(q \| N(0, I)), \qquad
        \mathbb{E}_q \log p(x \mid z) = \log N(x; W m + \mu, \Psi) - \tfrac12 \|\Psi^{-1/2} W S\|_F^2

    Args:
        x: Data, ``(N, D)``.
        weight: W, ``(D, L)``.
        mean: mu, ``(D,)``.
        variance: psi > 0, ``(D,)``.
        loc: Mean m of q, ``(N, L)``.
        scale_tril: Lower Cholesky factor S of its covariance, ``(N, L, L)`` or ``(L, L)``.

    Returns:
        ELBO in nats, ``(N,)``, exact: log p(x) less KL(q(z|x) || p(z|x)).

    Raises:
        ShapeError: the shapes do not fit together.

    Example:
        >>> x, one, zero = torch.zeros(1, 1), torch.ones(1), torch.zeros(1)
        >>> linear_gaussian_elbo(x, torch.ones(1, 1), zero, one, torch.zeros(1, 1), 0.5**0.5 * torch.eye(1))
        tensor([-1.2655])
    """
    _check_model(x, weight, mean, variance)
    if loc.shape != (len(x), weight.shape[1]):
        cure = "q has one mean per datum and latent dimension."
        raise ShapeError(refuse("loc", f"shape {(len(x), weight.shape[1])}", tuple(loc.shape), cure))
    identity = torch.eye(weight.shape[1], dtype=loc.dtype, device=loc.device)  # (L, L)
    kl = normal_kl(loc, scale_tril, torch.zeros_like(loc), identity)  # (N,)
    gram = weight.mT @ (weight / variance[:, None])  # (L, L)
    blur = (scale_tril * (gram @ scale_tril)).sum(dim=(-2, -1))  # (N,) or ()
    misfit = _squared_misfit(x, weight, mean, variance, loc)  # (N,)
    return -0.5 * (misfit + blur + variance.log().sum() + x.shape[1] * math.log(2 * math.pi)) - kl


def _squared_misfit(
    x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    """Squared distance of x from W z + mu in units of the noise, ``(N,)``."""
    return ((x - mean - z @ weight.mT).square() / variance).sum(dim=1)


def _log_diagonal(scale_tril: torch.Tensor) -> torch.Tensor:
    """Log-determinant of a triangular factor."""
    return scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)


def _check_model(x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
    if weight.dim() != 2:
        cure = "Its rows are data dimensions, its columns latent ones."
        raise ShapeError(refuse("weight", "shape (D, L)", tuple(weight.shape), cure))
    data_dim = weight.shape[0]
    if x.dim() != 2 or x.shape[1] != data_dim:
        cure = "weight has one row per data dimension; flatten x first."
        raise ShapeError(refuse("x", f"shape (N, {data_dim})", tuple(x.shape), cure))
    for name, value in (("mean", mean), ("variance", variance)):
        if value.shape != (data_dim,):
            cure = f"Pass one number per data dimension, e.g. {name}.expand({data_dim})."
            raise ShapeError(refuse(name, f"shape ({data_dim},)", tuple(value.shape), cure))


def _check_normals(
    loc_q: torch.Tensor, scale_tril_q: torch.Tensor, loc_p: torch.Tensor, scale_tril_p: torch.Tensor
) -> None:
    latent_dim = loc_q.shape[-1]
    shapes = {"scale_tril_q": scale_tril_q.shape[-2:], "scale_tril_p": scale_tril_p.shape[-2:]}
    for name, shape in {"loc_p": loc_p.shape[-1:], **shapes}.items():
        if any(size != latent_dim for size in shape):
            cure = f"loc_q has L = {latent_dim} dimensions."
            raise ShapeError(refuse(name, f"last dimensions of size {latent_dim}", tuple(shape), cure))
    try:
        leading = [loc_q.shape[:-1], loc_p.shape[:-1], scale_tril_q.shape[:-2], scale_tril_p.shape[:-2]]
        torch.broadcast_shapes(*leading)
    except RuntimeError:
        got = [tuple(shape) for shape in leading]
        cure = "Give every argument N in front, or none."
        raise ShapeError(refuse("loc_q", "leading dimensions that broadcast", got, cure)) from None
