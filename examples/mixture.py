r"""A Gaussian mixture finds groups that nobody labelled: the posterior p(z = k | x) is the answer.

    z ~ Cat(pi),  x | z = k ~ N(mu_k, Sigma_k),      p(x) = sum_k pi_k N(x; mu_k, Sigma_k)

A mixture that we make up draws z and then x; only x is kept. A second mixture is fitted to it by gradients of the
ELBO with z summed out, which is log p(x). The objective is not convex, so training starts from several k-means runs,
and `best_of` keeps the best. Expectation-maximisation of scikit-learn from the same starts is the judge. With the exact
posterior as guide the gap in the table is 0.
"""

import argparse
import math

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from sklearn.mixture import GaussianMixture as ExpectationMaximisation

import pyro_lvm as lvm
from pyro_lvm.models import GaussianMixture

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7")
NUM_COMPONENTS = len(COLOURS)


def main() -> None:
    """Draw data, forget the labels, find them again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=100)
    parser.add_argument("--picture", default="mixture.png")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    torch.manual_seed(args.seed)
    truth = made_up_mixture()
    x, _ = truth.sample(600)  # the components that the data come from are thrown away
    held_out, _ = truth.sample(1000)

    starts: dict[int, tuple[float, float]] = {}  # seed -> mean log p(x) where it starts, and after EM
    runs: list[lvm.FitResult] = []

    def train(seed: int) -> lvm.FitResult:
        model = GaussianMixture(NUM_COMPONENTS, 2).double().initialize(x, seed=seed)
        starts[seed] = model.log_prob(x).mean().item(), expectation_maximisation(model, x)
        steps = 20 if args.smoke else 250
        decay = lvm.callbacks.Schedule(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))
        adam = lambda params: torch.optim.Adam(params, lr=0.05)  # noqa: E731
        runs.append(lvm.fit(model, None, x, num_steps=steps, batch_size=len(x), optim=adam, callbacks=[decay]))
        return runs[-1]

    best = lvm.best_of(train, num_restarts=2 if args.smoke else 6, seed=args.seed)
    print(f"mean log p(x) of {len(x)} training data in nats, by restart")
    print("seed    start      SVI       EM  SVI - EM")
    for (seed, (start, em)), run in zip(starts.items(), runs, strict=True):
        svi = run.model.log_prob(x).mean().item()
        print(f"{seed:4d}{start:9.4f}{svi:9.4f}{em:9.4f}{svi - em:10.4f}")
    print(best.notes[-1])

    worst = max(runs, key=lambda run: float(run.losses[-1]))
    options = {"num_particles": args.particles, "seed": args.seed}
    rows = {
        "the best restart": (best.model, best.model.posterior_guide),
        "the worst": (worst.model, worst.model.posterior_guide),
        "what drew the data": lvm.log_marginal(truth, truth.posterior_guide, held_out, **options),
    }
    result = lvm.compare(rows, held_out, **options)
    print(f"\nlog p(x) of held-out data, with the exact posterior as guide\n{result}")
    draw(best.model, x).savefig(args.picture, dpi=120)
    print(f"picture: {args.picture}")


def made_up_mixture() -> GaussianMixture:
    """Five groups of other sizes and shapes, two of them crossed."""
    weights = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1])
    means = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 2.5], [-3.0, 2.0], [3.0, -2.0]])
    shears = torch.tensor([[1.6, 1.5, 0.3], [1.6, -1.5, 0.3], [0.4, 0.0, 1.0], [0.8, 0.4, 0.4], [0.5, 0.2, 0.5]])
    scales = torch.stack([torch.tensor([[a, 0.0], [b, c]]) for a, b, c in shears.tolist()])
    return GaussianMixture(NUM_COMPONENTS, 2).double().set_parameters(weights, means, scales @ scales.mT)


def expectation_maximisation(model: GaussianMixture, x: torch.Tensor) -> float:
    """Mean log p(x) after scikit-learn's EM from where the model is now."""
    weights, means, covariances = model.weights.detach(), model.means.detach(), model.covariances.detach()
    start = {"weights_init": weights, "means_init": means, "precisions_init": covariances.inverse()}
    em = ExpectationMaximisation(NUM_COMPONENTS, tol=1e-7, max_iter=5000, reg_covar=1e-9, **start)
    return float(em.fit(x).score(x))


@torch.no_grad()
def draw(model: GaussianMixture, x: torch.Tensor) -> Figure:
    """The data as they came, and one panel a component with its responsibilities; ellipses hold 90 % of a component."""
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    axes[0, 0].scatter(*x.T, s=6, color="0.4")
    axes[0, 0].set_title("the data, without labels")
    responsibilities, means = model.responsibilities(x), model.means.detach()  # (N, C), (C, 2)
    for k, (axis, colour) in enumerate(zip(axes.flat[1:], COLOURS, strict=True)):
        shades = LinearSegmentedColormap.from_list("", ["#E8E8E8", colour])
        points = axis.scatter(*x.T, s=6, c=responsibilities[:, k], cmap=shades, vmin=0, vmax=1)
        figure.colorbar(points, ax=axis, label=f"p(z = {k + 1} | x)")
        variances, directions = torch.linalg.eigh(model.covariances[k])
        width, height = 2 * (variances * 2 * math.log(10)).sqrt()  # chi-squared with 2 degrees of freedom
        angle = math.degrees(math.atan2(directions[1, 0], directions[0, 0]))
        for panel in (axis, axes[0, 0]):
            panel.add_patch(Ellipse(means[k], width, height, angle=angle, fill=False, edgecolor=colour, linewidth=2))
        axis.set_title(f"component {k + 1}, weight {model.weights[k]:.2f}")
    for axis in axes.flat:
        axis.set(xlabel="first coordinate of x", ylabel="second coordinate of x")
        axis.label_outer()
    return figure


if __name__ == "__main__":
    main()
