r"""Which guide is better, and what is log p(x)? Three guides of one deep Gaussian model of digits.

    p(x, z) = N(z; 0, I) Bernoulli(x; decoder(z)),        log p(x) = ELBO(q) + KL(q(z | x) || p(z | x))

The decoder is trained once and frozen, so that log p(x) is the same for all guides and a difference of ELBOs is a
difference of KL divergences. The three estimates of log p(x) must then agree: that is the check on the estimator.
A linear-Gaussian model of the same images, whose log p(x) is known exactly, is a second check.

Run it with no arguments, or with `--data mnist --root FOLDER`. Put your own `model` and `mean_field` in their places.
"""

import argparse
import logging

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.nn import MLP

LATENT_DIM = 8


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
    logging.getLogger("pyro_lvm").setLevel(logging.ERROR)  # guides of one kind in two pairs: said once, not here

    decoder_steps, guide_steps, test_size = (30, 30, 20) if args.smoke else (1500, 2000, 360)
    root = {} if args.data == "digits" else {"root": args.root}
    images = getattr(lvm.datasets, args.data)(binarize="threshold", seed=args.seed, **root)
    train, test = images.train, images.test[:test_size]
    data_dim, wide = train.shape[1], 64 if args.data == "digits" else 200
    torch.manual_seed(args.seed)

    def make_encoder(size: int) -> MLP:
        net = MLP(data_dim, [2 * wide, 2 * wide], size)
        with torch.no_grad():
            net.layers[-1].weight.mul_(0.1)  # q starts near the prior
        return net

    decoder = MLP(LATENT_DIM, [wide, wide], data_dim)
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

    triangle = LATENT_DIM * (LATENT_DIM + 1) // 2
    teacher = lvm.guides.DiagonalNormal(LATENT_DIM, make_encoder(2 * LATENT_DIM))
    guides = {
        "mean-field": mean_field,
        "full-rank": lvm.guides.FullRankNormal(LATENT_DIM, make_encoder(LATENT_DIM + triangle)),
        "flow": lvm.guides.Flow(LATENT_DIM, make_encoder(LATENT_DIM + triangle + 32), base="full", context_dim=32),
    }

    print(f"training a decoder on {len(train)} {args.data} images, then {len(guides)} guides on the frozen decoder")
    bound = RenyiELBO(alpha=0, num_particles=5, max_plate_nesting=1, vectorize_particles=True)  # 5 importance samples
    train_pair(model, teacher, train, decoder_steps, args.seed, loss=bound)
    for guide in guides.values():
        train_pair(model, guide, train, guide_steps, args.seed, update="guide")

    rows = {name: (model, guide) for name, guide in guides.items()}
    result = lvm.compare(rows, test, num_particles=args.particles, seed=args.seed)
    print(f"\nlog p(x) of {len(test)} held-out images, frozen decoder\n{result}")
    result.plot().savefig(args.picture, dpi=120)
    print(f"picture: {args.picture}")

    grey = getattr(lvm.datasets, args.data)(binarize="none", seed=args.seed, **root)
    linear = lvm.models.LinearGaussian(LATENT_DIM, data_dim).fit_closed_form(grey.train)
    independent = lvm.guides.DiagonalNormal(LATENT_DIM, nn.Linear(data_dim, 2 * LATENT_DIM))
    train_pair(linear, independent, grey.train, guide_steps, args.seed, update="guide")
    linear_rows = {"linear-Gaussian, exact posterior": (linear, linear.posterior_guide)}
    linear_rows["linear-Gaussian, mean-field"] = (linear, independent)
    exact = lvm.log_marginal(linear, None, grey.test[:test_size])
    check = lvm.compare(linear_rows, grey.test[:test_size], reference=exact, num_particles=args.particles)
    print(f"\na linear-Gaussian model of the grey levels: a density, not to be set against the table above\n{check}")


def train_pair(
    model: lvm.models.DeepGaussian, guide: nn.Module, x: torch.Tensor, num_steps: int, seed: int, **options: object
) -> lvm.FitResult:
    """Adam at 2e-3 for half of the steps, then linearly down to 2 % of it."""

    def decay(step: int) -> float:
        return min(1.0, 0.02 + 1.96 * (1 - step / num_steps))

    schedule = lvm.callbacks.Schedule(
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, decay), every="step"
    )
    adam = lambda params: torch.optim.Adam(params, lr=2e-3)  # noqa: E731
    return lvm.fit(model, guide, x, optim=adam, num_steps=num_steps, seed=seed, callbacks=[schedule], **options)


if __name__ == "__main__":
    main()
