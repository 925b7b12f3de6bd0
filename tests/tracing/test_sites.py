"""How the sites of a guide fit those of its model: what works, what is enumerated, what is refused."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide

from pyro_lvm.errors import DataTypeError, ParameterError, PlateError, ShapeError, SiteError, SupportError
from pyro_lvm.evidence import importance
from pyro_lvm.tracing import log_weights
from tests.references import SIGMA, data, normal_guide, normal_model, posterior

Program = Callable[..., Any]


def in_plate(*names: str, site: str = "z") -> Program:
    """A guide that draws each of these sites from N(0, 1)."""

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name in names or (site,):
                pyro.sample(name, dist.Normal(0.0, 1.0))

    return guide


def two_latents(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        first = pyro.sample("intensity", dist.Normal(0.0, 1.0))
        second = pyro.sample("colour", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(first + second, 1.0), obs=x)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (in_plate("intensity"), r"without 'colour'"),
        (in_plate("intensity", "color"), r"'color'.*Did you mean 'colour'"),
        (in_plate("intensity", "colour", "q"), r"guide site 'q'.*model lacks"),
        (in_plate("intensity", "colour", "x"), r"guide site 'x'.*model observes"),
        (in_plate("a", "b"), r"guide site 'a'.*\['intensity', 'colour'\]"),
        (lambda x: None, r"without 'intensity'"),
        (None, r"without 'intensity'"),
    ],
    ids=["missing", "misnamed", "extra", "observed", "all wrong", "empty", "none"],
)
def test_sites_that_do_not_fit_are_named(guide: Program | None, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        log_weights(two_latents, guide, data(3))


def test_a_guide_must_not_observe() -> None:
    def guide(x: torch.Tensor) -> None:
        in_plate("z")(x)
        with pyro.plate("more", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(SiteError, match=r"guide site 'y'.*obs="):
        log_weights(normal_model, guide, data(3))


def test_shapes_of_a_site_that_do_not_agree() -> None:
    """z has an event dimension in the guide and none in the model."""

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(SiteError, match="to_event"):
        log_weights(normal_model, guide, data(3))


@pytest.mark.parametrize("num_data", [2, 3, 5])
def test_an_event_of_the_size_of_the_data_does_not_pass_for_the_data(num_data: int) -> None:
    """z (N, N) in the guide, z (N,) in the model: broadcasting must not hide it."""

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))

    with pytest.raises(SiteError, match="z"):
        log_weights(normal_model, guide, data(num_data))


def sometimes(x: torch.Tensor) -> torch.Tensor:
    """z ~ N(0, 1), and a second latent behind an `if`."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    return pyro.sample("w", dist.Normal(z, 2.0)) if z[0] > 0 else z


@pytest.mark.parametrize("seed", range(6))
def test_a_site_that_only_some_particles_have_is_refused(seed: int) -> None:
    """One run cannot tell which sites there are; a site that the plan does not know must not be drawn twice."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(sometimes(x), SIGMA), obs=x)

    def guide(x: torch.Tensor) -> None:
        shift = 0.1 * seed  # another branch in the first run for another seed
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift - 0.3, 1.0))
            if z[0] > 0:
                pyro.sample("w", dist.Normal(z, 2.0))

    with pytest.raises(SiteError, match="'w'"):
        log_weights(model, guide, data(1), num_particles=30, vectorize=False)


@pytest.mark.parametrize("chunks", [None, (1, 1)], ids=str)
def test_a_latent_that_only_the_model_has_and_only_at_times_is_refused(chunks: tuple[int, int] | None) -> None:
    """A branch so rare that the probe does not see it; drawn from the prior, its density must not be counted."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if z[0] > 1.5:
                z = pyro.sample("w", dist.Normal(z, 2.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    with pytest.raises(SiteError, match="'w'"):
        importance(model, in_plate("z"), data(1), num_particles=200, vectorize=False, chunks=chunks, seed=0)


# --- supports ---------------------------------------------------------------------------------------------------------


def prior_and_proposal(prior: dist.Distribution, proposal: dist.Distribution) -> tuple[Program, Program]:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", proposal)

    return model, guide


normal, three = dist.Normal(0.0, 1.0), torch.ones(3)


@pytest.mark.parametrize(
    ("prior", "proposal"),
    [
        (normal, dist.LogNormal(0.0, 1.0)),
        (normal, dist.Gamma(1.0, 1.0)),
        (normal, dist.Uniform(-3.0, 3.0)),
        (normal, dist.Uniform(-50.0, 50.0)),
        (normal, dist.HalfNormal(1.0)),
        (dist.Normal(8.0, 0.1), dist.Gamma(1.0, 1.0)),
        (dist.HalfNormal(1.0), dist.Uniform(0.0, 2.0)),
        (dist.Gamma(2.0, 1.0), dist.Beta(1.0, 1.0)),
        (dist.Uniform(0.0, 1.0), dist.Uniform(0.1, 1.0)),
        (dist.Uniform(0.0, 1.0), dist.Uniform(0.0, 0.999)),
        (dist.Categorical(torch.ones(4)), dist.Categorical(three)),
        (dist.Categorical(torch.ones(100)), dist.Categorical(torch.ones(99))),
        (dist.Poisson(0.01), dist.Bernoulli(0.5)),
        (dist.Poisson(3.0), dist.Categorical(torch.ones(30))),
        (dist.Binomial(10, 0.5), dist.Binomial(9, 0.5)),
        (dist.Normal(three, 1.0).to_event(1), dist.LogNormal(three, 1.0).to_event(1)),
        (dist.Normal(three, 1.0).to_event(1), dist.Dirichlet(three)),
        (dist.Pareto(1.0, 1.0), dist.Pareto(1.5, 1.0)),
        (normal, dist.TransformedDistribution(normal, [dist.transforms.ExpTransform()])),
        (normal, dist.TransformedDistribution(normal, [dist.transforms.SigmoidTransform()])),
        (normal, dist.Delta(torch.tensor(0.0))),
    ],
    ids=lambda d: str(d)[:40],
)
def test_a_guide_narrower_than_the_prior_is_refused(prior: dist.Distribution, proposal: dist.Distribution) -> None:
    with pytest.raises(SupportError, match="guide site 'z'"):
        log_weights(*prior_and_proposal(prior, proposal), data(2))


@pytest.mark.parametrize(
    ("prior", "proposal"),
    [
        (normal, dist.StudentT(3.0)),
        (normal, dist.Laplace(0.0, 1.0)),
        (dist.Gamma(2.0, 2.0), dist.LogNormal(0.0, 1.0)),
        (dist.HalfNormal(1.0), dist.Exponential(1.0)),
        (dist.Uniform(0.0, 1.0), dist.Beta(1.0, 1.0)),
        (dist.Beta(2.0, 2.0), dist.Uniform(0.0, 1.0)),
        (dist.Beta(2.0, 2.0), dist.TransformedDistribution(normal, [dist.transforms.SigmoidTransform()])),
        (dist.Categorical(three), dist.Categorical(torch.tensor([0.2, 0.3, 0.5]))),
        (dist.Bernoulli(0.3), dist.Bernoulli(0.6)),
        (dist.Binomial(1, 0.3), dist.Bernoulli(0.6)),
        (dist.Dirichlet(three), dist.Dirichlet(2 * three)),
        (dist.OneHotCategorical(three), dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5]))),
        (dist.VonMises(0.0, 1.0), dist.VonMises(0.1, 0.5)),
        (dist.MultivariateNormal(three, torch.eye(3)), dist.Normal(three, 1.0).to_event(1)),
        (dist.Normal(three, 1.0).to_event(1), dist.MultivariateNormal(three, torch.eye(3))),
        (dist.Poisson(2.0), dist.Poisson(3.0)),
        (dist.Geometric(0.5), dist.Poisson(3.0)),
        (dist.LKJCholesky(3, torch.tensor(1.0)), dist.LKJCholesky(3, torch.tensor(2.0))),
    ],
    ids=lambda d: str(d)[:40],
)
def test_a_guide_as_wide_as_the_prior_is_accepted(prior: dist.Distribution, proposal: dist.Distribution) -> None:
    table = log_weights(*prior_and_proposal(prior, proposal), data(2), num_particles=3)
    assert table.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_grey_pixels_under_a_bernoulli(masked: bool) -> None:
    """Row 4 is the first that is neither 0 nor 1; a masked pixel does not count."""
    x = torch.tensor([[0.0, 1.0]]).repeat(6, 1)
    x[4:, 0] = 0.5
    seen = torch.ones_like(x).bool()
    seen[:, 0] = not masked

    def model(x: torch.Tensor, seen: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logits = z[..., None].expand(*z.shape, 2)
            likelihood = dist.Bernoulli(logits=logits, validate_args=False)
            with poutine.mask(mask=True):
                pyro.sample("x", likelihood.mask(seen).to_event(1), obs=x)

    def guide(x: torch.Tensor, seen: torch.Tensor) -> None:
        in_plate("z")(x)

    if masked:
        assert log_weights(model, guide, x, seen).isfinite().all()
    else:
        for function in (log_weights, importance):
            with pytest.raises(SupportError, match=r"(?s)'x'.*2 of 6 data, the first of them row 4.*binarise"):
                function(model, guide, x, seen)


@pytest.mark.parametrize("chunks", [None, (2, 1)])
def test_the_row_outside_the_support_is_counted_from_the_start_of_the_data(chunks: tuple[int, int] | None) -> None:
    x = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, -1.0, 6.0])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Exponential(z), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.0, 1.0))

    with pytest.raises(SupportError, match="the first of them row 5"):
        importance(model, guide, x, num_particles=2, chunks=chunks)


# --- parameters and data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("program", ["model", "guide"])
@pytest.mark.parametrize("kind", ["param", "module"])
def test_a_parameter_that_is_not_finite(value: float, program: str, kind: str) -> None:
    net = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(net.weight, value)
    pyro.param("bad", torch.tensor(value))

    def read(x: torch.Tensor) -> torch.Tensor:
        if kind == "param":
            return 0.0 * pyro.param("bad") + x
        pyro.module("bad", net)
        return net(x[:, None])[:, 0]

    def model(x: torch.Tensor) -> None:
        normal_model(read(x) if program == "model" else x)

    def guide(x: torch.Tensor) -> None:
        normal_guide(read(x) if program == "guide" else x)

    with pytest.raises(ParameterError, match="bad"):
        log_weights(model, guide, data(3).float())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.full((3,), torch.nan), ShapeError, "nothing but NaN"),
        (torch.empty(0), ShapeError, r"\(0,\)"),
        (torch.tensor(1.0), ShapeError, r"\(\)"),
        ([1.0, 2.0], DataTypeError, "list"),
        ("x", DataTypeError, "str"),
        (None, DataTypeError, "NoneType"),
        (torch.zeros(3, dtype=torch.complex64), DataTypeError, "complex"),
    ],
    ids=["nan", "empty", "scalar", "list", "string", "none", "complex"],
)
@pytest.mark.parametrize("function", [log_weights, importance])
def test_x_that_is_no_data(function: Program, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^x: .*{message}"):
        function(normal_model, normal_guide, x)


@pytest.mark.parametrize(
    ("num_particles", "error"),
    [(0, ShapeError), (-1, ShapeError), (1.5, DataTypeError), (True, DataTypeError), ("3", DataTypeError)],
)
@pytest.mark.parametrize("function", [log_weights, importance])
def test_num_particles_that_is_no_count(function: Program, num_particles: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="num_particles"):
        function(normal_model, normal_guide, data(3), num_particles=num_particles)


class UserError(RuntimeError):
    pass


@pytest.mark.parametrize("program", ["model", "guide"])
@pytest.mark.parametrize("function", [log_weights, importance])
def test_an_exception_of_the_user_passes_unchanged(function: Program, program: str) -> None:
    def broken(x: torch.Tensor) -> None:
        raise UserError("mine")

    model, guide = (broken, normal_guide) if program == "model" else (normal_model, broken)
    with pytest.raises(UserError, match="^mine$"):
        function(model, guide, data(3))


def test_an_exception_on_a_later_chunk_passes_unchanged() -> None:
    def model(x: torch.Tensor) -> None:
        if float(x[-1]) == 7.0:
            raise UserError("mine")
        normal_model(x)

    x = torch.cat([data(20), torch.tensor([7.0])])
    with pytest.raises(UserError, match="^mine$"):
        importance(model, normal_guide, x, num_particles=2, chunks=(4, 2))


# --- enumeration ------------------------------------------------------------------------------------------------------


def test_too_many_values_to_enumerate() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            bits = [pyro.sample(f"b{i}", dist.Bernoulli(0.5)) for i in range(13)]
            pyro.sample("x", dist.Normal(sum(bits), 1.0), obs=x)

    with pytest.raises(SiteError, match=r"8192 joint values, more than the 4096.*Sample them in the guide"):
        log_weights(model, None, data(2))


def test_a_discrete_site_without_finite_support() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            count = pyro.sample("count", dist.Poisson(2.0))
            pyro.sample("x", dist.Normal(count, 1.0), obs=x)

    with pytest.raises(SiteError, match="without 'count'"):
        log_weights(model, None, data(2))


def test_vectors_of_bits_are_refused_by_size() -> None:
    """20 independent bits as one event have 2^20 values, whatever one element of it has."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            bits = pyro.sample("bits", dist.Bernoulli(0.5 * torch.ones(20)).to_event(1))
            pyro.sample("x", dist.Normal(bits.sum(-1), 1.0), obs=x)

    with pytest.raises(SiteError, match="bits"):
        log_weights(model, None, data(2))


@pytest.mark.parametrize("num_data", [1, 4])
def test_short_vectors_of_bits_are_enumerated_or_refused(num_data: int) -> None:
    """3 bits: 8 joint values. Summing elements apart would be wrong where the likelihood couples them."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            bits = pyro.sample("bits", dist.Bernoulli(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)).to_event(1))
            pyro.sample("x", dist.Normal(bits.sum(-1), SIGMA), obs=x)

    x = data(num_data)
    values = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
    prior = dist.Bernoulli(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)).log_prob(values).sum(-1)
    expected = (dist.Normal(values.sum(-1), SIGMA).log_prob(x[:, None]) + prior).logsumexp(-1)
    try:
        table = log_weights(model, None, x)
    except SiteError:
        return
    torch.testing.assert_close(table[0], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("vectorize", ["auto", False])
def test_enumeration_of_a_masked_datum(vectorize: Any) -> None:
    weights, means = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([-1.0, 1.0], dtype=torch.float64)

    def model(x: torch.Tensor, seen: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)

    x, seen = data(4), torch.tensor([True, False, True, False])
    expected = (dist.Normal(means, 1.0).log_prob(x[:, None]) + weights.log()).logsumexp(-1) * seen
    table = log_weights(model, None, x, seen, vectorize=vectorize)
    torch.testing.assert_close(table[0], expected, atol=1e-10, rtol=0)


def test_enumeration_under_scales_ignores_them() -> None:
    weights, means = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([-1.0, 1.0], dtype=torch.float64)

    @poutine.scale(scale=3.0)
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 100, subsample=torch.arange(len(x))):
            c = pyro.sample("c", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)

    x = data(4)
    expected = (dist.Normal(means, 1.0).log_prob(x[:, None]) + weights.log()).logsumexp(-1)
    torch.testing.assert_close(log_weights(model, None, x)[0], expected, atol=1e-10, rtol=0)


def test_a_global_component_is_enumerated_jointly() -> None:
    """One component for all data: no result per datum, and a joint one that is no sum over data."""
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64)

    def model(x: torch.Tensor) -> None:
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)

    x = data(4)
    with pytest.raises(PlateError, match="'c'"):
        log_weights(model, None, x)
    expected = torch.logsumexp(
        dist.Normal(means, 1.0).log_prob(x[:, None]).sum(0) + torch.tensor([0.3, 0.7], dtype=torch.float64).log(), 0
    )
    table = log_weights(model, None, x, data_plate=None)
    torch.testing.assert_close(table, expected.reshape(1, 1), atol=1e-10, rtol=0)


def test_a_markov_chain_is_enumerated_or_refused() -> None:
    """Three steps of a two-state hidden Markov model with `pyro.markov`, against enumeration by hand."""
    start = torch.tensor([0.6, 0.4], dtype=torch.float64)
    step = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            state = None
            for t in pyro.markov(range(x.shape[1])):
                probs = start if state is None else step[state]
                state = pyro.sample(f"s{t}", dist.Categorical(probs))
                pyro.sample(f"x{t}", dist.Normal(means[state], 1.0), obs=x[:, t])

    x = data(4, 3)
    forward = start.log() + dist.Normal(means, 1.0).log_prob(x[:, :1])
    for t in (1, 2):
        forward = (forward[..., None] + step.log()).logsumexp(-2) + dist.Normal(means, 1.0).log_prob(x[:, t : t + 1])
    try:
        table = log_weights(model, None, x)
    except SiteError:
        return
    torch.testing.assert_close(table[0], forward.logsumexp(-1), atol=1e-10, rtol=0)


# --- auxiliary guide sites --------------------------------------------------------------------------------------------


def auxiliary_guide(x: torch.Tensor) -> None:
    """z given an auxiliary variable, without a density of that variable given z."""
    with pyro.plate("data", len(x)):
        aux = pyro.sample("aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(aux, 1.0))


def many_to_one_guide(x: torch.Tensor) -> None:
    """Two auxiliary numbers make one latent: the density of the pair is not the density of z."""
    with pyro.plate("data", len(x)):
        aux = pyro.sample("aux", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(aux.sum(-1)))


def unrelated_guide(x: torch.Tensor) -> None:
    """An auxiliary draw that a point mass beside it ignores."""
    with pyro.plate("data", len(x)):
        pyro.sample("aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(torch.zeros(len(x))))


def without_jacobian_guide(x: torch.Tensor) -> None:
    """z = loc + aux / 2 has twice the density of aux, which the Delta does not say."""
    loc, _, _ = posterior(x[:, None])
    with pyro.plate("data", len(x)):
        aux = pyro.sample("aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(loc + aux / 2))


@pytest.mark.parametrize("guide", [auxiliary_guide, many_to_one_guide, unrelated_guide, without_jacobian_guide])
def test_auxiliary_sites_that_do_not_determine_a_latent(guide: Program) -> None:
    with pytest.raises((SiteError, SupportError), match="aux|'z'"):
        log_weights(normal_model, guide, data(3))


def test_an_auxiliary_change_of_variables_is_exact() -> None:
    """z = loc + scale * aux with log |dz/daux| = log scale: weights are the evidence."""

    def guide(x: torch.Tensor) -> None:
        loc, scale, _ = posterior(x[:, None])
        with pyro.plate("data", len(x)):
            aux = pyro.sample("aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(loc + scale * aux, log_density=-scale.log()))

    x = data(4)
    table = log_weights(normal_model, guide, x, num_particles=3)
    torch.testing.assert_close(table, posterior(x[:, None])[2].expand(3, -1), atol=1e-6, rtol=0)


# --- normalising flows ------------------------------------------------------------------------------------------------

FLOWS = ["spline", "affine_autoregressive", "affine_coupling", "householder", "neural_autoregressive"]
#: Pyro can score a draw of these, which it remembers, but no stored value. (`block_autoregressive` is left out: its
#: range is bounded, whatever its support says.)
FLOWS += ["planar", "radial", "sylvester", "polynomial"]


@pytest.mark.statistical
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.filterwarnings("ignore::pyro_lvm.errors.UnreliableEstimateWarning")
def test_every_flow_of_pyro_is_a_guide(flow: str) -> None:
    """An amortised flow at its initial values: the mean weight is p(x)."""
    pyro.set_rng_seed(0)
    transform = getattr(dist.transforms, flow)(2)

    def guide(x: torch.Tensor) -> None:
        if isinstance(transform, torch.nn.Module):
            pyro.module("flow", transform)
        base = dist.Normal(0.1 * x, 1.5).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [transform]))

    x = data(4, 2).float()
    w = log_weights(event_model, guide, x, num_particles=5000, seed=0).double().exp()
    assert ((w.mean(0) - event_evidence(x).exp()).abs() < 5 * w.std(0) / 5000**0.5).all()


# --- every AutoGuide of Pyro ------------------------------------------------------------------------------------------

wide = {"init_scale": 1.0, "init_loc_fn": autoguide.init_to_mean}
JOINT = {
    "diagonal": partial(autoguide.AutoDiagonalNormal, **wide),
    "multivariate": partial(autoguide.AutoMultivariateNormal, **wide),
    "low rank": partial(autoguide.AutoLowRankMultivariateNormal, **wide),
    "iaf": autoguide.AutoIAFNormal,
    "flow": partial(autoguide.AutoNormalizingFlow, init_transform_fn=dist.transforms.affine_autoregressive),
    "structured": partial(autoguide.AutoStructured, conditionals={"z": "normal"}, **wide),
}
NOISE = 3.0  # so large that a standard normal is a good proposal, whatever x is


def event_model(x: torch.Tensor) -> None:
    """z (N, 2), so that autoregressive flows have something to do."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)


def event_evidence(x: torch.Tensor) -> torch.Tensor:
    return dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(x).sum(-1)


def ready(guide: Any, x: torch.Tensor) -> Any:
    """With its parameters made."""
    pyro.set_rng_seed(0)
    guide(x)
    return guide


joint_guides = pytest.mark.parametrize("make", JOINT.values(), ids=JOINT)


@joint_guides
def test_joint_auto_guides_have_no_result_per_datum(make: Program) -> None:
    x = data(3, 2).float()
    with pytest.raises(PlateError, match=r"(?s)data_plate=None.*AutoNormal"):
        log_weights(event_model, ready(make(event_model), x), x)


@joint_guides
@pytest.mark.statistical
def test_joint_auto_guides_have_a_joint_result(make: Program) -> None:
    """Within five standard errors of log p(x) of all data, closed form."""
    x = data(2, 2).float()
    result = importance(event_model, ready(make(event_model), x), x, num_particles=5000, data_plate=None, seed=0)
    assert result.value.shape == (1,)
    assert (result.value - event_evidence(x).sum()).abs() < 5 * result.stderr


auto_normal = partial(autoguide.AutoNormal, **wide)


@pytest.mark.statistical
@pytest.mark.parametrize("make", [auto_normal, lambda model: guide_list(model, auto_normal)], ids=["normal", "list"])
@pytest.mark.parametrize("num_data", [1, 2, 6])
def test_auto_normal_has_results_per_datum_and_is_tied_to_the_data(make: Program, num_data: int) -> None:
    x = data(num_data, 2).float()
    guide = ready(make(event_model), x)
    result = importance(event_model, guide, x, num_particles=20_000, chunks=(2, 5000), seed=0)
    assert ((result.value - event_evidence(x)).abs() < 5 * result.stderr).all()
    if num_data > 2:
        assert result.provenance["streamed"] == "particles"


def guide_list(model: Program, make: Program) -> autoguide.AutoGuideList:
    guides = autoguide.AutoGuideList(model)
    guides.append(make(poutine.block(model, expose=["z"])))
    return guides


@pytest.mark.parametrize("make", [autoguide.AutoDelta, lambda model: guide_list(model, autoguide.AutoDelta)])
def test_point_masses_are_refused(make: Program) -> None:
    x = data(3, 2).float()
    with pytest.raises(SupportError, match="point mass"):
        log_weights(event_model, ready(make(event_model), x), x)


def test_a_point_mass_beside_a_density_is_refused() -> None:
    """AutoNormal for one latent, AutoDelta for the other: the second has no density."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    x = data(3).float()
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["z"])))
    guide.append(autoguide.AutoDelta(poutine.block(model, expose=["w"])))
    with pytest.raises(SupportError, match="(?s)'w'.*point mass"):
        log_weights(model, ready(guide, x), x)


@pytest.mark.statistical
@pytest.mark.parametrize(
    "prior",
    [dist.Gamma(3.0, 2.0), dist.Uniform(0.5, 2.0), dist.Dirichlet(2 * torch.ones(3)), dist.Beta(2.0, 3.0)],
    ids=lambda d: type(d).__name__,
)
def test_auto_normal_transforms_to_the_support_of_the_prior(prior: dist.Distribution) -> None:
    """p(x) = N(x; 0, 1) whatever z is; a Dirichlet has one dimension less than its values."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(0 * (z.sum(-1) if prior.event_dim else z), 1.0), obs=x)

    x = data(3).float()
    guide = ready(auto_normal(model), x)
    w = log_weights(model, guide, x, num_particles=20_000, seed=0).double().exp()
    error = (w.mean(0) - dist.Normal(0.0, 1.0).log_prob(x).exp()).abs()
    assert (error < 5 * w.std(0) / 20_000**0.5).all()


@pytest.mark.parametrize("num_data", [2, 3, 5])
def test_a_local_guide_of_a_latent_that_the_likelihood_ignores_is_tied_to_the_data(num_data: int) -> None:
    """Nothing in the model shows that the guide has a row for each datum and no other."""
    model, _ = prior_and_proposal(normal, normal)
    x = data(num_data).float()
    guide = ready(auto_normal(model), x)  # N(0, 1), the posterior
    result = importance(model, guide, x, num_particles=3, chunks=(2, 2))
    torch.testing.assert_close(result.value, normal.log_prob(x).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("data_plate", ["auto", None])
def test_auto_laplace_before_its_approximation_is_a_point_mass(data_plate: str | None) -> None:
    x = data(3, 2).float()
    guide = ready(autoguide.AutoLaplaceApproximation(event_model), x)
    with pytest.raises(SupportError, match="point mass"):
        log_weights(event_model, guide, x, data_plate=data_plate)


def test_auto_discrete_parallel() -> None:
    means = torch.tensor([-1.0, 1.0, 2.0])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)

    x = data(4).float()
    guide = ready(autoguide.AutoDiscreteParallel(model), x)
    result = importance(model, guide, x, num_particles=20_000, seed=0)
    expected = (dist.Normal(means, 1.0).log_prob(x[:, None])).logsumexp(-1) - torch.tensor(3.0).log()
    assert ((result.value - expected).abs() < 5 * result.stderr + 1e-4).all()


def test_auto_callable_is_its_function() -> None:
    x = data(4)
    table = log_weights(normal_model, autoguide.AutoCallable(normal_model, normal_guide), x, num_particles=2)
    torch.testing.assert_close(table, posterior(x[:, None])[2].expand(2, -1), atol=1e-10, rtol=0)


def test_an_auto_guide_on_data_of_another_size_is_refused() -> None:
    """AutoNormal has a row of parameters for each training datum: rows of other data have none."""
    guide = ready(autoguide.AutoNormal(normal_model), data(5).float())
    with pytest.raises(PlateError, match="5"):
        log_weights(normal_model, guide, data(3).float())


@pytest.mark.statistical
def test_a_guide_messenger_is_a_guide() -> None:
    """It runs its model inside; 5 standard errors of each of 6 data."""
    x = data(6)
    guide = autoguide.AutoNormalMessenger(normal_model, init_scale=1.0)
    guide(x)
    result = importance(normal_model, guide, x, num_particles=4000, seed=0)
    assert bool(((result.value - posterior(x[:, None])[2]).abs() <= 5 * result.stderr).all())


# --- shapes and spreads -----------------------------------------------------------------------------------------------


def plane(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), SIGMA), obs=x)


@pytest.mark.parametrize("size", [1, 3])
def test_a_guide_whose_draw_would_be_broadcast(size: int) -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(size), 1.0).to_event(1))

    with pytest.raises(SiteError, match=rf"guide site 'z'.*shape \(3, 2\).*got \(3, {size}\)"):
        importance(plane, guide, data(3))


def test_one_draw_for_all_data_is_no_joint_guide() -> None:
    def guide(x: torch.Tensor) -> None:
        pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    with pytest.raises(SiteError, match=r"guide site 'z'.*shape \(3, 2\).*got \(2,\)"):
        importance(plane, guide, data(3), data_plate=None)


def test_an_event_in_the_place_of_an_inner_plate() -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 2, dim=-1):
            pyro.sample("z", dist.Normal(x[:, None] / 4, 0.9))

    def inner(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            with pyro.plate("inner", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), SIGMA), obs=x[:, None])

    x = data(3)
    result = importance(inner, guide, x, num_particles=4000, seed=0)
    exact = dist.Normal(0.0, (2 + SIGMA**2) ** 0.5).log_prob(x)
    assert bool(((result.value - exact).abs() < 5 * result.stderr).all())


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-9), (torch.float64, 1e-18)], ids=str)
def test_a_scale_that_is_lost_beside_the_mean(dtype: torch.dtype, scale: float) -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, scale))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    with pytest.raises(SupportError, match=rf"guide site 'z'.*{str(dtype)[6:]}.*all alike"):
        importance(model, guide, data(3).to(dtype))


def test_certain_bits_are_no_lost_spread() -> None:
    def program(x: torch.Tensor, observe: bool) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_ones(())))
            if observe:
                pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    x = data(3)
    result = importance(partial(program, observe=True), partial(program, observe=False), x)
    torch.testing.assert_close(result.value, dist.Normal(1.0, SIGMA).log_prob(x))


# --- supports that move -----------------------------------------------------------------------------------------------


def within(x: torch.Tensor, observe: bool) -> None:
    """x ~ U(0, z) with z ~ Gamma(2, 1): p(x) is the integral of exp(-z) from x on."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
        if observe:
            pyro.sample("x", dist.Uniform(x.new_zeros(()), z), obs=x)


def test_latents_out_of_reach_of_the_data_weigh_nothing() -> None:
    x = torch.tensor([0.1, 0.5, 1.5, 3.0], dtype=torch.float64)
    result = importance(partial(within, observe=True), partial(within, observe=False), x, num_particles=10_000, seed=0)
    assert bool(((result.value + x).abs() < 5 * result.stderr).all())


def test_data_outside_a_fixed_support_are_refused_beside_it() -> None:
    def model(x: torch.Tensor) -> None:
        within(x, observe=True)
        with pyro.plate("more", len(x)):
            pyro.sample("y", dist.Uniform(x.new_zeros(()), 1.0), obs=x)

    with pytest.raises(SupportError, match=r"'y'.*got 3"):
        importance(model, partial(within, observe=False), torch.tensor([0.5, 3.0]).double(), data_plate=None)
