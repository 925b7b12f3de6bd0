r"""Whose fault is the gap? What a guide loses by its family, and what by its encoder.

    log p(x) - ELBO(q_encoder)  =  log p(x) - ELBO(q*)  +  ELBO(q*) - ELBO(q_encoder)
              gap               =  approximation gap     +  amortization gap

An encoder gives the parameters of q(z | x) for any x at once; q* is the best member of the same family for one x, found
here by gradient steps on parameters that belong to that image alone, started where the encoder puts them. On the same
held-out images and one frozen decoder, differences of ELBOs are differences of KL(q || p(z | x)).

A larger family shrinks the first part only: an encoder that generalises badly is no better for it. (Cremer, Li and
Duvenaud 2018, Inference Suboptimality in Variational Autoencoders.)
"""

import argparse
import logging
import warnings
from functools import partial

import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
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
    """Train a decoder and two encoders, refine both guides image by image, and split their gaps."""
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
    train(args, model, teacher, images.train, 1500, 2e-3, loss=ImportanceWeightedELBO(5))

    rows, refined = {}, {}
    for name, (family, size) in FAMILIES.items():
        guide, own = family(LATENT_DIM, MLP(64, [128, 128], size)), family(LATENT_DIM, num_data=len(x))
        train(args, model, guide, images.train, 2000, 2e-3, update="guide")
        with torch.no_grad():
            own.phi.table.copy_(guide.phi(x))
        several = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
        train(args, model, own, x, 800, 1e-2, update="guide", loss=several, batch_size=len(x))
        rows[f"{name}, encoder"], rows[f"{name}, refined"] = (model, guide), (model, own)
        refined[name] = own
    best = lvm.log_marginal(model, refined["full-rank"], x, num_particles=20 * args.particles, seed=args.seed + 1)
    table = lvm.compare(rows, x, reference=best, num_particles=args.particles, seed=args.seed)
    print(f"{len(x)} held-out images; the reference is log p-hat of the refined full-rank guide\n{table}\n")
    parts = split(table, best)
    print("nats an image        gap = approximation + amortization")
    for name, (whole, approximation, amortization, error) in parts.items():
        print(f"{name:16s}{whole:8.3f}{approximation:16.3f}{amortization:15.3f} +- {error:.3f}")
    draw(parts).savefig(args.picture, dpi=120)
    print(f"picture: {args.picture}")


def train(args, model, guide, x: torch.Tensor, steps: int, lr: float, **options) -> None:  # noqa: ANN001, ANN003
    """Adam with a learning rate that falls to a tenth."""
    steps = 20 if args.smoke else steps
    decay = lvm.callbacks.Schedule(lambda optimizer: LinearLR(optimizer, 1.0, 0.1, steps))
    options |= {"num_steps": steps, "seed": args.seed, "callbacks": [decay]}
    lvm.fit(model, guide, x, optim=partial(Adam, lr=lr), **options)


def split(table: lvm.Comparison, reference: lvm.LogMarginal) -> dict[str, tuple[float, float, float, float]]:
    """Family -> mean gap, its two parts, and the paired standard error of the second."""
    elbo = {row.name: row.runs[0].elbo for row in table.rows}  # (N,)
    parts = {}
    for name in FAMILIES:
        approximation = reference.value - elbo[f"{name}, refined"]  # (N,)
        amortization = elbo[f"{name}, refined"] - elbo[f"{name}, encoder"]  # (N,)
        error = float(amortization.std()) / len(amortization) ** 0.5
        means = float(approximation.mean()), float(amortization.mean())
        parts[name] = (sum(means), *means, error)
    return parts


def draw(parts: dict[str, tuple[float, float, float, float]]) -> Figure:
    """Both parts of each gap, one on the other."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    names = list(parts)
    approximation, amortization, errors = ([parts[name][i] for name in names] for i in (1, 2, 3))
    axes.barh(names, approximation, color="#0072B2", label="approximation: the family")
    axes.barh(names, amortization, left=approximation, xerr=errors, color="#E69F00", label="amortization: the encoder")
    axes.set(xlabel="log p(x) - ELBO, nats an image")
    axes.margins(y=0.4)
    axes.legend(frameon=False, loc="upper right")
    return figure


if __name__ == "__main__":
    main()
