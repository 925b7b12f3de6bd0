r"""Deep Gaussian models in two dimensions, seen whole: p(x) by quadrature, and log p(x) estimated and exact.

    z ~ N(0, I_2),  x | z ~ N(mu(z), Sigma(z)),  p(x) = integral of p(z) p(x | z) dz

is a mixture of infinitely many Gaussians. Bounded: mu = sigmoid(A z + c) and Sigma = diag(exp(sigmoid(B z + d))).
Whatever A, B, c and d are, the means lie in (0, 1)^2 and the variances in (1, e): all the Gaussians overlap, and p(x)
has one mode. Free: mu and Sigma from a network, trained on two moons; p(x) bends round the data.

In two latent dimensions quadrature is exact, so it judges the estimates: importance sampling with the guide, the ELBO.
"""

import argparse
import warnings

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

import pyro_lvm as lvm
from pyro_lvm import guides, models, nn
from pyro_lvm.models import likelihoods


def main() -> None:
    """Draw both models; train the second one and measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--picture", default="deep_gaussian_2d.png")
    parser.add_argument("--smoke", action="store_true", help="few steps, to see that it runs")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # networks as small as these gain nothing from a second
    warnings.simplefilter("ignore", lvm.UnreliableEstimateWarning)  # the table counts them
    left = bounded_model()
    p = left.decode(left.prior.sample((1000,))).base_dist
    print("bounded model, over 1000 draws of z, so that its p(x) has one mode")
    for name, values in (("means of x | z", p.loc), ("variances of x | z", p.variance)):
        print(f"{name:20s} from {values.min():.2f} to {values.max():.2f}")

    train, test = (lvm.datasets.two_moons(n, seed=seed)[0] for n, seed in ((1000, 0), (100, 1)))
    right = free_model()
    guide = guides.Flow(2, nn.MLP(2, [32, 32], 5 + 16), base="full", context_dim=16, hidden_dim=32)
    epochs = 3 if args.smoke else 200
    lvm.fit(right, guide, train, num_epochs=epochs, optim=lambda p: torch.optim.Adam(p, lr=5e-3), seed=args.seed)
    table(right, guide, train, test, args)
    draw(left, right, train, 9 if args.smoke else 31).savefig(args.picture, dpi=120)
    print(f"picture: {args.picture}")


def bounded_model() -> models.DeepGaussian:
    """mu = sigmoid(A z + c), Sigma = diag(exp(sigmoid(B z + d))), for some A, B, c and d."""
    decoder = torch.nn.Linear(2, 4)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[4.0, 1.0], [-1.0, 4.0], [3.0, 0.0], [0.0, -3.0]]))  # A, then B
        decoder.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))  # c, then d
    return models.DeepGaussian(decoder, 2, likelihoods.SigmoidNormal())


def free_model() -> models.DeepGaussian:
    """Mean and scale from a network that is smooth, so that quadrature converges fast, and starts with small scales."""
    decoder = nn.MLP(2, [32, 32], 4, activation=torch.nn.Tanh)
    with torch.no_grad():
        decoder.layers[-1].bias[2:] = -3.0  # from large ones it learns to leave a coordinate of z unused
    return models.DeepGaussian(decoder, 2, likelihoods.Normal(min_scale=0.05))


def table(model: object, guide: object, train: torch.Tensor, test: torch.Tensor, args: argparse.Namespace) -> None:
    """Mean log p(x) of the test data, exact and estimated, beside that of one Gaussian."""
    exact = lvm.evidence.quadrature(model, test, tolerance=1e-3)
    sampled = lvm.log_marginal(model, guide, test, num_particles=args.particles, seed=args.seed)
    gaussian = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov())
    distance = (sampled.value - exact.value).abs() / sampled.stderr  # (N,)
    doubtful = sampled.status == "unreliable"
    print(f"\nmean over {len(test)} test data, nats")
    print(f"log p(x), quadrature             {exact.mean:8.4f}  error at most {float(exact.stderr.max()):.0e}")
    print(f"log p(x), importance sampling    {sampled.mean:8.4f}  +- {sampled.mean_stderr:.4f}, K = {args.particles}")
    print(f"ELBO                             {float(sampled.elbo.mean()):8.4f}  lower by the mean of KL(q || p(z|x))")
    print(f"log p(x) of one fitted Gaussian  {float(gaussian.log_prob(test).mean()):8.4f}  exact")
    print(f"importance sampling: {int(doubtful.sum())} data called unreliable by their own weights; of the others")
    print(f"{float((distance[~doubtful] < 2).double().mean()):.0%} are within two errors of quadrature")


def density(model: object, low: tuple[float, float], high: tuple[float, float], num: int) -> tuple[torch.Tensor, ...]:
    """Both axes of a grid, ``(num,)``, and p(x) on it, ``(num, num)`` with one row for each x2."""
    x1, x2 = (torch.linspace(low[i], high[i], num) for i in (0, 1))
    record = lvm.evidence.quadrature(model, torch.cartesian_prod(x1, x2), num_nodes=49, tolerance=1e-3)
    return x1, x2, record.value.exp().reshape(num, num).T


def modes(p: torch.Tensor) -> int:
    """Points of a grid where p is larger than at all eight neighbours."""
    return int((p == torch.nn.functional.max_pool2d(p[None], 3, stride=1, padding=1)[0]).sum())


def draw(left: models.DeepGaussian, right: models.DeepGaussian, train: torch.Tensor, num: int) -> Figure:
    """Some p(x|z) of the bounded model, its p(x), and the p(x) of the trained model with the data."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    parts, bounded, free = figure.subplots(1, 3)
    colours = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
    p = left.decode(left.prior.sample((6,))).base_dist
    for loc, scale, colour in zip(p.loc.tolist(), p.scale.tolist(), colours, strict=True):
        parts.add_patch(Ellipse(loc, 2 * scale[0], 2 * scale[1], fill=False, color=colour))
        parts.plot(*loc, "o", color=colour, markersize=4)
    parts.set(title="bounded: p(x|z) of six z, 1 std. dev.", xlim=(-3, 4), ylim=(-2.5, 4.5))
    grids = {"bounded": density(left, (-3, -2.5), (4, 4.5), num), "free": density(right, (-1.8, -1.3), (2.8, 1.8), num)}
    for axes, (name, (x1, x2, values)) in zip((bounded, free), grids.items(), strict=True):
        filled = axes.contourf(x1, x2, values, levels=12, cmap="Blues")
        figure.colorbar(filled, ax=axes, label="p(x), per unit area")
        axes.set_title(f"{name}: p(x), local maxima: {modes(values)}")
    free.plot(*train[:300].T, ".", color="#D55E00", markersize=1.5, label="data")
    free.legend(frameon=False, loc="lower left")
    for axes in (parts, bounded, free):
        axes.set(xlabel="x1, data units", ylabel="x2, data units")
    return figure


if __name__ == "__main__":
    main()
