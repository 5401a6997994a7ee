"""A record of curvature in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from gptnorm.report.curvature_tables import Sheet, curvature_sheets, general_notes


def print_curvature(record: dict[str, Any], console: Console) -> None:
    """A table for each kind of number, and what they mean; of a record as `Curvature.record` makes it."""
    model, first = record["config"]["model"], record["readings"][0]["sharpness"]
    line = (
        f"{model['strategy']} on {model['backbone']}: {first['parameters']:,} parameters ({record['part']}), "
        f"{record['sequences']} x {record['seq_len']} tokens of {record['text']}, {record['dtype']}"
    )
    console.print(line, highlight=False, markup=False)
    sheets = curvature_sheets(record)
    for sheet in sheets.values():
        console.print()
        console.print(_table(sheet))
    console.print()
    for note in [*(note for sheet in sheets.values() for note in sheet.notes), *general_notes(record)]:
        console.print(note, highlight=False, markup=False)


def _table(sheet: Sheet) -> Table:
    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": None, "pad_edge": False}
    table = Table(title=sheet.title, padding=(0, 1, 0, 0), **look)
    for column in sheet.head:
        # Where it is narrow, names are broken, and numbers never.
        words = column in sheet.words
        table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in sheet.rows:
        table.add_row(*row)
    return table
