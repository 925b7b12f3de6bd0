"""Records with columns that are known, to be drawn."""

import numpy as np
import torch

import pyro_lvm as lvm
from pyro_lvm.comparison import ComparisonRow

__all__ = ["comparison", "log_marginal"]

PROVENANCE = {
    "seed": 7,
    "device": "cpu",
    "dtype": "torch.float64",
    "chunks": [4, 500],
    "sha256": {"data": "d" * 64, "parameters": "p" * 64},
    "versions": {"pyro_lvm": "0.1.0", "torch": "2.5"},
    "model": "VAE<2>",
    "data": None,
}


def log_marginal(
    value, elbo=None, status="no_fault_found", khat=0.3, stderr=0.0, bias=0.0, ess=50.0, num_particles=100
):
    """One datum a value; everything else alike for all data, or one entry a datum."""
    value = torch.tensor(value, dtype=torch.float64)

    def column(entry):
        return torch.as_tensor(entry, dtype=torch.float64).expand(len(value)).clone()

    return lvm.LogMarginal(
        value=value,
        stderr=column(stderr),
        bias=column(bias),
        elbo=value.clone() if elbo is None else torch.tensor(elbo, dtype=torch.float64),
        elbo_stderr=column(0.0),
        ess=column(ess),
        khat=column(khat),
        status=np.broadcast_to(np.array(status), (len(value),)).copy(),
        num_particles=num_particles,
        method="importance sampling",
        provenance=PROVENANCE | {"num_data": len(value)},
    )


def comparison(reference=True, ranked_by="elbo"):
    """Three rows over four data: ELBOs -1, -1.5 and -4 in the mean, log p-hat -0.75, -1 and -2, the reference -0.5."""
    status = ["no_fault_found", "heavy_tail", "heavy_tail", "unreliable"]
    rows = {
        "flow": log_marginal([-0.5, -1.0, -0.5, -1.0], [-0.5, -1.5, -0.5, -1.5], stderr=0.2, bias=-0.01),
        "mean-field & <b>": log_marginal(
            [-1.0, -1.0, -1.0, -1.0], [-1.0, -2.0, -1.5, -1.5], "heavy_tail", 0.55, 0.1, -0.2
        ),
        "costs $5$ or $6$": log_marginal([-2.0, -2.0, -2.0, -2.0], [-4.0, -4.0, -5.0, -3.0], status, 0.9, 0.4, -0.4),
    }
    exact = log_marginal([-0.5, -0.5, -0.5, -0.5], status="exact") if reference else None
    made = tuple(
        ComparisonRow(name, (run,), 1234 * (i + 1), 0.5 * i, None) for i, (name, run) in enumerate(rows.items())
    )
    return lvm.Comparison(made, ranked_by, exact, ("nats per datum, +- <one> error", "a second note"))
