"""What a study or a run found, as tables, plots and one static HTML page.

- `results.load_study` reads a study folder and holds the table logic;
- `table.rich_table` and `table.markdown_table` print it;
- `ladder.load_ladder`, `ladder_table.rich_ladder` and `.markdown_ladder` do the same for a depth or width ladder;
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


def rich_study(folder: str | Path) -> RenderableType:
    """The tables of a study of any kind for the terminal; UserError where the folder holds none."""
    return rich_ladder(load_ladder(folder)) if is_ladder(folder) else rich_table(load_study(folder))


__all__ = [
    "Ladder",
    "Study",
    "is_ladder",
    "load_ladder",
    "load_study",
    "markdown_ladder",
    "markdown_table",
    "rich_ladder",
    "rich_study",
    "rich_table",
]
