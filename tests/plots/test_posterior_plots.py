"""`plots.posterior`: what is drawn is p(z | x) and q(z | x), and the numbers in the legend are theirs."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

import pyro_lvm as lvm
from pyro_lvm import plots

# z ~ N(0, 1), x | z ~ N(z, S^2): the posterior is N(x / (1 + S^2), S^2 / (1 + S^2)), and x ~ N(0, 1 + S^2).
S = 0.7


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, S), obs=x)


def gaussian(loc, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_tensor(loc), scale))

    return guide


def exact(x):
    """log p(x), mean and standard deviation of the posterior."""
    return float(dist.Normal(0.0, math.sqrt(1 + S**2)).log_prob(x)), float(x) / (1 + S**2), S / math.sqrt(1 + S**2)


def legend(ax):
    """(log p(x), ELBO, KL) from the legend."""
    text = " ".join(part.get_text() for part in ax.get_legend().get_texts()).replace("\u2212", "-")
    return [float(re.search(rf"{name} = (-?[\d.]+|-?inf)", text)[1]) for name in (r"log p\(x\)", "ELBO", "KL")]


def filled(ax):
    """(z, density) of the filled posterior."""
    vertices = ax.collections[0].get_paths()[0].vertices
    upper = vertices[vertices[:, 1] > 0]
    return upper[:, 0], upper[:, 1]


def box(ax):
    return np.array([ax.get_xlim(), ax.get_ylim()])


@pytest.mark.parametrize("given", [False, True])
def test_both_densities_and_their_numbers(given):
    x, own = torch.tensor([1.3], dtype=torch.float64), Figure().subplots()
    log_p, mean, sd = exact(x)
    ax = plots.posterior(model, gaussian(0.2, 0.9), x, ax=own if given else None)
    assert (ax is own) is given
    z, density = filled(ax)
    expected = np.exp(-0.5 * ((z - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(density, expected, rtol=1e-9)
    z, q = ax.lines[0].get_data()
    np.testing.assert_allclose(q, np.exp(-0.5 * ((z - 0.2) / 0.9) ** 2) / (0.9 * math.sqrt(2 * math.pi)), rtol=1e-9)
    kl = math.log(sd / 0.9) + (0.9**2 + (0.2 - mean) ** 2) / (2 * sd**2) - 0.5  # of two Gaussians
    assert legend(ax) == pytest.approx([log_p, log_p - kl, kl], abs=0.005)  # two digits are written
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z", "density, per unit of z")


def test_the_posterior_as_guide_has_no_divergence():
    x = torch.tensor([1.3], dtype=torch.float64)
    _, mean, sd = exact(x)
    text = plots.posterior(model, gaussian(mean, sd), x).get_legend().get_texts()[1].get_text()
    assert "KL = 0.00 nats" in text  # neither minus zero nor an error


@pytest.mark.parametrize(
    ("x", "loc", "scale"),
    [
        (40.0, 0.0, 1.0),  # the posterior is 27 deviations of the prior away from all draws
        (0.5, 30.0, 0.01),  # q is far off, and narrow
        (0.5, 0.0, 50.0),  # q is wide
        (-0.5, 0.3, 1e-4),
    ],
)
def test_neither_density_is_cut_or_lost_between_points(x, loc, scale):
    x = torch.tensor([x], dtype=torch.float64)
    _, mean, sd = exact(x)
    ax = plots.posterior(model, gaussian(loc, scale), x)
    low, high = ax.get_xlim()
    assert low < min(mean - 3 * sd, loc - 3 * scale)
    assert high > max(mean + 3 * sd, loc + 3 * scale)
    peaks = filled(ax)[1].max(), ax.lines[0].get_ydata().max()
    assert peaks == pytest.approx([1 / (sd * math.sqrt(2 * math.pi)), 1 / (scale * math.sqrt(2 * math.pi))], rel=1e-2)


def test_a_mode_that_the_guide_misses_is_shown():
    """x = 2.5, z ~ N(0, 16), x | z ~ N(z + 0.85 exp(-z / 2), 1): modes near -4 and 2."""

    def bent(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 4.0))
            pyro.sample("x", dist.Normal(z + 0.85 * (-z / 2).exp(), 1.0), obs=x)

    x = torch.tensor([2.5], dtype=torch.float64)
    z = torch.linspace(-12, 15, 100_001, dtype=torch.float64)
    log_joint = dist.Normal(0.0, 4.0).log_prob(z) + dist.Normal(z + 0.85 * (-z / 2).exp(), 1.0).log_prob(x)
    log_p = float(torch.trapezoid(log_joint.exp(), z).log())
    q = dist.Normal(-4.0, 0.75**0.5)
    elbo = float(torch.trapezoid(q.log_prob(z).exp() * (log_joint - q.log_prob(z)), z))
    ax = plots.posterior(bent, gaussian(-4.0, 0.75**0.5), x)
    assert legend(ax) == pytest.approx([log_p, elbo, log_p - elbo], abs=0.006)
    found, density = filled(ax)
    posterior = np.interp(found, z, (log_joint - log_p).exp())
    np.testing.assert_allclose(density, posterior, atol=1e-4)
    assert density[found > 0].max() > density[found < -2].max() > 0.1  # both modes, the missed one the higher


def test_given_limits_and_points():
    x = torch.tensor([1.0], dtype=torch.float64)
    ax = plots.posterior(model, gaussian(0.0, 1.0), x, limits=(0, 0.5), num_points=11)
    assert ax.get_xlim() == (0, 0.5)
    assert len(ax.lines[0].get_xdata()) >= 11
    # What lies outside still counts: the posterior is not normalised over what is shown.
    _, mean, sd = exact(x)
    z, density = filled(ax)
    np.testing.assert_allclose(density, dist.Normal(mean, sd).log_prob(torch.tensor(z)).exp(), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Two dimensions.


def plane(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, S).to_event(1), obs=x)


def plane_guide(loc, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_tensor(loc), scale).to_event(1))

    return guide


@pytest.mark.parametrize("given", [False, True])
def test_contours_hold_their_shares(given):
    x, own = torch.tensor([[1.0, -2.0]], dtype=torch.float64), Figure().subplots()
    mean, sd = x[0] / (1 + S**2), S / math.sqrt(1 + S**2)
    ax = plots.posterior(plane, plane_guide([0.5, 0.0], 0.8), x, ax=own if given else None)
    assert (ax is own) is given
    p, q = ax.collections
    # A Gaussian of two dimensions has the share 1 - t of its mass where it is above t times its peak.
    for drawn, scale in ((p, sd), (q, 0.8)):
        peak = 1 / (2 * math.pi * scale**2)
        np.testing.assert_allclose(drawn.levels[:3] / peak, [0.01, 0.1, 0.5], rtol=0.02)
    outermost = np.concatenate([path.vertices for path in q.get_paths()[:1]])
    radius = np.linalg.norm(outermost - [0.5, 0.0], axis=1).max()
    assert radius == pytest.approx(0.8 * math.sqrt(2 * math.log(100)), rel=0.01)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[0]", "z[1]")
    log_p = float(dist.Normal(0.0, math.sqrt(1 + S**2)).log_prob(x).sum())
    apart = float((mean - torch.tensor([0.5, 0.0])).square().sum())
    kl = 2 * (math.log(sd / 0.8) - 0.5) + (2 * 0.8**2 + apart) / (2 * sd**2)
    assert legend(ax) == pytest.approx([log_p, log_p - kl, kl], abs=0.006)


def test_two_scalar_sites_by_their_names():
    def two(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
            slope = pyro.sample("slope", dist.Normal(rate.log(), 1.0))  # NaN at a rate below zero, where there is none
            pyro.sample("x", dist.Poisson(slope.exp()), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.LogNormal(x.new_tensor(0.8), 0.7))
            pyro.sample("slope", dist.Normal(0.5 * rate.log() + 0.6, 0.4))

    x = torch.tensor([4.0], dtype=torch.float64)
    ax = plots.posterior(two, guide, x)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rate", "slope")
    elbo = float(lvm.elbo(two, guide, x, num_particles=100_000, seed=0))  # an error of about 0.002
    log_p = lvm.evidence.quadrature(two, x).mean
    assert legend(ax) == pytest.approx([log_p, elbo, log_p - elbo], abs=0.015)


def test_a_correlated_posterior_is_not_cut():
    def ridge(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 3.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0] - z[..., 1], 0.2), obs=x)

    x = torch.tensor([0.0], dtype=torch.float64)
    ax = plots.posterior(ridge, plane_guide([4.0, 4.0], 0.2), x)
    # Along the ridge the posterior has the deviation of the prior, 3, and so 3 / sqrt(2) in each coordinate.
    assert (box(ax)[:, 0] < -3 * 3 / math.sqrt(2)).all()
    assert (box(ax)[:, 1] > 3 * 3 / math.sqrt(2)).all()


def test_a_flat_posterior_has_contours():
    def flat(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Beta(x.new_full((2,), 2.0), 2.0).to_event(1))

    ax = plots.posterior(flat, guide, torch.zeros(1, dtype=torch.float64))
    assert ax.collections[0].levels[:3] == pytest.approx(1.0, rel=1e-5)
    # KL(Beta(2, 2)^2 || U) = 2 (log 6 - 5 / 3), for E log z(1 - z) = 2 (psi(2) - psi(4)) = -5 / 3.
    assert legend(ax)[2] == pytest.approx(2 * (math.log(6) - 5 / 3), abs=0.006)


# ---------------------------------------------------------------------------------------------------------------------
# Any pair.


def mixture():
    """A discrete latent that the guide lacks is summed out."""

    def program(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_tensor([0.3, 0.7])))
            z = pyro.sample("z", dist.Normal(4 * c.to(x.dtype) - 2, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return program, gaussian(0.4, 1.2), torch.tensor([0.5])


def control_flow():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            loc = z if bool((z > 0).all()) else 2 * z  # one particle at a time
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return program, gaussian(0.2, 0.8), torch.tensor([0.5])


def folded():
    layer = torch.nn.ConvTranspose2d(1, 1, 2)
    torch.nn.init.constant_(layer.weight, 0.5)

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            image = layer(z.reshape(len(x), 1, 1, 1))
            pyro.sample("x", dist.Normal(image, 1.0).to_event(3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_full((1,), 0.2), 0.7).to_event(1))

    return program, guide, torch.ones(1, 1, 2, 2)


def positive():
    def program(x, scale):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(3.0), 1.0))
            pyro.sample("x", dist.Poisson(z * scale), obs=x)  # NaN where z < 0

    def guide(x, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x.new_tensor(0.7), 0.5))

    return program, guide, torch.tensor([3.0]), torch.tensor([2.0])


def auto_normal():
    """Draws the unconstrained coordinate; trained for one datum, and with the values that it starts with."""
    program, _, x, scale = positive()
    guide = pyro.infer.autoguide.AutoNormal(program)
    guide(x, scale)
    return program, guide, x, scale


def sequence():
    """The second site depends on the draw of the first."""

    def program(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x / 3, 0.8))
            pyro.sample("b", dist.Normal((a + x) / 2, 0.7))

    return program, guide, torch.tensor([1.0])


def library():
    torch.manual_seed(0)
    vae = lvm.models.DeepGaussian(lvm.nn.MLP(2, [8], 5), 2, lvm.models.likelihoods.Bernoulli())
    return vae, lvm.guides.Flow(2, encoder=lvm.nn.MLP(5, [8], 4 + 8), context_dim=8), torch.ones(1, 5)


def fitted():
    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.9))

    result = lvm.fit(model, guide, torch.tensor([0.3, 0.5]), num_steps=3, seed=0)
    pyro.clear_param_store()  # the result has its own
    return result.model, result.guide, torch.tensor([0.5])


@pytest.mark.parametrize(
    "make", [mixture, control_flow, folded, positive, auto_normal, sequence, library, fitted], ids=lambda f: f.__name__
)
def test_any_pair(make):
    program, guide, x, *args = make()
    ax = plots.posterior(program, guide, x, *args, num_points=21)
    num = 2000 if make is control_flow else 40_000
    weights = lvm.log_weights(program, guide, x, *args, num_particles=num, seed=0)[:, 0].detach().double()
    log_p, elbo, kl = legend(ax)
    error = float(weights.std()) / math.sqrt(num)
    assert elbo == pytest.approx(float(weights.mean()), abs=5 * error + 0.006)
    assert log_p == pytest.approx(lvm.evidence.quadrature(program, x, *args).mean, abs=0.006)
    assert kl == pytest.approx(log_p - elbo, abs=0.011)


def test_latents_in_a_plate_of_their_own():
    """Two elements, each with the posterior of `model`."""

    def program(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, S), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 2, dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 0.8))

    x = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    ax = plots.posterior(program, guide, x)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[0]", "z[1]")
    assert legend(ax)[0] == pytest.approx(sum(exact(part)[0] for part in x[0]), abs=0.006)


def test_a_mixture_as_prior():
    """Of a support that torch cannot unfold, so that quadrature cannot be had."""

    def program(x):
        with pyro.plate("data", len(x)):
            parts = dist.Normal(x.new_tensor([-2.0, 2.0]), 1.0)
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(x.new_tensor([0.3, 0.7])), parts))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.5], dtype=torch.float64)
    log_p = math.log(sum(w * math.exp(dist.Normal(m, 2**0.5).log_prob(x)) for w, m in ((0.3, -2.0), (0.7, 2.0))))
    assert legend(plots.posterior(program, gaussian(0.4, 1.2), x))[0] == pytest.approx(log_p, abs=0.006)


def test_nothing_outside_changes():
    x = torch.tensor([0.5])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plots.posterior(model, gaussian(0.0, 1.0), x)
    assert torch.equal(before, torch.get_rng_state())
    texts = [plots.posterior(model, gaussian(0.1, 1.0), x).get_xlim() for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_guide_that_leaves_the_support_has_no_bound():
    program, _, x, scale = positive()

    def guide(x, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_tensor(1.0), 1.0))

    text = plots.posterior(program, guide, x, scale).get_legend().get_texts()[1].get_text()
    assert "ELBO = \u2212inf, KL = inf nats" in text


def test_a_mode_that_only_one_of_two_sums_has_seen_is_said():
    """Most of the posterior is narrow and far away, where only q looks for it."""

    def far(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 3.0))
            spike = dist.Normal(29.37, 1e-6).log_prob(z) + 53.0
            pyro.factor("seen", torch.logaddexp(spike, torch.zeros_like(z)))
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    with pytest.warns(lvm.UnreliableEstimateWarning, match="narrow parts were missed"):
        plots.posterior(far, gaussian(29.37, 1e-6), torch.zeros(1, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


def three(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def three_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))


def coin(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x)


def coin_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))


def shares(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(x.new_ones(2)))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def shares_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Dirichlet(x.new_ones(2)))


def one_way(x):
    """A change of variables without an inverse."""

    class Bend(torch.distributions.Transform):
        domain = codomain = torch.distributions.constraints.real
        bijective = True

        def _call(self, x):
            return x + 0.1 * x.tanh()

        def _inverse(self, y):
            raise NotImplementedError

        def log_abs_det_jacobian(self, x, y):
            return (1 + 0.1 * (1 - x.tanh() ** 2)).log()

    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(len(x)), 1.0), [Bend(cache_size=1)]))


def drawn_elsewhere(x):
    with pyro.plate("data", len(x)):
        noise = pyro.sample("noise", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(noise + 1.0, log_density=torch.zeros(len(x)) + 1e-9))


ONE = torch.tensor([0.5])


@pytest.mark.parametrize(
    ("pair", "x", "options", "error", "words"),
    [
        ((model, gaussian(0.0, 1.0)), torch.zeros(2), {}, lvm.ShapeError, r"x\[i:i\+1\]"),
        ((model, None), ONE, {}, lvm.DataTypeError, "guide: expected a Pyro program"),
        ((model, gaussian(0.0, 1.0)), "x", {}, lvm.DataTypeError, "x: expected a tensor"),
        ((three, three_guide), ONE, {}, lvm.ShapeError, r"'z\[2\]'\]: expected one or two dimensions, got 3"),
        ((coin, coin_guide), ONE, {}, lvm.SupportError, "site 'c': .* got a discrete one"),
        ((shares, shares_guide), ONE, {}, lvm.SupportError, "site 'z': .* on a surface"),
        ((model, one_way), ONE, {}, lvm.SiteError, "NotImplementedError.* with a log_prob"),
        ((model, drawn_elsewhere), ONE, {}, lvm.SiteError, "a Delta, made of draws from elsewhere"),
        ((model, gaussian(0.0, 1.0)), ONE, {"limits": (1, 0)}, lvm.ShapeError, "limits: .* low < high"),
        ((model, gaussian(0.0, 1.0)), ONE, {"limits": ((0, 1), (0, 1))}, lvm.ShapeError, r"limits: expected \(low, h"),
        ((model, gaussian(0.0, 1.0)), ONE, {"limits": "wide"}, lvm.ShapeError, "limits: .* got 'wide'"),
        ((model, gaussian(0.0, 1.0)), ONE, {"num_points": 2}, lvm.ShapeError, "num_points: expected 9 or more"),
        ((model, gaussian(0.0, 1.0)), ONE, {"num_points": 20.5}, lvm.DataTypeError, "num_points: expected an integer"),
        ((model, gaussian(0.0, 1.0)), ONE, {"ax": "here"}, lvm.DataTypeError, "ax: expected matplotlib axes, got str"),
    ],
)
def test_refusals(pair, x, options, error, words):
    with pytest.raises(error, match=words):
        plots.posterior(*pair, x, **options)


def test_limits_around_nothing_draw_nothing():
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    ax = plots.posterior(plane, plane_guide([0.5, 0.0], 0.8), x, limits=((10, 12), (20, 22)))
    assert box(ax).tolist() == [[10, 12], [20, 22]]
