"""A study whose kind its folder tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from gptnorm.records import read_object
from gptnorm.report.ladder import Ladder, load_ladder
from gptnorm.report.results import Study, load_study
from gptnorm.report.tolerance import ToleranceStudy
from gptnorm.report.tolerance_ledger import load_tolerance

AnyStudy = Study | Ladder | ToleranceStudy
T = TypeVar("T")


def load_any(folder: str | Path) -> AnyStudy:
    """A study of any kind, complete or partial; UserError where the folder holds none."""
    facts = read_object(Path(folder) / "study.json")
    if "tolerance" in facts:
        return load_tolerance(folder)
    return load_ladder(folder) if "ladder" in facts else load_study(folder)


def by_kind(
    study: AnyStudy,
    tolerance: Callable[[ToleranceStudy], T],
    ladder: Callable[[Ladder], T],
    grid: Callable[[Study], T],
) -> T:
    """What that of the three gives which is for a study of this kind."""
    match study:
        case ToleranceStudy():
            return tolerance(study)
        case Ladder():
            return ladder(study)
        case Study():
            return grid(study)
