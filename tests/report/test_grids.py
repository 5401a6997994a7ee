"""Tables of text where room is short."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gptnorm.report.grids import Grid, Stacked, rich_grids

NUMBER = Stacked("1.2345", "[1.2300, 1.2400]")


@pytest.mark.parametrize("columns", [1, 3, 6])
def test_names_stay_whole_and_lines_within_the_terminal(columns: int) -> None:
    path = "runs/" + "a" * 90
    rows = ((name, *[NUMBER] * columns) for name in ("prenorm_qknorm", path))
    head = ("strategy", *(f"loss minus somebody's, {n}" for n in range(columns)))
    console = Console(file=io.StringIO(), width=80)
    console.print(rich_grids("A study", [Grid(title="Losses", head=head, rows=tuple(rows), words=1)], []))
    shown = console.file.getvalue()
    assert "prenorm_qknorm" in shown
    assert "1.2345" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
