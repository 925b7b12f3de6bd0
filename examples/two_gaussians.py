r"""Two Gaussians for one posterior: which is better, and by how much?

    z ~ N(0, 16),  x | z ~ N(z + 0.85 exp(-z / 2), 1),  x = 2.5        the posterior p(z | x) has two modes

For any q(z): log p(x) = ELBO(q) + KL(q || posterior). The larger ELBO is the smaller KL, so q can be chosen without
the posterior being known. Here all three terms are known: log p(x) by quadrature, the ELBO of a Gaussian in closed
form, the KL by a sum over a fine grid. N(m, v) is written with its variance v.

Climbing the ELBO from either q ends at an optimum of its own, on one mode: KL(q || p) punishes q where p is small, and
not where p is large and q is not. Importance sampling with such a q misses the mass of the other mode: its weights
say so by k-hat, while their effective sample size looks harmless.
"""

import argparse
import math
import warnings

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize

import pyro_lvm as lvm

X = torch.tensor([2.5], dtype=torch.float64)
GIVEN = {"N(2, 2)": (2.0, 2.0), "N(-4, 0.75)": (-4.0, 0.75)}
COLOURS = ("#0072B2", "#D55E00")


def model(x: torch.Tensor) -> None:
    """p(z) p(x | z)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 4.0))
        pyro.sample("x", dist.Normal(z + 0.85 * (-z / 2).exp(), 1.0), obs=x)


def main() -> None:
    """Measure the two Gaussians and the optima that they lead to, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--picture", default="two_gaussians.png")
    parser.add_argument("--smoke", action="store_true", help="a coarser picture, to see that it runs")
    args = parser.parse_args()
    warnings.simplefilter("ignore", lvm.UnreliableEstimateWarning)  # that estimates fail is what is shown
    log_p = lvm.evidence.quadrature(model, X).mean
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)  # (G,)
    log_posterior = log_joint(z) - log_p
    print(f"log p(x) = {log_p:.6f} nats, by quadrature; p(z < 0 | x) = {mass(z, log_posterior, z < 0):.4f}\n")
    print(f"q(z)                    ELBO  KL(q||p)       sum   log p-hat, K = {args.particles}    error  ESS/K  k-hat")
    optima = {f"best N({m:.2f}, {v:.2f})": (m, v) for m, v in map(climb, GIVEN.values())}
    for name, (m, v) in (GIVEN | optima).items():
        log_q = dist.Normal(m, v**0.5).log_prob(z)
        bound, kl = float(elbo(m, v)), mass(z, log_q, log_q - log_posterior)

        def guide(x: torch.Tensor, m: float = m, v: float = v) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.new_tensor(m), v**0.5))

        found = lvm.log_marginal(model, guide, X, num_particles=args.particles, seed=args.seed)
        share, khat = float(found.ess) / args.particles, float(found.khat)
        print(f"{name:20s}{bound:8.4f}{kl:10.4f}{bound + kl:10.4f}", end="")
        print(f"{found.mean:20.4f}{found.mean - log_p:15.4f}{share:7.2f}{khat:7.2f}")
    draw(z, log_posterior, optima, log_p, 60 if args.smoke else 300).savefig(args.picture, dpi=120)
    print(f"picture: {args.picture}")


def log_joint(z: torch.Tensor) -> torch.Tensor:
    """log p(x, z) at x = 2.5, shaped as z."""
    return dist.Normal(0.0, 4.0).log_prob(z) + dist.Normal(z + 0.85 * (-z / 2).exp(), 1.0).log_prob(X)


def mass(z: torch.Tensor, log_density: torch.Tensor, values: torch.Tensor) -> float:
    """The mean of values at z under a density, by the trapezoidal rule."""
    return float(torch.trapezoid(log_density.exp() * values, z))


def elbo(m: torch.Tensor | float, v: torch.Tensor | float) -> torch.Tensor:
    """E_q log p(x, z) + H(q) of q = N(m, v): Gaussian moments of z, exp(-z / 2) and their products."""
    m, v = (torch.as_tensor(value, dtype=torch.float64) for value in (m, v))
    bend = 0.85 * (-m / 2 + v / 8).exp()  # E 0.85 exp(-z / 2)
    square = m**2 + v + 2 * (m - v / 2) * bend + 0.85**2 * (-m + v / 2).exp()  # E f(z)^2
    error = X**2 - 2 * X * (m + bend) + square  # E (x - f(z))^2
    prior = -0.5 * (math.log(2 * math.pi * 16) + (m**2 + v) / 16)
    return prior - 0.5 * (math.log(2 * math.pi) + error) + 0.5 * (2 * math.pi * math.e * v).log()


def climb(start: tuple[float, float]) -> tuple[float, float]:
    """The optimum of the ELBO that gradients lead to."""
    found = minimize(lambda point: -float(elbo(point[0], math.exp(point[1]))), (start[0], math.log(start[1])))
    return float(found.x[0]), math.exp(found.x[1])


def draw(
    z: torch.Tensor, log_posterior: torch.Tensor, optima: dict[str, tuple[float, float]], log_p: float, num: int
) -> Figure:
    """The posterior with the two Gaussians, and KL(q || posterior) over all Gaussians with the two optima."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.fill_between(z, log_posterior.exp(), color="0.85", label="p(z | x)")
    means, sizes = torch.linspace(-6, 5, num), torch.logspace(-1, 1, num)
    kl = log_p - elbo(means[None], sizes[:, None])  # (num, num)
    shown = right.contourf(means, sizes, kl.clamp(max=6), levels=[0, 0.3, 0.5, 1, 1.5, 2, 3, 4, 6], cmap="viridis_r")
    figure.colorbar(shown, ax=right, label="KL(q || p(z | x)), nats, from 6 up alike")
    for (name, q), best, colour in zip(GIVEN.items(), optima.values(), COLOURS, strict=True):
        left.plot(z, dist.Normal(q[0], q[1] ** 0.5).log_prob(z).exp(), color=colour, label=name)
        left.plot(z, dist.Normal(best[0], best[1] ** 0.5).log_prob(z).exp(), "--", color=colour, label="its optimum")
        right.plot(*q, "o", color=colour, label=name)
        right.plot(*best, "*", color=colour, markersize=12, label="its optimum")
    left.set(xlim=(-7, 7), xlabel="z", ylabel="density")
    right.set(xlabel="mean m of q", ylabel="variance v of q", yscale="log")
    for axes in (left, right):
        axes.legend(frameon=axes is right, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
