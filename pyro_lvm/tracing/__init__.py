"""Runs a model/guide pair under particles and finds its log-weights; the only package that sees Pyro's handlers.

Read in this order: `intercept` (one program, one site), `tables` (sites to numbers), `plates` and `sites` (what the
pair must look like), `batch` and `particles` (three ways to run K of them), `probe` (which way), `weights` (the
result). `handlers` is what a loss puts around a pair; `params` and `isolation` keep the process as it was; `questions`
answers what training and comparison ask.
"""

from pyro_lvm.tracing.weights import elbo, log_weights

__all__ = ["elbo", "log_weights"]
