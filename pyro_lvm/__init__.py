"""Latent-variable models in Pyro: train any model/guide pair, measure log p(x) per datum, compare guides.

A model p(x, z) and a guide q(z | x) are Pyro programs, any callables with the same arguments.

* `check` says what is wrong with a pair before it is trained.
* `fit` trains a pair with Pyro's SVI, `best_of` from several starts; `save` and `load` keep what was trained.
* `log_marginal` estimates log p(x) of every datum, with an error and a verdict.
* `expectation` is the mean of any function of z over p(z | x); `latent` looks at the space of z.
* `inference_gap` says what a guide loses by its family, and what by its encoder; `calibration`, whether its marginals
  lie where they should.
* `compare` puts pairs side by side; `log_weights` and `elbo` are what all of it is made of.
"""

from pyro_lvm import datasets, errors, evidence, guides, latent, models, nn, objectives, ops, plots, testing, transforms
from pyro_lvm._version import __version__
from pyro_lvm.calibration import Calibration, calibration
from pyro_lvm.check import CheckReport, Finding, check
from pyro_lvm.compare import compare
from pyro_lvm.comparison import Comparison
from pyro_lvm.errors import (
    BudgetError,
    CheckpointError,
    DatasetError,
    DataTypeError,
    NonFiniteError,
    ParameterError,
    PlateError,
    PyroLVMError,
    ShapeError,
    SiteError,
    SupportError,
    UnreliableEstimateWarning,
    UntrainedParameterWarning,
)
from pyro_lvm.evidence import Expectation, LogMarginal, expectation
from pyro_lvm.evidence import importance as log_marginal
from pyro_lvm.gaps import InferenceGap, inference_gap
from pyro_lvm.tracing import elbo, log_weights
from pyro_lvm.training import FitResult, best_of, callbacks, fit, load, save

__all__ = [
    "BudgetError",
    "Calibration",
    "CheckReport",
    "CheckpointError",
    "Comparison",
    "DataTypeError",
    "DatasetError",
    "Expectation",
    "Finding",
    "FitResult",
    "InferenceGap",
    "LogMarginal",
    "NonFiniteError",
    "ParameterError",
    "PlateError",
    "PyroLVMError",
    "ShapeError",
    "SiteError",
    "SupportError",
    "UnreliableEstimateWarning",
    "UntrainedParameterWarning",
    "__version__",
    "best_of",
    "calibration",
    "callbacks",
    "check",
    "compare",
    "datasets",
    "elbo",
    "errors",
    "evidence",
    "expectation",
    "fit",
    "guides",
    "inference_gap",
    "latent",
    "load",
    "log_marginal",
    "log_weights",
    "models",
    "nn",
    "objectives",
    "ops",
    "plots",
    "save",
    "testing",
    "transforms",
]
