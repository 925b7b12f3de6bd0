"""Which plate holds the data, what is refused, and how programs that were not written for particles are run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_lvm.errors import PlateError, ShapeError, SiteError
from pyro_lvm.evidence import importance
from pyro_lvm.tracing import log_weights
from pyro_lvm.tracing.batch import make_batch
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.probe import probe_pair
from pyro_lvm.tracing.weights import Proposal, weight_table
from tests.references import ORACLES, SIGMA, Pair, data, normal_guide, normal_model, plain, posterior

Program = Callable[..., Any]


def modes(pair: Pair, **options: Any) -> dict[str, Any]:
    result = importance(pair.model, pair.guide, pair.x, *pair.args, num_particles=3, **pair.options, **options)
    torch.testing.assert_close(result.value, pair.log_px, atol=1e-10, rtol=0)
    return result.provenance


# --- which plate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_data", [3, 4, 64])
@pytest.mark.parametrize("num_pixels", [3, 4, 64])
@pytest.mark.parametrize("dims", [(-1, -2), (-2, -1)], ids=str)
def test_a_pixel_plate_of_the_same_size_is_not_the_data(num_data: int, num_pixels: int, dims: tuple[int, int]) -> None:
    data_dim, pixel_dim = dims

    def model(x: torch.Tensor) -> None:
        pixels = pyro.plate("pixels", x.shape[1], dim=pixel_dim)
        with pixels, pyro.plate("data", len(x), dim=data_dim):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x if pixel_dim == -1 else x.T)

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior((x if pixel_dim == -1 else x.T)[..., None])
        pixels = pyro.plate("pixels", x.shape[1], dim=pixel_dim)
        with pixels, pyro.plate("data", len(x), dim=data_dim):
            pyro.sample("z", dist.Normal(loc, scale))

    x = data(num_data, num_pixels)
    provenance = modes(Pair(model, guide, x, posterior(x[..., None])[2].sum(-1)))
    assert provenance["data_plate"] == "data"


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
def test_the_plate_is_found_by_itself(oracle: Callable[[int], Pair]) -> None:
    assert modes(oracle(5))["data_plate"] == "data"


def two_plates(x: torch.Tensor) -> None:
    """Two plates follow the size of x: rows and columns of a matrix that pairs every datum with every other."""
    with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, SIGMA), obs=x[:, None] - x)


def two_plates_guide(x: torch.Tensor) -> None:
    loc, scale, _ = posterior((x[:, None] - x)[..., None])
    with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", len(x), dim=-1):
        pyro.sample("z", dist.Normal(loc, scale))


def test_two_plates_that_follow_the_data_are_ambiguous() -> None:
    with pytest.raises(PlateError, match=r"2 candidates \['rows', 'columns'\](.|\n)*data_plate=(.|\n)*latent 'z'"):
        log_weights(two_plates, two_plates_guide, data(4))


def test_data_coupled_through_the_arguments_is_refused_even_by_name() -> None:
    with pytest.raises(PlateError, match="independent"):
        log_weights(two_plates, two_plates_guide, data(4), data_plate="rows")


def test_no_plate() -> None:
    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, SIGMA).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[:, None])
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    pair = plain(4)
    with pytest.raises(PlateError, match=r"got none.*data_plate=None(.|\n)*no plate"):
        log_weights(model, guide, pair.x)
    table = log_weights(model, guide, pair.x, num_particles=2, data_plate=None)
    torch.testing.assert_close(table, pair.log_px.sum().expand(2, 1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("program", ["model", "guide"])
@pytest.mark.parametrize("num_data", [1, 3, 4, 10])
def test_plate_of_a_fixed_size_unlike_the_data(program: str, num_data: int) -> None:
    def fixed(x: torch.Tensor) -> None:
        with pyro.plate("data", 7):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if program == "model":
                pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    model, guide = (fixed, normal_guide) if program == "model" else (normal_model, fixed)
    with pytest.raises(PlateError, match="7"):
        log_weights(model, guide, data(num_data))


def test_plate_of_a_fixed_size_like_the_data_ties_the_pair_to_them() -> None:
    provenance = modes(ORACLES["conditioned_whole"](5))
    assert provenance["streamed"] == "particles"


def test_plate_that_draws_its_own_subsample() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x[rows])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            loc, scale, _ = posterior(x[rows][:, None])
            pyro.sample("z", dist.Normal(loc, scale))

    with pytest.raises(PlateError, match="subsample="):
        log_weights(model, guide, data(5))


def inner_subsample(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", 4, subsample_size=2, dim=-2) as rows:
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x.new_zeros(4, len(x))[rows])


def joint_subsample(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        pyro.sample("x", dist.Normal(z, SIGMA), obs=x[rows])


@pytest.mark.parametrize(
    ("model", "plate", "options"),
    [(inner_subsample, "pixels", {}), (joint_subsample, "data", {"data_plate": None})],
    ids=["inner", "joint"],
)
def test_a_plate_that_draws_its_rows_has_another_density_in_each_run(
    model: Program, plate: str, options: dict[str, Any]
) -> None:
    def guide(x: torch.Tensor) -> None:
        if options:
            pyro.sample("z", dist.Normal(0.0, 1.0))
        else:
            normal_guide(x)

    with pytest.raises(PlateError, match=rf"model plate '{plate}'.*draws anew in each run.*subsample_size"):
        log_weights(model, guide, data(5), **options)


def test_named_rows_of_an_inner_plate_count() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("pixels", 4, subsample=torch.arange(1), dim=-2):
                pyro.sample("x", dist.Normal(z, SIGMA), obs=x[None])

    x = data(5)
    expected = log_weights(normal_model, normal_guide, x, num_particles=2, seed=0)
    torch.testing.assert_close(log_weights(model, normal_guide, x, num_particles=2, seed=0), expected)


def test_named_plate_that_does_not_exist() -> None:
    with pytest.raises(PlateError, match=r"data_plate='rows'(.|\n)*\['data'\]"):
        log_weights(normal_model, normal_guide, data(3), data_plate="rows")


def test_named_plate_of_another_size() -> None:
    pair = ORACLES["data -2, pixels -1"](5)
    with pytest.raises(PlateError, match=r"expected size 5.*got \[4\]"):
        log_weights(pair.model, pair.guide, pair.x, data_plate="pixels")


# --- sites outside the plate ------------------------------------------------------------------------------------------


def global_model(x: torch.Tensor) -> None:
    shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(shared, SIGMA), obs=x)


def global_guide(x: torch.Tensor) -> None:
    loc, scale, _ = posterior(x)
    pyro.sample("shared", dist.Normal(loc, scale))


class BayesianNet(pyro.nn.PyroModule):
    """The weight is a latent of all data (`PyroSample`)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x: torch.Tensor) -> None:
        weight = self.weight
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(weight, SIGMA), obs=x)


def bayesian_guide(x: torch.Tensor) -> None:
    loc, scale, _ = posterior(x)
    pyro.sample("weight", dist.Normal(loc, scale))


global_pairs = pytest.mark.parametrize(
    ("model", "guide", "site"),
    [(global_model, global_guide, "shared"), (BayesianNet(), bayesian_guide, "weight")],
    ids=["function", "PyroSample"],
)


@global_pairs
@pytest.mark.parametrize("num_data", [1, 4])
def test_a_global_latent_has_no_result_per_datum(model: Program, guide: Program, site: str, num_data: int) -> None:
    with pytest.raises(PlateError, match=rf"(?s)model site '{site}'.*outside.*data_plate=None.*no plate"):
        log_weights(model, guide, data(num_data))


@global_pairs
def test_a_global_latent_has_a_joint_result(model: Program, guide: Program, site: str) -> None:
    x = data(4)
    expected = posterior(x)[2].expand(3, 1)
    for vectorize in ("auto", False):
        table = log_weights(model, guide, x, num_particles=3, data_plate=None, vectorize=vectorize)
        torch.testing.assert_close(table, expected, atol=1e-10, rtol=0)


def test_a_factor_outside_the_plate_is_never_summed_silently() -> None:
    def model(x: torch.Tensor) -> None:
        normal_model(x)
        pyro.factor("penalty", torch.tensor(-3.0))

    with pytest.raises(PlateError, match="penalty"):
        log_weights(model, normal_guide, data(3))


def test_an_observation_outside_the_plate_is_never_summed_silently() -> None:
    def model(x: torch.Tensor) -> None:
        normal_model(x)
        pyro.sample("constant", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(PlateError, match="constant"):
        log_weights(model, normal_guide, data(3))


def test_a_guide_site_outside_the_plate() -> None:
    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[:, None])
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    with pytest.raises(PlateError, match=r"(?s)guide site 'z'.*outside"):
        log_weights(normal_model, guide, data(3))


def test_a_model_without_observations() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(SiteError, match="obs=x"):
        log_weights(model, normal_guide, data(3))


# --- dimensions without a plate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_data", "size"), [(4, 3), (3, 3), (2, 2), (1, 3), (2, 3), (5, 5), (5, 1)])
@pytest.mark.parametrize("program", ["likelihood", "latent", "both"])
def test_a_forgotten_to_event(num_data: int, size: int, program: str) -> None:
    """Also where the batch shape fits by chance, N = D."""

    def event(d: dist.Distribution, site: str) -> dist.Distribution:
        return d if program in (site, "both") else d.to_event(1)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", event(dist.Normal(torch.zeros(len(x), size), 1.0), "latent"))
            pyro.sample("x", event(dist.Normal(z, SIGMA), "likelihood"), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[..., None])
        with pyro.plate("data", len(x)):
            pyro.sample("z", event(dist.Normal(loc, scale), "latent"))

    with pytest.raises(SiteError, match="to_event"):
        log_weights(model, guide, data(num_data, size))


# --- programs that were not written for particles ---------------------------------------------------------------------


def decoder_pair(decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], n: int, *shape: int) -> Pair:
    """z (N, 2), a decoder that reads z[:, 0] in some awkward way, and x ~ N(z_0, SIGMA) for every pixel."""
    event = len(shape)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z, x), SIGMA).to_event(event), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x.flatten(1))
        loc, scale = torch.stack([loc, 0 * loc], -1), torch.stack([scale, 0 * scale + 1], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    x = data(n, *shape)
    return Pair(model, guide, x, posterior(x.flatten(1))[2])


def transposed_convolution() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    net = nn.ConvTranspose2d(2, 1, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        net.weight[0], net.weight[1] = 1.0, 0.0
    return lambda z, x: net(z.view(-1, 2, 1, 1))


@pytest.mark.parametrize(
    ("decode", "shape", "mode"),
    [
        (lambda z, x: z[..., :1].expand(*z.shape[:-1], 3), (3,), "vectorised"),
        (lambda z, x: z.reshape(len(x), -1)[:, :1].expand(-1, 3), (3,), "folded"),
        (lambda z, x: z[:, :1].expand(-1, 3), (3,), "folded"),
        (lambda z, x: z.unsqueeze(-1).repeat(1, 1, 3)[:, 0], (3,), "folded"),
        (transposed_convolution(), (1, 3, 3), "folded"),
        (lambda z, x: z.view(z.size(0), 1, 1, 2)[..., :1].expand(-1, 1, 3, 2), (1, 3, 2), "folded"),
        (lambda z, x: torch.stack([z[i, :1].expand(3) for i in range(len(x))]), (3,), "folded"),
    ],
    ids=["plain", "reshape", "index", "repeat", "convolution", "view", "loop over data"],
)
@pytest.mark.parametrize("num_data", [1, 2, 3, 6])
def test_decoders_are_run_as_they_need_it(decode: Any, shape: tuple[int, ...], mode: str, num_data: int) -> None:
    provenance = modes(decoder_pair(decode, num_data, *shape))
    assert provenance["particles"]["model"] == mode or num_data == 1


@pytest.mark.parametrize("num_data", [1, 2, 3, 6])
def test_an_encoder_that_reshapes_is_folded(num_data: int) -> None:
    """z2 given z1 in the guide, with a reshape by `len(x)` that particles would upset."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            first = pyro.sample("z1", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            second = pyro.sample("z2", dist.Normal(first, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(second, 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            second = pyro.sample("z2", dist.Normal(2 * x / 3, (2 / 3) ** 0.5).to_event(1))
            mean = second.reshape(len(x), -1)[:, :2] / 2
            pyro.sample("z1", dist.Normal(mean, 0.5**0.5).to_event(1))

    x = data(num_data, 2)
    log_px = dist.Normal(0.0, torch.tensor(3.0, dtype=torch.float64).sqrt()).log_prob(x).sum(-1)
    modes(Pair(model, guide, x, log_px))


def branching_model(x: torch.Tensor) -> None:
    """Python looks at the latent: x ~ N(|z|, SIGMA), one datum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z if z > 0 else -z
        pyro.sample("x", dist.Normal(loc, SIGMA), obs=x)


def branching_guide(x: torch.Tensor) -> None:
    """The posterior: a mixture of two normals, mirrored and cut at zero; here the proposal is the prior."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))


@pytest.mark.parametrize("vectorize", ["auto", False])
def test_python_control_flow_takes_its_own_branch_for_each_particle(vectorize: Any) -> None:
    x, drawn = data(1), []

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            drawn.append(pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)])))

    table = log_weights(branching_model, guide, x, num_particles=40, vectorize=vectorize, seed=0)
    loc = torch.cat(drawn[-40:]) if vectorize is False else None
    if loc is None:
        assert len(table.unique()) == 40
    else:
        torch.testing.assert_close(table[:, 0], dist.Normal(loc.abs(), SIGMA).log_prob(x))


def test_a_branch_on_all_particles_of_a_single_datum_is_looped() -> None:
    """There are no other data that it could couple, and few particles may all lie on one side."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA if z.mean() > 0 else 2 * SIGMA), obs=x)

    for x in torch.linspace(-0.5, 0.5, 5, dtype=torch.float64):  # whose posterior has less or more on one side
        with validation(False), evaluation_rng(0):
            plan = probe_pair(model, normal_guide, make_batch(x[None], ()))
        assert plan.model_mode == "looped"


def test_python_control_flow_on_a_sum_couples_the_data() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z if z.sum() > 0 else -z
            pyro.sample("x", dist.Normal(loc, SIGMA), obs=x)

    with pytest.raises(PlateError, match="independent"):
        log_weights(model, branching_guide, data(6), vectorize=False)


# --- data that know of each other -------------------------------------------------------------------------------------


class Whitening(nn.Module):
    """Batch normalisation that ignores eval mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-2, keepdim=True)


def coupled_model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), SIGMA), obs=x)


def coupled_data_model(x: torch.Tensor) -> None:
    normal_model(x - x.mean())


def neighbour_model(x: torch.Tensor) -> None:
    normal_model(x + 0.1 * x.roll(1))


def coupled_guide(x: torch.Tensor) -> None:
    normal_guide(x - x.mean())


def always_training_guide(x: torch.Tensor) -> None:
    norm = nn.BatchNorm1d(1, dtype=torch.float64)
    norm.forward(x[:, None])
    normal_guide(nn.functional.batch_norm(x[:, None], None, None, training=True)[:, 0])


@pytest.mark.parametrize("vectorize", ["auto", False])
@pytest.mark.parametrize("num_data", [2, 3, 5])
@pytest.mark.parametrize(
    ("model", "guide", "program"),
    [
        (coupled_model, normal_guide, "model"),
        (coupled_data_model, normal_guide, "model"),
        (neighbour_model, normal_guide, "model"),
        (normal_model, coupled_guide, "guide"),
    ],
    ids=["latents", "data", "neighbour", "guide"],
)
def test_coupled_data_are_refused(model: Program, guide: Program, program: str, num_data: int, vectorize: Any) -> None:
    with pytest.raises(PlateError, match=rf"{program}: expected data that are independent.*data_plate=None"):
        log_weights(model, guide, data(num_data), vectorize=vectorize)


def test_sharp_densities_are_not_taken_for_coupled_data() -> None:
    """Many pixels make a narrow posterior, in whose units the last digit of a location is not small."""
    torch.manual_seed(0)
    decoder, noise = torch.randn(784).double(), 0.05
    x = torch.randn(5, 1).double() * decoder + noise * torch.randn(5, 784).double()
    precision = 1 + decoder.square().sum() / noise**2

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * decoder, noise).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ decoder / noise**2 / precision, precision**-0.5))

    result = importance(model, guide, x, num_particles=10, seed=0)
    covariance = torch.outer(decoder, decoder) + noise**2 * torch.eye(784).double()
    exact = dist.MultivariateNormal(torch.zeros(784).double(), covariance).log_prob(x)
    torch.testing.assert_close(result.value, exact, rtol=0, atol=1e-6)


def test_coupled_data_have_a_joint_result() -> None:
    x = data(4)
    table = log_weights(coupled_data_model, coupled_guide, x, num_particles=2, data_plate=None)
    expected = posterior((x - x.mean())[:, None])[2].sum()
    torch.testing.assert_close(table, expected.expand(2, 1), atol=1e-10, rtol=0)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data_args", "args", "message"),
    [
        ((1,), (torch.zeros(3),), r"data_args.*argument 1.*got none"),
        ((0,), (torch.zeros(2),), r"argument 0 to have 3 rows, got \(2,\)"),
        ((0,), (5,), r"argument 0 .*got none"),
        ((-1,), (torch.zeros(3),), r"data_args"),
    ],
)
def test_data_args_that_have_no_rows(data_args: tuple[int, ...], args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        log_weights(normal_model, normal_guide, data(3), *args, data_args=data_args)


# --- the three ways of running particles ------------------------------------------------------------------------------

RUNS: list[tuple[Any, Any]] = [
    ("folded", "folded"),
    ("folded", "looped"),
    ("looped", "folded"),
    ("vectorised", "looped"),
]
FOLDABLE = {name: oracle for name, oracle in ORACLES.items() if name not in ("sequential_data", "conditioned_whole")}


@pytest.mark.parametrize("oracle", FOLDABLE.values(), ids=FOLDABLE)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_all_ways_of_running_particles_agree(oracle: Callable[[int], Pair], run: tuple[Any, Any]) -> None:
    """Forced on pairs that would not need them: plates on either side of the data, masks, two latents."""
    pair = oracle(4)
    batch = make_batch(pair.x, pair.args, pair.options.get("data_args", "auto"))
    guide_mode, model_mode = run
    plan = replace(probe_pair(pair.model, pair.guide, batch), guide_mode=guide_mode, model_mode=model_mode)
    with torch.no_grad(), validation(False):
        table = weight_table(plan, pair.model, Proposal(plan, pair.guide, batch), 3).total
    torch.testing.assert_close(table, pair.log_px.expand(3, -1), atol=1e-10, rtol=0)
