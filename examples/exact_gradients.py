r"""How wrong is the gradient that a variational method follows? Judged by the exact one, and log p by its two parts.

    grad log p(x) = sum over z of p(z | x) grad log p(x, z)           exact: all 2^8 values of z
    grad ELBO(x)  = E_q [grad log p(x, z)]                            the same mean, but under the guide q
    grad of the bound with K particles, L_K = E log 1/K sum_k p(x, z_k) / q(z_k | x), in between

All by the model's parameters. L_1 is the ELBO: no number of draws removes its gradient's bias, for the guide is not the
posterior. That of L_K falls about like 1 / K, its noise like 1 / sqrt(K). Behind it: log p = ELBO + KL(q, posterior).
"""

import argparse

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch.distributions import kl_divergence
from torch.nn.functional import cosine_similarity

import pyro_lvm as lvm

BITS = 8
LABELS = {"noise": "noise of one gradient", "bias": "bias", "chance": "bias by chance alone"}


def main() -> None:
    """Fit a model and a guide, check the identity, measure gradients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=500, help="largest K")
    parser.add_argument("--picture", default="exact_gradients.png")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    torch.manual_seed(args.seed)
    torch.set_default_dtype(torch.float64)
    images = lvm.datasets.digits("threshold", seed=args.seed).train.double()  # (N, 64)
    model, encoder = lvm.models.BinaryLatent(BITS, 64), torch.nn.Linear(64, BITS)
    guide = lvm.guides.as_guide(lambda x: dist.Bernoulli(logits=encoder(x)).to_event(1))
    codes = (torch.arange(2**BITS)[:, None] >> torch.arange(BITS) & 1).double()[:, None]  # (2^L, 1, L)

    optimizer = torch.optim.Adam([*model.parameters(), *encoder.parameters()], lr=0.03)
    for _ in range(5 if args.smoke else 300):  # the ELBO as a sum over all z: no draws are needed to train these two
        optimizer.zero_grad()
        terms(model, encoder, images[torch.randint(len(images), (50,))], codes)["elbo"].mean().neg().backward()
        optimizer.step()

    x = images[:20]
    elbo = gradient(model, identity(model, encoder, x, codes))  # (P,)
    exact = gradient(model, model.log_prob(x))
    sizes = [k for k in (1, 5, 50) if k < args.particles] + [args.particles]
    rows = [summary(measure(model, guide, x, k, 5 if args.smoke else 200), exact) for k in sizes]
    print("\ngradient of L_K in lengths of the exact one of log p(x); K = exact: the ELBO's, by its sum over all z")
    print("    K      bias  (by chance)    noise   cosine")
    for k, row in zip(["exact", *sizes], [summary(elbo[None], exact), *rows], strict=True):
        print(f"{k:>5} {row['bias']:9.4f} {row['chance']:12.4f} {row['noise']:8.4f} {row['cosine']:8.4f}")
    draw(sizes, rows, exact, elbo).savefig(args.picture, dpi=120)
    print(f"picture: {args.picture}")


def identity(model, encoder, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:  # noqa: ANN001
    """Print log p(x) = ELBO + KL(q || posterior), and the ELBO in both forms, which is returned, ``(N,)``."""
    each, log_p = terms(model, encoder, x, codes), model.log_prob(x)  # (N,)
    m = {name: value.mean().item() for name, value in each.items()}
    again, total, error = m["likelihood"] - m["prior"], m["elbo"] + m["kl"], each["elbo"] + each["kl"] - log_p
    print(f"{len(x)} digits, {BITS} bits; means in nats a digit, each a sum over all {len(codes)} values of z")
    print(f"  E log p(x, z)   {m['joint']:9.4f} + entropy of q       {m['entropy']:.4f} = {m['elbo']:9.4f}, the ELBO")
    print(f"  E log p(x | z)  {m['likelihood']:9.4f} - KL(q || prior)     {m['prior']:.4f} = {again:9.4f}, again")
    print(f"  ELBO            {m['elbo']:9.4f} + KL(q || posterior) {m['kl']:.4f} = {total:9.4f}")
    print(f"  log p(x) itself {log_p.mean():9.4f}, for no digit further off than {error.abs().max():.0e}")
    return each["elbo"]


def terms(model, encoder, x: torch.Tensor, codes: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: ANN001
    """Everything in log p(x) = ELBO + KL, by summing over all z: ``(N,)`` each."""
    logits = encoder(x)  # (N, L)
    q, prior = dist.Bernoulli(logits=logits), dist.Bernoulli(logits=model.logits.expand_as(logits))
    log_q, log_joint = q.log_prob(codes).sum(-1), model.log_joint(x, codes)  # (2^L, N)
    joint, entropy = (log_q.exp() * log_joint).sum(0), q.entropy().sum(-1)
    likelihood = (log_q.exp() * (log_joint - prior.log_prob(codes).sum(-1))).sum(0)
    kl = (log_q.exp() * (log_q - log_joint.log_softmax(0))).sum(0)  # the softmax is the posterior
    parts = {"joint": joint, "entropy": entropy, "elbo": joint + entropy, "likelihood": likelihood, "kl": kl}
    return parts | {"prior": kl_divergence(q, prior).sum(-1)}


def gradient(model: torch.nn.Module, objective: torch.Tensor) -> torch.Tensor:
    """Of the mean of an objective ``(N,)`` with respect to the P numbers in the model: ``(P,)``."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(objective.mean(), list(model.parameters()))])


def measure(model, guide, x, num_particles: int, num_repeats: int) -> torch.Tensor:  # noqa: ANN001
    """Estimates of the gradient of L_K: ``(num_repeats, P)``."""
    bounds = (lvm.log_weights(model, guide, x, num_particles=num_particles).logsumexp(0) for _ in range(num_repeats))
    return torch.stack([gradient(model, bound) for bound in bounds])  # less log K, which has no gradient


def summary(draws: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Bias of gradients ``(R, P)``, what chance alone would show as bias, noise, and cosine."""
    mean, length = draws.mean(0), float(exact.norm())
    noise = float(draws.var(0, correction=0).sum().sqrt()) / length
    bias, cosine = float((mean - exact).norm()) / length, float(cosine_similarity(mean, exact, 0))
    return {"bias": bias, "chance": noise / len(draws) ** 0.5, "noise": noise, "cosine": cosine}


def draw(sizes: list[int], rows: list[dict[str, float]], exact: torch.Tensor, mean_elbo: torch.Tensor) -> Figure:
    """Bias and noise by number of particles, and the ELBO's gradient against the exact one."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, style, colour in (("noise", "s-", "#D55E00"), ("bias", "o-", "#0072B2"), ("chance", "--", "#009E73")):
        left.loglog(sizes, [row[name] for row in rows], style, color=colour, label=LABELS[name])
    left.set(xlabel="particles K", ylabel="in lengths of the exact gradient", title="gradient of the bound L_K")
    left.legend(frameon=False, loc="lower left")
    right.plot(exact, mean_elbo, ".", color="#0072B2", alpha=0.5)
    right.axline((0, 0), slope=1, color="#E69F00")
    right.set(xlabel="gradient of log p(x), nats", ylabel="gradient of the ELBO, nats", title="one point a parameter")
    return figure


if __name__ == "__main__":
    main()
