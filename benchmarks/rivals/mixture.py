"""Contenders that fit a mixture of Gaussians from k-means on; a piece of work is a whole fit.

EM goes on until its gain is below 1e-7; `fit` until it is within 0.01 nats a datum of where EM ended.
"""

from functools import partial
from typing import Any

import pyro
import torch
from sklearn.mixture import GaussianMixture as ScikitMixture

import pyro_lvm as lvm
from benchmarks.rivals.problems import Mixture, Problem, make
from benchmarks.rounds import Turn

__all__ = ["em", "fit_captured", "fit_plain"]

WITHIN = 0.01  # nats a datum
LIMIT = 20_000  # steps


def scikit_learn(pair: Mixture) -> ScikitMixture:
    """EM; it stops when the log-likelihood rises by less than ``tol`` an iteration."""
    return ScikitMixture(pair.model.num_components, tol=1e-7, max_iter=10_000, random_state=0).fit(pair.x.numpy())


def em(problem: Problem, turn: Turn) -> dict[str, float]:
    """Scikit-learn."""
    pair = make(problem)
    with torch.no_grad():
        start = float(pair.model.log_prob(pair.x).mean())
    going = True
    while going:
        found = scikit_learn(pair)
        score = found.score(pair.x.numpy())
        going = turn(score)
    return {"steps": found.n_iter_, "start": start}


def fit(problem: Problem, turn: Turn, compile: bool) -> dict[str, Any]:
    """This package: full batches, Adam; looks at the log-likelihood every ten steps."""
    pair = make(problem)
    target = scikit_learn(pair).score(pair.x.numpy()) - WITHIN
    adam = partial(torch.optim.Adam, lr=0.03)
    going = True
    while going:
        pyro.clear_param_store()
        pair = make(problem)

        def on_epoch(state: Any, pair: Mixture = pair) -> None:
            if state.step % 10 == 0:
                with torch.no_grad():
                    score = float(pair.model.log_prob(pair.x).mean())
                if score >= target:
                    state.stop("as good as EM")

        options: dict[str, Any] = {"num_steps": LIMIT, "batch_size": len(pair.x), "progress": False}
        result = lvm.fit(pair.model, None, pair.x, optim=adam, compile=compile, callbacks=[on_epoch], **options)
        with torch.no_grad():
            going = turn(float(pair.model.log_prob(pair.x).mean()))
    return {"steps": result.num_steps, "captured": result.captured, "stopped by": result.stop_reason}


def fit_captured(problem: Problem, turn: Turn) -> dict[str, Any]:
    """``fit(..., compile=True)``, which compiles if the run is long enough to earn it back."""
    return fit(problem, turn, compile=True)


def fit_plain(problem: Problem, turn: Turn) -> dict[str, Any]:
    """``fit``."""
    return fit(problem, turn, compile=False)
