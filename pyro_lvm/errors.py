"""Errors and warnings of the package. Every message names what was expected, what came and the cure."""

__all__ = [
    "BudgetError",
    "CheckpointError",
    "DatasetError",
    "DataTypeError",
    "NonFiniteError",
    "ParameterError",
    "PlateError",
    "PyroLVMError",
    "ShapeError",
    "SiteError",
    "SupportError",
    "UnreliableEstimateWarning",
    "UntrainedParameterWarning",
]


class PyroLVMError(Exception):
    """Base of every error that the package raises.

    Attributes:
        finding: its name among the findings of `pyro_lvm.check`, each of which has a page; empty if it has none.
    """

    def __init__(self, message: str = "", finding: str = "") -> None:
        super().__init__(message)
        self.finding = finding


class PlateError(PyroLVMError, ValueError):
    """The data plate is missing, ambiguous, of the wrong size, or does not enclose what it must."""


class SupportError(PyroLVMError, ValueError):
    """A value or a guide lies outside, or does not cover, the support that a density needs."""


class SiteError(PyroLVMError, ValueError):
    """The sites of a model and of its guide do not fit together."""


class ShapeError(PyroLVMError, ValueError):
    """A tensor has a shape that the call cannot use."""


class ParameterError(PyroLVMError, ValueError):
    """Parameters are not finite, or it is not clear which values of them are meant."""


class NonFiniteError(PyroLVMError, ValueError):
    """Training has not had one finite loss."""


class DataTypeError(PyroLVMError, TypeError):
    """An argument is of a kind or dtype that the call cannot use."""


class DatasetError(PyroLVMError, RuntimeError):
    """A data set is not where it was looked for, or its files are damaged."""


class BudgetError(PyroLVMError, ValueError):
    """A wanted precision takes more than the call may spend."""


class CheckpointError(PyroLVMError, RuntimeError):
    """What was saved is damaged, of a newer format, or belongs to something else."""


class UnreliableEstimateWarning(UserWarning):
    """An estimate was computed, but its own diagnostics say not to rely on it."""


class UntrainedParameterWarning(UserWarning):
    """A parameter came into being during evaluation: nothing has trained it."""
