r"""Local refinement: gradient steps on parameters of its own for each datum, for any guide.

.. math:: q^*_n = \arg\max_{q \in Q} \; E_{q(z)}\Big[\log \frac{p(x_n, z)}{q(z)}\Big]

An encoder gives q(z | x_n) at once; the best member of the same family for x_n alone has a higher ELBO, and the
difference is the encoder's (Cremer, Li and Duvenaud 2018, Inference Suboptimality in Variational Autoencoders).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm.auto import tqdm

from pyro_lvm._checks import check_positive_int, check_program, data_tensor, refuse, shown
from pyro_lvm._typing import DataPlate, Guide, Model, TensorLike, Vectorize
from pyro_lvm.errors import DataTypeError, SiteError
from pyro_lvm.guides.base import VariationalParameters
from pyro_lvm.guides.free import SHARED, flowing, is_plain, offset
from pyro_lvm.guides.leaves import Leaves
from pyro_lvm.objectives.estimators import ESTIMATORS
from pyro_lvm.tracing.batch import Batch, DataArgs, make_batch
from pyro_lvm.tracing.intercept import is_latent, replaced, run, support
from pyro_lvm.tracing.isolation import eval_mode, evaluation_rng, validation
from pyro_lvm.tracing.params import Fitted, anchor, current_params
from pyro_lvm.tracing.probe import Plan, probe_pair
from pyro_lvm.tracing.weights import Proposal, check_data, evaluation, weight_table

__all__ = ["Refinement", "refine"]

_NUM_CHECKED = 200  # draws that judge whether the steps were enough
_CONVERGED, _LARGE = 0.01, 0.1  # nats: what may be left, and what an error is not to excuse
_EPS = 1e-3  # a gradient far below is nothing to walk along: Adam would make long steps of rounding errors


@dataclass(frozen=True, eq=False, repr=False)
class Refinement:
    """A guide with parameters of its own for each datum, and how its optimisation went; tensors are ``(N,)``.

    Attributes:
        guide: q*, for the data that it was made for, in their order.
        gain: ELBO of q* less that of the guide it started from, in nats, never below zero but for noise.
        last_gain: ELBO of the last step less that of the mean of the third quarter of the steps, in nats.
        converged: whether that is at most 0.01 nats, or two of its standard errors if these are below 0.1 nats, and the
            datum did not end worse than it started.
        free: names of the parameters that each datum has for itself.
        fixed: what it has not for itself -> why.
        num_steps: gradient steps.
    """

    guide: Guide
    gain: torch.Tensor
    last_gain: torch.Tensor
    converged: torch.Tensor
    free: tuple[str, ...]
    fixed: dict[str, str]
    num_steps: int

    def __repr__(self) -> str:
        done = float(self.converged.double().mean())
        return (
            f"Refinement: {len(self.gain)} data, {self.num_steps} steps, ELBO +{float(self.gain.mean()):.4f} nats a "
            f"datum; converged for {done:.0%}; free: {', '.join(self.free)}"
            + (f"; not free: {', '.join(self.fixed)}" if self.fixed else "")
        )


def refine(
    model: Model,
    guide: Guide,
    x: TensorLike,
    *args: Any,
    family: Literal["own", "flow"] = "own",
    num_steps: int = 400,
    num_draws: int = 8,
    learning_rate: float | None = None,
    data_plate: DataPlate = "auto",
    data_args: DataArgs = "auto",
    vectorize: Vectorize = "auto",
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Refinement:
    r"""Optimise the guide for each datum on its own; the model and the guide's parameters stay as they are.

    With ``family="own"`` each parameter v of the distributions at the guide's latent sites becomes
    :math:`T(T^{-1}(v) + \delta_n)`, where T maps the real numbers onto the values that v may have. A flow, a mixture or
    a chain of bits of this package has offsets on what its encoder puts out instead. Weights of networks in a transform
    or a chain stay as they are, for all data: q* is the best over what is free. With ``family="flow"`` the draws go
    through a flow of their own for each datum (a spline, couplings, a full affine map), at first the identity: what a
    richer local family would give. Both start at the guide as it is, so that its dependences between sites stay.

    Adam ascends the sum of the ELBOs by ``num_draws`` draws, with the sticking-the-landing gradient where draws have
    gradients (its variance vanishes as q* nears the posterior) and the score with a leave-one-out baseline elsewhere;
    the rate falls along a cosine to 1 %, and steps of a location are in standard deviations of q. The rule for stopping
    is the number of steps alone. A datum that the steps left worse than it was goes back to the start.

    Args:
        model: generative program p(x, z).
        guide: variational program q(z | x).
        x: data ``(N, ...)``, all optimised at once; they do not interact.
        *args: further arguments of both; tensors with N rows go with x.
        family: the guide's own, or a flow on top of the guide.
        num_steps: gradient steps.
        num_draws: draws of each step.
        learning_rate: of Adam, at the start; None is 0.1, and 0.02 for a flow.
        data_plate: see `log_weights`, as are the options below.
        data_args: positions of the arguments with one row per datum.
        vectorize: ``False`` for Python control flow on latents.
        seed: forks the global random state.
        device: where to compute.
        progress: show a bar.

    Returns:
        `Refinement`. Its guide's ELBO is at most that of the best member of the family: too few steps leave it lower.

    Raises:
        SiteError: no parameter can be freed; the message says why, site by site.
        DataTypeError: an unknown family, a rate that is not above 0, or a call inside ``torch.inference_mode()``.
        PlateError, SupportError, ParameterError, ShapeError: as in `log_weights`.

    Source: Cremer et al. (2018), Section 3; Kim et al. (2018), Semi-Amortized Variational Autoencoders; Roeder et al.
    (2017) for the gradient.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def prior(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> result = refine(model, prior, torch.tensor([2.0]), seed=0)
        >>> result.free, result.converged
        (('z.loc', 'z.scale'), tensor([True]))
    """
    if family not in ("own", "flow"):
        raise DataTypeError(refuse("family", "'own' or 'flow'", repr(family), "Pass one of the two."))
    num_steps, num_draws = check_positive_int("num_steps", num_steps), check_positive_int("num_draws", num_draws, 2)
    check_program("guide", guide)
    if learning_rate is not None and not (isinstance(learning_rate, float | int) and learning_rate > 0):
        raise DataTypeError(refuse("learning_rate", "a number above 0", repr(learning_rate), "None chooses one."))
    learning_rate = learning_rate or {"own": 0.1, "flow": 0.02}[family]
    batch = make_batch(data_tensor("x", x), args, data_args).to(device)
    if torch.is_inference_mode_enabled():
        raise DataTypeError(refuse("refine", "gradients", "torch.inference_mode()", "Call it outside."))
    with evaluation(model, guide), torch.enable_grad():
        with evaluation_rng(0):
            plan = probe_pair(model, guide, batch, data_plate, vectorize)
            with torch.no_grad(), validation(False):
                check_data(plan, model, guide, batch)
        params = current_params()
        with evaluation_rng(seed), validation(False):
            local = _Local(guide, batch, family, plan.model_layout.dim)
            search = _Search(plan, model, local, batch, num_draws)
            start, before = search.ascend(num_steps, learning_rate, progress)
            gain, last_gain, converged = search.judge(start, before)
    free = tuple(local.leaves.tensors)
    return Refinement(Fitted(local, params), gain, last_gain, converged, free, local.leaves.fixed, num_steps)


class _Local:
    """A guide with leaves for each datum; a Pyro guide of the same kind."""

    def __init__(self, guide: Guide, batch: Batch, family: str, data_dim: int | None) -> None:
        self.guide = guide
        self.leaves = Leaves(data_dim)
        self.encoders: list[VariationalParameters] = []
        if hasattr(guide, "get_traces"):  # how a guide that runs its own model is known
            self.get_traces = guide.get_traces
        if family == "own":
            self._take_encoders(batch)
        replace = partial(flowing if family == "flow" else offset, self.leaves)
        self.program = guide if self.encoders else replaced(guide, replace)
        with torch.no_grad():
            run(self, batch.args)
        self.leaves.complete = True
        if not self.leaves.tensors:
            cure = "Sample latents from distributions with parameters, such as Normal, in the guide."
            raise SiteError(refuse("guide", "a latent site with parameters to free", self.leaves.fixed or "none", cure))

    def _take_encoders(self, batch: Batch) -> None:
        """Free what encoders put out, where the one distribution that they parametrise cannot be freed by itself."""
        owner = anchor(self.guide)
        latents = [site for site in run(self.guide, batch.args).values() if is_latent(site)]
        if not isinstance(owner, torch.nn.Module) or len(latents) != 1 or is_plain(latents[0]["fn"]):
            return
        self.encoders = [part for part in owner.modules() if isinstance(part, VariationalParameters)]
        inside = {id(p) for encoder in self.encoders for p in encoder.parameters()}
        if self.encoders and any(id(p) not in inside for p in owner.parameters()):
            self.leaves.fixed["weights beside the encoder"] = SHARED

    def __call__(self, *args: Any) -> Any:
        """Run the guide with its leaves, in eval mode: they were found so."""
        with eval_mode(self.guide), _shifted(self.encoders, self.leaves):
            return self.program(*args)


@contextmanager
def _shifted(encoders: list[VariationalParameters], leaves: Leaves) -> Iterator[None]:
    """Inside, what these put out has offsets."""
    with ExitStack() as stack:
        for i, encoder in enumerate(encoders):
            name = "phi" if len(encoders) == 1 else f"phi{i}"

            def shift(_module: Any, _inputs: Any, phi: torch.Tensor, name: str = name) -> torch.Tensor:
                return leaves.shift(name, phi, phi.shape[:-1], row=0)

            stack.callback(encoder.register_forward_hook(shift).remove)
        yield


Values = dict[str, torch.Tensor]


@dataclass
class _Search:
    """The ascent of one batch."""

    plan: Plan
    model: Model
    local: _Local
    batch: Batch
    num_draws: int

    def ascend(self, num_steps: int, learning_rate: float, progress: bool | None) -> tuple[Values, Values]:
        """All steps; returns the leaves as they were at first, and their mean over the third quarter of the steps.

        A mean, for the noise of the steps, which falls with their size, is not what is left to gain.
        """
        leaves, estimator = self.local.leaves, self._estimator()
        tensors = list(leaves.tensors.values())
        optimizer = Adam(tensors, lr=learning_rate, eps=_EPS)
        decay = CosineAnnealingLR(optimizer, num_steps, eta_min=learning_rate / 100)
        start = before = leaves.copy()
        third = range(num_steps // 2, num_steps - max(1, num_steps // 4))
        for step in tqdm(range(num_steps), unit="step", desc="refine", leave=False, disable=not shown(progress)):
            proposal = estimator(self.plan, self.local, self.batch)
            log_weights = weight_table(self.plan, self.model, proposal, self.num_draws).total  # (K, N)
            objective = proposal.bound(log_weights[:, None]).sum()
            gradients = torch.autograd.grad(-objective, tensors, allow_unused=True)
            self._step(optimizer, dict(zip(leaves.tensors, gradients, strict=True)))
            decay.step()
            if step in third:
                share = 1 / (step - third.start + 1)
                before = {name: before[name].lerp(leaf.detach(), share) for name, leaf in leaves.tensors.items()}
        return start, before

    def _step(self, optimizer: Adam, gradients: dict[str, torch.Tensor | None]) -> None:
        """One step of all leaves, each in its unit."""
        leaves, before = self.local.leaves, self.local.leaves.copy()
        for name, gradient in gradients.items():
            if gradient is not None:  # one datum without a bound is not to stop the others
                finite = gradient.nan_to_num(0.0, 0.0, 0.0)
                leaves.tensors[name].grad = finite * leaves.units.get(name, 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, unit in leaves.units.items():
                leaf = leaves.tensors[name]
                leaf.copy_(before[name] + unit * (leaf - before[name]))

    def _estimator(self) -> Callable[..., Any]:
        """The best of the gradient estimators that this guide allows."""
        trace = run(self.local, self.batch.args)
        if not all(_has_gradient(site["fn"]) for site in trace.values() if is_latent(site)):
            return ESTIMATORS["reinforce"]
        try:
            with torch.no_grad():
                ESTIMATORS["sticking_the_landing"](self.plan, self.local, self.batch, check=True).draw(2)
        except SiteError:  # the guide does not know the density of a given draw
            return ESTIMATORS["standard"]
        return ESTIMATORS["sticking_the_landing"]

    def judge(self, start: Values, before: Values) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gain, gain of the last quarter, and whether that is next to nothing; each ``(N,)``, on common draws."""
        leaves, seed = self.local.leaves, int(torch.randint(2**31, ()))
        final = leaves.copy()
        for leaf in leaves.tensors.values():
            leaf.requires_grad_(False)
        last, previous, first = (self._log_weights(values, seed) for values in (final, before, start))  # (K, N)
        gain, last_gain = (last - first).mean(0), (last - previous).mean(0)  # (N,)
        errors = [2 * (last - other).std(0) / _NUM_CHECKED**0.5 for other in (first, previous)]
        leaves.restore(final)
        worse = ~(gain >= 0)
        if leaves.rows:
            leaves.restore(start, worse)
        elif bool(worse.all()):
            leaves.restore(start)
        small = last_gain <= errors[1].clamp(min=_CONVERGED, max=_LARGE)
        return gain.clamp(min=0.0), last_gain, small & (gain >= -errors[0].clamp(min=_CONVERGED))

    def _log_weights(self, values: Values, seed: int) -> torch.Tensor:
        """Log-weights of fresh draws with these leaves, ``(K, N)``."""
        self.local.leaves.restore(values)
        device = self.batch.args[0].device
        size = self.plan.chunk_sizes(len(self.batch), _NUM_CHECKED, device)[1]
        with torch.no_grad(), evaluation_rng(seed):
            proposal = Proposal(self.plan, self.local, self.batch)
            sizes = [min(size, _NUM_CHECKED - done) for done in range(0, _NUM_CHECKED, size)]
            return torch.cat([weight_table(self.plan, self.model, proposal, now).total for now in sizes])


def _has_gradient(fn: Any) -> bool:
    """Whether draws have the gradient of their distribution; a straight-through one of classes has another."""
    return fn.has_rsample and not getattr(support(fn), "is_discrete", False)
