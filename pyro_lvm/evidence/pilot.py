"""What annealing is tuned by: populations of a few chains that find temperatures, steps and metrics as they go.

A pilot is a sequential Monte Carlo sampler: it goes on as far as its weights stay even enough, resamples, and moves.
So no chain is left behind, and what it sees at each b are draws from there. All of it is for each datum on its own.
"""

import math

import torch

from pyro_lvm.evidence.annealing import Course, Path, jittered
from pyro_lvm.ops.hmc import hmc_transition

__all__ = ["PILOT_CHAINS", "enough_steps", "most_rows", "tune"]

PILOT_CHAINS = 32
_NODES = 128  # at most
_DENSE = 64  # dimensions up to which the metric is a matrix
_LEAST = 24  # of the second pilot
_KEPT = 0.8  # of the effective sample size from one b to the next
_TARGET = 0.75  # acceptance that steps are tuned to
_TURN = 1.8  # length of a trajectory in units of the metric: a little more than a quarter of a period
_WINDOWS = 8  # correlation matrices on the way, at least
_NUMBERS = 2**22  # in all of them, at most, unless that makes fewer windows
_VARIANCE = 2 / 3  # of the log-weights, that the number of steps is chosen for
_MOST_MEMORY = 0.95  # that so few chains can tell from 1
_TINY = 1e-300
_STEPS = (200, 2000)  # least and most that are chosen


def tune(path: Path, num_leapfrog: int) -> Course:
    """Two pilots: the first finds the temperatures, the second follows them with the metrics of the first."""
    course = _Pilot(path, num_leapfrog, None, rate=1.0).run()
    num_steps = int(course.lengths.sum(0).amax().clamp(_LEAST, _NODES // 2))
    return _Pilot(path, num_leapfrog, course.at(num_steps), rate=0.4).run()


def enough_steps(course: Course) -> int:
    """A number of steps that leaves the log-weights of all data a variance of 2/3 by the pilot's reckoning.

    With T steps of equal length it is L^2 / T, where L is that of the whole way.
    """
    least, most = _STEPS
    return int((course.lengths.sum(0).square() / _VARIANCE).amax().nan_to_num(0.0, most).clamp(least, most))


def most_rows(dim: int) -> int:
    """Data whose covariances, at as many nodes as there are mostly, take 128 MiB."""
    return max(1, 2**24 // (dim**2 * 64)) if dim <= _DENSE else max(1, 2**24 // (dim * 64))


class _Pilot:
    """One population for each datum, and what it has seen."""

    def __init__(self, path: Path, num_leapfrog: int, course: Course | None, rate: float) -> None:
        self.path, self.num_leapfrog, self.course, self.rate = path, num_leapfrog, course, rate
        self.most = math.log(_TURN / num_leapfrog) if course else math.inf  # a metric that lags behind needs long steps
        self.state = path.state(path.draw(PILOT_CHAINS))
        self.log_weight = torch.zeros_like(self.state.delta, dtype=torch.float64)  # (K, N)
        zeros = torch.zeros_like(self.log_weight[0])
        self.offset = zeros if course else zeros + min(math.log(_TURN / num_leapfrog), -0.25 * math.log(path.dim))
        self.dense = path.dim <= _DENSE
        self.scale = self.correlation = zeros
        self.nodes: list[tuple[torch.Tensor, ...]] = []

    def run(self) -> Course:
        """From b = 0 to b = 1."""
        beta, t = torch.zeros_like(self.offset), 0
        self._see(beta, t, num_moves=3)
        while bool((beta < 1).any()):
            t += 1
            beta = self._next(beta, t)
            self._see(beta, t, num_moves=2)
        return self._chosen()

    def _next(self, beta: torch.Tensor, t: int) -> torch.Tensor:
        """Go on to the next b, ``(N,)``, and let the weights follow."""
        delta = self.state.delta.double()
        if self.course:
            new = self.course.betas[t]
        else:
            new = _next_beta(self.log_weight, delta, beta) if t < _NODES else torch.ones_like(beta)
        gained = torch.where(new > beta, (new - beta) * delta, 0.0)
        log_weight = (self.log_weight + gained).nan_to_num(nan=-torch.inf, posinf=-torch.inf)
        self.log_weight = log_weight - log_weight.logsumexp(0).nan_to_num(0.0, 0.0, 0.0)
        self._resample()
        return new

    def _resample(self) -> None:
        """Systematically, where the effective sample size is below half."""
        weights, size = self.log_weight.exp(), len(self.log_weight)  # (K, N)
        poor = (weights.square().sum(0) > 2 / size) & (weights.sum(0) > 0.5)  # (N,)
        if not bool(poor.any()):
            return
        order = torch.arange(size, device=weights.device)
        rungs = ((order + torch.rand(1, device=weights.device)) / size).double().expand(len(poor), -1)
        chosen = torch.searchsorted(weights.T.cumsum(1).contiguous(), rungs.contiguous()).clamp(max=size - 1)
        self.state = self.state.gathered(torch.where(poor, chosen.T, order[:, None]))
        self.log_weight = torch.where(poor, -math.log(size), self.log_weight)

    def _see(self, beta: torch.Tensor, t: int, num_moves: int) -> None:
        """Move at this b, adapt, and note what there is to know."""
        weights = self.log_weight.softmax(0).nan_to_num(1 / len(self.log_weight))  # (K, N)
        spread = _spread(self.state.delta, weights)
        self._follow(weights)
        dtype = self.state.u.dtype
        metric = self.course.metric(t, dtype) if self.course else self._metric().to(dtype)
        start = self.course.log_steps[t] if self.course else torch.zeros_like(self.offset)
        memory = torch.ones_like(spread)
        for _ in range(num_moves):
            before = self.state.delta
            step = jittered((start + self.offset).clamp(max=self.most), len(weights))
            self.state, acceptance = hmc_transition(self.path.state, self.state, beta, step, metric, self.num_leapfrog)
            surplus = (acceptance.double() * weights).sum(0) - _TARGET
            self.offset = torch.minimum(self.offset + self.rate * surplus, self.most - start)
            memory = _correlated(before, self.state.delta, weights)
        self.nodes.append((beta, start + self.offset, spread, memory, self.scale, self.correlation))

    def _follow(self, weights: torch.Tensor) -> None:
        """The spread of each coordinate that is now, ``(N, D)``; correlations ``(N, D, D)`` half of those before."""
        u = self.state.u.double().nan_to_num(0.0).clamp(-1e12, 1e12)
        size = 1 / weights.square().sum(0)  # (N,)
        unbiased = weights * (size / (size - 1).clamp(min=1))
        part = unbiased.sqrt()[..., None] * (u - (weights[..., None] * u).sum(0))  # (K, N, D)
        scale = part.square().sum(0).sqrt().clamp(min=1e-12)
        if self.dense:
            part = part / scale
            now = torch.einsum("kni,knj->nij", part, part)
            self.correlation = (self.correlation + now) / 2 if self.nodes else now
        self.scale = scale.masked_fill(~self.path.coordinates.moves, 0.0)

    def _metric(self) -> torch.Tensor:
        return self.scale[..., None] * _factor(self.correlation, 2 * PILOT_CHAINS) if self.dense else self.scale

    def _chosen(self) -> Course:
        """What chains are to follow."""
        betas, log_steps, spread, memory, scales, correlations = (
            torch.stack(each) for each in zip(*self.nodes, strict=True)
        )
        memory = _smooth(memory).clamp(0.0, _MOST_MEMORY)
        spread = spread * ((1 + memory) / (1 - memory)).sqrt()
        lengths = betas.diff(dim=0) * (spread[1:] * spread[:-1]).sqrt()  # (G - 1, N)
        factors, place = None, torch.zeros_like(betas)
        if self.dense:
            most = max(_WINDOWS, _NUMBERS // correlations[0].numel())
            windows = torch.arange(len(betas), device=betas.device).tensor_split(min(most, len(betas)))
            factors = torch.stack([_factor(correlations[w].mean(0), len(w) * PILOT_CHAINS / 2) for w in windows])
            for i, window in enumerate(windows):
                place[window] = float(i)
        return Course(betas, _smooth(log_steps), _smooth(scales.log()), factors, place, lengths)


def _next_beta(log_weight: torch.Tensor, delta: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """The next b, ``(N,)``, that keeps most of the effective sample size, at most 1."""
    delta = delta.nan_to_num(nan=-torch.inf, posinf=-torch.inf)

    def size(width: torch.Tensor) -> torch.Tensor:
        ratio = width * delta  # (K, N)
        return (2 * (log_weight + ratio).logsumexp(0) - (log_weight + 2 * ratio).logsumexp(0)).exp().nan_to_num(0.0)

    # A chain where the end has no mass is lost at any b above zero: what is compared are the others.
    least = _KEPT * size(torch.full_like(beta, _TINY))
    low, high = torch.full_like(beta, -40.0), (1 - beta).clamp(min=_TINY).log()  # of the log of the width
    for _ in range(40):
        middle = (low + high) / 2
        good = size(middle.exp()) >= least
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(size(1 - beta) >= least, 1.0, (beta + low.exp()).clamp(max=1.0))


def _spread(delta: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the chains that have one, ``(N,)``."""
    weights = weights.where(delta.isfinite(), 0.0)
    weights, delta = weights / weights.sum(0).clamp(min=_TINY), delta.double().where(delta.isfinite(), 0.0)
    return (weights * (delta - (weights * delta).sum(0)).square()).sum(0).sqrt()


def _correlated(before: torch.Tensor, after: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Correlation over the chains of what it was and what it is, ``(N,)``; zero where nothing varies."""
    finite = before.isfinite() & after.isfinite()
    weights = weights.where(finite, 0.0)
    weights = weights / weights.sum(0).clamp(min=_TINY)
    pair = [values.double().where(finite, 0.0) for values in (before, after)]
    first, second = (values - (weights * values).sum(0) for values in pair)
    sizes = [(weights * values.square()).sum(0) for values in (first, second)]
    return (weights * first * second).sum(0) / (sizes[0] * sizes[1]).sqrt().clamp(min=_TINY)


def _factor(correlation: torch.Tensor, count: float) -> torch.Tensor:
    """Cholesky factors of matrices ``(N, D, D)``, shrunk towards the identity by as much as they are noise.

    Schaefer and Strimmer (2005), A shrinkage approach to large-scale covariance matrix estimation, table 2, target B.
    """
    eye = torch.eye(correlation.shape[-1], dtype=correlation.dtype, device=correlation.device)
    others = correlation * (1 - eye)
    noise = ((1 - others.square()).square() * (1 - eye)).sum((-2, -1)) / count  # (N,)
    share = (noise / others.square().sum((-2, -1)).clamp(min=_TINY)).clamp(1e-6, 1.0)
    return torch.linalg.cholesky((1 - share)[:, None, None] * others + eye)


def _smooth(values: torch.Tensor) -> torch.Tensor:
    """Means over five nodes, those at the ends repeated."""
    padded = torch.cat([values[:1], values[:1], values, values[-1:], values[-1:]])
    return torch.stack([padded[i : i + len(values)] for i in range(5)]).mean(0)
