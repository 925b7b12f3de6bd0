"""What ``--help`` says: what each command computes, what its numbers mean, and calls that run as they stand."""

from dataclasses import dataclass

from pyro_lvm.cli.pairs import GUIDES

__all__ = ["COMMANDS", "EPILOG", "PROGRAM", "USAGE", "Text"]


@dataclass(frozen=True)
class Text:
    """The help of one command.

    Attributes:
        usage: the call in short.
        line: one line for the list of commands.
        page: what it does.
        examples: calls that run as they stand.
    """

    usage: str
    line: str
    page: str
    examples: str


USAGE = "pyro-lvm COMMAND ... [--help]"

PROGRAM = """\
Latent-variable models in Pyro: train a model p(x, z) with a guide q(z | x), estimate log p(x) of every datum with an
error and a verdict, compare guides.

    log p(x)  =  ELBO(x)  +  KL( q(z | x) || p(z | x) )

Everything is per datum, in nats, and higher is better."""

EPILOG = """\
examples:
  pyro-lvm compare --data digits --guides diagonal,full_rank,flow
  pyro-lvm train --data digits --out run && pyro-lvm evaluate run

Data, models and guides are named, or your own: data from a file or a folder of images, models and guides as
module:name, importable from the current folder. Data are never unpickled. `pyro-lvm train --help` lists the names.

Results go to stdout and into files. stderr has the progress bars, and one sentence where something is refused.
Exit codes: 0 fine; 1 `check` found errors, or your own code raised; 2 an argument, a file or a pair was refused;
130 interrupted by Ctrl-C; 141 stdout was closed."""

_ABOUT_MODELS = {
    "vae": "z ~ N(0, I), x | z through a perceptron",
    "linear_gaussian": "z ~ N(0, I), x | z ~ N(W z + mu, s^2 I): probabilistic PCA",
    "mixture_vae": "a vae with clusters in z; a vae is trained first, for as many steps again",
    "hierarchical": "a vae with two layers of latents, of L and L / 2 numbers",
    "binary": "z in {0, 1}^L, binary x",
    "mixture": "Gaussians with full covariances, z is the component",
    "normalizing_flow": "real-NVP, no latent",
    "autoregressive": "masked autoencoder of binary x, no latent",
}
_ABOUT_GUIDES = {
    "diagonal": "Gaussian with independent coordinates",
    "low_rank": "the same with a covariance of rank 2 added",
    "full_rank": "Gaussian with a full covariance",
    "mixture": "four diagonal Gaussians",
    "flow": "full_rank, bent by autoregressive networks",
    "top_down": "layers drawn from the top, each given x and the one above",
    "bottom_up": "layers drawn from the data upwards",
    "ladder": "top_down, merged with the model's own conditionals",
    "bernoulli": "independent bits",
    "autoregressive_bernoulli": "each bit given those before it",
    "none": "no guide: the model's own exact log p(x) is trained",
}


def _listed(about: dict[str, str]) -> str:
    return "\n".join(f"  {name:26s}{words}" for name, words in about.items())


_FITTING = _listed({model: ", ".join(guides) for model, guides in GUIDES.items()})

_STATUSES = """\
log p-hat is the logarithm of a mean of K weights p(x, z) / q(z | x). It is biased low, by about half its variance, and
the bias does not average out over data: where it is not small against the error, the bias is printed and no +-. The
ELBO is lower still, by KL(q || p(z | x)). Each datum has a status:

  exact            a closed form, or a sum over all latents
  zero_variance    all weights equal: exact, if the guide covers the posterior
  no_fault_found   k-hat, the tail index of the weights, is below 0.5
  heavy_tail       the value is usable, its error too small
  unreliable       a lower bound and no more: take more particles or a better guide
  no_support, nonfinite   no value

None of them says "correct": draws from one guide cannot show a mode that it misses."""

_TRAIN = Text(
    usage="pyro-lvm train --data DATA --out FOLDER [--model MODEL] [--guide GUIDE] [options]",
    line="train a pair, and keep it in a folder",
    page=f"""\
Train a model with a guide by gradient steps on a bound of log p(x), and keep the run in a folder.

Models:
{_listed(_ABOUT_MODELS)}

Guides:
{_listed(_ABOUT_GUIDES)}

Guides that fit a model, first the one that is taken if none is named:
{_FITTING}

Library models take each datum as one row of numbers, library guides have a perceptron as encoder. A model or a guide
of your own is module:name, for `name` in module.py of the current folder. A function is taken as it is, a class is
called without arguments. With a model of your own, library guides sample z of --latent-dim numbers.

The folder gets run.json (settings, data, versions), pair.pt (the parameters), history.csv and history.png (the bound
of each step, nats a datum) and checkpoint.pt, from which --resume goes on after a kill, to the same parameters.

In brackets below: what is taken where an option is not given.""",
    examples="""\
examples:
  pyro-lvm train --data digits --out run_digits
  pyro-lvm train --data two_moons --model linear_gaussian --guide none --steps 500 --out run_moons""",
)

_EVALUATE = Text(
    usage="pyro-lvm evaluate RUN [--data DATA] [--particles K] [options]",
    line="log p(x) of held-out data under a trained pair",
    page=f"""\
Estimate log p(x) of the data that a run holds out, by importance sampling with its guide.

{_STATUSES}

Prints a record of five lines, and writes log_marginal.json (all columns, read by pyro_lvm.LogMarginal.load) and
khat.png, the k-hat of each datum.""",
    examples="""\
examples, of a run that the first line makes:
  pyro-lvm train --data two_moons --guide flow --steps 500 --out run_flow
  pyro-lvm evaluate run_flow
  pyro-lvm evaluate run_flow --particles 10000 --seed 1 --out run_flow_10000""",
)

_COMPARE = Text(
    usage="pyro-lvm compare RUN RUN ... [options]\n       pyro-lvm compare --data DATA --guides A,B,... [options]",
    line="put guides of one model, or trained runs, into one table",
    page="""\
Which guide is better, and what is log p(x)? Rows of a table, from the best to the worst, on the same held-out data.

With --data and --guides one model is trained, with a guide of its own and the bound of five particles, and frozen;
then each guide is trained on it. All rows share log p(x), so that a difference of ELBOs is minus a difference of
KL(q || p(z | x)), and their estimates log p-hat have to agree: that is a check on them. Of a vae a second table
follows, of a linear-Gaussian model of the same data (grey levels, if they have them), whose log p(x) is known exactly.
A linear_gaussian model is set to its maximum likelihood, and gaps are measured from its exact log p(x).

With RUN RUN ... the rows are pairs that `pyro-lvm train` has trained, on the same held-out data. They do not share a
model: they are ranked by log p-hat, and another training seed may rank them otherwise.

  ELBO         mean lower bound of log p(x), nats a datum
  log p-hat    mean estimate of log p(x) by K draws; biased low
  ... - best   paired difference to the first row, +- its standard error over data and draws
  gap          log p(x) - ELBO = KL(q || p(z | x)), what the guide loses; guides of one model are pooled for log p(x)
  ESS/K        share of the draws that count, median over data
  status       no_fault_found, heavy_tail (error too small), unreliable (a lower bound): `pyro-lvm evaluate --help`

Names of models and guides: `pyro-lvm train --help`. In brackets below: what is taken where an option is not given.""",
    examples="""\
examples:
  pyro-lvm compare --data digits --guides diagonal,full_rank,flow
  pyro-lvm compare --data pinwheel --guides diagonal,flow --steps 500 --out compare_pinwheel""",
)

_CHECK = Text(
    usage="pyro-lvm check --data DATA [--model MODEL] [--guide GUIDE] [options]",
    line="look for what is wrong with a pair before it is trained",
    page="""\
Look for what makes training or evaluation of a pair wrong without a sign: mistyped sites, forgotten event dimensions,
data off their support, data that leak into one another, parameters that never get a gradient, and some forty more.

The pair is run on the first thousand data that it would be trained on; nothing is trained. Prints a page of errors
(results would be wrong), warnings (right for some pairs, a mistake in others) and notes (how the pair is going to be
treated), each with its name and its cure. The exit code is 1 if there are errors.

Names of models and guides: `pyro-lvm train --help`. In brackets below: what is taken where an option is not given.""",
    examples="""\
examples:
  pyro-lvm check --data digits --model vae --guide flow
  pyro-lvm check --data two_moons --model mixture --components 2""",
)

_PLOT = Text(
    usage="pyro-lvm plot FILE [--out PICTURE]",
    line="a picture of what the other commands have written",
    page="""\
Draw a picture of a file or a folder that another command has written:

  log_marginal.json   k-hat of each datum; above the upper line an estimate is not to be relied on
  comparison.json     bounds, gaps and paired differences in nats, and the shares of each status
  a run's folder      the bound of each epoch, nats a datum""",
    examples="""\
examples, of a run that the first line makes:
  pyro-lvm train --data gaussian_blobs --steps 300 --out run_blobs
  pyro-lvm plot run_blobs --out bound.pdf""",
)

COMMANDS = {"train": _TRAIN, "evaluate": _EVALUATE, "compare": _COMPARE, "check": _CHECK, "plot": _PLOT}
