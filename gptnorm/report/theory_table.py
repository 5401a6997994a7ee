"""Tables of theory checks, as `gptnorm.theory.finding` records them, for the terminal, as Markdown and as HTML."""

from __future__ import annotations

import html
from typing import Any

from rich.table import Table

from gptnorm.format import MISSING
from gptnorm.report import page
from gptnorm.report.estimates import ratio_text
from gptnorm.report.page import Markup, tag
from gptnorm.report.table import escape


def cell_text(cell: Any) -> tuple[str, str]:
    """What a cell says, and its interval or nothing."""
    if cell is None:
        return MISSING, ""
    if isinstance(cell, str):
        return cell, ""
    if isinstance(cell, dict):
        ends = [cell["low"], cell["high"]]
        below = "" if None in ends else f"[{', '.join(map(_number, ends))}]"
        return _number(cell["value"]), below
    return _number(cell), ""


def rich_table(table: dict[str, Any]) -> Table:
    """For the terminal."""
    found = Table(
        title=table["title"], title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, name in enumerate(table["head"]):
        found.add_column(name, justify="left" if index < table["words"] else "right", overflow="fold")
    for row in table["rows"]:
        found.add_row(*("\n".join(filter(None, cell_text(cell))) for cell in row))
    return found


def markdown_table(table: dict[str, Any]) -> str:
    """Title and table, ending in a newline."""
    rules = [":--" if index < table["words"] else "--:" for index in range(len(table["head"]))]
    lines = [f"**{escape(table['title'])}**", "", _line(table["head"]), f"|{'|'.join(rules)}|"]
    lines += [_line([" ".join(filter(None, cell_text(cell))) for cell in row]) for row in table["rows"]]
    return "\n".join(lines) + "\n"


def html_table(table: dict[str, Any]) -> Markup:
    """For the report."""
    rows = []
    for first, *rest in table["rows"]:
        # Names such as np_layernorm may break after their underscore.
        name = Markup(html.escape(cell_text(first)[0]).replace("_", "_<wbr>"))
        cells = [tag("th", name, scope="row")]
        for index, cell in enumerate(rest, 1):
            value, below = cell_text(cell)
            content = [value, tag("span", f" {below}", class_="sd")] if below else value
            cells.append(page.data_cell(content, "words" if index < table["words"] else ""))
        rows.append(cells)
    words = frozenset(table["head"][1 : table["words"]])
    return page.table(table["title"], list(table["head"]), rows, class_="numbers grid", words=words)


def _number(value: float | None) -> str:
    """Three digits, with the sign of a negative number; whole numbers as they are."""
    if value is None:
        return MISSING
    if value == 0 or (isinstance(value, int) and abs(value) < 1000):
        return f"{value:g}"
    return f"{'-' if value < 0 else ''}{ratio_text(abs(value))}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(map(escape, cells))} |"
