"""The tables of `benchmarks.proving_ground`: for the screen, and for the documentation."""

from collections.abc import Callable
from typing import Any

from pyro_lvm.ops import STATUSES
from pyro_lvm.table import TextTable

__all__ = ["TABLES", "fill", "printed"]

Report = dict[str, Any]
NOTHING = "-"


def percent(value: float | None) -> str:
    """Of a share; one decimal where it is small."""
    if value is None:
        return NOTHING
    return f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"


def nats(value: float | None) -> str:
    """Three decimals; huge numbers short."""
    if value is None:
        return NOTHING
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1e}"


def count(value: float) -> str:
    """Evaluations in thousands."""
    return f"{value / 1000:.1f}" if value < 10_000 else f"{value / 1000:.0f}"


def scores(report: Report) -> TextTable:
    """A row a procedure."""
    header = (
        "procedure",
        "pairs",
        "bias",
        "wrong",
        "false assurance",
        "... of the wrong",
        "right",
        "false alarm",
        "... or disagreement",
        "usable",
        "coverage",
        "thousand evaluations",
        "s",
    )
    lines = []
    for name, row in report["procedures"].items():
        score = row["score"]
        rates = ("wrong", "false assurance", "false assurance of the wrong", "right")
        alarms = ("false alarm", "false alarm or disagreement", "usable", "coverage")
        cells = [percent(score[key]) for key in (*rates, *alarms)]
        cost = (count(row["evaluations"]), f"{row['seconds']:.2f}")
        lines.append((name, str(row["pairs"]), nats(score["bias of the usable"]), *cells, *cost))
    return TextTable(header, tuple(lines))


def statuses(report: Report) -> TextTable:
    """A row a procedure and status."""
    lines = []
    for name, row in report["procedures"].items():
        for word, score in row["by status"].items():
            cells = [percent(score[key]) for key in ("share", "wrong", "right", "coverage of all")]
            lines.append((f"{name}: {word}", cells[0], nats(score["bias"]), *cells[1:]))
    return TextTable(("procedure: status", "share", "bias", "wrong", "right", "coverage"), tuple(lines))


def pairs(report: Report) -> TextTable:
    """A row a pair: mean |error| and alarms of some procedures."""
    names = [name for name in report["procedures"] if name not in ("prior", "enumeration", "quadrature")]
    lines = []
    for pair in report["pairs"]:
        cells = []
        for name in names:
            row = report["procedures"][name]["by pair"].get(pair["name"])
            cells.append(f"{nats(row['mean size'])} / {percent(row['usable'])}" if row else NOTHING)
        lines.append((pair["name"], ", ".join(pair["tags"]), str(pair["latent_dim"]), *cells))
    return TextTable(("pair", "what is hard", "dim", *names), tuple(lines))


def modes(report: Report) -> TextTable:
    """Guides on one mode each, and pooled."""
    lines = [
        (
            f"{row['pair']}: {row['proposal']}",
            nats(row["error"]),
            nats(row["largest"]),
            f"{row['stderr']:.1g}",
            percent(row["within 5"]),
            ", ".join(f"{word} {share:.0%}" for word, share in row["status"].items()),
        )
        for row in report["modes"]
    ]
    header = ("pair: proposal", "median error", "largest", "stated error", "within 5 errors", "status")
    return TextTable(header, tuple(lines))


def rescued(report: Report) -> TextTable:
    """Annealing where the guide is unreliable."""
    lines = []
    for row in report["where the guide fails"]:
        cells = []
        for name in ("annealed from the guide", "annealed from the prior", "annealed from both"):
            part = row[name]
            worst = NOTHING if part["worst"] is None else f"{part['worst']:.1f}"
            cells += [worst, f"{part['beyond 5']} of {part['cases']}", str(part["beyond 5 without alarm"])]
        lines.append((row["pair"], str(row["latent_dim"]), *cells))
    each = ("largest", "beyond 5", "of these without alarm")
    header = (
        "pair",
        "dim",
        *(f"from the guide: {word}" for word in each),
        *(f"from the prior: {word}" for word in each),
        *(f"from both: {word}" for word in each),
    )
    return TextTable(header, tuple(lines))


def expectation(report: Report) -> TextTable:
    """Moments by guides that are right and by others, and by these and the prior, over all pairs."""
    lines = []
    kinds = {
        "guides that are right": ("guide", [False]),
        "misled guides": ("guide", [True]),
        "any guide, and the prior": ("guide and prior", [False, True]),
    }
    for kind, (by, misled) in kinds.items():
        rows = [row for row in report["expectation"] if row["by"] == by and row["misled"] in misled]
        words = dict.fromkeys(word for row in rows for word in row["z"])
        for word in sorted(words, key=STATUSES.index):
            cells = []
            for moment in ("z", "z^2"):
                parts = [row[moment][word] for row in rows if word in row[moment]]
                data, beyond = (sum(part[key] for part in parts) for key in ("data", "beyond 5"))
                cells.append(f"{beyond} of {data}")
            lines.append((f"{kind}: {word}", *cells))
    return TextTable(("by: status", "E[z] beyond 5 errors", "E[z^2] beyond 5 errors"), tuple(lines))


def target_stderr(report: Report) -> TextTable:
    """What a wanted error takes, and whether it is kept."""
    misled = {pair["name"]: pair["misled"] for pair in report["pairs"]}
    lines = []
    for row in report["target_stderr"]:
        if row["promised"]:
            data = f"{row['promised']} of {row['data']}"
            cells = (
                percent(row["met"]),
                f"{row['rms error']:.3f}",
                f"{row['largest error']:.3f}",
                count(row["particles"]),
            )
            lines.append((row["pair"], "yes" if misled[row["pair"]] else "no", data, *cells))
    header = ("pair", "misled", "data", "stated error within", "rms error", "largest error", "thousand particles")
    return TextTable(header, tuple(lines))


def one_number(report: Report) -> TextTable:
    """A wanted error beside one K for all data."""
    lines = [
        (row["by"], count(row["particles"]), percent(row["met"]), f"{row['largest']:.3f}") for row in report["one K"]
    ]
    return TextTable(("by", "thousand particles", "stated error within", "largest"), tuple(lines))


#: Name of a table in the documentation -> what makes it.
TABLES: dict[str, Callable[[Report], TextTable]] = {
    "scores": scores,
    "statuses": statuses,
    "pairs": pairs,
    "modes": modes,
    "rescued": rescued,
    "expectation": expectation,
    "target_stderr": target_stderr,
    "one_number": one_number,
}


def printed(report: Report) -> str:
    """All tables, for the screen."""
    return "\n\n".join(str(make(report)) for make in TABLES.values())


def fill(page: str, report: Report) -> str:
    """The page with the tables of a report between its marks ``<!-- table NAME -->`` and ``<!-- end -->``."""
    for name, make in TABLES.items():
        mark = f"<!-- table {name} -->\n"
        before, found, rest = page.partition(mark)
        if found:
            page = f"{before}{mark}{make(report).to_markdown()}\n{rest[rest.index('<!-- end -->') :]}"
    return page
