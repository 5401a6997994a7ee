"""A study whose kind its folder tells."""

from __future__ import annotations

from pathlib import Path

from gptnorm.records import read_object
from gptnorm.report.ladder import Ladder, load_ladder
from gptnorm.report.results import Study, load_study
from gptnorm.report.tolerance import ToleranceStudy
from gptnorm.report.tolerance_ledger import load_tolerance

AnyStudy = Study | Ladder | ToleranceStudy


def load_any(folder: str | Path) -> AnyStudy:
    """A study of any kind, complete or partial; UserError where the folder holds none."""
    facts = read_object(Path(folder) / "study.json")
    if "tolerance" in facts:
        return load_tolerance(folder)
    return load_ladder(folder) if "ladder" in facts else load_study(folder)
