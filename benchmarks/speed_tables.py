"""The tables of `benchmarks.speed` and `benchmarks.gpu`: for the screen, and for the documentation."""

from collections.abc import Callable, Iterable
from typing import Any

from pyro_lvm.table import TextTable

__all__ = ["TABLES", "fill", "printed", "table"]

Report = dict[str, Any]
NOTHING = "-"


def ratio(row: Report | None) -> str:
    """Median, and in brackets the quartiles."""
    return span(row["ratio"]) if row and row["ratio"] else NOTHING


def span(values: Report | None) -> str:
    """``median (lower to upper)``."""
    if not values:
        return NOTHING
    return f"{digits(values['median'])} ({digits(values['lower'])} to {digits(values['upper'])})"


def digits(value: float) -> str:
    """Two digits at least, and no more than the whole number needs."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def left_out(rows: Iterable[tuple[str, Report]]) -> tuple[str, ...]:
    """Who is missing, and the last line of why."""
    reasons = {name: row["left_out"].strip().splitlines()[-1] for name, row in rows if row["left_out"]}
    return tuple(f"{name}: left out, {reason}" for name, reason in reasons.items())


def training(report: Report, cell: Callable[[Report | None], str], title: str) -> TextTable:
    """Contenders by problems."""
    found = {problem: part["contenders"] for problem, part in report["training"].items()}
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    lines = tuple((name, *(cell(rows.get(name)) for rows in found.values())) for name in names)
    notes = left_out((name, row) for rows in found.values() for name, row in rows.items())
    return TextTable((title, *found), lines, notes)


def training_ratios(report: Report) -> TextTable:
    """Time of a captured step over that of each contender."""
    return training(report, ratio, "time of fit(compile=True) over that of")


def training_ms(report: Report) -> TextTable:
    """Milliseconds a step."""
    return training(report, lambda row: span(row["ms"]) if row else NOTHING, "ms a step")


def evidence(report: Report) -> TextTable:
    """Draws a second, and how many times as fast the compiled estimate is."""
    rows = report["evidence"]["contenders"]
    lines = tuple((name, inverse(row["ratio"]), span(row["thousand/s"])) for name, row in rows.items())
    return TextTable(
        ("estimator", "speed of log_marginal(compile=True) over it", "thousand draws a second"),
        lines,
        left_out(rows.items()),
    )


def inverse(values: Report | None) -> str:
    """A ratio of times as one of speeds."""
    return (
        span({"median": 1 / values["median"], "lower": 1 / values["upper"], "upper": 1 / values["lower"]})
        if (values and min(values.values()) > 0)
        else NOTHING
    )


def calls(report: Report) -> TextTable:
    """Seconds of whole calls."""
    rows = report["evidence"]["calls"]
    return TextTable(("whole call", "s"), tuple((name, span(row["s"])) for name, row in rows.items()))


def scaling(report: Report) -> TextTable:
    """Seconds, and ratio of doublings."""
    lines = [
        (f"{axis} = {size}", span(row["s"]), span(row.get("doubling")))
        for axis, rows in report["scaling"].items()
        for size, row in rows.items()
    ]
    return TextTable(("log_marginal", "s", "ratio to half the size"), tuple(lines))


def memory(report: Report) -> TextTable:
    """Peak by size."""
    lines = [
        (f"{axis} = {size}", f"{row['megabytes']:.0f}")
        for axis, rows in report["memory"].items()
        for size, row in rows.items()
    ]
    return TextTable(("log_marginal", "10^6 bytes"), tuple(lines))


def mixture(report: Report) -> TextTable:
    """Seconds of a whole fit."""
    rows = report["mixture"]["contenders"]
    lines = [
        (name, span(row["s"]), str((row["notes"] or {}).get("steps", NOTHING)), f"{row['value']:.4f}")
        for name, row in rows.items()
    ]
    header = ("from k-means", "s", "steps or iterations", "log p(x), nats a datum")
    return TextTable(header, tuple(lines), left_out(rows.items()))


def gpu(report: Report) -> TextTable:
    """Everything that was measured on a GPU."""
    lines = [(name, digits(row["value"]), row["unit"]) for name, row in report["gpu"].items()]
    return TextTable((report["machine"]["gpu"], "value", "unit"), tuple(lines))


#: Name of a table in the documentation -> section of the report, and what makes the table.
TABLES: dict[str, tuple[str, Callable[[Report], TextTable]]] = {
    "training ratios": ("training", training_ratios),
    "training ms": ("training", training_ms),
    "evidence": ("evidence", evidence),
    "calls": ("evidence", calls),
    "scaling": ("scaling", scaling),
    "memory": ("memory", memory),
    "mixture": ("mixture", mixture),
    "gpu": ("gpu", gpu),
}


def table(report: Report, name: str) -> str:
    """One of `TABLES` in Markdown."""
    return TABLES[name][1](report).to_markdown()


def printed(report: Report) -> str:
    """All tables that a report has, for the screen."""
    return "\n\n".join(str(make(report)) for section, make in TABLES.values() if section in report)


def fill(page: str, report: Report) -> str:
    """The page with the tables of a report between its marks ``<!-- table NAME -->`` and ``<!-- end -->``."""
    for name, (section, _) in TABLES.items():
        if section in report:
            mark = f"<!-- table {name} -->\n"
            before, found, rest = page.partition(mark)
            if found:
                page = f"{before}{mark}{table(report, name)}\n{rest[rest.index('<!-- end -->') :]}"
    return page
