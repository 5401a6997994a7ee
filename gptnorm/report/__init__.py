"""What a study or a run found, as tables, plots and one static HTML page.

- `results.load_study` reads a study folder and holds the table logic;
- `table.rich_table` and `table.markdown_table` print it;
- `html.write_study_report` and `html.write_run_report` write `report.html`.

Nothing here trains, and no strategy is known by name: names come from the data.
"""

from __future__ import annotations

from gptnorm.report.results import Study, load_study
from gptnorm.report.table import markdown_table, rich_table

__all__ = ["Study", "load_study", "markdown_table", "rich_table"]
