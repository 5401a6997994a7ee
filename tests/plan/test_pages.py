"""The tables of docs/plan.md are those of the result files: no number was typed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def test_tables_of_the_page(script: Callable[[str], Any]) -> None:
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    assert script("plan_memory").markdown(results) in page
    assert script("plan_papers").markdown(json.loads((results / "plan-papers.json").read_text())) in page
