r"""What a latent-variable model learns from 85 faces: reconstructions, samples, and a walk between two faces.

    z ~ N(0, I),  x | z ~ N(f(z), s^2 I):      f = sigmoid(network) is a VAE, f(z) = W z + mu probabilistic PCA

The faces are the first hundred of the LFW subset that scikit-image contains, 25x25 grey pixels (`pip install
"pyro_lvm[data]"`). With 85 training images all depends on making more of them: a VAE sees each face at every step anew,
flipped, moved by up to a pixel, brighter or darker; without the moves it learns the faces by heart. The linear model,
whose maximum likelihood is a formula, gets all flips and moves at once. On so few faces it has the better log p(x), and
that is known exactly; the VAE's is an estimate from below, too low by less than the distance (100 times the particles
add 7 nats). What the VAE adds are means that stay in (0, 1) and bend.
"""

import argparse
from collections.abc import Iterator

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader, IterableDataset

import pyro_lvm as lvm
from pyro_lvm.models import DeepGaussian, LinearGaussian
from pyro_lvm.models.likelihoods import SharedNormal

SIZE, LATENT_DIM, WIDTH = 25, 20, 128
ENDS = [2, 11]  # two training faces


class InputNoise(nn.Module):
    """What the encoder sees of a face."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gaussian noise in training, none later."""
        return x + 0.05 * torch.randn_like(x) if self.training else x


class Redrawn(IterableDataset):
    """All faces as one batch, changed at random each time: flipped, moved by a pixel, brightness and contrast."""

    def __init__(self, faces: torch.Tensor) -> None:
        self.moved = all_moves(faces).unflatten(1, (3, 3))  # (N, 3, 3, H, W)

    def __iter__(self) -> Iterator[torch.Tensor]:
        count = len(self.moved)
        while True:
            x = self.moved[torch.arange(count), torch.randint(3, (count,)), torch.randint(3, (count,))]  # (N, H, W)
            x = torch.where(torch.rand(count, 1, 1) < 0.5, x, x.flip(-1))
            contrast, brightness = 1 + 0.2 * torch.randn(count, 1, 1), 0.05 * torch.randn(count, 1, 1)
            yield ((x - 0.5) * contrast + 0.5 + brightness).clamp(0, 1).flatten(1)


def all_moves(faces: torch.Tensor) -> torch.Tensor:
    """Each face moved by -1, 0, 1 pixels in both directions: ``(N, D)`` to ``(N, 9, H, W)``."""
    padded = pad(faces.view(-1, 1, SIZE, SIZE), (1, 1, 1, 1), mode="replicate")[:, 0]
    return padded.unfold(1, SIZE, 1).unfold(2, SIZE, 1).flatten(1, 2)


def main() -> None:
    """Train both models, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--picture", default="faces.png")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    torch.manual_seed(args.seed)
    data = lvm.datasets.faces(seed=args.seed)

    decoder = nn.Sequential(lvm.nn.MLP(LATENT_DIM, [WIDTH], SIZE**2), nn.Sigmoid())
    vae = DeepGaussian(decoder, LATENT_DIM, SharedNormal(initial_scale=0.2))
    hidden = (nn.Linear(SIZE**2, WIDTH), nn.ELU(), nn.Dropout(0.2))
    encoder = nn.Sequential(InputNoise(), *hidden, nn.Linear(WIDTH, 2 * LATENT_DIM))
    guide = lvm.guides.DiagonalNormal(LATENT_DIM, encoder)
    loader = DataLoader(Redrawn(data.train), batch_size=None)
    adam = lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=1e-3)  # noqa: E731
    run = lvm.fit(vae, guide, loader, num_steps=20 if args.smoke else 2000, optim=adam, seed=args.seed)
    print(f"trained a VAE on {len(data.train)} faces in {run.seconds:.0f} s; its scale s is {vae.likelihood.scale:.3f}")

    moved = all_moves(data.train).flatten(0, 1)
    moved = torch.cat([moved, moved.flip(-1)]).flatten(1)  # (1530, D)
    linear = {dim: LinearGaussian(dim, SIZE**2).fit_closed_form(moved) for dim in (LATENT_DIM, 160)}
    rows = {f"VAE, {LATENT_DIM} latents": (vae, guide)}
    rows |= {f"linear, {dim} latents": (model, None) for dim, model in linear.items()}
    result = lvm.compare(rows, data.test, num_particles=args.particles, seed=args.seed)
    print(f"\nlog p(x) of {len(data.test)} held-out faces (a density of {SIZE**2} grey levels in [0, 1])\n{result}")
    draw(vae, guide, linear[LATENT_DIM], data).savefig(args.picture, dpi=110)
    print(f"picture: {args.picture}")


@torch.no_grad()
def draw(vae: DeepGaussian, guide: nn.Module, linear: LinearGaussian, data: lvm.datasets.ImageData) -> Figure:
    """Ten columns of means f(z), without the noise of p(x | z); grey levels from 0 to 1."""
    z, steps = torch.randn(10, LATENT_DIM), torch.linspace(0, 1, 8)[:, None]
    rows = {"held-out faces": data.test[:10]}
    guide.eval()
    encoders = {"VAE": guide.distribution, "linear": linear.posterior}
    means = {"VAE": vae.decoder, "linear": lambda z: z @ linear.weight.T + linear.mean}
    for name, encode in encoders.items():
        rows[f"{name}: reconstructions"] = means[name](encode(data.test[:10]).mean)
    for name in encoders:
        rows[f"{name}: samples"] = means[name](z)
    for name, encode in encoders.items():
        (first, last), (start, stop) = data.train[ENDS], encode(data.train[ENDS]).mean
        between = means[name]((1 - steps) * start + steps * stop)
        rows[f"{name}: between the\ntwo at the ends"] = torch.cat([first[None], between, last[None]])
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    for axes, (label, images) in zip(figure.subplots(len(rows), 10), rows.items(), strict=True):
        for axis, image in zip(axes, images, strict=True):
            axis.imshow(image.view(SIZE, SIZE), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label.replace(": ", "\n"), rotation=0, ha="right", va="center")
    return figure


if __name__ == "__main__":
    main()
