"""What the statuses of a record say in words: how many data have which, and what may be quoted."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from pyro_lvm._checks import warn_caller
from pyro_lvm._typing import Data
from pyro_lvm.errors import UnreliableEstimateWarning
from pyro_lvm.evidence.data import data_provenance
from pyro_lvm.ops import DOUBTFUL, STATUSES

__all__ = ["data_in_words", "doubt", "is_joint", "quoted", "status_shares", "verdict"]

_CURES = {
    "unreliable": "More particles, or a guide that fits better.",
    "no_support": "The model excludes what the guide proposes there.",
    "nonfinite": "Look for NaN in data, parameters or densities.",
}

_DISAGREEMENT = (
    " The guides disagree on {share:.1%} of the data: one misses mass that another sees. The pooled value holds the "
    "mass of all of them; mass that none sees would not show."
)


def status_shares(status: np.ndarray) -> dict[str, float]:
    """Share of the data in each status that occurs, from the best to the worst."""
    shares = {word: float((status == word).mean()) for word in STATUSES}
    return {word: share for word, share in shares.items() if share}


def is_joint(provenance: Mapping[str, Any]) -> bool:
    """Whether there is one joint result, as with ``data_plate=None``."""
    return provenance.get("data_plate", "") is None


def data_in_words(done: int, provenance: Mapping[str, Any]) -> str:
    """How many data there are; and of how many, where results are joint or Ctrl-C came before the others."""
    num_data = provenance.get("num_data", done)
    if is_joint(provenance):
        return f"one joint result of {num_data} data"
    return f"{done} data" if provenance.get("finished", True) else f"{done} of {num_data} data (interrupted)"


def doubt(status: np.ndarray) -> str:
    """Words on the data whose value is not to be quoted; empty if there are none."""
    shares = status_shares(status)
    return ", ".join(f"{word} for {shares[word]:.1%}" for word in DOUBTFUL if word in shares)


def verdict(status: np.ndarray, quantity: str) -> str:
    """What may be said with estimates of a quantity that have these statuses, in a plain sentence."""
    shares = status_shares(status)
    apart = _DISAGREEMENT.format(share=shares["disagreement"]) if "disagreement" in shares else ""
    if words := doubt(status):
        cure = " ".join(_CURES[word] for word in DOUBTFUL if word in shares)
        return f"not to be quoted as {quantity}: {words} of the data. {cure}{apart}"
    if "heavy_tail" in shares:
        return f"usable; the stated error is optimistic for the {shares['heavy_tail']:.1%} with heavy tails.{apart}"
    if apart:
        return f"usable.{apart}"
    if set(shares) == {"exact"}:
        return "exact."
    if set(shares) <= {"exact", "zero_variance"}:
        return "all weights are equal: exact, if the guide covers the whole posterior."
    return "no fault found; draws of one guide cannot show a mode that it misses."


class _Record(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def status(self) -> np.ndarray: ...
    @property
    def provenance(self) -> dict[str, Any]: ...
    @property
    def verdict(self) -> str: ...


Quoted = TypeVar("Quoted", bound=_Record)


def quoted(record: Quoted, x: Data) -> Quoted:
    """The record with what the data say of themselves, and one warning if some have no trustworthy value."""
    counts = {word: int((record.status == word).sum()) for word in DOUBTFUL}
    if any(counts.values()):
        found = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        name = type(record).__name__
        message = f"of {len(record.status)} data: {found}. See {name}.status and .khat; {record.verdict}"
        warn_caller(message, UnreliableEstimateWarning)
    return replace(record, provenance={"data": data_provenance(x)} | record.provenance)
