r"""Whose fault is the gap? What a guide loses by its family, and what by its encoder.

    log p(x) - ELBO(q_encoder)  =  log p(x) - ELBO(q*)  +  ELBO(q*) - ELBO(q_encoder)
              gap               =  approximation gap     +  amortization gap

An encoder gives the parameters of q(z | x) for any x at once; q* is the best member of the same family for one x, found
by gradient steps on parameters that belong to that image alone, started where the encoder puts them. `inference_gap`
splits the gap of any guide, image by image; here on held-out images and one frozen decoder, for two families.

A larger family shrinks the first part only: an encoder that generalises badly is no better for it. (Cremer, Li and
Duvenaud 2018, Inference Suboptimality in Variational Autoencoders.)
"""

import argparse
import logging
import warnings
from functools import partial

import torch
from matplotlib.figure import Figure
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR

import pyro_lvm as lvm
from pyro_lvm.guides import DiagonalNormal, FullRankNormal
from pyro_lvm.models import DeepGaussian
from pyro_lvm.nn import MLP
from pyro_lvm.objectives import ImportanceWeightedELBO

LATENT_DIM = 8
FAMILIES = {"mean-field": (DiagonalNormal, 2 * LATENT_DIM), "full-rank": (FullRankNormal, LATENT_DIM + 36)}


def main() -> None:
    """Train a decoder and two encoders, and split the gap of both guides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--picture", default="encoder_gap.png")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    logging.getLogger("pyro_lvm").setLevel(logging.ERROR)  # guides of one class in several pairs are no news here
    warnings.simplefilter("ignore", lvm.UnreliableEstimateWarning)  # the table says it
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # networks as small as these gain nothing from a second
    images = lvm.datasets.digits("threshold", seed=args.seed)
    x = images.test[:100]
    model = DeepGaussian(MLP(LATENT_DIM, [64, 64], 64), LATENT_DIM)
    teacher = DiagonalNormal(LATENT_DIM, MLP(64, [128, 128], 2 * LATENT_DIM))
    train(args, model, teacher, images.train, 1500, loss=ImportanceWeightedELBO(5))

    gaps = {}
    for name, (family, size) in FAMILIES.items():
        guide = family(LATENT_DIM, MLP(64, [128, 128], size))
        train(args, model, guide, images.train, 1500, update="guide")
        steps = 20 if args.smoke else 200
        gaps[name] = lvm.inference_gap(model, guide, x, num_steps=steps, num_particles=args.particles, seed=args.seed)
        print(f"{name}, held-out images\n{gaps[name]}\n")
    draw(gaps).savefig(args.picture, dpi=120)
    print(f"picture: {args.picture}")


def train(args, model, guide, x: torch.Tensor, steps: int, **options) -> None:  # noqa: ANN001, ANN003
    """Adam with a learning rate that falls to a tenth."""
    steps = 20 if args.smoke else steps
    decay = lvm.callbacks.Schedule(lambda optimizer: LinearLR(optimizer, 1.0, 0.1, steps))
    lvm.fit(
        model, guide, x, optim=partial(Adam, lr=2e-3), num_steps=steps, seed=args.seed, callbacks=[decay], **options
    )


def draw(gaps: dict[str, lvm.InferenceGap]) -> Figure:
    """Both parts of each gap, one on the other, and what a flow of its own would leave."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    names = list(gaps)
    parts = {
        part: [float(getattr(gap, part).mean()) for gap in gaps.values()] for part in ("approximation", "amortization")
    }
    errors = [float(gap.amortization.std()) / len(gap) ** 0.5 for gap in gaps.values()]
    left = [float((gap.log_marginal - gap.flow_elbo).mean()) for gap in gaps.values()]
    axes.barh(names, parts["approximation"], color="#0072B2", label="approximation: the family")
    axes.barh(
        names,
        parts["amortization"],
        left=parts["approximation"],
        xerr=errors,
        color="#E69F00",
        label="amortization: the encoder",
    )
    axes.plot(left, names, "k|", markersize=18, label="left by a flow for each image")
    axes.set(xlabel="log p(x) - ELBO, nats an image")
    axes.margins(y=0.6)
    axes.legend(frameon=False, loc="upper right", fontsize="small")
    return figure


if __name__ == "__main__":
    main()
