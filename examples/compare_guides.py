r"""Which guide is better, and what is log p(x)? Three guides of one deep Gaussian model of digits.

    p(x, z) = N(z; 0, I) Bernoulli(x; decoder(z)),        log p(x) = ELBO(q) + KL(q(z | x) || p(z | x))

The decoder is trained once and frozen, so that log p(x) is the same for all guides and a difference of ELBOs is a
difference of KL divergences. The three estimates of log p(x) must then agree: that is the check on the estimator.
A linear-Gaussian model of the same images, whose log p(x) is known exactly, is a second check.

Run it with no arguments, or with `--data mnist --root FOLDER`. Put your own `model` and `mean_field` in their places.
"""

import argparse
import logging
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

import pyro_lvm as lvm
from pyro_lvm.nn import MLP

LATENT_DIM = 8
TRIANGLE = LATENT_DIM * (LATENT_DIM + 1) // 2  # numbers in a Cholesky factor


def main() -> None:
    """Train, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "mnist", "fashion_mnist"], default="digits")
    parser.add_argument("--root", help="folder that holds MNIST/ or FashionMNIST/")
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="compare_guides.png")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    logging.getLogger("pyro_lvm").setLevel(logging.ERROR)  # guides of one class in several pairs are no news here
    torch.manual_seed(args.seed)
    if args.data == "digits":
        torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    root = {} if args.data == "digits" else {"root": args.root}
    load = partial(getattr(lvm.datasets, args.data), seed=args.seed, **root)
    compare_guides(args, load("threshold"))
    check_on_exact_model(args, load("none"))


def compare_guides(args: argparse.Namespace, images: lvm.datasets.ImageData) -> None:
    """Three guides of one frozen decoder."""
    data_dim, width = images.train.shape[1], 64 if args.data == "digits" else 200

    def make_encoder(size: int) -> MLP:
        net = MLP(data_dim, [2 * width, 2 * width], size)
        with torch.no_grad():
            net.layers[-1].weight.mul_(0.1)  # q starts near the prior
        return net

    decoder = MLP(LATENT_DIM, [width, width], data_dim)
    encoder = make_encoder(2 * LATENT_DIM)

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def mean_field(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    guides = {
        "mean-field": mean_field,
        "full-rank": lvm.guides.FullRankNormal(LATENT_DIM, make_encoder(LATENT_DIM + TRIANGLE)),
        "flow": lvm.guides.Flow(LATENT_DIM, make_encoder(LATENT_DIM + TRIANGLE + 32), base="full", context_dim=32),
    }
    print(f"training a decoder on {len(images.train)} {args.data} images, then {len(guides)} guides with it frozen")
    teacher = lvm.guides.DiagonalNormal(LATENT_DIM, make_encoder(2 * LATENT_DIM))
    bound = RenyiELBO(alpha=0, num_particles=5, max_plate_nesting=1, vectorize_particles=True)  # 5 importance samples
    train(args, model, teacher, images.train, 1500, loss=bound)
    for guide in guides.values():
        train(args, model, guide, images.train, 2000, update="guide")

    rows = {name: (model, guide) for name, guide in guides.items()}
    result = lvm.compare(rows, images.test, num_particles=args.particles, seed=args.seed)
    result.plot().savefig(args.picture, dpi=120)
    print(f"\nlog p(x) of held-out images, one frozen decoder\n{result}\npicture: {args.picture}")


def check_on_exact_model(args: argparse.Namespace, images: lvm.datasets.ImageData) -> None:
    """The same measurement where the answer is known: a linear-Gaussian model of the grey levels."""
    data_dim = images.train.shape[1]
    model = lvm.models.LinearGaussian(LATENT_DIM, data_dim).fit_closed_form(images.train)
    mean_field = lvm.guides.DiagonalNormal(LATENT_DIM, torch.nn.Linear(data_dim, 2 * LATENT_DIM))
    train(args, model, mean_field, images.train, 2000, update="guide")
    pairs = (model, model.posterior_guide), (model, mean_field)
    rows = dict(zip(("linear-Gaussian, exact", "linear-Gaussian, mean-field"), pairs, strict=True))
    exact = lvm.log_marginal(model, None, images.test)
    result = lvm.compare(rows, images.test, reference=exact, num_particles=args.particles, seed=args.seed)
    print(f"\nwhere log p(x) is known (a density of grey levels, not to be set against the above)\n{result}")


def train(args: argparse.Namespace, model: Callable, guide: Callable, x: torch.Tensor, steps: int, **options) -> None:  # noqa: ANN003
    """Adam at 2e-3 for half of the steps, then linearly down to 2 % of it."""
    steps = 30 if args.smoke else steps

    def decay(optimizer: Adam) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: min(1.0, 0.02 + 1.96 * (1 - step / steps)))

    options |= {"num_steps": steps, "seed": args.seed, "callbacks": [lvm.callbacks.Schedule(decay)]}
    lvm.fit(model, guide, x, optim=partial(Adam, lr=2e-3), **options)


if __name__ == "__main__":
    main()
