"""What a study or a run found, as tables, plots and one static HTML page.

- `results.load_study` reads a study folder and holds the table logic;
- `table.rich_table` and `table.markdown_table` print it;
- `ladder.load_ladder`, `ladder_table.rich_ladder` and `.markdown_ladder` do the same for a depth or width ladder;
- `tolerance_ledger.load_tolerance`, `tolerance_table.rich_tolerance` and `.markdown_tolerance`: a tolerance study;
- `any_study.load_any`, `rich_study` and `markdown_study` do it for a study of any kind;
- `html.write_study_report` and `html.write_run_report` write `report.html`.

Nothing here trains, and no strategy is known by name: names come from the data.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import RenderableType

from gptnorm.report.any_study import AnyStudy, by_kind, load_any
from gptnorm.report.ladder import Ladder, load_ladder
from gptnorm.report.ladder_table import markdown_ladder, rich_ladder
from gptnorm.report.results import Study, load_study
from gptnorm.report.table import markdown_table, rich_table
from gptnorm.report.tolerance import ToleranceStudy
from gptnorm.report.tolerance_ledger import load_tolerance
from gptnorm.report.tolerance_table import markdown_tolerance, rich_tolerance


def rich_study(folder: str | Path) -> RenderableType:
    """The tables of a study of any kind for the terminal; UserError where the folder holds none."""
    return by_kind(load_any(folder), rich_tolerance, rich_ladder, rich_table)


def markdown_study(folder: str | Path) -> str:
    """The same as Markdown, ending in a newline."""
    return by_kind(load_any(folder), markdown_tolerance, markdown_ladder, markdown_table)


__all__ = [
    "AnyStudy",
    "Ladder",
    "Study",
    "ToleranceStudy",
    "load_any",
    "load_ladder",
    "load_study",
    "load_tolerance",
    "markdown_ladder",
    "markdown_study",
    "markdown_table",
    "markdown_tolerance",
    "rich_ladder",
    "rich_study",
    "rich_table",
    "rich_tolerance",
]
