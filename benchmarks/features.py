"""What other packages say of log p(x) and of a guide, measured on problems with a known answer.

    z ~ N(0, 1),  x | z ~ N(z, 1),  q(z | x) = N(0.3 x, 1),   50 data:   log p(x) is known

Packages that are not installed are left out. Run `python -m benchmarks.features`.
"""

import argparse
import math
import warnings
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, RenyiELBO
from pyro.infer.importance import Importance, psis_diagnostic

import pyro_lvm as lvm

X = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2**0.5
EXACT = dist.Normal(0.0, 2**0.5).log_prob(X)  # (N,)
DRAWS, REPEATS = 1000, 200

Fact = tuple[str, str, str]  # package, question, answer


def model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x, 1.0))


def this_package() -> Iterator[Fact]:
    found = lvm.log_marginal(model, guide, X, num_particles=DRAWS, seed=1)
    largest = float(((found.value - EXACT).abs() / found.stderr).max())
    yield "pyro_lvm", "log p(x)", f"{len(found)} numbers, each with an error: off by at most {largest:.1f} of them"
    yield (
        "pyro_lvm",
        "k-hat of 50 data",
        f"{len(found.khat)} numbers, from {found.khat.min():.2f} to {found.khat.max():.2f}",
    )
    loss = lvm.objectives.ImportanceWeightedELBO(5, gradient="vimco")
    yield "pyro_lvm", "weighted bound, gradient of a Bernoulli guide", discrete_gradient(loss)


def pyro_itself() -> Iterator[Fact]:
    torch.manual_seed(1)
    value = float(Importance(model, guide, DRAWS).run(X).get_log_normalizer())
    yield "Pyro", "log p(x)", f"one number for all data, {value:.2f}; exactly {float(EXACT.sum()):.2f}"
    yield "Pyro", "k-hat of 50 data", f"one number, {psis_diagnostic(model, guide, X, num_particles=DRAWS):.2f}"
    loss = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    yield "Pyro", "weighted bound, gradient of a Bernoulli guide", discrete_gradient(loss)


def discrete_gradient(loss: ELBO) -> str:
    """Gradient of the weighted bound of five particles by the logit of a Bernoulli guide, and what it should be."""

    def switch(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(2 * on, 1.0), obs=x)

    def q(x: torch.Tensor) -> None:
        logit = pyro.param("logit", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("on", dist.Bernoulli(logits=logit))

    pyro.clear_param_store()
    torch.manual_seed(1)
    for _ in range(REPEATS):
        loss.loss_and_grads(switch, q, X)
    found = -pyro.param("logit").grad / REPEATS
    pyro.clear_param_store()
    return f"{float(found):.1f}, mean of {REPEATS} draws; exactly {weighted_bound_gradient():.1f}"


def weighted_bound_gradient() -> float:
    """Exactly: the number of ones among five draws is binomial."""
    logit = torch.tensor(0.5, requires_grad=True)
    on = torch.arange(6.0)[:, None]  # of five
    weight_on = 0.5 * dist.Normal(2.0, 1.0).log_prob(X).exp() / logit.sigmoid()
    weight_off = 0.5 * dist.Normal(0.0, 1.0).log_prob(X).exp() / (-logit).sigmoid()
    bounds = ((on * weight_on + (5 - on) * weight_off) / 5).log()  # (6, N)
    probs = dist.Binomial(5, logits=logit).log_prob(on).exp()
    (gradient,) = torch.autograd.grad((probs * bounds).sum(), logit)
    return float(gradient)


def numpyro_package() -> Iterator[Fact]:
    import jax
    import numpyro
    import numpyro.distributions as npdist
    from numpyro.infer import psis_diagnostic

    def np_model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", npdist.Normal(0.0, 1.0))
            numpyro.sample("x", npdist.Normal(z, 1.0), obs=x)

    def np_guide(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", npdist.Normal(0.3 * x, 1.0))

    khat = psis_diagnostic(jax.random.key(0), {}, np_model, np_guide, jax.numpy.asarray(X.numpy()), num_particles=DRAWS)
    yield "NumPyro", "k-hat of 50 data", f"one number, {float(khat):.2f}"


def pythae_package() -> Iterator[Fact]:
    from pythae.models import VAE, VAEConfig

    vae = VAE(VAEConfig(input_dim=(1, 4), latent_dim=2))
    drawn: list[int] = []
    encode = vae.encoder.forward
    vae.encoder.forward = lambda x: drawn.append(len(x)) or encode(x)
    found = vae.get_nll(torch.rand(3, 1, 4), n_samples=150, batch_size=100)
    yield "pythae", "log p(x)", f"one {type(found).__name__} for 3 data, without an error"
    yield "pythae", "150 draws asked for, 100 at once", f"{sum(drawn) // 3} are made for each of 3 data"


def scvi_tools() -> Iterator[Fact]:
    from scvi import REGISTRY_KEYS
    from scvi.module import VAE

    vae = VAE(n_input=4).eval()
    drawn: list[int] = []
    inference = vae.inference

    def counted(*args: object, n_samples: int = 1, **options: object) -> object:
        drawn.append(n_samples)
        return inference(*args, n_samples=n_samples, **options)

    vae.inference = counted
    tensors = {REGISTRY_KEYS.X_KEY: torch.ones(3, 4), REGISTRY_KEYS.BATCH_KEY: torch.zeros(3, 1)}
    tensors |= {REGISTRY_KEYS.LABELS_KEY: torch.zeros(3, 1)}
    found = vae.marginal_ll(tensors, n_mc_samples=10, n_mc_samples_per_pass=3)
    yield "scvi-tools", "log p(x)", f"{found.numel()} numbers for 3 data, without an error"
    excess = math.log(sum(drawn) / 10)
    yield (
        "scvi-tools",
        "10 draws asked for, 3 at once",
        f"{sum(drawn)} are made, divided by 10: {excess:.2f} nats too high",
    )


def main() -> None:
    """Print what each installed package answers."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    for facts in (this_package, pyro_itself, numpyro_package, pythae_package, scvi_tools):
        try:
            for package, question, answer in facts():
                print(f"{package:11s}{question:47s}{answer}")
        except ImportError as error:
            print(f"{facts.__name__:11s}left out: {error}")


if __name__ == "__main__":
    main()
