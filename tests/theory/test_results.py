"""docs/results/theory.md has the tables and verdicts of its ledger, and no number of theirs was typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

from gptnorm.report.theory_table import markdown_table
from gptnorm.theory import CHECKS

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_tables_are_those_of_the_ledger() -> None:
    record = json.loads((RESULTS / "theory" / "theory.json").read_text(encoding="utf-8"))
    page = (RESULTS / "theory.md").read_text(encoding="utf-8")
    assert [check["name"] for check in record["checks"]] == list(CHECKS)
    assert (record["seeds"], record["widths"], record["recipe"]) == (5, [32, 64, 128, 256, 512], "quickstart")
    for check in record["checks"]:
        assert f"| {check['name']} | {check['verdict']}" in page
        for table in check["tables"]:
            assert table["detail"] or markdown_table(table) in page, table["title"]
