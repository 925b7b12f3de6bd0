r"""Two tries at log p(x), each judged by the exact sum: why a guide is needed, and what it costs.

    p(x) = sum over z in {0, 1}^d of p(z) p(x | z)

First try: K values of z drawn uniformly, p(x) ~ |Z| / K sum p(x, z). It fails as d grows, for almost every z has a
tiny p(x, z); drawn from the prior it is hardly better. Second try: z drawn from a guide q(z | x),
p(x) ~ 1 / K sum p(x, z) / q(z | x). The guide here is a logistic regression of z on x, fitted to pairs that the model
draws. What is left is the bias of a logarithm, E[log p-hat] < log p, which falls like 1 / K and which the delta method
predicts.
"""

import argparse
import warnings

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure

import pyro_lvm as lvm

DATA_DIM = 32
PRIOR = 0.3  # probability of a one


def main() -> None:
    """Measure both tries and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=10_000)
    parser.add_argument("--picture", default="naive_monte_carlo.png")
    parser.add_argument("--smoke", action="store_true", help="few bits, to see that it runs")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    warnings.simplefilter("ignore", lvm.UnreliableEstimateWarning)  # that estimates fail is what is shown
    sizes = (2, 4, 6) if args.smoke else (2, 4, 6, 8, 10, 12, 14, 16)
    rows = [errors(num_bits, args) for num_bits in sizes]
    print("mean error of log p-hat(x) in nats, by number of bits (exact value by enumeration)")
    print("bits     terms   uniform     prior     guide")
    for bits, row in zip(sizes, rows, strict=True):
        print(f"{bits:4d} {2**bits:9,d}" + "".join(f"{row[name]:10.4f}" for name in ("uniform", "prior", "guide")))
    biases = jensen(args, 200 if args.smoke else 40_000)
    print("\nbias of log p-hat(x) in nats, by number of particles\n   K  measured  delta method")
    for num_particles, measured, predicted in biases:
        print(f"{num_particles:4d}{measured:10.4f}{predicted:14.4f}")
    draw(sizes, rows, biases).savefig(args.picture, dpi=120)
    print(f"picture: {args.picture}")


def errors(num_bits: int, args: argparse.Namespace) -> dict[str, float]:
    """Mean |log p-hat - log p| over 20 data of a random model, for each proposal."""
    generator = torch.Generator().manual_seed(args.seed + num_bits)
    weight = 2.0 * torch.randn(num_bits, DATA_DIM, generator=generator)
    encoder = torch.nn.Linear(DATA_DIM, num_bits)

    def model(x: torch.Tensor) -> torch.Tensor:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((num_bits,), PRIOR)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight - weight.sum(0) / 2).to_event(1), obs=x)
        return z

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    z = torch.bernoulli(torch.full((5000, num_bits), PRIOR), generator=generator)
    x = torch.bernoulli((z @ weight - weight.sum(0) / 2).sigmoid(), generator=generator)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    for _ in range(200):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(encoder(x), z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    test = x[:20]
    exact = lvm.evidence.enumeration(model, test)
    options = {"num_particles": args.particles, "seed": args.seed}
    estimates = {
        "uniform": lvm.evidence.uniform(model, test, **options),
        "prior": lvm.evidence.prior(model, test, **options),
        "guide": lvm.log_marginal(model, guide, test, **options),
    }
    return {name: float((result.value - exact.value).abs().mean()) for name, result in estimates.items()}


def jensen(args: argparse.Namespace, num_repeats: int) -> list[tuple[int, float, float]]:
    """(K, measured bias, bias that the delta method predicts) where log p(x) is known: z ~ N(0, 1), x | z ~ N(z, 1)."""
    x = torch.full((num_repeats,), 1.0)  # one datum, repeated: the mean over the copies is over repeats

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = float(dist.Normal(0.0, 2**0.5).log_prob(x[0]))
    records = [lvm.evidence.prior(model, x, num_particles=k, seed=args.seed) for k in (2, 4, 8, 16, 32, 64)]
    return [(record.num_particles, record.mean - exact, record.mean_bias) for record in records]


def draw(sizes: tuple[int, ...], rows: list[dict[str, float]], biases: list[tuple[int, float, float]]) -> Figure:
    """Errors by number of bits, and bias by number of particles."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, marker, colour in (("uniform", "o", "#D55E00"), ("prior", "s", "#E69F00"), ("guide", "D", "#0072B2")):
        left.semilogy(sizes, [max(row[name], 1e-6) for row in rows], marker=marker, color=colour, label=name)
    left.set(xlabel="bits of z", ylabel="mean error of log p-hat, nats", title="proposals against the exact sum")
    left.legend(frameon=False)
    right.loglog([k for k, _, _ in biases], [-m for _, m, _ in biases], "o", color="#0072B2", label="measured")
    right.loglog([k for k, _, _ in biases], [-p for _, _, p in biases], "-", color="#D55E00", label="delta method")
    right.set_xticks([k for k, _, _ in biases], labels=[str(k) for k, _, _ in biases])
    right.minorticks_off()
    right.set(xlabel="particles K", ylabel="-bias of log p-hat, nats", title="Jensen: E log is not log E")
    right.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
