"""Each layer's determinant is that of autograd, and there and back is the identity, both to rounding."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.distributions import TransformedDistribution

from pyro_lvm.transforms import (
    AffineCoupling,
    AutoregressiveNetwork,
    AutoregressiveStep,
    CouplingNetwork,
    LocationScale,
    SplineCoupling,
    Step,
)

N, L, C = 5, 4, 3


def shaken(network: torch.nn.Module, spread: float = 0.5) -> Any:
    """In double precision and far from where it starts."""
    network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return network


class OwnWeights:
    """A network with weights of its own for each datum: linear in the coordinates before."""

    def __init__(self, dim: int) -> None:
        self.order = range(dim)
        self.weights = torch.randn(2, N, dim, dim).double().tril(-1)  # shift and log-scale

    def __call__(self, u: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shift, log_scale = ((rows @ u[..., None])[..., 0] for rows in self.weights)
        return shift + context.sum(-1, keepdim=True), 0.3 * torch.tanh(log_scale)


def autoregressive(dim: int, context: torch.Tensor) -> Step:
    return AutoregressiveStep(shaken(AutoregressiveNetwork(dim, 12, C)), context)


def reversed_autoregressive(dim: int, context: torch.Tensor) -> Step:
    return AutoregressiveStep(shaken(AutoregressiveNetwork(dim, 12, C, reverse=True)), context)


def own_weights(dim: int, context: torch.Tensor) -> Step:
    return AutoregressiveStep(OwnWeights(dim), context)


def coupling(dim: int, context: torch.Tensor) -> Step:
    return AffineCoupling(shaken(CouplingNetwork(dim, [12], 2, 1, C)), context)


def coupling_without_context(dim: int, context: torch.Tensor) -> Step:
    return AffineCoupling(shaken(CouplingNetwork(dim, [12, 8], 2)))


def spline(dim: int, context: torch.Tensor) -> Step:
    return SplineCoupling(shaken(CouplingNetwork(dim, [12], 3 * 5 - 1, 1, C), 2.0), context)


def diagonal(dim: int, context: torch.Tensor) -> Step:
    return LocationScale(torch.randn(N, dim).double(), torch.rand(N, dim).double() + 0.5)


def full(dim: int, context: torch.Tensor) -> Step:
    scale = torch.randn(N, dim, dim).double().tril(-1) + torch.rand(N, dim).double().add(0.5).diag_embed()
    return LocationScale(torch.randn(N, dim).double(), scale)


KINDS = [
    autoregressive,
    reversed_autoregressive,
    own_weights,
    coupling,
    coupling_without_context,
    spline,
    diagonal,
    full,
]
STEPS = pytest.mark.parametrize("make", KINDS)
COUPLINGS = pytest.mark.parametrize(("kind", "outputs"), [(AffineCoupling, 2), (SplineCoupling, 3 * 5 - 1)])


def step_and_draws(make: Any, dim: int = L, num_particles: int = 7) -> tuple[Step, torch.Tensor]:
    """A step, and values that reach out of where a spline bends."""
    torch.manual_seed(0)
    return make(dim, torch.randn(N, C).double()), 3 * torch.randn(num_particles, N, dim).double()


@STEPS
@pytest.mark.parametrize("dim", [1, 2, L])
def test_determinant_is_that_of_autograd(make: Any, dim: int) -> None:
    step, u = step_and_draws(make, dim, num_particles=3)
    got = step.log_abs_det_jacobian(u, step(u))
    for k in range(3):
        rows = torch.autograd.functional.jacobian(lambda v: step.forwards(v)[0], u[k])  # (N, L, N, L)
        own = rows[torch.arange(N), :, torch.arange(N)]  # (N, L, L)
        torch.testing.assert_close(got[k], torch.linalg.slogdet(own).logabsdet, rtol=0, atol=1e-10)
        rows[torch.arange(N), :, torch.arange(N)] = 0
        assert not rows.any()  # no datum moves another


@STEPS
@pytest.mark.parametrize("dim", [1, 2, L])
def test_there_and_back(make: Any, dim: int) -> None:
    step, u = step_and_draws(make, dim)
    z, forth = step.forwards(u)
    again, back = step.backwards(z)
    torch.testing.assert_close(again, u, rtol=0, atol=1e-10)
    torch.testing.assert_close(back, forth, rtol=0, atol=1e-10)
    torch.testing.assert_close(step.forwards(step.backwards(u)[0])[0], u, rtol=0, atol=1e-10)


@STEPS
def test_memory_is_of_the_last_pass_only(make: Any) -> None:
    step, u = step_and_draws(make)
    z = step(u)
    assert step.inv(z) is u
    assert step.inv(z.clone()) is not u
    with torch.no_grad():
        z = step(u)
    assert step.log_abs_det_jacobian(u, z).requires_grad == bool(getattr(step, "network", None) and make != own_weights)
    assert step.inv(z) is not u  # without gradients, and now they are wanted


@STEPS
def test_nothing_is_held_after_use(make: Any) -> None:
    step, u = step_and_draws(make)
    gc.collect()
    gc.disable()
    try:
        q = TransformedDistribution(torch.distributions.Normal(torch.zeros_like(u[0]), 1.0), [step])
        z = q.rsample((7,))
        score = q.log_prob(z).sum()
        ghost = weakref.ref(z)
        del q, z, score, step
        assert ghost() is None
    finally:
        gc.enable()


@COUPLINGS
def test_couplings_keep_what_they_read_and_start_as_the_identity(kind: Any, outputs: int) -> None:
    torch.manual_seed(0)
    network, context, u = CouplingNetwork(L, [8], outputs, 1, C).double(), torch.randn(N, C).double(), torch.randn(N, L)
    z, log_det = kind(network, context).forwards(u.double())
    torch.testing.assert_close(z, u.double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(log_det, torch.zeros(N).double(), rtol=0, atol=1e-14)
    z, _ = kind(shaken(network), context).forwards(u.double())
    assert (z == u)[:, 1::2].all()
    assert (z != u)[:, ::2].all()


@COUPLINGS
def test_gradients_are_finite_in_single_precision_far_out(kind: Any, outputs: int) -> None:
    torch.manual_seed(0)
    network = shaken(CouplingNetwork(L, [8], outputs, 1, C), 2.0).float()
    u = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4]).repeat(N, 1).T.reshape(N, N, 1).expand(N, N, L).clone()
    u.requires_grad_()
    z, log_det = kind(network, torch.randn(N, C)).forwards(u)
    (z.sum() + log_det.sum()).backward()
    assert u.grad is not None
    assert u.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_spline_is_the_formula_between_its_knots() -> None:
    """Durkan et al. (2019), Eq. (4), by a loop over coordinates; widths and heights are shares of 6."""
    torch.manual_seed(0)
    raw, u = torch.randn(N, 3 * 5 - 1, L).double(), 6 * torch.rand(N, L).double() - 3
    context = torch.zeros(N, C).double()

    class Given:
        kept = torch.zeros(L, dtype=torch.bool)

        def __call__(self, u: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
            return 8 * raw

    z, log_det = SplineCoupling(Given(), context).forwards(u)
    start = torch.tensor(1.0).double().expm1().log()  # softplus of this is 1
    for n in range(N):
        log_slopes = []
        for l in range(L):
            widths, heights = (6 * (0.002 + 0.99 * part.softmax(0)) for part in raw[n, :10, l].split(5))
            knots, levels = (torch.cat([torch.zeros(1), part.cumsum(0)]) - 3 for part in (widths, heights))
            inner = 0.01 + 0.99 * torch.nn.functional.softplus(raw[n, 10:, l] + start)
            slopes = torch.cat([torch.ones(1), inner, torch.ones(1)])
            k = int((knots[1:-1] <= u[n, l]).sum())
            xi = (u[n, l] - knots[k]) / widths[k]
            s = heights[k] / widths[k]
            below = s + (slopes[k + 1] + slopes[k] - 2 * s) * xi * (1 - xi)
            expected = levels[k] + heights[k] * (s * xi**2 + slopes[k] * xi * (1 - xi)) / below
            torch.testing.assert_close(z[n, l], expected, rtol=0, atol=1e-10)
            top = slopes[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + slopes[k] * (1 - xi) ** 2
            log_slopes.append((s**2 * top / below**2).log())
        torch.testing.assert_close(log_det[n], torch.stack(log_slopes).sum(), rtol=0, atol=1e-10)


def test_autoregressive_steps_are_triangular_in_their_order() -> None:
    for make, outside in ((autoregressive, torch.triu), (reversed_autoregressive, torch.tril)):
        step, u = step_and_draws(make, num_particles=1)
        rows = torch.autograd.functional.jacobian(lambda v, step=step: step.forwards(v)[0], u[0])
        own = rows[torch.arange(N), :, torch.arange(N)]  # (N, L, L)
        assert not outside(own - own.diagonal(dim1=-2, dim2=-1).diag_embed()).any()
        assert (own.flatten(1) != 0).sum(1).eq(L * (L + 1) // 2).all()


@COUPLINGS
def test_a_single_coordinate_is_moved_by_every_step(kind: Any, outputs: int) -> None:
    for parity in (0, 1):
        network = CouplingNetwork(1, [12], outputs, parity, C)
        assert not network.kept.any()
        z, _ = kind(shaken(network), torch.randn(N, C).double()).forwards(torch.randn(N, 1).double() / 3)
        grads = torch.autograd.grad(z.sum(), list(network.parameters()))
        assert all(bool(grad.any()) for grad in grads)
