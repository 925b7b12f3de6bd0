"""E[z | x] and p(y | x): closed forms, sums written out, and both ways of having a discrete latent."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_lvm as lvm
from pyro_lvm.errors import DataTypeError, ShapeError, SiteError, SupportError
from pyro_lvm.guides import DiagonalNormal
from pyro_lvm.latent import attribute, cluster, encode
from pyro_lvm.models import GaussianMixture, LinearGaussian, SemiSupervisedVAE
from pyro_lvm.nn import MLP

PROBS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
X = torch.linspace(-4, 4, 5, dtype=torch.float64)


def model(x: torch.Tensor) -> None:
    """y -> z -> x: z | y ~ N(mean of y, 1), x | z ~ N(z, 1)."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(PROBS))
        z = pyro.sample("z", dist.Normal(MEANS[y], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def direct(x: torch.Tensor) -> None:
    """As `model`, and x depends on y too."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(PROBS))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + MEANS[y], 1.0), obs=x)


def guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.5))


def both(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(torch.ones(3, dtype=torch.float64)))
        pyro.sample("z", dist.Normal(x / 2, 1.5))


def exact() -> torch.Tensor:
    """p(y | x), (N, 3): x | y ~ N(mean of y, sqrt 2) under both models."""
    joint = PROBS.log() + dist.Normal(MEANS, 2**0.5).log_prob(X[:, None])
    return joint.softmax(1)


@pytest.mark.statistical
@pytest.mark.parametrize("program", [model, direct])
@pytest.mark.parametrize("q", [guide, both], ids=["summed out", "drawn"])
def test_attribute_is_the_posterior_within_five_errors(program, q):
    found = attribute(program, q, X, site="y", num_particles=10_000, seed=0)
    assert found.value.shape == (5, 3)
    torch.testing.assert_close(found.value.sum(1), torch.ones(5, dtype=torch.float64))
    assert ((found.value - exact()).abs() < 5 * found.stderr + 1e-12).all()


def test_a_class_that_is_summed_out_is_known_better_than_one_that_is_drawn():
    summed, drawn = (attribute(model, q, X, site="y", num_particles=2000, seed=0) for q in (guide, both))
    assert summed.stderr.mean() < drawn.stderr.mean() / 1.5


@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")  # one draw has no diagnostics
def test_probabilities_at_one_draw_are_the_sum_written_out():
    found = attribute(model, guide, X, num_particles=1, seed=0)
    z = lvm.expectation(model, guide, X, lambda z: z, num_particles=1, seed=0).under_guide[:, None]
    expected = (PROBS.log() + dist.Normal(MEANS, 1.0).log_prob(z)).softmax(1)
    torch.testing.assert_close(found.value, expected)


def test_without_other_latents_it_is_exact():
    mixture = GaussianMixture(3, 2).double()
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixture.initialize(torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    found = attribute(mixture, None, x)
    torch.testing.assert_close(found.value, mixture.responsibilities(x))
    assert set(found.status) == {"exact"}
    assert (found.stderr == 0).all()
    assert found.num_particles == 1


@pytest.mark.filterwarnings("ignore::pyro_lvm.UnreliableEstimateWarning")  # a guide that nobody trained
def test_under_the_guide_it_is_what_the_library_s_own_model_says():
    torch.manual_seed(0)
    vae = SemiSupervisedVAE(MLP(2, [8], 6), 2, num_classes=3)
    q = DiagonalNormal(2, MLP(6, [8], 4))
    x = (torch.randn(7, 6) > 0).float()
    found = attribute(vae, q, x, num_particles=4000, seed=0)
    with torch.no_grad():
        expected = vae.class_probs(q.distribution(x), 4000, seed=1)
    assert ((found.under_guide - expected).abs() < 5 * 2**0.5 * found.under_guide_stderr).all()  # two means


@pytest.mark.parametrize("kind", ["one hot", "binary", "folded", "looped"])
def test_every_kind_of_class_and_of_run(kind):
    def program(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            if kind == "one hot":
                y = pyro.sample("y", dist.OneHotCategorical(PROBS))
                loc = (y * MEANS).sum(-1)
            elif kind == "binary":
                loc = pyro.sample("y", dist.Bernoulli(0.3)).double() * 2
            else:
                loc = MEANS[pyro.sample("y", dist.Categorical(PROBS))]
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z.reshape(-1)[: len(x)] if kind == "folded" else z, 1.0), obs=x)

    q = guide if kind != "folded" else both
    found = attribute(
        program, q, X, site="y", num_particles=2000, vectorize=False if kind == "looped" else "auto", seed=0
    )
    expected = exact()
    if kind == "binary":
        joint = torch.tensor([0.7, 0.3]).log() + dist.Normal(torch.tensor([0.0, 2.0]), 2**0.5).log_prob(X[:, None])
        expected = joint.softmax(1).double()
    assert ((found.value - expected).abs() < 5 * found.stderr + 1e-12).all()


def test_a_plate_at_another_dimension():
    def program(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            y = pyro.sample("y", dist.Categorical(PROBS))  # (N, 1)
            z = pyro.sample("z", dist.Normal(MEANS[y], 1.0))
            with pyro.plate("pixels", 2, dim=-1):
                pyro.sample("x", dist.Normal(z, 2**0.5), obs=x)

    def q(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True) / 2, 1.5))

    found = attribute(program, q, X[:, None].expand(-1, 2), num_particles=5000, seed=0)
    assert ((found.value - exact()).abs() < 5 * found.stderr).all()  # two pixels of variance 2 are one of variance 1


@pytest.mark.statistical
def test_encode_is_the_posterior_mean():
    torch.manual_seed(0)
    linear = LinearGaussian(2, 5)
    x = torch.randn(4, 5)
    found = encode(linear, linear.posterior_guide, x, num_particles=500, seed=0)
    assert found.value.shape == (4, 2)
    with torch.no_grad():
        assert ((found.value - linear.posterior(x).mean).abs() < 5 * found.stderr).all()


def test_encode_of_a_joint_result():
    """One result that holds the latents of all data, as `expectation` of z has it."""
    linear = LinearGaussian(2, 5)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = encode(linear, linear.posterior_guide, x, data_plate=None, num_particles=500, seed=0)
    same = lvm.expectation(linear, linear.posterior_guide, x, lambda z: z, data_plate=None, num_particles=500, seed=0)
    assert found.value.shape == (1, 4, 2)
    assert found.value.equal(same.value)
    assert found.stderr.equal(same.stderr)
    with torch.no_grad():
        assert ((found.value[0] - linear.posterior(x).mean).abs() < 5 * found.stderr[0]).all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: encode(model, both, X), SiteError, r"latent sites that the guide draws \['y', 'z'\], got None"),
        (lambda: encode(model, guide, X, site="y"), SiteError, r"\['z'\], got 'y'"),
        (lambda: attribute(model, both, X), SiteError, r"\['y', 'z'\], got None. Name one with site=."),
        (lambda: attribute(model, guide, X, site="Y"), SiteError, "got 'Y'"),
        (lambda: attribute(model, guide, X, site="z"), SupportError, "site 'z': expected a discrete latent"),
        (lambda: attribute(model, guide, X, data_plate=None), SupportError, "one value of all data"),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_several_values_for_each_datum_are_refused():
    bits = lvm.models.BinaryLatent(3, 4)
    q = lvm.guides.Bernoulli(3, MLP(4, [4], 3))
    with pytest.raises(SupportError, match=r"one value a datum, got Bernoulli of shape \(1, 3\)"):
        attribute(bits, q, torch.ones(2, 4))


def test_clusters_and_their_scores():
    """Two groups and a stray: the table counts, the scores are scikit-learn's, the matching may swap names."""
    mixture = GaussianMixture(2, 1, covariance="spherical").double()
    x = torch.tensor([[-3.0], [-3.1], [-2.9], [3.0], [3.1]], dtype=torch.float64)
    found = cluster(mixture.initialize(x), None, x)
    classes = torch.tensor([1, 1, 0, 0, 0])
    left = found.labels[0]
    assert found.table(classes)[left].tolist() == [1, 2]
    assert found.table(classes).sum() == 5
    scores = found.scores(classes)
    assert scores.accuracy == 0.8
    assert found.scores(1 - classes) == scores
    perfect = found.scores(found.labels)
    assert (perfect.accuracy, round(perfect.nmi, 12), perfect.ari) == (1.0, 1.0, 1.0)
    with pytest.raises(ShapeError, match=r"classes: expected shape \(5,\), got \(4,\)"):
        found.scores(classes[:4])
    with pytest.raises(DataTypeError, match="integers from 0 on"):
        found.scores(classes - 1)


# --- a regime that all data share -------------------------------------------------------------------------------------

LEVELS = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)


def regime(y):
    c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)))
    shift = pyro.sample("shift", dist.Normal(y.new_zeros(()), 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(LEVELS[c] + shift, 1.0), obs=y)


def drawn_regime(y):
    pyro.sample("c", dist.Categorical(torch.ones(3, dtype=torch.float64)))
    pyro.sample("shift", dist.Normal(y.new_zeros(()), 0.5))


def shift_alone(y):
    pyro.sample("shift", dist.Normal(y.new_zeros(()), 0.5))


@pytest.mark.parametrize("guide", [drawn_regime, shift_alone])
def test_the_posterior_of_what_all_data_share(guide):
    y = torch.tensor([0.8, 1.9, 1.1], dtype=torch.float64)
    covariance = torch.eye(3, dtype=torch.float64) + 0.25
    logits = [dist.MultivariateNormal(level.expand(3), covariance).log_prob(y) for level in LEVELS]
    truth = (torch.stack(logits) + torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()).softmax(0)
    found = attribute(regime, guide, y, site="c", data_plate=None, num_particles=20_000, seed=0)
    assert found.value.shape == (1, 3)
    assert bool(((found.value[0] - truth).abs() < 5 * found.stderr[0]).all())
    assert float(found.stderr.max()) < 0.02
