"""Memory: reused rather than given back, and how its end is told from other errors."""

import torch

__all__ = ["keep_freed_memory", "ran_out_of_memory"]

_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of a batch for the next, where it would give it back and clear new pages.

    It does so once a block as large as its limit, 32 MiB, was freed (mallopt(3), M_MMAP_THRESHOLD): a fifth of the time
    of an estimate or of a step of a convolutional network on a CPU. Nothing is touched, and elsewhere nothing happens.
    """
    torch.empty(33_500_000, dtype=torch.uint8)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory; torch has no class for it on a CPU."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _WORDS)
