r"""Ten labels a class: p(y | x) from a model of all the images, and whether its probabilities can be believed.

    y ~ Cat(pi),  z | y = k ~ N(mu_k, Sigma_k),  x | z ~ Binomial(16, f(z))      100 of 1437 training images have a y

Three steps: a VAE on all images; a component for each class, where the few labels spread to by neighbourhood in z; then
all of it together: bounds on log p(x), on log p(x, y) where y is known, and there log p(y | z). Beside it an SVM that
sees the 100 labelled images alone. Probabilities are calibrated if of the images with 80 % confidence 80 % are right:
half of the 360 test images sets a temperature, the other half shows what it mends.
"""

import argparse
from functools import partial

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from sklearn.svm import SVC
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR

import pyro_lvm as lvm
from pyro_lvm.models import DeepGaussian, SemiSupervisedVAE, likelihoods
from pyro_lvm.nn import MLP

LATENT_DIM = 16
EDGES = (0.5, 0.7, 0.9, 0.97, 0.99)  # between the confidences that are averaged over


def main() -> None:
    """Train with each set of labels; print the accuracies and the calibration, draw the reliability curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="how many sets of labels, from --seed on")
    parser.add_argument("--particles", type=int, default=100, help="draws of z for each image")
    parser.add_argument("--picture", default="semi_supervised_digits.png")
    parser.add_argument("--smoke", action="store_true", help="few epochs, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # networks as small as these gain nothing from a second
    data = lvm.datasets.digits("counts")
    half = len(data.test) // 2
    first = torch.where(torch.arange(len(data.test)) < half, data.test_labels, -1)
    print("accuracy on the test images; calibration on the second half of them, as trained and with a temperature T")
    print("labels         SVM   model   confidence    log p(y|x)   with T: confidence    log p(y|x)     T")
    rows, before, after = [], [], []
    for seed in range(args.seed, args.seed + args.seeds):
        y = some_labels(data.train_labels, seed)
        svm = SVC(C=10).fit(data.train[y >= 0].numpy() / 16, y[y >= 0].numpy())
        model, q = train(data.train, y, data.test, seed, epochs=(2, 2) if args.smoke else (100, 60))
        plain = model.class_probs(q, args.particles, seed)
        tempered = model.calibrate(q, first, args.particles, seed).class_probs(q, args.particles, seed)
        correct = (plain.argmax(1) == data.test_labels).double().mean()
        row = [svm.score(data.test.numpy() / 16, data.test_labels.numpy()), float(correct)]
        for found, probs in ((before, plain[half:]), (after, tempered[half:])):
            found.append((probs, data.test_labels[half:]))
            log_p = probs.log().gather(1, data.test_labels[half:, None])  # of the true class
            row += [float(probs.amax(1).mean()), float(log_p.mean())]
        rows.append([*row, float(model.temperature)])
        print(f"set {seed:<6}" + line(rows[-1]), flush=True)
    if args.seeds > 1:
        print("mean      " + line(np.mean(rows, 0)) + "\nstd. dev. " + line(np.std(rows, 0, ddof=1)))
    draw({"as trained": before, "with a temperature": after}).savefig(args.picture, dpi=120)
    print(f"picture: {args.picture}")


def some_labels(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """The labels of ten random images of each class, -1 for all others."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == k][:10] for k in range(10)])
    return torch.full_like(labels, -1).index_copy(0, chosen, labels[chosen])


def train(
    x: torch.Tensor, y: torch.Tensor, test: torch.Tensor, seed: int, epochs: tuple[int, int]
) -> tuple[SemiSupervisedVAE, torch.distributions.Distribution]:
    """The trained model, and q(z|x) of the test data."""
    pyro.clear_param_store()  # of what another seed has trained
    torch.manual_seed(seed)
    encoder, decoder = MLP(64, [256, 128], 2 * LATENT_DIM), MLP(LATENT_DIM, [128, 256], 64)
    guide = lvm.guides.DiagonalNormal(LATENT_DIM, encoder)
    with torch.no_grad():
        encoder.layers[0].weight /= 16  # pixels are counts from 0 to 16
    steps = epochs[0] * -(-len(x) // 128)
    decay = lvm.callbacks.Schedule(lambda optim: LinearLR(optim, 1.0, 0.0, steps))
    counts = likelihoods.Binomial(16)
    vae = DeepGaussian(decoder, LATENT_DIM, counts)
    lvm.fit(vae, guide, x, optim=partial(Adam, lr=2e-3), num_epochs=epochs[0], seed=seed, callbacks=[decay])
    model = SemiSupervisedVAE(decoder, LATENT_DIM, 10, counts).initialize(guide.distribution(x), y, seed)
    loss = model.loss(guide)
    lvm.fit(model, guide, (x, y), loss=loss, optim=partial(Adam, lr=5e-4), num_epochs=epochs[1], seed=seed)
    with torch.no_grad():
        return model, guide.distribution(test)


def line(values: list[float] | np.ndarray) -> str:
    """One row of the table."""
    return "".join(f"{value:{width}.3f}" for value, width in zip(values, (8, 8, 13, 14, 21, 14, 6), strict=True))


def draw(results: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]) -> Figure:
    """Share of right answers by confidence, with standard errors: calibrated probabilities lie on the diagonal."""
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots(subplot_kw={"ylim": (0, 1.05)})
    axes.axline((0, 0), slope=1, color="0.6", linestyle="--")
    for (name, parts), style, colour in zip(results.items(), ("o-", "s-"), ("#D55E00", "#0072B2"), strict=True):
        probs, y = (torch.cat(values) for values in zip(*parts, strict=True))
        confidence, right = probs.amax(1).numpy(), (probs.argmax(1) == y).numpy()
        bins = np.digitize(confidence, EDGES)
        found = [bins == k for k in np.unique(bins)]
        share = np.array([right[some].mean() for some in found])
        errors = [(max(p * (1 - p), 0.01) / some.sum()) ** 0.5 for p, some in zip(share, found, strict=True)]
        axes.errorbar([confidence[b].mean() for b in found], share, errors, fmt=style, color=colour, label=name)
    axes.set(xlabel="confidence, mean of max p(y | x)", ylabel="share of right answers", xlim=(0.3, 1.02))
    axes.legend(frameon=False, loc="upper left")
    return figure


if __name__ == "__main__":
    main()
