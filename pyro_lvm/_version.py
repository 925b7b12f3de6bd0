"""The version, in one place, and those that a number depends on."""

__all__ = ["__version__", "versions"]

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Of the packages that make the numbers."""
    import pyro
    import torch

    return {"pyro_lvm": __version__, "pyro": pyro.__version__, "torch": str(torch.__version__)}
