"""What a study or a run found, as tables, plots and one static HTML page.

- `results.load_study` reads a study folder and holds the table logic;
- `table.rich_table` and `table.markdown_table` print it;
- `ladder.load_ladder`, `ladder_table.rich_ladder` and `.markdown_ladder` do the same for a depth or width ladder;
- `tolerance_ledger.load_tolerance`, `tolerance_table.rich_tolerance` and `.markdown_tolerance`: a tolerance study;
- `rich_study` and `markdown_study` do it for any study's folder;
- `html.write_study_report` and `html.write_run_report` write `report.html`.

Nothing here trains, and no strategy is known by name: names come from the data.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import RenderableType

from gptnorm.report.ladder import Ladder, is_ladder, load_ladder
from gptnorm.report.ladder_table import markdown_ladder, rich_ladder
from gptnorm.report.results import Study, load_study
from gptnorm.report.table import markdown_table, rich_table
from gptnorm.report.tolerance import ToleranceStudy
from gptnorm.report.tolerance_ledger import is_tolerance, load_tolerance
from gptnorm.report.tolerance_table import markdown_tolerance, rich_tolerance


def rich_study(folder: str | Path) -> RenderableType:
    """The tables of a study of any kind for the terminal; UserError where the folder holds none."""
    if is_tolerance(folder):
        return rich_tolerance(load_tolerance(folder))
    return rich_ladder(load_ladder(folder)) if is_ladder(folder) else rich_table(load_study(folder))


def markdown_study(folder: str | Path) -> str:
    """The same as Markdown, ending in a newline."""
    if is_tolerance(folder):
        return markdown_tolerance(load_tolerance(folder))
    return markdown_ladder(load_ladder(folder)) if is_ladder(folder) else markdown_table(load_study(folder))


__all__ = [
    "Ladder",
    "Study",
    "ToleranceStudy",
    "is_ladder",
    "is_tolerance",
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
