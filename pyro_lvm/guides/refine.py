r"""Local refinement: gradient steps on parameters of its own for each datum, for any guide.

.. math:: q^*_n = \arg\max_{q \in Q} \; E_{q(z)}\Big[\log \frac{p(x_n, z)}{q(z)}\Big]

An encoder gives q(z | x_n) at once; the best member of the same family for x_n alone has a higher ELBO, and the
difference is the encoder's (Cremer, Li and Duvenaud 2018, Inference Suboptimality in Variational Autoencoders).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm.auto import tqdm

from pyro_lvm._checks import check_positive_int, data_tensor, refuse, shown
from pyro_lvm._typing import DataPlate, Guide, Model, TensorLike, Vectorize
from pyro_lvm.errors import DataTypeError, SiteError
from pyro_lvm.guides.base import VariationalParameters
from pyro_lvm.guides.free import Leaves
from pyro_lvm.objectives.estimators import ESTIMATORS
from pyro_lvm.tracing.batch import Batch, DataArgs, make_batch
from pyro_lvm.tracing.intercept import is_latent, replaced, run
from pyro_lvm.tracing.isolation import evaluation_rng, validation
from pyro_lvm.tracing.params import Fitted, anchor, learned
from pyro_lvm.tracing.probe import Plan, probe_pair
from pyro_lvm.tracing.weights import Proposal, check_data, evaluation, weight_table

__all__ = ["Refinement", "refine"]

_NUM_CHECKED = 200  # draws that judge whether the steps were enough
_CONVERGED = 0.01  # nats
_EPS = 1e-3  # a gradient far below is nothing to walk along: Adam would make long steps of rounding errors


@dataclass(frozen=True, eq=False, repr=False)
class Refinement:
    """A guide with parameters of its own for each datum, and how its optimisation went; tensors are ``(N,)``.

    Attributes:
        guide: q*, for the data that it was made for, in their order.
        gain: ELBO of q* less that of the guide it started from, in nats, never below zero but for noise.
        last_gain: ELBO of q* less that of the mean of the third quarter of the steps, in nats.
        converged: whether that is less than 0.01 nats, or than two of its standard errors.
        free: names of the parameters that each datum has for itself.
        fixed: latent site -> why it has none of its own.
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
    :math:`T(T^{-1}(v) + \delta_n)`, where T maps the real numbers onto the values that v may have. A guide of this
    package with one latent site has offsets on what its encoder puts out instead. With ``family="flow"`` the draws go
    through a flow of their own for each datum (a spline, couplings, a full affine map), at first the identity: what a
    richer local family would give. Both start at the guide as it is, so that its dependences between sites stay.

    Adam ascends the sum of the ELBOs by ``num_draws`` draws, with the sticking-the-landing gradient where draws have
    gradients (its variance vanishes as q* nears the posterior) and the score with a leave-one-out baseline elsewhere;
    the rate falls along a cosine to 1 %. The rule for stopping is the number of steps alone. A datum that the steps
    left worse than it was goes back to the start.

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
        DataTypeError: an unknown family.
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
    learning_rate = learning_rate or {"own": 0.1, "flow": 0.02}[family]
    batch = make_batch(data_tensor("x", x), args, data_args).to(device)
    devices = [batch.args[0].device]
    params = learned(model, guide)
    with evaluation(model, guide):
        with evaluation_rng(0, devices):
            plan = probe_pair(model, guide, batch, data_plate, vectorize)
            with torch.no_grad(), validation(False):
                check_data(plan, model, guide, batch)
        with evaluation_rng(seed, devices), validation(False):
            local = _Local(guide, batch, family)
            search = _Search(plan, model, local, batch, num_draws)
            start, before = search.ascend(num_steps, learning_rate, progress)
            gain, last_gain, converged = search.judge(start, before)
    free = tuple(local.leaves.tensors)
    return Refinement(Fitted(local, params), gain, last_gain, converged, free, local.leaves.fixed, num_steps)


class _Local:
    """A guide with leaves for each datum."""

    def __init__(self, guide: Guide, batch: Batch, family: str) -> None:
        self.leaves = Leaves()
        owner = anchor(guide)
        latents = [name for name, site in run(guide, batch.args).items() if is_latent(site)]
        parts = list(owner.modules()) if isinstance(owner, torch.nn.Module) else []
        own = [part for part in parts if isinstance(part, VariationalParameters)]
        self.encoders = own if family == "own" and len(latents) == 1 else []
        replace = self.leaves.flow if family == "flow" else self.leaves.offsets
        self.program = guide if self.encoders else replaced(guide, replace)
        with torch.no_grad():
            run(self, batch.args)
        self.leaves.complete = True
        if not self.leaves.tensors:
            cure = "Sample latents from distributions with parameters, such as Normal, in the guide."
            raise SiteError(refuse("guide", "a latent site with parameters to free", self.leaves.fixed or "none", cure))

    def __call__(self, *args: Any) -> Any:
        """Run the guide with its leaves."""
        with _shifted(self.encoders, self.leaves):
            return self.program(*args)


@contextmanager
def _shifted(encoders: list[VariationalParameters], leaves: Leaves) -> Iterator[None]:
    """Inside, what these put out has offsets."""
    with ExitStack() as stack:
        for i, encoder in enumerate(encoders):
            name = "phi" if len(encoders) == 1 else f"phi{i}"

            def shift(_module: Any, _inputs: Any, phi: torch.Tensor, name: str = name) -> torch.Tensor:
                return leaves.shift(name, phi, phi.shape[:-1])

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
        third = range(num_steps // 2, num_steps - num_steps // 4)
        for step in tqdm(range(num_steps), unit="step", desc="refine", leave=False, disable=not shown(progress)):
            proposal = estimator(self.plan, self.local, self.batch)
            log_weights = weight_table(self.plan, self.model, proposal, self.num_draws).total  # (K, N)
            objective = proposal.bound(log_weights[:, None]).sum()
            for leaf, gradient in zip(tensors, torch.autograd.grad(-objective, tensors), strict=True):
                leaf.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # one datum without a bound is not to stop the others
            optimizer.step()
            decay.step()
            if step in third:
                share = 1 / (step - third.start + 1)
                before = {name: before[name].lerp(leaf.detach(), share) for name, leaf in leaves.tensors.items()}
        return start, before

    def _estimator(self) -> Callable[..., Any]:
        """The best of the gradient estimators that this guide allows."""
        trace = run(self.local, self.batch.args)
        if not all(site["fn"].has_rsample for site in trace.values() if is_latent(site)):
            return ESTIMATORS["reinforce"]
        try:
            with torch.no_grad():
                ESTIMATORS["sticking_the_landing"](self.plan, self.local, self.batch, check=True).draw(2)
        except SiteError:  # the guide does not know the density of a given draw
            return ESTIMATORS["standard"]
        return ESTIMATORS["sticking_the_landing"]

    def judge(self, start: Values, before: Values) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gain, gain of the last quarter, and whether that is next to nothing; each ``(N,)``, on common draws."""
        leaves, dim, seed = self.local.leaves, self.plan.model_layout.dim, int(torch.randint(2**31, ()))
        final = leaves.copy()
        for leaf in leaves.tensors.values():
            leaf.requires_grad_(False)
        last, previous, first = (self._log_weights(values, seed) for values in (final, before, start))  # (K, N)
        gain, last_gain = (last - first).mean(0), (last - previous).mean(0)  # (N,)
        leaves.restore(final)
        worse = ~(gain >= 0)
        if dim is not None:
            leaves.restore(start, worse, dim)
        elif bool(worse.all()):
            leaves.restore(start)
        noise = (last - previous).std(0) / _NUM_CHECKED**0.5
        return gain.clamp(min=0.0), last_gain, last_gain <= (2 * noise).clamp(min=_CONVERGED)

    def _log_weights(self, values: Values, seed: int) -> torch.Tensor:
        """Log-weights of fresh draws with these leaves, ``(K, N)``."""
        self.local.leaves.restore(values)
        device = self.batch.args[0].device
        size = self.plan.chunk_sizes(len(self.batch), _NUM_CHECKED, device)[1]
        with torch.no_grad(), evaluation_rng(seed, [device]):
            proposal = Proposal(self.plan, self.local, self.batch)
            sizes = [min(size, _NUM_CHECKED - done) for done in range(0, _NUM_CHECKED, size)]
            return torch.cat([weight_table(self.plan, self.model, proposal, now).total for now in sizes])
