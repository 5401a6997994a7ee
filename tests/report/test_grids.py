"""Tables of text where room is short."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from gptnorm.report.grids import Stacked, TextTable, grid_table, rich_grids

NUMBER = Stacked("1.2345", "[1.2300, 1.2400]")


@pytest.mark.parametrize(("columns", "other"), [(1, "runs/" + "a" * 90), (3, "runs/" + "a" * 90), (6, "simplenorm")])
def test_names_stay_whole_and_lines_within_the_terminal(columns: int, other: str) -> None:
    """Beside a whole path in a wide table a name may break, so that no number is cut off."""
    rows = ((name, *[NUMBER] * columns) for name in ("prenorm_qknorm", other))
    head = ("strategy", *(f"loss minus somebody's, {n}" for n in range(columns)))
    console = Console(file=io.StringIO(), width=80)
    console.print(rich_grids("A study", [TextTable(title="Losses", head=head, rows=tuple(rows), words=1)], []))
    shown = console.file.getvalue()
    assert "prenorm_qknorm" in shown
    assert "1.2345" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize("columns", range(1, 10))
@pytest.mark.parametrize("name", ["simplenorm", "runs/" + "a" * 90])
def test_nothing_of_a_number_is_cut_off(columns: int, name: str) -> None:
    """Of a wide table every sign is there, however it is broken."""
    rows = ((name, "words " * 6, *[Stacked("9" * 4, "9" * 12)] * columns),)
    head = ("strategy", "at", *(["batch"] * columns))
    console = Console(file=io.StringIO(), width=80)
    console.print(rich_grids("A study", [TextTable(title="Losses", head=head, rows=rows, words=2)], []))
    assert console.file.getvalue().count("9") == 16 * columns


class Cells(HTMLParser):
    """How many cells each row of a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += 1


@pytest.mark.parametrize("words", [0, 1, 2])
def test_a_number_stands_under_its_head(words: int) -> None:
    grid = TextTable(title="Losses", head=("rate", "on", "loss"), rows=(("1e-2", "speeches", NUMBER),) * 2, words=words)
    cells = Cells()
    cells.feed(str(grid_table(grid)))
    assert cells.rows == [3, 3, 3]
