"""Types of the public signatures, and the letters that shapes use.

==  =====================================================
K   number of particles (importance samples); leftmost
N   number of data
B   batch size: the data of one training step
L   latent dimension
D   data dimension
==  =====================================================
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

__all__ = ["Chunks", "DataPlate", "Data", "Guide", "Guides", "Model", "TensorLike"]

#: A generative program p(x, z): any callable that takes x first and makes Pyro statements.
Model: TypeAlias = Callable[..., Any]
#: A variational program q(z | x): any callable with the model's arguments.
Guide: TypeAlias = Callable[..., Any]
#: Several of them, which draw together, by number or by name; None is the prior of the model.
Guides: TypeAlias = Sequence[Guide | None] | Mapping[str, Guide | None]
TensorLike: TypeAlias = torch.Tensor | np.ndarray
#: x itself, or a tuple of arguments, or a torch ``Dataset`` or ``DataLoader``.
Data: TypeAlias = Any
#: ``"auto"``, the plate's name, or ``None`` for one joint result.
DataPlate: TypeAlias = str | None
#: (data, particles) run at once.
Chunks: TypeAlias = tuple[int, int] | None
Vectorize: TypeAlias = bool | Literal["auto"]
