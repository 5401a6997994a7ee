"""What the scripts share that compare rows at their own best learning rate, picked on seed 0 and reported on others."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from gptnorm.report import load_study, markdown_table

SEEDS = (1, 2, 3, 4, 5)
"""Those reported, none of them the one that the rate was picked on."""

BEYOND = {3e-3: 1e-3, 1e-3: 3e-4, 3e-2: 1e-1, 1e-1: 3e-1}
"""The next rate, outwards."""


def best_rate(losses: dict[float, float | None]) -> float:
    """The rate of lowest loss; None is a run that diverged."""
    return min((loss, lr) for lr, loss in losses.items() if loss is not None)[1]


def rate_beyond(losses: dict[float, float | None]) -> float | None:
    """The rate to try next if the best stands at the edge of those tried."""
    best = best_rate(losses)
    return BEYOND.get(best) if best in (min(losses), max(losses)) else None


def ledger_sections(folders: Iterable[Path], title: str = "") -> list[str]:
    """A section for each study: the command that made it, and its table."""
    sections = []
    for folder in folders:
        command = json.loads((folder / "study.json").read_text(encoding="utf-8"))["command"]
        sections.append(f"## {title}{folder.name}\n\n    {command}\n\n{markdown_table(load_study(folder))}")
    return sections
