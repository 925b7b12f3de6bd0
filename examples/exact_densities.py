r"""Models with and without latents in one table: flows, autoregressive models and mixtures beside deep Gaussians.

    autoregressive   p(x) = prod_d p(x_d | x_1 .. x_{d-1})               exact, no latent
    flow             p(x) = N(u; 0, I) |det du/dx|,  u = T^{-1}(x)       exact, u is as large as x
    mixture          p(x) = sum_k pi_k p(x | z = k)                      exact, a sum of few terms
    deep Gaussian    p(x) = int N(z; 0, I) p(x | z) dz                   no formula: importance sampling with a guide

Log-likelihoods compare only where x is the same thing: probabilities of binary images in one table, densities of points
in the plane in the other. Which row is first depends on sizes and training; what to see is which numbers are exact. The
deep Gaussian of points is trained by the bound of 8 importance samples, which is why its ELBO is low.
"""

import argparse
import logging
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import RenyiELBO, config_enumerate
from torch.nn import Tanh

import pyro_lvm as lvm
from pyro_lvm.guides import FullRankNormal
from pyro_lvm.models import Autoregressive, DeepGaussian, GaussianMixture, NormalizingFlow
from pyro_lvm.nn import MLP


@config_enumerate
def patterns(x: torch.Tensor) -> None:
    """A mixture of independent pixels, as a plain function: z, summed out, picks one of the patterns."""
    logits = pyro.param("patterns", lambda: 0.5 * torch.randn(40, x.shape[1]))  # (C, D)
    shares = pyro.param("shares", torch.zeros(40))  # (C,)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=shares))
        pyro.sample("x", dist.Bernoulli(logits=logits[z]).to_event(1), obs=x)


def main() -> None:
    """Two tables and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--picture", default="exact_densities.png")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    logging.getLogger("pyro_lvm").setLevel(logging.ERROR)  # guides of one class in two pairs are no news here
    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    torch.manual_seed(args.seed)

    images = lvm.datasets.digits("threshold", seed=args.seed)
    digits = {  # model, guide, steps, learning rate, data a step, loss
        "autoregressive": (Autoregressive(64, [256]), None, 2500, 3e-3, 128),
        "deep Gaussian": (
            DeepGaussian(MLP(8, [64, 64], 64), 8),
            FullRankNormal(8, MLP(64, [128], 44)),
            2500,
            3e-3,
            128,
        ),
        "mixture of 40": (patterns, None, 300, 5e-2, 256),
    }
    print(f"log p(x) of {len(images.test)} held-out binary digits of 64 pixels")
    print(train_and_compare(digits, images.train, images.test, args))
    points, held_out = (lvm.datasets.two_moons(n, seed=args.seed + n)[0] for n in (2000, 1000))
    decoder, encoder = MLP(2, [64, 64], 4, Tanh), MLP(2, [64, 64], 5, Tanh)
    bound = RenyiELBO(alpha=0, num_particles=8, max_plate_nesting=1, vectorize_particles=True)  # 8 importance samples
    plane = {
        "flow": (NormalizingFlow(2, 10, [16, 16]).initialize(points), None, 800, 1e-2, 500),
        "deep Gaussian": (DeepGaussian(decoder, 2, "normal"), FullRankNormal(2, encoder), 1000, 5e-3, 256, bound),
        "mixture of 8": (GaussianMixture(8, 2).initialize(points, seed=args.seed), None, 200, 5e-2, 2000),
    }
    print(f"\nlog p(x) of {len(held_out)} held-out points of two moons")
    print(train_and_compare(plane, points, held_out, args))
    draw(digits, plane, images.test, held_out).savefig(args.picture, dpi=110)
    print(f"picture: {args.picture}")


def train_and_compare(rows: dict, x: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> lvm.Comparison:
    """Adam for all, with a learning rate that falls to zero along a cosine."""
    for model, guide, steps, lr, batch_size, *loss in rows.values():
        steps = 20 if args.smoke else steps
        schedule = lvm.callbacks.Schedule(partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps))
        options = {"num_steps": steps, "batch_size": batch_size, "seed": args.seed, "callbacks": [schedule]}
        lvm.fit(model, guide, x, optim=partial(torch.optim.Adam, lr=lr), loss=loss[0] if loss else None, **options)
    pairs = {name: row[:2] for name, row in rows.items()}
    return lvm.compare(pairs, held_out, num_particles=args.particles, seed=args.seed)


@torch.no_grad()
def draw(digits: dict, plane: dict, images: torch.Tensor, held_out: torch.Tensor) -> Figure:
    """Samples of the models of images, and densities of the models of points."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 0.9))
    z = dist.Categorical(logits=pyro.param("shares")).sample((16,))
    samples = {"held-out": images[:16], "mixture of 40": pyro.param("patterns")[z].sigmoid().bernoulli()}
    samples |= {name: digits[name][0].sample(16) for name in ("autoregressive", "deep Gaussian")}
    for axes, (name, rows) in zip(top.subplots(4, 16), samples.items(), strict=True):
        for axis, image in zip(axes, rows, strict=True):
            axis.imshow(image.view(8, 8), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    warnings.simplefilter("ignore", lvm.UnreliableEstimateWarning)  # far from all data no guide is good
    across, up = torch.meshgrid(torch.linspace(-1.6, 2.6, 100), torch.linspace(-1.1, 1.6, 80), indexing="xy")
    grid, axes = torch.stack([across.flatten(), up.flatten()], 1), bottom.subplots(1, 3, sharey=True)  # (8000, 2)
    for axis, (name, (model, guide, *_)) in zip(axes, plane.items(), strict=True):
        value = lvm.log_marginal(model, guide, grid, num_particles=100, seed=0).value.view_as(across)
        shown = axis.contourf(across, up, value.clamp(-6, 0.5), levels=torch.linspace(-6, 0.5, 27), cmap="viridis")
        axis.plot(*held_out[:200].T, ".", color="#D55E00", markersize=2)
        axis.set(title=name, xlabel="$x_1$", aspect="equal")
    axes[0].set_ylabel("$x_2$")
    bottom.colorbar(shown, ax=axes, label="log p(x), nats, from -6 up", ticks=range(-6, 1), shrink=0.75)
    return figure


if __name__ == "__main__":
    main()
