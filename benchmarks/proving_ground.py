r"""How far estimators of log p(x) can be trusted: all of them on pairs whose answers are known.

Protocol. `pyro_lvm.testing.proving_ground()` has the pairs, 16 or 32 data each, and their exact log p(x). Each
estimator runs with its own defaults (importance, prior: K = 1000; pooled: K = 1000 of each guide; annealed: 100 chains
of 200 to 2000 steps, as its pilot says) and with several seeds, annealing with fewer; nothing was tuned for any pair.
A case is one datum of one pair with one seed. Shares and means are taken over the cases of a pair, and then over the
pairs, so that each pair counts alike. An estimator that refuses a pair is scored on the others.

    error             value less the exact log p(x), nats
    bias              mean error; in the first table of the cases that are not alarmed
    wrong, right      |error| above 1 nat, below 0.1 nats
    assured           status exact, zero_variance or no_fault_found
    alarmed           status unreliable, no_support or nonfinite
    false assurance   assured and wrong, as a share of all cases; and as a share of the wrong ones
    false alarm       share of the right cases that are alarmed; and of those with disagreement, too
    coverage          |error| <= 1.96 stderr + 1e-6, of the cases that are not alarmed
    evaluations       of the model for each datum; one with a gradient counts as one, pilots of annealing not at all

`python -m benchmarks.proving_ground` measures all, `--only NAME` some estimators; with `--cache FILE` what was measured
is not measured again. An estimator of one's own is a line in ESTIMATORS.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import pyro_lvm as lvm
from benchmarks import proving_ground_tables
from benchmarks.proving_ground_scores import Answer, scored
from pyro_lvm import evidence
from pyro_lvm.ops import DOUBTFUL
from pyro_lvm.testing import ProvingPair, proving_ground

Estimator = Callable[[ProvingPair, int], lvm.LogMarginal]


#: name -> estimate of a pair with a seed.
ESTIMATORS: dict[str, Estimator] = {
    "importance": lambda p, seed: evidence.importance(p.model, p.guide, p.x, seed=seed),
    "prior": lambda p, seed: evidence.prior(p.model, p.x, seed=seed),
    "pooled with the prior": lambda p, seed: evidence.pooled(p.model, [p.guide, None], p.x, seed=seed),
    "annealed from the guide": lambda p, seed: evidence.annealed(p.model, p.guide, p.x, seed=seed),
    "annealed from the prior": lambda p, seed: evidence.annealed(p.model, None, p.x, seed=seed),
    "annealed from both": lambda p, seed: evidence.annealed(p.model, [p.guide, None], p.x, seed=seed),
    "defensive": lambda p, seed: evidence.defensive(p.model, p.guide, p.x, seed=seed),
    "enumeration": lambda p, seed: evidence.enumeration(p.model, p.x),
    "quadrature": lambda p, seed: evidence.quadrature(p.model, p.x),
}
RECOMMENDED = "defensive"
ANNEALED = ("annealed from the guide", "annealed from the prior", "annealed from both")
EXPENSIVE = (*ANNEALED, RECOMMENDED)
TARGET, BUDGET = 0.05, 100_000
UNIFORM = (1000, 2000, 4000, 8000, 16_000, 32_000)
WITHOUT_SEED = ("enumeration", "quadrature")


@dataclass(frozen=True)
class Settings:
    """Numbers of seeds."""

    seeds: int = 5
    annealed_seeds: int = 2
    first_seed: int = 100

    def of(self, name: str) -> range:
        """The seeds of an estimator or recipe."""
        many = self.annealed_seeds if name in EXPENSIVE else self.seeds
        return range(self.first_seed, self.first_seed + (1 if name in WITHOUT_SEED else many))


SMOKE = Settings(seeds=1, annealed_seeds=1)
SMOKE_PAIRS = ("exact-2d", "mirrored-1d", "missed-class")

#: (estimator, pair, seed) -> answer, or the words of a refusal.
Found = dict[tuple[str, str, int], Answer | str]


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=ESTIMATORS, help="may be given several times")
    parser.add_argument("--cache", type=Path, help="a file that keeps all answers; those in it are not asked again")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--page", type=Path, help="a page of the documentation, whose tables are replaced")
    parser.add_argument("--smoke", action="store_true", help="one seed, three pairs, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", lvm.UnreliableEstimateWarning)  # the tables say it
    pairs = [pair for pair in proving_ground() if not args.smoke or pair.name in SMOKE_PAIRS]
    settings = SMOKE if args.smoke else Settings()
    found: Found = torch.load(args.cache, weights_only=False) if args.cache and args.cache.exists() else {}
    for name in args.only or ESTIMATORS:
        start = time.perf_counter()
        for pair in pairs:
            ask(found, name, pair, settings.of(name))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        if args.cache:
            torch.save(found, args.cache)
    report = {"protocol": __doc__, "settings": asdict(settings)} | made_of(found, pairs, settings)
    args.out.write_text(json.dumps(rounded(report), indent=1) + "\n", encoding="utf-8")
    report = json.loads(args.out.read_text(encoding="utf-8"))
    print(proving_ground_tables.printed(report))
    if args.page:
        page = args.page.read_text(encoding="utf-8")
        args.page.write_text(proving_ground_tables.fill(page, report), encoding="utf-8")


def ask(found: Found, name: str, pair: ProvingPair, seeds: Iterable[int]) -> None:
    """Put the answers of an estimator on a pair into ``found``, or why it has none."""
    for seed in seeds:
        if (name, pair.name, seed) in found:
            continue
        start = time.perf_counter()
        try:
            record = ESTIMATORS[name](pair, seed)
        except lvm.PyroLVMError as refusal:
            found[name, pair.name, seed] = f"{type(refusal).__name__}: {refusal}"
            return
        found[name, pair.name, seed] = answer(record, time.perf_counter() - start)


def answer(record: lvm.LogMarginal, seconds: float) -> Answer:
    """A record as an answer."""
    evaluations, course, chains = float(record.num_particles), record.provenance.get("annealing", {}), 0.0
    if "num_steps" in course:
        chains = float(record.particles.min()) * float(np.mean(course["num_steps"])) * course["num_leapfrog"]
    if record.method.startswith("defensive"):  # all pooled, some annealed, the others pooled anew
        share = course.get("num_data", 0) / len(record)
        evaluations += chains * share + evaluations * (1 - share) * ("refused" not in course)
    elif course:
        evaluations = chains
    return Answer(record.value.numpy(), record.stderr.numpy(), record.status, evaluations, seconds)


def made_of(found: Found, pairs: Sequence[ProvingPair], settings: Settings) -> dict[str, Any]:
    """The report of all that was found, and of what takes no time."""
    known = {name for name, _, _ in found}
    wanted = {pair.name: promised(pair) for pair in pairs}
    right = [(pair, answer) for pair in pairs if not pair.misled and (answer := wanted[pair.name])]
    procedures = {name: of_estimator(found, name) for name in ESTIMATORS if name in known}
    return {
        "versions": {"pyro_lvm": lvm.__version__, "pyro": pyro.__version__, "torch": torch.__version__},
        "date": date.today().isoformat(),
        "minutes": sum(each.seconds for each in found.values() if isinstance(each, Answer)) / 60,
        "pairs": [described(pair) for pair in pairs],
        "procedures": {name: scored(answers, pairs) for name, answers in procedures.items()},
        "refused": refusals(found),
        "where the guide fails": rescued(found, pairs) if {*ANNEALED, "importance"} <= known else [],
        "modes": [row for pair in pairs if pair.guides for row in one_mode(pair)],
        "expectation": [row for pair in pairs if pair.mean is not None for row in moments(pair)],
        "target_stderr": [targeted(pair, wanted[pair.name]) for pair in pairs],
        "one K": one_for_all(right) if right else [],
    }


def of_estimator(found: Found, name: str) -> dict[str, list[Answer]]:
    """Answers by pair."""
    answers: dict[str, list[Answer]] = {}
    for (estimator, pair, _), each in found.items():
        if estimator == name and isinstance(each, Answer):
            answers.setdefault(pair, []).append(each)
    return answers


def refusals(found: Found) -> dict[str, dict[str, str]]:
    """Estimator -> pair -> the first words of why not."""
    rows: dict[str, dict[str, str]] = {}
    for (name, pair, _), each in found.items():
        if isinstance(each, str):
            rows.setdefault(name, {})[pair] = each[:160]
    return rows


def described(pair: ProvingPair) -> dict[str, Any]:
    """What a pair is."""
    names = ("name", "tags", "latent_dim", "continuous", "misled", "source")
    return {name: getattr(pair, name) for name in names} | {"num_data": len(pair.x)}


# ---------------------------------------------------------------- what must hold


def in_errors(error: Any, stderr: Any) -> np.ndarray:
    """|error| in units of the stated one, of which five allow for 0.001 in addition."""
    return np.abs(np.asarray(error)) / (np.asarray(stderr) + 2e-4)


def rescued(found: Found, pairs: Sequence[ProvingPair]) -> list[dict[str, Any]]:
    """Annealing where importance sampling by the guide is unreliable."""
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {"pair": pair.name, "latent_dim": pair.latent_dim}
        for name in ANNEALED:
            scores, alarmed = [], []
            for (estimator, of, seed), each in found.items():
                first = found.get(("importance", of, seed))
                if (estimator, of) == (name, pair.name) and isinstance(each, Answer) and isinstance(first, Answer):
                    chosen = first.status == "unreliable"
                    scores += in_errors(each.value - pair.log_prob.numpy(), each.stderr)[chosen].tolist()
                    alarmed += each.alarmed[chosen].tolist()
            row[name] = {
                "cases": len(scores),
                "worst": max(scores, default=None),
                "beyond 5": sum(score > 5 for score in scores),
                "beyond 5 without alarm": sum(s > 5 and not a for s, a in zip(scores, alarmed, strict=True)),
            }
        if row[ANNEALED[0]]["cases"]:
            rows.append(row)
    return rows


def one_mode(pair: ProvingPair) -> list[dict[str, Any]]:
    """Each guide alone, and all of them pooled, by one seed."""
    guides = [pair.guide, *pair.guides]
    alone = {f"guide {i + 1}": evidence.importance(pair.model, guide, pair.x, seed=0) for i, guide in enumerate(guides)}
    rows = []
    for name, record in (alone | {"pooled": evidence.pooled(pair.model, guides, pair.x, seed=0)}).items():
        error = (record.value - pair.log_prob).numpy()
        within = in_errors(error, record.stderr) <= 5
        rows.append(
            {
                "pair": pair.name,
                "proposal": name,
                "error": float(np.median(error)),
                "largest": float(abs(error).max()),
                "stderr": float(record.stderr.median()),
                "within 5": float(within.mean()),
                "status": record.status_shares(),
            }
        )
    return rows


def moments(pair: ProvingPair) -> list[dict[str, Any]]:
    """E[z | x] and E[z^2 | x] by the guide, and with the prior, by one seed.

    A datum is as far off as its farthest coordinate.
    """
    rows = []
    exact = torch.stack([pair.mean, pair.square], -1)
    for by, guides in (("guide", pair.guide), ("guide and prior", [pair.guide, None])):
        try:
            found = lvm.expectation(
                pair.model, guides, pair.x, lambda z: torch.stack([z, z.square()], -1), seed=0, num_particles=1000
            )
        except lvm.PyroLVMError:  # the prior has no density
            continue
        scores = in_errors(found.value.reshape(exact.shape) - exact, found.stderr.reshape(exact.shape))
        worst = scores.reshape(len(pair.x), -1, 2).max(1)  # (N, 2)
        row: dict[str, Any] = {"pair": pair.name, "by": by, "misled": pair.misled}
        for i, name in enumerate(("z", "z^2")):
            row[name] = {
                word: {
                    "data": int((found.status == word).sum()),
                    "worst": float(worst[found.status == word, i].max()),
                    "beyond 5": int((worst[found.status == word, i] > 5).sum()),
                }
                for word in found.status_shares()
            }
        rows.append(row)
    return rows


def promised(pair: ProvingPair) -> tuple[lvm.LogMarginal, np.ndarray] | None:
    """The answer with a wanted error, and which data are within the budget and not alarmed; None if there are none."""
    try:
        found = evidence.importance(pair.model, pair.guide, pair.x, num_particles=BUDGET, target_stderr=TARGET, seed=0)
    except lvm.BudgetError:
        return None
    kept = ~np.isin(found.status, DOUBTFUL) & (found.particles < BUDGET).numpy() & (found.stderr > 0).numpy()
    return (found, kept) if "target_stderr" in found.provenance and kept.any() else None


def targeted(pair: ProvingPair, answer: tuple[lvm.LogMarginal, np.ndarray] | None) -> dict[str, Any]:
    """What `target_stderr` takes of all data, and gives to those within the budget that are not alarmed."""
    row: dict[str, Any] = {"pair": pair.name, "data": len(pair.x), "promised": 0}
    if answer is None:
        return row
    found, kept = answer
    error, spent = (found.value - pair.log_prob).numpy()[kept], found.provenance["target_stderr"]
    return row | {
        "promised": int(kept.sum()),
        "met": float((found.stderr.numpy()[kept] <= TARGET).mean()),
        "rms error": float(np.sqrt(np.square(error).mean())),
        "largest error": float(abs(error).max()),
        "particles": (spent["pilot"] + spent["final"]) / len(pair.x),
    }


def one_for_all(answers: Sequence[tuple[ProvingPair, tuple[lvm.LogMarginal, np.ndarray]]]) -> list[dict[str, Any]]:
    """`target_stderr` and one K for the same data of all pairs: stated errors, and particles a datum."""
    particles = [
        (found.particles.numpy() + found.provenance["target_stderr"]["pilot"] / len(pair.x))[kept]
        for pair, (found, kept) in answers
    ]
    rows = [
        stated([found.stderr.numpy()[kept] for _, (found, kept) in answers], float(np.concatenate(particles).mean()))
    ]
    rows[0]["by"] = "target_stderr"
    for size in UNIFORM:
        alone = [evidence.importance(p.model, p.guide, p.x, num_particles=size, seed=1).stderr for p, _ in answers]
        rows.append(stated([each.numpy()[kept] for each, (_, (_, kept)) in zip(alone, answers, strict=True)], size))
        rows[-1]["by"] = f"K = {size}"
    return rows


def stated(errors: Sequence[np.ndarray], particles: float) -> dict[str, Any]:
    """How many of these errors are as wanted."""
    each = np.concatenate(errors)
    met, largest = float((each <= TARGET).mean()), float(each.max())
    return {"data": len(each), "particles": particles, "met": met, "largest": largest}


def rounded(value: Any) -> Any:
    """The same with numbers of four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
