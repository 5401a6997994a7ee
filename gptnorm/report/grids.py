"""A table of text, for the terminal, as Markdown and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from gptnorm.report import page
from gptnorm.report.page import Markup, tag
from gptnorm.report.table import escape


@dataclass(frozen=True)
class Stacked:
    """A cell in two lines where there is room for them: a number, and its interval below."""

    value: str
    below: str

    def __str__(self) -> str:
        return f"{self.value} {self.below}"


Entry = str | Stacked

WHOLE = 16
"""Signs up to which the first entry of a row is not broken in the terminal."""


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A grid of text under a title."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    words: int
    """Leading columns that hold text; the first heads its row even if it holds a number."""


def rich_grids(title: str, grids: Sequence[TextTable], notes: Sequence[str], answer: Sequence[str] = ()) -> Group:
    """Tables and notes for the terminal, what they say first; print it with a `rich.console.Console`."""
    parts: list[Table | Text] = [Text(title, style="bold"), *(Text(sentence) for sentence in answer)]
    for grid in grids:
        # Text, never markup: a name with brackets in it is shown as it is.
        table = Table(title=Text(grid.title), box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False)
        table.title_justify = "left"
        for index, name in enumerate(grid.head):
            justify = "left" if index < grid.words else "right"
            # What a row is about stays in one piece where room is short, unless it is a whole path; a least width
            # would push numbers out of the terminal.
            short = index == 0 and all(len(str(row[0])) <= WHOLE for row in grid.rows)
            table.add_column(Text(name), justify=justify, overflow="fold", no_wrap=short)
        for row in grid.rows:
            table.add_row(*(Text(_lines(entry)) for entry in row))
        parts.append(table)
    return Group(*parts, Text("\n".join(notes)))


def markdown_grids(grids: Sequence[TextTable], notes: Sequence[str], *, titled: bool = False) -> str:
    """Tables and notes as Markdown, ending in a newline.

    Args:
        titled: whether each table has its title above it.
    """
    parts = []
    for grid in grids:
        rule = "|:--" * grid.words + "|--:" * (len(grid.head) - grid.words) + "|"
        rows = ["| " + " | ".join(escape(str(entry)) for entry in row) + " |" for row in (grid.head, *grid.rows)]
        if titled:
            parts.append(f"**{escape(grid.title)}**")
        parts.append("\n".join([rows[0], rule, *rows[1:]]))
    return "\n\n".join([*parts, "  \n".join(map(escape, notes))]) + "\n"


def grid_table(grid: TextTable) -> Markup:
    """The table for a page."""
    rows = []
    for row in grid.rows:
        words = [page.data_cell(_content(entry), "words") for entry in row[1 : grid.words]]
        cells = [page.data_cell(_content(entry)) for entry in row[max(1, grid.words) :]]
        rows.append([page.head_cell(str(row[0])), *words, *cells])
    words = frozenset(grid.head[1 : grid.words])
    return page.table(grid.title, list(grid.head), rows, class_="numbers grid", words=words)


def _lines(entry: Entry) -> str:
    return entry if isinstance(entry, str) else f"{entry.value}\n{entry.below}"


def _content(entry: Entry) -> list[str]:
    return [entry] if isinstance(entry, str) else [entry.value, " ", tag("span", entry.below, class_="sd")]
