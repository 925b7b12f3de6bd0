r"""Monotone rational-quadratic splines of one variable, with exact slope and inverse.

With knots at places v, heights w and slopes d there, :math:`\xi = (u - v_k) / (v_{k+1} - v_k)`, :math:`\eta = 1 - \xi`
and :math:`s = (w_{k+1} - w_k) / (v_{k+1} - v_k)`, the piece from knot k on is

.. math::
    z = w_k + \frac{(w_{k+1} - w_k) (s \xi^2 + d_k \xi \eta)}{s + (d_{k+1} + d_k - 2 s) \xi \eta}, \qquad
    \frac{dz}{du} = \frac{s^2 (d_{k+1} \xi^2 + 2 s \xi \eta + d_k \eta^2)}{(s + (d_{k+1} + d_k - 2 s) \xi \eta)^2}
"""

import math

import torch
from torch.nn.functional import pad, softplus

__all__ = ["rational_quadratic_spline"]

#: Least width, height and slope, in parts of those of the identity, so that a spline can be inverted in float32.
_LEAST = 1e-2
_SOFTPLUS_OF_THIS_IS_ONE = math.log(math.e - 1)


def rational_quadratic_spline(
    raw: torch.Tensor, value: torch.Tensor, bound: float, *, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A spline of K pieces on [-bound, bound], and the identity outside.

    Args:
        raw: ``(..., 3 K - 1)``: the pieces' widths and their heights, both before a softmax, then the slopes at the
            inner knots before a softplus; those at the ends are 1. Zeros are the identity.
        value: u ``(...)``, or z for the inverse.
        bound: half the width of the interval.
        inverse: whether to return u of z.

    Returns:
        z of u, or u of z, ``(...)``; and log dz/du, ``(...)``.

    Source: Durkan, Bekasov, Murray and Papamakarios (2019), Neural Spline Flows, Eqs. (4) to (8).

    Example:
        >>> raw = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])  # two pieces
        >>> z, _ = rational_quadratic_spline(raw, torch.tensor(0.5), 3.0)
        >>> u, _ = rational_quadratic_spline(raw, z, 3.0, inverse=True)
        >>> print(f"{z:.3f} {u:.3f}")
        -1.868 0.500
    """
    num_bins = (raw.shape[-1] + 1) // 3
    widths, heights, slopes = raw.split([num_bins, num_bins, num_bins - 1], dim=-1)
    places, levels = _knots(widths, bound), _knots(heights, bound)  # (..., K + 1)
    inner = _LEAST + (1 - _LEAST) * softplus(slopes + _SOFTPLUS_OF_THIS_IS_ONE)
    slopes = pad(inner, (1, 1), value=1.0)  # as outside, (..., K + 1)
    inside = value.clamp(-bound, bound)  # so that where the spline is not used its gradient is finite
    k = ((levels if inverse else places)[..., 1:-1] <= inside[..., None]).sum(-1, keepdim=True)  # the piece, (..., 1)
    ends = torch.stack([places, levels, slopes]).take_along_dim(torch.cat([k, k + 1], -1)[None], -1)  # (3, ..., 2)
    (left, right), (low, high), (d, d_next) = (pair.unbind(-1) for pair in ends)
    s = (high - low) / (right - left)
    bow = d_next + d - 2 * s
    if inverse:
        up = (inside - low) / (high - low)
        # a xi^2 + b xi + c = 0 for xi, in the form that does not cancel (Eqs. (6) to (8)).
        a, b, c = s - d + up * bow, d - up * bow, -s * up
        xi = -2 * c / (b + (b.square() - 4 * a * c).clamp(min=0.0).sqrt())
    else:
        xi = (inside - left) / (right - left)
    eta = 1 - xi
    below = s + bow * xi * eta
    log_slope = 2 * s.log() + (d_next * xi.square() + 2 * s * xi * eta + d * eta.square()).log() - 2 * below.log()
    bent = left + (right - left) * xi if inverse else low + (high - low) * (s * xi.square() + d * xi * eta) / below
    outside = value.abs() >= bound
    return torch.where(outside, value, bent), log_slope.masked_fill(outside, 0.0)


def _knots(raw: torch.Tensor, bound: float) -> torch.Tensor:
    """K + 1 increasing knots from -bound to bound, of raw widths ``(..., K)``."""
    shares = _LEAST / raw.shape[-1] + (1 - _LEAST) * raw.softmax(-1)
    inner = (2 * shares[..., :-1].cumsum(-1) - 1) * bound
    ends = torch.full_like(raw[..., :1], bound)
    return torch.cat([-ends, inner, ends], dim=-1)
