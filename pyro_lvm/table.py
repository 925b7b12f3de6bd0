"""A table of words: the one place that lays out text, Markdown and HTML."""

import html
from dataclasses import dataclass

__all__ = ["TextTable"]


@dataclass(frozen=True)
class TextTable:
    """Columns of strings with notes below; the first column is aligned left, the others right.

    Example:
        >>> print(TextTable(("guide", "ELBO"), (("flow", "-17.5"), ("mean-field", "-18.1")), ("nats per datum",)))
        guide        ELBO
        ----------  -----
        flow        -17.5
        mean-field  -18.1
        nats per datum
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

        def line(cells: tuple[str, ...]) -> str:
            first, *rest = (
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join([first, *rest]).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([line(self.header), rule, *map(line, self.rows), *self.notes])

    def to_markdown(self) -> str:
        """The table in Markdown, the notes as a list."""
        align = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [" | ".join(cells) for cells in (self.header, align, *self.rows)]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([*(f"| {line} |" for line in lines), *([""] if notes else []), *notes])

    def to_html(self) -> str:
        """The table as an HTML fragment."""

        def cells(tag: str, row: tuple[str, ...]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

        body = "".join(cells("td", row) for row in self.rows)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<table><thead>{cells('th', self.header)}</thead><tbody>{body}</tbody></table><ul>{notes}</ul>"
