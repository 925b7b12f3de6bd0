r"""Digits sorted without labels, by a Gaussian-mixture VAE.

    y ~ Cat(1/10),  z | y = k ~ N(mu_k, Sigma_k),  x | z ~ Binomial(16, f(z))    8 x 8 grey levels, counts 0 to 16

Three steps: a VAE on the counts; a mixture in its latent space; then all of it together, with y summed out of

    E_q(z|x) [log p(x | z) + log sum_k p(y = k) p(z | y = k) - log q(z | x)].

The labels are used for nothing but the scores: accuracy after the best matching of clusters to digits, NMI and ARI.
Beside it, a Gaussian mixture on 20 principal components. The objective has many optima: look at several seeds.
"""

import argparse
from dataclasses import astuple
from functools import partial

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix
from sklearn.mixture import GaussianMixture
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR

import pyro_lvm as lvm
from pyro_lvm.latent import cluster_scores
from pyro_lvm.models import DeepGaussian, GaussianMixtureVAE, likelihoods
from pyro_lvm.nn import MLP

LATENT_DIM = 10


def main() -> None:
    """Cluster with each seed, print the scores, draw what the last one found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--particles", type=int, default=100, help="draws of z for each image")
    parser.add_argument("--picture", default="cluster_digits.png")
    parser.add_argument("--smoke", action="store_true", help="few epochs, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # networks as small as these gain nothing from a second
    data = load_digits()
    x, digit = torch.tensor(data.data, dtype=torch.float32), data.target  # all 1797 images
    print(f"{len(x)} images    accuracy    NMI     ARI   bound, nats")
    scores = []
    for seed in range(args.seed, args.seed + args.seeds):
        model, q, bound = train(x, seed, epochs=(2, 2) if args.smoke else (250, 80))
        cluster = model.component_probs(q, args.particles, seed).argmax(1).numpy()
        scores.append(astuple(cluster_scores(cluster, digit)))
        print(f"seed {seed:<5}" + "".join(f"{value:10.3f}" for value in (*scores[-1], bound)), flush=True)
    if args.seeds > 1:
        print("mean      " + "".join(f"{value:10.3f}" for value in np.mean(scores, 0)))
        print("std. dev. " + "".join(f"{value:10.3f}" for value in np.std(scores, 0, ddof=1)))
    mixture = GaussianMixture(10, n_init=10, random_state=args.seed)
    linear = mixture.fit_predict(PCA(20, random_state=args.seed).fit_transform(data.data))
    print("PCA, GMM  " + "".join(f"{value:10.3f}" for value in astuple(cluster_scores(linear, digit))))
    draw(model, x, digit, cluster).savefig(args.picture, dpi=120)
    print(f"picture: {args.picture}")


def train(
    x: torch.Tensor, seed: int, epochs: tuple[int, int]
) -> tuple[GaussianMixtureVAE, torch.distributions.Distribution, float]:
    """The trained model, q(z|x) of all data, and the mean bound of the last epoch."""
    pyro.clear_param_store()  # of what another seed has trained
    torch.manual_seed(seed)
    encoder, decoder = MLP(64, [256, 128], 2 * LATENT_DIM), MLP(LATENT_DIM, [128, 256], 64)
    guide = lvm.guides.DiagonalNormal(LATENT_DIM, encoder)
    with torch.no_grad():
        encoder.layers[0].weight /= 16  # pixels are counts from 0 to 16
    counts = likelihoods.Binomial(16)

    steps = epochs[0] * -(-len(x) // 128)
    decay = lvm.callbacks.Schedule(lambda optim: LinearLR(optim, 1.0, 0.0, steps))
    vae = DeepGaussian(decoder, LATENT_DIM, counts)
    lvm.fit(vae, guide, x, optim=partial(Adam, lr=2e-3), num_epochs=epochs[0], seed=seed, callbacks=[decay])

    model = GaussianMixtureVAE(decoder, LATENT_DIM, 10, counts).initialize(guide.distribution(x), seed)
    result = lvm.fit(model, guide, x, optim=partial(Adam, lr=5e-4), num_epochs=epochs[1], seed=seed)
    with torch.no_grad():
        return model, guide.distribution(x), -float(result.losses[-15:].mean())


def draw(model: GaussianMixtureVAE, x: torch.Tensor, digit: np.ndarray, cluster: np.ndarray) -> Figure:
    """Each cluster in a row: some of its images, some draws from it; and how many images of each digit it holds."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    order = linear_sum_assignment(-confusion_matrix(digit, cluster))[1]  # the cluster of each digit
    with torch.no_grad():
        drawn = model.decode(model.mixture.component(torch.tensor(order)).sample((10,))).mean / 16  # (10, C, 64)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    members = [x[shuffled][cluster[shuffled] == k] for k in order]
    rows = [torch.cat([each[:10], x.new_zeros(10, 64)])[:10] / 16 for each in members]
    for axes, images, title in ((left, torch.stack(rows), "images"), (middle, drawn.transpose(0, 1), "draws")):
        picture = torch.nn.functional.pad(images.reshape(10, 10, 8, 8), (1, 1, 1, 1), value=0.5)
        axes.imshow(picture.permute(0, 2, 1, 3).reshape(100, 100), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=range(5, 100, 10), title=f"{title} of each cluster")
        axes.set_yticklabels([str(k) for k in order])
    counts = confusion_matrix(cluster, digit)[order]
    right.imshow(counts, cmap="Blues")
    for row, column in np.argwhere(counts > 0):
        colour = "white" if counts[row, column] > 100 else "black"
        right.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=colour)
    right.set(xticks=range(10), yticks=range(10), yticklabels=order, xlabel="digit", ylabel="cluster", title="images")
    return figure


if __name__ == "__main__":
    main()
