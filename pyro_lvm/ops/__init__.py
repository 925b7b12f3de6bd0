"""Plain torch building blocks: sums of log-weights, importance-sampling diagnostics, Gaussian closed forms.

Log-weights are ``(K, N)`` tensors in nats, particles first. Nothing here imports Pyro.
"""

from pyro_lvm.ops.gaussian import (
    linear_gaussian_elbo,
    linear_gaussian_log_marginal,
    linear_gaussian_posterior,
    normal_kl,
)
from pyro_lvm.ops.log_space import log_mean_exp, log_normalize, log_weight_table
from pyro_lvm.ops.moments import WeightMoments, merge_moments, weight_moments
from pyro_lvm.ops.pareto import (
    fit_generalized_pareto,
    khat_from_tail,
    khat_threshold,
    pareto_khat,
    pareto_smooth,
    tail_size,
)
from pyro_lvm.ops.ratio import RatioAccumulator, RatioSummary
from pyro_lvm.ops.running import RunningMoments
from pyro_lvm.ops.status import DOUBTFUL, STATUSES, classify, disagreement, status_names
from pyro_lvm.ops.streaming import WeightAccumulator, WeightSummary
from pyro_lvm.ops.weights import (
    delta_bias,
    effective_sample_size,
    elbo,
    importance_weighted_bound,
    log_evidence,
    standard_error,
)

__all__ = [
    "DOUBTFUL",
    "STATUSES",
    "RatioAccumulator",
    "RatioSummary",
    "RunningMoments",
    "WeightAccumulator",
    "WeightMoments",
    "WeightSummary",
    "classify",
    "delta_bias",
    "disagreement",
    "effective_sample_size",
    "elbo",
    "fit_generalized_pareto",
    "importance_weighted_bound",
    "khat_from_tail",
    "khat_threshold",
    "linear_gaussian_elbo",
    "linear_gaussian_log_marginal",
    "linear_gaussian_posterior",
    "log_evidence",
    "log_mean_exp",
    "log_normalize",
    "log_weight_table",
    "merge_moments",
    "normal_kl",
    "pareto_khat",
    "pareto_smooth",
    "standard_error",
    "status_names",
    "tail_size",
    "weight_moments",
]
