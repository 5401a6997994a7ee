"""The page of theory checks: complete, safe, self-contained, and the same numbers as the terminal and Markdown."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from test_html import EVIL, Page

from gptnorm.report.panels import Panel
from gptnorm.report.theory_page import theory_page
from gptnorm.report.theory_table import cell_text, markdown_table, rich_table
from gptnorm.study.measures import Estimate
from gptnorm.theory.finding import Finding, Table, Verdict


def finding(name: str, verdict: Verdict) -> Finding:
    rows = [["a_b", 1.25, Estimate(value=-0.5, low=-0.625, high=-0.375, seeds=5), None], [EVIL, 0, 12, 3.5e-15]]
    panel = Panel(
        name="p",
        title="t",
        x_label="d",
        x=[32, 64],
        lines={"a": [1.0, 1.1], "b": [0.5, None]},
        ranges={"a": [(0.9, 1.2), (None, None)]},
        dashed=frozenset({"b"}),
        alt="what it shows",
        log_x=True,
        log_y=True,
    )
    empty = Panel(name="e", title="t", x_label="d", x=[1], lines={"a": [None]}, alt="nothing")
    return Finding(
        name=name,
        title=f"Check {name}",
        claim=EVIL,
        source="s",
        verdict=verdict,
        reason=EVIL,
        tables=[
            Table(title="Numbers", head=["name", "x", "y", "z"], rows=rows),
            Table(title="More", head=["name", "x", "y", "z"], rows=rows, words=1, detail=True),
        ],
        panels=[panel, empty],
        notes=["x: what x is"],
    )


def record():
    checks = [finding("one", "holds"), finding("two", "does not hold"), finding("three", "depends")]
    return {
        "seeds": 5,
        "widths": [32, 64],
        "recipe": EVIL,
        "checks": [check.record() for check in checks],
        "seconds": {"one": 1.5, "two": 70.0, "three": 0.1},
        "environment": {"device": "d", "torch": "2.13.0"},
    }


def test_page_is_complete_and_safe(tmp_path: Path) -> None:
    path = tmp_path / "t.html"
    path.write_text(theory_page(record()), encoding="utf-8")
    page = Page(path)
    assert all(load.startswith("#") or "url(#" in load for load in page.loads)
    assert "http" not in page.raw.replace("http://www.w3.org/", "")
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert page.images == ["what it shows"] * 3
    assert EVIL in page.text
    assert "3 claims, of which holds: 1, does not hold: 1, depends: 1" in page.text
    for text in ("1.25", "-0.500", "[-0.625, -0.375]", "3.5e-15", "Does not hold: ", "1 min 10 s", "More (2)"):
        assert text in page.text, text
    assert theory_page(record()) == page.raw


def test_cells() -> None:
    assert cell_text(None) == ("–", "")
    assert cell_text(0.0) == ("0", "")
    assert cell_text(7) == ("7", "")
    assert cell_text({"value": 2.0, "low": None, "high": None, "seeds": 1}) == ("2.00", "")
    assert cell_text({"value": 2.0, "low": 1.0, "high": -3e-4, "seeds": 3}) == ("2.00", "[1.00, -3e-4]")


def test_markdown_and_terminal_say_the_same() -> None:
    table = record()["checks"][0]["tables"][0]
    lines = markdown_table(table).splitlines()
    assert lines[0] == "**Numbers**"
    assert lines[3] == "|:--|--:|--:|--:|"
    assert lines[4] == "| a\\_b | 1.25 | -0.500 \\[-0.625, -0.375] | – |"
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(rich_table(table))
    shown = console.export_text()
    assert "-0.500" in shown
    assert "[-0.625, -0.375]" in shown
