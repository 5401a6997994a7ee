"""The reports: one static HTML file for a study, one for a run.

Each is complete in itself: styles and plots are inside, there is no script, nothing is loaded.
"""

from __future__ import annotations

from pathlib import Path

from gptnorm.errors import UserError
from gptnorm.files import write_atomic
from gptnorm.report.any_study import by_kind, load_any
from gptnorm.report.ladder_page import ladder_page
from gptnorm.report.run_page import run_page
from gptnorm.report.shared import REPORT
from gptnorm.report.study_page import study_page
from gptnorm.report.tolerance_page import tolerance_page


def write_study_report(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a study of any kind, complete or partial, and return its path.

    Raises UserError where the folder holds no readable `study.json`.
    """
    content = by_kind(load_any(folder), tolerance_page, ladder_page, study_page)
    write_atomic(Path(folder) / REPORT, content)
    return Path(folder) / REPORT


def write_run_report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path.

    Raises UserError where the folder holds no `metrics.jsonl`.
    """
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: holds no metrics.jsonl, so it is no run to report")
    write_atomic(folder / REPORT, run_page(folder))
    return folder / REPORT
