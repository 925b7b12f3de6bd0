r"""A Bayes net over the attributes of a face, written by hand: p(x) and p(attribute | x), exactly.

    p(x, z) = prod over attributes a of p(z_a | parents) * prod over measurements m of N(x_m; mu_m(parents), s_m)

The attributes z are latent and discrete; x are noisy measurements of an image. log p(x) is the log of a sum over all 96
z, which `evidence.enumeration` takes by eliminating one variable after the other; p(z_a | x) is a ratio of two such
sums. The table of all p(x, z) is the check. Of pixels nobody can write such tables: there networks are learned.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch.nn.functional import one_hot

import pyro_lvm as lvm

ATTRIBUTES = {  # values, parents, p(value | parents) indexed by the values of the parents
    "gender": (("female", "male"), (), [0.5, 0.5]),
    "age": (("young", "old"), (), [0.7, 0.3]),
    "pose": (("front", "side"), (), [0.8, 0.2]),
    "eyes": (("brown", "blue"), (), [0.75, 0.25]),
    "hair": (("dark", "fair", "grey"), ("age",), [[0.7, 0.28, 0.02], [0.25, 0.1, 0.65]]),
    "beard": (("no", "yes"), ("gender", "age"), [[[0.999, 0.001], [0.995, 0.005]], [[0.75, 0.25], [0.6, 0.4]]]),
}
MEASUREMENTS = {  # parents, mean by their values, standard deviation; mostly between 0 and 1
    "jaw width": (("gender",), [0.4, 0.6], 0.15),
    "chin darkness": (("beard", "pose"), [[0.2, 0.35], [0.7, 0.55]], 0.15),
    "symmetry": (("pose",), [0.9, 0.5], 0.15),
    "iris brightness": (("pose", "eyes"), [[0.3, 0.7], [0.4, 0.5]], 0.15),
    "hair brightness": (("hair",), [0.2, 0.6, 0.8], 0.12),
}
FACES = {
    "wide jaw, dark chin": [0.65, 0.60, 0.88, 0.30, 0.25],
    "narrow jaw, grey": [0.35, 0.25, 0.85, 0.65, 0.80],
    "half in shadow": [0.55, 0.52, 0.68, 0.45, 0.45],
}
PLACES = {"gender": (0, 2), "age": (2.6, 2), "beard": (1, 1), "pose": (2, 1), "eyes": (3, 1), "hair": (4, 1)}
PLACES |= {name: (column, 0) for column, name in enumerate(MEASUREMENTS)}


def model(x: torch.Tensor) -> None:
    """Any Pyro function is a model: attributes, then measurements."""
    z: dict[str, torch.Tensor] = {}
    with pyro.plate("data", len(x)):
        for name, (_, parents, table) in ATTRIBUTES.items():
            z[name] = pyro.sample(name, dist.Categorical(x.new_tensor(table)[tuple(z[p] for p in parents)]))
        for reading, (name, (parents, table, scale)) in zip(x.T, MEASUREMENTS.items(), strict=True):
            pyro.sample(name, dist.Normal(x.new_tensor(table)[tuple(z[p] for p in parents)], scale), obs=reading)


def main() -> None:
    """Sum, check by the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="changes nothing: no number is random")
    parser.add_argument("--particles", type=int, default=0, help="changes nothing: sums are exact")
    parser.add_argument("--picture", default="bayes_net.png")
    parser.add_argument("--smoke", action="store_true", help="changes nothing: it is fast")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    x = torch.tensor(list(FACES.values()), dtype=torch.float64)  # (N, 5)
    exact = lvm.evidence.enumeration(model, x)
    posterior = {}
    for name, (values, _, _) in ATTRIBUTES.items():
        fixed = [pyro.condition(model, {name: torch.tensor(v)}) for v in range(len(values))]
        log_joint = torch.stack([lvm.evidence.enumeration(program, x).value for program in fixed], -1)
        posterior[name] = (log_joint - exact.value[:, None]).exp()  # (N, values): p(x, z_a = v) / p(x)
    print("face                 log p(x), nats  p(female | x)  p(old | x)  p(beard | x)")
    columns = (exact.value, posterior["gender"][:, 0], posterior["age"][:, 1], posterior["beard"][:, 1])
    for name, *row in zip(FACES, *columns, strict=True):
        print("{:20}{:15.4f}{:15.4f}{:12.4f}{:14.4f}".format(name, *row))
    table, sums = from_table(x), {"log p": exact.value} | posterior
    worst = max((value - table[name]).abs().max() for name, value in sums.items())
    print(f"largest difference from the table of all p(x, z): {worst:.1e}")
    draw(from_table(x[:1, :0]), posterior).savefig(args.picture, dpi=120)
    print(f"picture: {args.picture}")


def from_table(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """log p(x) and all posteriors, given the first measurements or none, from all p(x, z) at once and without Pyro."""
    states = torch.cartesian_prod(*(torch.arange(len(values)) for values, _, _ in ATTRIBUTES.values()))  # (96, 6)
    z = dict(zip(ATTRIBUTES, states.T, strict=True))
    joint = x.new_ones(len(x), len(states))
    for name, (_, parents, table) in ATTRIBUTES.items():
        joint = joint * x.new_tensor(table)[(*(z[p] for p in parents), z[name])]
    for reading, (parents, table, scale) in zip(x.T, MEASUREMENTS.values(), strict=False):
        density = dist.Normal(x.new_tensor(table)[tuple(z[p] for p in parents)], scale)
        joint = joint * density.log_prob(reading[:, None]).exp()
    total = joint.sum(1, keepdim=True)  # (N, 1)
    return {"log p": total[:, 0].log()} | {name: joint @ one_hot(v).to(x) / total for name, v in z.items()}


def draw(prior: dict[str, torch.Tensor], posterior: dict[str, torch.Tensor]) -> Figure:
    """The graph, and each attribute before and after the measurements."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    graph, bars = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.1, 1)})
    parents = {name: node[1] for name, node in ATTRIBUTES.items()} | {n: node[0] for n, node in MEASUREMENTS.items()}
    for name, place in PLACES.items():
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#56B4E9" if name in MEASUREMENTS else "white"}
        graph.text(*place, name.replace(" ", "\n"), ha="center", va="center", bbox=box, zorder=2)
        for parent in parents[name]:
            graph.annotate("", place, PLACES[parent], arrowprops={"arrowstyle": "-|>", "shrinkA": 18, "shrinkB": 20})
    graph.set(xlim=(-0.5, 4.5), ylim=(-0.4, 2.4), title="white: attributes z, latent; blue: measurements x, observed")
    graph.set_axis_off()
    labels = [f"{name} = {value}" for name, (values, _, _) in ATTRIBUTES.items() for value in values]
    shares = [torch.cat([table[name] for name in ATTRIBUTES], 1) for table in (prior, posterior)]  # (1, 13), (N, 13)
    for i, (name, row) in enumerate(zip(("", *FACES), torch.cat(shares), strict=True)):
        label, colour = f"p(z | {name})" if name else "p(z)", ("0.6", "#0072B2", "#D55E00", "#009E73")[i]
        bars.barh(torch.arange(len(labels)) + 0.2 * (i - 1.5), row, 0.2, label=label, color=colour)
    bars.set_yticks(range(len(labels)), labels)
    bars.set(xlabel="probability, before and after the measurements", xlim=(0, 1), ylim=(len(labels) - 0.4, -0.6))
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


if __name__ == "__main__":
    main()
