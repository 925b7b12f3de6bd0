"""Scores of `benchmarks.proving_ground`: what answers are worth beside the truth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_lvm.ops import DOUBTFUL
from pyro_lvm.testing import ProvingPair

__all__ = ["Answer", "scored"]

ASSURED = ("exact", "zero_variance", "no_fault_found")


@dataclass(frozen=True)
class Answer:
    """What an estimator says of one pair with one seed.

    Attributes:
        value: log p-hat, ``(N,)`` nats.
        stderr: its stated error, ``(N,)``.
        status: words, ``(N,)``.
        evaluations: of the model, a datum.
        seconds: the call took, for all data.
    """

    value: np.ndarray
    stderr: np.ndarray
    status: np.ndarray
    evaluations: float
    seconds: float

    @property
    def alarmed(self) -> np.ndarray:
        """Which data the status warns of, ``(N,)``."""
        return np.isin(self.status, DOUBTFUL)


def scored(answers: Mapping[str, Sequence[Answer]], pairs: Sequence[ProvingPair]) -> dict[str, Any]:
    """All pairs in one: means over cases, then over pairs."""
    exact = {pair.name: pair.log_prob.numpy() for pair in pairs}
    cases = {name: [Cases(each, exact[name]) for each in given] for name, given in answers.items() if name in exact}
    by_pair = {name: shares([part.marks() for part in parts]) for name, parts in cases.items()}
    total = {key: float(np.mean([row[key] for row in by_pair.values()])) for key in next(iter(by_pair.values()))}
    words = sorted({word for given in answers.values() for each in given for word in each.status})
    return {
        "pairs": len(by_pair),
        "cases": int(sum(len(part.error) for parts in cases.values() for part in parts)),
        "score": summary(total),
        "by status": {word: summary(of_status(cases, word)) for word in words},
        "by pair": {name: summary(row) for name, row in by_pair.items()},
        "evaluations": float(np.mean([each.evaluations for given in answers.values() for each in given])),
        "seconds": float(np.mean([each.seconds for given in answers.values() for each in given])),
    }


@dataclass(frozen=True)
class Cases:
    """An answer beside the truth."""

    answer: Answer
    exact: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """Nats, ``(N,)``."""
        return self.answer.value - self.exact

    def marks(self) -> dict[str, np.ndarray]:
        """What holds for which datum; ``bias`` is the error where it is finite."""
        answer, size = self.answer, abs(np.nan_to_num(self.error, nan=np.inf))
        assured, alarmed = np.isin(answer.status, ASSURED), answer.alarmed
        wrong, right = size > 1, size < 0.1
        covered = size <= 1.96 * answer.stderr + 1e-6
        return {
            "all": np.ones(len(size)),
            "bias": np.where(np.isfinite(self.error), self.error, 0.0),
            "usable bias": np.where(np.isfinite(self.error) & ~alarmed, self.error, 0.0),
            "size": np.minimum(size, 100.0),
            "wrong": wrong,
            "right": right,
            "assured": assured,
            "alarmed": alarmed,
            "assured and wrong": assured & wrong,
            "right and alarmed": right & alarmed,
            "right and alarmed or disagreeing": right & (alarmed | (answer.status == "disagreement")),
            "usable": ~alarmed,
            "usable and covered": ~alarmed & covered,
            "covered": covered,
        }


def shares(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Means over the cases of a pair."""
    return {key: float(np.concatenate([part[key] for part in parts]).mean()) for key in parts[0]}


def of_status(cases: Mapping[str, Sequence[Cases]], word: str) -> dict[str, float]:
    """Means over pairs of what holds *and* has this status."""
    rows = [
        shares([{key: mark * (part.answer.status == word) for key, mark in part.marks().items()} for part in parts])
        for parts in cases.values()
    ]
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def summary(mean: Mapping[str, float]) -> dict[str, float | None]:
    """Rates, from means of marks."""

    def rate(part: str, whole: str) -> float | None:
        return mean[part] / mean[whole] if mean[whole] > 0 else None

    return {
        "share": mean["all"],
        "bias": rate("bias", "all"),
        "bias of the usable": rate("usable bias", "usable"),
        "mean size": rate("size", "all"),
        "wrong": rate("wrong", "all"),
        "right": rate("right", "all"),
        "false assurance": rate("assured and wrong", "all"),
        "false assurance of the wrong": rate("assured and wrong", "wrong"),
        "false alarm": rate("right and alarmed", "right"),
        "false alarm or disagreement": rate("right and alarmed or disagreeing", "right"),
        "usable": rate("usable", "all"),
        "coverage": rate("usable and covered", "usable"),
        "coverage of all": rate("covered", "all"),
    }
