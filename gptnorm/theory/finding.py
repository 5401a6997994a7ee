"""What a check found, as plain data: a claim, a verdict that its numbers gave, tables and panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gptnorm.probe.show import plain
from gptnorm.report.panels import Panel
from gptnorm.study.measures import Estimate

Verdict = Literal["holds", "does not hold", "depends"]
"""Whether a claim held in all that was measured, in none of it, or in a part, which the reason names."""

Cell = str | float | Estimate | None
"""Text, a number, a mean with its interval over seeds, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers under names."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1
    """Columns of text, the first ones."""
    detail: bool = False
    """Whether only the report and the JSON have it."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.head) for row in self.rows), self.title


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Of one check."""

    name: str
    title: str
    claim: str
    """One sentence."""
    source: str
    """Of the claim."""
    verdict: Verdict
    reason: str
    """Why, with the numbers that decided it."""
    tables: Sequence[Table]
    panels: Sequence[Panel]
    notes: Sequence[str]
    """What each symbol means, and how it was drawn."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the verdict was computed from."""

    def record(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        found = asdict(self)
        for panel in found["panels"]:
            panel["dashed"] = sorted(panel["dashed"])
        return plain(found)


def verdict_of(held: Sequence[bool]) -> Verdict:
    """Of several cases of one claim."""
    assert held, "nothing was measured"
    if all(held):
        return "holds"
    return "depends" if any(held) else "does not hold"
