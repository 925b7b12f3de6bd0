"""A comparison as one page of HTML: what may be quoted, the table, the pictures, and where each number comes from.

The page is whole in itself: no script, nothing from a network. It follows the light or dark scheme of the reader, and
on a phone its table scrolls while the page does not.
"""

import html
import io
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from pyro_lvm import plots
from pyro_lvm._checks import check_path, refuse
from pyro_lvm._files import in_place_of
from pyro_lvm.errors import CheckpointError
from pyro_lvm.evidence.verdict import is_joint
from pyro_lvm.table import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page", "verdict", "write_page"]

_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--paper:#fff;--faint:#5a5a5a;--line:#d0d0d0;--band:#f4f6f8}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--paper:#16181b;--faint:#a8a8a8;--line:#3c4046;--band:#202429}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.4rem}
table{border-collapse:collapse;width:100%;font-size:.9375rem;overflow-wrap:normal;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.5rem .7rem;color:var(--faint);font-size:.875rem}
caption span{display:inline-block;position:sticky;left:.7rem;max-width:calc(100vw - 4rem)}
th,td{padding:.4rem .55rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
th:first-child{text-align:left}thead th{background:var(--band)}
tbody th{position:sticky;left:0;background:var(--paper);white-space:normal;min-width:8rem;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem;
max-width:60rem}
figure{margin:0}figure svg{display:block;width:100%;height:auto;padding:.4rem;background:#fff;
border:1px solid var(--line);border-radius:.4rem}
figcaption,dt{color:var(--faint);font-size:.875rem}
ul{padding-left:1.2rem}li{margin:.4rem 0}td.long{white-space:normal;min-width:16rem}td.long span{white-space:nowrap}
details{border-top:1px solid var(--line);padding:.5rem 0}summary{cursor:pointer}
dl{display:grid;grid-template-columns:minmax(7rem,auto) 1fr;gap:.2rem 1rem;margin:.5rem 0}dd{margin:0}
"""

_FIGURES = {
    "bounds": (plots.bounds, "ELBO and log p-hat of each pair, with the error of log p-hat over its draws."),
    "differences": (plots.differences, "How far each pair is behind the best, paired over the data."),
    "gaps": (plots.gaps, "What lies between the ELBO of each pair and log p(x)."),
    "statuses": (plots.statuses, "How much of the data has a value of log p-hat that can be relied on."),
}
_LONG = 30  # letters of a cell that may be broken into lines
#: Of the provenance, in this order; all else follows.
_FIRST = ("seed", "sha256", "num_data", "data", "model", "guide", "chunks", "device", "dtype", "versions")


def write_page(path: str | os.PathLike[str], comparison: Any) -> None:
    """Write `page` as a file, over what was there, whole or not at all.

    Raises:
        DataTypeError: ``path`` is no path.
        CheckpointError: no file can be written there.
    """
    path, text = check_path("path", path), page(comparison)
    try:
        with in_place_of(path, "w") as file:
            file.write(text)
    except OSError as error:
        cure = "Make its folder first, or choose one that you may write to."
        got = f"{path}: {type(error).__name__}: {error.strerror}"
        raise CheckpointError(refuse("path", "a file that can be written", got, cure)) from error


def page(comparison: Any) -> str:
    """The page of a `Comparison`; the same comparison gives the same text.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> result = lvm.compare({"exact": (lvm.models.LinearGaussian(1, 2), None)}, torch.ones(5, 2))
        >>> "<h1>Comparison of 1 pair on 5 data</h1>" in page(result)
        True
    """
    rows = comparison.rows
    run = rows[0].runs[0]
    title = f"Comparison of {len(rows)} pair{'s' * (len(rows) > 1)} on {run.provenance.get('num_data', len(run))} data"
    parts = [
        f"<h1>{title}</h1>",
        "<h2>What may be quoted</h2>",
        _list("ul", (f"<strong>{_text(name)}</strong>: {_text(words)}" for name, words in _verdicts(comparison))),
        "<h2>Table</h2>",
        _table(comparison.table, "in all" if is_joint(run.provenance) else "per datum"),
        "<h2>Pictures</h2>",
        f'<div class="figures">{"".join(_figure(name, comparison) for name in _FIGURES)}</div>',
        "<h2>Where the numbers come from</h2>",
        *_sources(comparison),
        "<h2>Notes</h2>",
        _list("ul", map(_text, comparison.notes)),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{_STYLE}</style>'
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def _text(value: Any) -> str:
    return html.escape(str(value))


def _list(tag: str, items: Any) -> str:
    return f"<{tag}>{''.join(f'<li>{item}</li>' for item in items)}</{tag}>"


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts.


def _verdicts(comparison: Any) -> Iterator[tuple[str, str]]:
    for row in comparison.rows:
        yield row.name, verdict(comparison, row)
    if comparison.reference is not None:
        yield "the reference", comparison.reference.verdict


def verdict(comparison: Any, row: Any) -> str:
    """What may be said with the numbers of a row, and what may not, in one sentence.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> result = lvm.compare({"exact": (lvm.models.LinearGaussian(1, 2), None)}, torch.ones(5, 2))
        >>> rank, value = verdict(result, result.rows[0]).split("; ")
        >>> rank, value.split(" = ")[0]
        ('ranked first', 'log p(x)')
    """
    rounding = sorted({run.rounding.strip().rstrip(".") for run in row.runs} - {""})
    below = _below_the_reference(comparison, row) > 0
    clauses = (_of_the_rank(comparison, row), _of_the_value(row, below), *_of_the_reference(comparison, row), *rounding)
    return "; ".join(clauses) + "."


def _of_the_value(row: Any, below: bool) -> str:
    """Whether log p-hat may be quoted, and how; not if it lies ``below`` the reference."""
    shares = row.status_shares()
    if doubts := ", ".join(sorted({run.doubt for run in row.runs} - {""})):
        low = ", and likely too low there" if "unreliable" in shares else ""
        bound = f"; the ELBO, {row.elbo:.3f}, may be quoted as a lower bound" if math.isfinite(row.elbo) else ""
        return f"log p-hat is not to be quoted as log p(x), for it is {doubts} of the data{low}{bound}"
    if set(shares) == {"exact"}:
        return f"log p(x) = {row.log_marginal:.3f} is exact"
    if set(shares) <= {"exact", "zero_variance"}:
        return f"log p(x) = {row.log_marginal:.3f} may be quoted if the guide covers the whole posterior"
    instead = " with its bias, which a \u00b1 would hide" if "bias" in row.quoted else ""
    quoted = row.quoted.replace("+-", "\u00b1")
    if below:
        return f"log p-hat = {quoted} is not to be quoted as log p(x), which is larger"
    quotable = f"log p-hat = {quoted} may be quoted{instead}"
    if "disagreement" in shares:
        quotable += f", with the mass of all its guides, which disagree on {shares['disagreement']:.1%} of the data"
    if "heavy_tail" in shares:
        return f"{quotable}, and its error is optimistic for the {shares['heavy_tail']:.1%} with heavy tails"
    if "disagreement" in shares:
        return f"{quotable}, but mass that none of them proposes is not seen"
    return f"{quotable}, and no fault was found, but a mode that the guide misses is not seen"


def _of_the_reference(comparison: Any, row: Any) -> tuple[str, ...]:
    """Whether log p-hat agrees with the reference."""
    if comparison.reference is None:
        return ()
    if not (below := _below_the_reference(comparison, row)):
        return ("log p-hat agrees with the reference",)
    return (f"log p-hat lies {abs(below):.3f} nats {'below' if below > 0 else 'above'} the reference",)


def _below_the_reference(comparison: Any, row: Any) -> float:
    """The reference less log p-hat, in nats; 0 without one, and up to three standard errors over data or draws."""
    if comparison.reference is None:
        return 0.0
    paired = comparison.reference.value - row.mean_over_runs("value").to(comparison.reference.value.device)  # (N,)
    mean, error = _mean(paired)
    own = (row.stderr**2 + comparison.reference.mean_stderr**2) ** 0.5
    return mean if abs(mean) > 3 * max(error, own) + 1e-6 else 0.0


def _of_the_rank(comparison: Any, row: Any) -> str:
    best = comparison.rows[0]
    if row is best:
        return "ranked first"
    difference, error = comparison.difference(row.name)
    score = "ELBO" if comparison.ranked_by == "elbo" else "log p-hat"
    errors = f" \u00b1 {error:.2g}" if error > 0 else ""
    said = f"{score} {abs(difference):.3f}{errors} nats below that of {best.name}"
    return f"{said}, which does not tell them apart" if abs(difference) <= 2 * error else said


def _mean(values: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error; none of one value."""
    return float(values.mean()), float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Table, pictures and provenance.


def _table(table: TextTable, nats: str) -> str:
    """The table with a caption and headers, in a box of its own that scrolls."""
    header = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th>{"".join(map(_cell, cells))}</tr>' for name, *cells in table.rows
    )
    caption = f"From the best to the worst; nats {nats}, higher is better."
    return (
        '<div class="scroll" role="region" aria-label="Table" tabindex="0">'
        f"<table><caption><span>{caption}</span></caption>"
        f"<thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """A cell; a long one, such as the shares of all statuses, is broken into lines at its commas."""
    if len(text) <= _LONG:
        return f"<td>{_text(text)}</td>"
    return f'<td class="long">{", ".join(f"<span>{_text(part)}</span>" for part in text.split(", "))}</td>'


def _figure(name: str, comparison: Any) -> str:
    draw, caption = _FIGURES[name]
    from matplotlib.figure import Figure

    # At the width of a phone, letters are then about as large as those around the picture.
    figure = Figure(figsize=(4.2, 1.6 + 0.4 * len(comparison.rows)), layout="constrained")
    draw(comparison, ax=figure.subplots())
    return f"<figure>{_svg(figure, name, caption)}<figcaption>{caption}</figcaption></figure>"


def _svg(figure: "Figure", name: str, label: str) -> str:
    """A picture as inline SVG, its letters as text and its ids its own."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    viewbox = re.search(r'viewBox="[^"]*"', text)
    assert viewbox is not None
    opened = f'<svg {viewbox[0]} role="img" aria-label="{_text(label)}">'
    return opened + text[text.index(">") + 1 :].strip()


def _sources(comparison: Any) -> Iterator[str]:
    """The provenance of each training run of each row, and of the reference."""
    for row in comparison.rows:
        for i, run in enumerate(row.runs):
            yield _source(f"{row.name}, run {i + 1}" if len(row.runs) > 1 else row.name, run)
    if comparison.reference is not None:
        yield _source("reference", comparison.reference)


def _source(name: str, run: Any) -> str:
    provenance = run.provenance
    ordered = {key: provenance[key] for key in (*_FIRST, *provenance) if key in provenance}
    found = [("method", run.method), ("K", run.particles_in_words), *_flat(ordered)]
    items = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in found)
    return f"<details><summary>{_text(name)}</summary><dl>{items}</dl></details>"


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of nested mappings; what is empty says nothing."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}: ")
        elif value is not None and value != [] and value != ():
            yield f"{above}{key}", value
