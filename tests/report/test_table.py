"""The table as the terminal and as Markdown show it."""

from __future__ import annotations

import io
from pathlib import Path

from report_folders import Outcome, make_study
from rich.console import Console

from gptnorm.report import load_study, markdown_table, rich_table

CELLS: dict[str, dict[float, list[Outcome]]] = {
    "alpha": {1e-3: [3.0, 3.1], 1e-2: [2.0, 2.2], 1e-1: ["diverged", 2.5]},
    "[b]e|ta": {1e-3: [2.5, 2.5], 1e-2: [2.6, None], 1e-1: [5.5, 5.5]},
}


def test_markdown(tmp_path: Path) -> None:
    lines = markdown_table(load_study(make_study(tmp_path, CELLS))).splitlines()
    assert lines[:4] == [
        "| strategy | 1e-3 | 1e-2 | 1e-1 |",
        "|:--|--:|--:|--:|",
        "| alpha | 3.0500 ± 0.0707 | **2.1000 ± 0.1414 \\*** | diverged (1 of 2) |",
        "| \\[b]e\\|ta | **2.5000 ± 0.0000 \\* edge** | 2.6000 (1 of 2) | 5.5000 ± 0.0000 † |",
    ]
    notes = "\n".join(lines[5:])
    for part in ("edge of the learning rates tried", "seed sd", "k of n seeds diverged", "token frequencies"):
        assert part in notes


def test_terminal_fits_and_shows_names_as_they_are(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(rich_table(load_study(make_study(tmp_path, CELLS))))
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    for part in ("[b]e|ta", "2.1000 *", "± 0.1414", "diverged", "(1 of 2)", "* edge", "5.5000 †"):
        assert part in text


def test_footnotes_explain_only_what_is_there(tmp_path: Path) -> None:
    text = markdown_table(load_study(make_study(tmp_path, {"a": {1e-3: [3.0], 1e-2: [2.0], 1e-1: [3.0]}})))
    assert "one seed" in text
    for absent in ("edge", "diverged", "†", "not run"):
        assert absent not in text
