"""Gradients of draws against those of an integral, and posteriors with two modes, where no single Gaussian fits."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_lvm
from pyro_lvm.errors import DataTypeError, ShapeError
from pyro_lvm.evidence import quadrature
from pyro_lvm.guides import DiagonalNormal, FullRankNormal, MixtureOfNormals
from pyro_lvm.guides.mixture import DifferentiableMixture
from pyro_lvm.models import DeepGaussian, priors
from pyro_lvm.nn import MLP
from pyro_lvm.tracing.intercept import run

N = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(parameters: list[torch.Tensor]) -> DifferentiableMixture:
    logits, loc, scale = parameters
    return DifferentiableMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))


def integrand(z: torch.Tensor) -> torch.Tensor:
    """Not additive, so that dependence between coordinates counts."""
    return (z.sin() * torch.linspace(1, 2, z.shape[-1])).sum(-1) + 0.3 * z.prod(-1)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(("dim", "components", "reach", "nodes"), [(1, 3, 12, 1001), (2, 2, 12, 301), (3, 3, 8, 61)])
def test_expected_gradient_of_a_draw_is_that_of_the_integral(
    dim: int, components: int, reach: float, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int q(z) (df/dz) (dz/dphi) dz = d/dphi int q(z; phi) f(z) dz, both by the same trapezoidal rule.

    Of three dimensions the grid is the coarsest: spacing 0.27, and scales of 0.5 or more.
    """
    parameters = [torch.randn(components), torch.randn(components, dim), 0.6 + 0.5 * torch.rand(components, dim)]
    parameters = [p.double().requires_grad_() for p in parameters]
    grid = torch.linspace(-reach, reach, nodes, dtype=torch.float64)
    z = torch.cartesian_prod(*[grid] * dim).reshape(-1, dim)
    q = make(parameters)
    mass = q.log_prob(z).exp() * (2 * reach / (nodes - 1)) ** dim
    assert abs(mass.sum() - 1) < 1e-9
    expected = torch.autograd.grad((mass * integrand(z)).sum(), parameters, retain_graph=True)

    # Where q underflows so does the density that the gradient is divided by, and no draw ever is.
    inside = mass.detach() > 1e-40
    monkeypatch.setattr(q, "sample", lambda shape: z[inside])
    draws = q.rsample()
    assert torch.equal(draws.detach(), z[inside])
    got = torch.autograd.grad((mass.detach()[inside] * integrand(draws)).sum(), parameters)
    for name, mine, theirs in zip(("logits", "loc", "scale"), got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_one_component_moves_as_a_normal_does() -> None:
    """z = m + s epsilon: dz/dm = 1, dz/ds = epsilon, coordinate by coordinate."""
    loc, scale = torch.randn(1, 3).double().requires_grad_(), (0.5 + torch.rand(1, 3)).double().requires_grad_()
    z = make([torch.zeros(1).double(), loc, scale]).rsample((5,))
    up = torch.randn(5, 3).double()
    by_loc, by_scale = torch.autograd.grad((z * up).sum(), [loc, scale])
    torch.testing.assert_close(by_loc[0], up.sum(0))
    torch.testing.assert_close(by_scale[0], (up * ((z - loc) / scale)).sum(0).detach())


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_gradients_belong_to_their_own_datum(shape: tuple[int, ...]) -> None:
    parameters = [torch.randn(N, 3), torch.randn(N, 3, 2), 0.5 + torch.rand(N, 3, 2)]
    parameters = [p.double().requires_grad_() for p in parameters]
    z = make(parameters).rsample(shape)
    assert z.shape == (*shape, N, 2)
    for gradient in torch.autograd.grad(z[..., 1, :].sum(), parameters):
        assert gradient[1].any()
        assert not gradient[[0, 2, 3]].any()


@pytest.mark.parametrize("dim", [1, 40])
def test_gradients_are_finite_in_single_precision(dim: int) -> None:
    """Also where components lie 20 standard deviations apart, or coincide."""
    loc = torch.stack([torch.zeros(dim), torch.full((dim,), 2.0), torch.full((dim,), 2.0)]).requires_grad_()
    parameters = [torch.zeros(3, requires_grad=True), loc, torch.full((3, dim), 0.1, requires_grad=True)]
    for gradient in torch.autograd.grad(make(parameters).rsample((5000,)).sum(), parameters):
        assert gradient.isfinite().all()


def test_draws_without_gradients_do_no_work_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    q = MixtureOfNormals(3, 2, shared=True).distribution(torch.zeros(N, 1))
    monkeypatch.setattr(DifferentiableMixture, "_lag", None)
    with torch.no_grad():
        assert q.rsample((7,)).shape == (7, N, 2)


# ---------------------------------------------------------------- the family


def test_one_component_at_zero_is_the_prior() -> None:
    q = MixtureOfNormals(1, 3, num_data=N).double().distribution(torch.zeros(N, 2))
    z = torch.randn(5, N, 3).double()
    expected = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1).log_prob(z)
    torch.testing.assert_close(q.log_prob(z), expected)


@pytest.mark.parametrize("learn_weights", [False, True])
def test_components_start_apart_around_zero_and_always_alike(learn_weights: bool) -> None:
    guide = MixtureOfNormals(5, 3, num_data=N, learn_weights=learn_weights)
    torch.manual_seed(99)
    again = MixtureOfNormals(5, 3, shared=True, learn_weights=learn_weights)
    torch.testing.assert_close(guide.start, again.start)
    q = guide.distribution(torch.zeros(N, 2))
    means = q.component_distribution.mean[0]
    assert torch.pdist(means).min() > 0.1
    torch.testing.assert_close(q.mean, torch.zeros(N, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(q.mixture_distribution.probs, torch.full((N, 5), 0.2))
    torch.testing.assert_close(q.component_distribution.variance, torch.ones(N, 5, 3))


def test_double_precision_starts_where_single_does() -> None:
    single = MixtureOfNormals(4, 2, shared=True).start
    torch.set_default_dtype(torch.float64)
    try:
        double = MixtureOfNormals(4, 2, shared=True).start
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(double.float(), single)


def test_parameters_are_means_scales_and_logits() -> None:
    phi = torch.randn(N, 2 * (2 * 3 + 1))
    guide = MixtureOfNormals(2, 3, nn.Identity(), learn_weights=True)
    q = guide.distribution(phi)
    torch.testing.assert_close(q.component_distribution.mean, guide.start + phi[:, :6].reshape(N, 2, 3))
    one = DiagonalNormal(3, nn.Identity()).distribution(torch.cat([phi[:, 3:6], phi[:, 9:12]], 1))
    torch.testing.assert_close(q.component_distribution.stddev[:, 1], one.stddev)
    torch.testing.assert_close(q.mixture_distribution.probs, phi[:, 12:].softmax(1))


def test_particles_agree_with_the_loop_at_stored_draws() -> None:
    guide, x = MixtureOfNormals(3, 2, MLP(2, [8], 15), learn_weights=True).double(), torch.randn(N, 2).double()
    z = torch.randn(6, N, 2).double()
    with pyro.plate("particles", 6, dim=-2):
        together = run(guide, (x,), values={"z": z})["z"]
    for k in range(6):
        alone = run(guide, (x,), values={"z": z[k]})["z"]
        assert torch.equal(alone["value"], z[k])
        mine, theirs = together["fn"].log_prob(together["value"])[k], alone["fn"].log_prob(alone["value"])
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- posteriors with several modes


def mixture_case() -> tuple[Any, MixtureOfNormals, torch.Tensor, torch.Tensor]:
    """A prior of two normals under x = z + noise, whose posterior is two normals again."""
    weights, means, scales = (
        torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [[-2.0, 0.5], [1.5, -1.0]], [0.8, 0.6])
    )
    sd, x = 0.9, 1.5 * torch.randn(N, 2).double()

    def model(x: torch.Tensor) -> None:
        prior = dist.Normal(means, scales[:, None]).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), prior))
            pyro.sample("x", dist.Normal(z, sd).to_event(1), obs=x)

    evidence = dist.Normal(means, (scales.square() + sd**2).sqrt()[:, None]).to_event(1).log_prob(x[:, None])
    joint = evidence + weights.log()  # (N, C)
    precision = (scales**-2 + sd**-2)[:, None]  # (C, 1)
    loc = (means * scales[:, None] ** -2 + x[:, None] * sd**-2) / precision  # (N, C, L)
    guide = MixtureOfNormals(2, 2, num_data=N, learn_weights=True).double()
    raw = (precision.rsqrt().expm1().log() - torch.tensor(1.0).double().expm1().log()).expand(2, 2)
    table = torch.cat([(loc - guide.start).flatten(1), raw.flatten().expand(N, 4), joint], 1)
    with torch.no_grad():
        guide.phi.table.copy_(table)
    return model, guide, x, joint.logsumexp(1)


@pytest.mark.parametrize("vectorize", ["auto", False])
def test_posterior_that_is_a_mixture_makes_all_weights_equal(vectorize: Any) -> None:
    model, guide, x, log_px = mixture_case()
    table = pyro_lvm.log_weights(model, guide, x, num_particles=3, vectorize=vectorize)
    torch.testing.assert_close(table, log_px.expand(3, N), rtol=0, atol=1e-10)
    result = pyro_lvm.log_marginal(model, guide, x, num_particles=50, vectorize=vectorize, seed=0)
    torch.testing.assert_close(result.value, log_px, rtol=0, atol=1e-10)


def squares(x: torch.Tensor) -> None:
    """x = z^2 + noise does not know the sign of z."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.square(), 0.5).to_event(1), obs=x)


def first_square(x: torch.Tensor) -> None:
    """The same with z_1 and a second datum z_1 + z_2 + noise, at 0: z and -z are equally likely."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        loc = torch.stack([z[..., 0].square(), z.sum(-1)], -1)
        pyro.sample("x", dist.Normal(loc, x.new_tensor([0.5, 1.0])).to_event(1), obs=x)


def fitted_gap(model: Callable[..., None], guide: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """log p(x), by quadrature, less the ELBO: KL(q || p(z|x)) of the trained guide, ``(N,)``."""
    loss = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    for lr, steps in ((0.03, 400), (0.003, 150)):
        optim = lambda params, lr=lr: torch.optim.Adam(params, lr=lr)  # noqa: E731
        pyro_lvm.fit(model, guide, x, loss=loss, optim=optim, num_steps=steps, seed=0)
    with torch.no_grad():
        elbo = pyro_lvm.log_weights(model, guide, x, num_particles=10_000, seed=1).mean(0)
    return quadrature(model, x).value - elbo


@pytest.mark.parametrize(("model", "dim"), [(squares, 1), (first_square, 2)])
def test_both_modes_are_found_where_a_normal_finds_one(model: Callable[..., None], dim: int) -> None:
    x = torch.tensor([[2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)[:, :dim]
    guide = MixtureOfNormals(4, dim, num_data=2).double()
    gap = fitted_gap(model, guide, x)
    single = fitted_gap(model, FullRankNormal(dim, num_data=2).double(), x)
    assert (gap < 0.1).all()
    assert (single > 0.4).all()  # one of two modes costs log 2 = 0.69, a bridge between them as much
    share = (guide.distribution(x).sample((2000,))[..., 0] > 0).double().mean(0)
    assert ((share > 0.2) & (share < 0.8)).all()
    result = pyro_lvm.log_marginal(model, guide, x, num_particles=5000, seed=2)
    assert ((result.value - quadrature(model, x).value).abs() < 5 * result.stderr).all()


def test_an_encoder_learns_the_modes_of_each_datum() -> None:
    x = torch.linspace(1, 4, 40, dtype=torch.float64)[:, None]
    gap = fitted_gap(squares, MixtureOfNormals(4, 1, MLP(1, [16], 8)).double(), x)
    single = fitted_gap(squares, DiagonalNormal(1, MLP(1, [16], 2)).double(), x)
    assert gap.mean() < 0.3
    assert single.mean() > 0.6  # one of two modes costs log 2 = 0.69


# ---------------------------------------------------------------- with others


def test_prior_of_the_same_name_keeps_its_parameters() -> None:
    prior, guide = priors.MixtureOfNormals(2, 2), MixtureOfNormals(2, 2, MLP(6, [4], 8))
    pyro.module("MixtureOfNormals", prior)
    guide(torch.zeros(N, 6))
    names = {f"MixtureOfNormals$$${name}" for module in (prior, guide) for name, _ in module.named_parameters()}
    assert set(pyro.get_param_store()) == names
    assert len(names) == 3 + 4


def test_it_can_be_averaged_into_a_prior() -> None:
    x = torch.rand(20, 6).round()
    guide = MixtureOfNormals(2, 2, MLP(6, [4], 8))
    model = DeepGaussian(MLP(2, [4], 6), 2, "bernoulli", prior=priors.VampPrior(guide, x[:3]))
    result = pyro_lvm.fit(model, guide, x, num_steps=3, seed=0)
    assert result.losses.isfinite().all()


# ---------------------------------------------------------------- refusals


def test_bad_input_is_refused() -> None:
    with pytest.raises(ShapeError, match="num_components: expected 1 or more, got 0"):
        MixtureOfNormals(0, 2, num_data=N)
    with pytest.raises(DataTypeError, match="latent_dim: expected an integer"):
        MixtureOfNormals(2, 2.0, num_data=N)  # type: ignore[arg-type]
    with pytest.raises(DataTypeError, match="expected exactly one of the three, got none"):
        MixtureOfNormals(2, 2)
    with pytest.raises(ShapeError, match=r"encoder: expected output of shape \(4, 8\), got \(4, 10\)"):
        MixtureOfNormals(2, 2, nn.Linear(3, 10))(torch.zeros(N, 3))
    with pytest.raises(ShapeError, match=r"encoder: expected output of shape \(4, 10\), got \(4, 8\)"):
        MixtureOfNormals(2, 2, nn.Linear(3, 8), learn_weights=True)(torch.zeros(N, 3))
    with pytest.raises(ShapeError, match="x: expected num_data=4 data, got 3"):
        MixtureOfNormals(2, 2, num_data=N)(torch.zeros(3, 3))
