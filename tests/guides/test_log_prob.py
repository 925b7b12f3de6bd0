"""log q(z|x) of latents that the guide did not draw just now: of every family, of users' guides, of hierarchies."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_lvm
from pyro_lvm import guides
from pyro_lvm.errors import DataTypeError, PlateError, ShapeError, SiteError
from pyro_lvm.guides import log_prob
from pyro_lvm.models import HierarchicalGaussian, LinearGaussian
from pyro_lvm.nn import MLP

N, D, K = 4, 3, 5


def encoder(size: int) -> nn.Module:
    return MLP(D, [6], size)


def flow(transform: Any) -> nn.Module:
    return guides.Flow(3, encoder(6 + 2), transform=transform, hidden_dim=6, context_dim=2)


def user_density() -> nn.Module:
    net = encoder(6)

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.guide = guides.as_guide(self.distribution)
            self.net = net

        def distribution(self, x: torch.Tensor) -> dist.TorchDistribution:
            loc, raw = self.net(x).chunk(2, dim=-1)
            return dist.Laplace(loc, raw.exp()).to_event(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.guide(x)

    return Owner()


REAL: dict[str, Callable[[], Any]] = {
    "diagonal": lambda: guides.DiagonalNormal(3, encoder(6)),
    "full": lambda: guides.FullRankNormal(3, encoder(9)),
    "low rank": lambda: guides.LowRankNormal(3, 1, encoder(9)),
    "mixture": lambda: guides.MixtureOfNormals(2, 3, encoder(12)),
    "autoregressive": lambda: flow("autoregressive"),
    "coupling": lambda: flow("coupling"),
    "spline": lambda: flow("spline"),
    "user": user_density,
    "local": lambda: guides.FullRankNormal(3, num_data=N),
    "shared": lambda: guides.DiagonalNormal(3, shared=True),
}
DISCRETE: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "bernoulli": (lambda: guides.Bernoulli(3, encoder(3)), (3,)),
    "chain": (lambda: guides.AutoregressiveBernoulli(3, 6, encoder(5), context_dim=2), (3,)),
    "categorical": (lambda: guides.Categorical(2, encoder(2)), ()),
}


def random(guide: nn.Module) -> tuple[Any, torch.Tensor]:
    with torch.no_grad():
        for parameter in guide.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide, torch.randn(N, D).double()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("leading", [(), (1,), (K,)])
@pytest.mark.parametrize("family", REAL)
def test_stored_draws_of_another_process_are_scored(family: str, leading: tuple[int, ...]) -> None:
    guide, x = random(REAL[family]())
    z = torch.randn(*leading, N, 3).double()
    guide(x)  # the guide's own last draw is another
    got = log_prob(guide, {"z": z}, x)
    assert got.shape == (*leading, N)
    torch.testing.assert_close(got, guide.distribution(x).log_prob(z), rtol=0, atol=1e-10)


@pytest.mark.parametrize("leading", [(), (K,)])
@pytest.mark.parametrize("family", DISCRETE)
def test_stored_bits_and_classes_are_scored(family: str, leading: tuple[int, ...]) -> None:
    make, event = DISCRETE[family]
    guide, x = random(make())
    z = torch.randint(2, (*leading, N, *event)).double()
    expected = guide.distribution(x).log_prob(z)
    torch.testing.assert_close(log_prob(guide, {"z": z}, x), expected, rtol=0, atol=1e-10)
    if event:
        z[..., 0, 1] = 2  # no bit
        assert log_prob(guide, {"z": z}, x).isneginf().nonzero()[:, -1].eq(0).all()


def hierarchies() -> list[nn.Module]:
    model = HierarchicalGaussian(MLP(2, [6], D), [2, 1], hidden_dims=(6,)).double()
    return [
        guides.BottomUp([2, 1], encoder(4), hidden_dims=(6,)),
        guides.TopDown([2, 1], encoder(3), feature_dim=3, hidden_dims=(6,)),
        guides.Ladder(model, encoder(6)),
    ]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_layers_are_scored_as_the_weights_of_a_pair_say(which: int) -> None:
    """log p(x, z) of standard normals less log q is what `log_weights` makes of the same draws."""
    guide, x = random(hierarchies()[which])
    stored: list[dict[str, torch.Tensor]] = []

    def noting(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            above = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x.new_zeros(D), 1.0).to_event(1), obs=x)
        stored.append({"z": z, "z2": above})

    weights = pyro_lvm.log_weights(noting, guide, x, num_particles=K, seed=0)
    values = stored[-1]
    assert values["z2"].shape == (K, N, 1)
    log_q = log_prob(guide, values, x)
    standard = -0.5 * torch.cat([values["z"], values["z2"], x.expand(K, N, D)], -1).square().sum(-1)
    torch.testing.assert_close(weights, standard - 3 * torch.tensor(2 * torch.pi).double().log() - log_q)
    one = {name: value[2] for name, value in values.items()}
    torch.testing.assert_close(log_prob(guide, one, x), log_q[2], rtol=0, atol=1e-10)


def test_plain_functions_with_control_flow_over_one_draw() -> None:
    def guide(x: torch.Tensor, shift: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(shift, 1.0))
            scale = 2.0 if float(a.sum()) > 0 else 1.0  # which a batch of particles would decide once for all
            pyro.sample("b", dist.Normal(a, scale))

    x, shift = torch.zeros(N, D).double(), torch.randn(N).double()
    a, b = torch.randn(2, K, N).double()
    got = log_prob(guide, {"a": a, "b": b}, x, shift, vectorize=False)
    scale = 1.0 + (a.sum(-1, keepdim=True) > 0).double()
    expected = dist.Normal(shift, 1.0).log_prob(a) + dist.Normal(a, scale).log_prob(b)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    total = log_prob(guide, {"a": a, "b": b}, x, shift, data_plate=None, vectorize=False)
    torch.testing.assert_close(total, expected.sum(-1, keepdim=True), rtol=0, atol=1e-10)


def test_auto_guides_are_scored_at_their_auxiliary_draws() -> None:
    """The site of the model is a Delta at these, which may be left out."""
    model, x = LinearGaussian(2, D), torch.randn(N, D)
    guide = AutoNormal(model)
    guide(x)
    z = torch.randn(N, 2)
    got = log_prob(guide, {"z_unconstrained": z}, x)
    expected = dist.Normal(guide.locs.z, guide.scales.z).to_event(1).log_prob(z)
    torch.testing.assert_close(got, expected)


def test_gradients_reach_guide_and_values_in_eval_mode() -> None:
    guide, x = random(guides.DiagonalNormal(3, nn.Sequential(nn.Linear(D, 6), nn.Dropout(0.5)), site="w"))
    z = torch.randn(K, N, 3).double().requires_grad_()
    got = log_prob(guide, {"w": z}, x)
    torch.testing.assert_close(got, log_prob(guide, {"w": z}, x), rtol=0, atol=0)
    assert guide.training
    got.sum().backward()
    assert z.grad is not None
    assert all(parameter.grad is not None for parameter in guide.parameters())
    assert not pyro.get_param_store().keys()  # nothing is left there


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(N, D)
    guide = guides.BottomUp([2, 1], encoder(4))
    z, above = torch.zeros(N, 2), torch.zeros(N, 1)
    with pytest.raises(SiteError, match=r"values: expected .* latent sites \['z', 'z2'\], got no \['z2'\]"):
        log_prob(guide, {"z": z}, x)
    with pytest.raises(SiteError, match=r"got \['w'\], which the guide does not sample"):
        log_prob(guide, {"z": z, "z2": above, "w": z}, x)
    with pytest.raises(ShapeError, match=r"values\['z2'\]: expected shape \(4, 1\) or \(K, 4, 1\), got \(4, 2\)"):
        log_prob(guide, {"z": z, "z2": z}, x)
    with pytest.raises(ShapeError, match=r"values\['z'\]: .* got \(4, 2\)"):
        log_prob(guide, {"z": z, "z2": above.expand(K, N, 1)}, x)
    with pytest.raises(ShapeError, match=r"values\['z'\]: .* got \(2, 4, 2\)"):
        log_prob(guide, {"z": z.expand(2, N, 2), "z2": above.expand(K, N, 1)}, x)
    with pytest.raises(PlateError, match=r"guide: expected one plate of size 4 around all its sites, got \['data'\]"):
        log_prob(guide, {"z": z, "z2": above}, x, data_plate="rows")

    def bare(x: torch.Tensor) -> None:
        pyro.sample("z", dist.Normal(torch.zeros(N, 2), 1.0).to_event(2))

    with pytest.raises(PlateError, match=r"got \[\]. Name it with data_plate="):
        log_prob(bare, {"z": z}, x)
    torch.testing.assert_close(log_prob(bare, {"z": z}, x, data_plate=None), torch.tensor([-7.3515]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("values", [[torch.zeros(N, 2)], torch.zeros(N, 2), {"z": [[0.0, 0.0]] * N}])
def test_values_of_the_wrong_kind_are_named(values: Any) -> None:
    with pytest.raises(DataTypeError, match=r"values.*: expected a (mapping|tensor or an array), got (list|Tensor)"):
        log_prob(guides.DiagonalNormal(2, shared=True), values, torch.zeros(N, D))


def test_arrays_are_taken() -> None:
    guide, x, z = guides.DiagonalNormal(2, shared=True), torch.zeros(N, D), torch.randn(K, N, 2)
    torch.testing.assert_close(log_prob(guide, {"z": z.numpy()}, x), log_prob(guide, {"z": z}, x), rtol=0, atol=0)
