"""The page of theory checks: for each its claim, verdict, figures, tables, and what the symbols mean."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gptnorm.format import duration_text, plural
from gptnorm.report import page
from gptnorm.report.page import Markup, tag
from gptnorm.report.panels import Panel, draw
from gptnorm.report.shared import environment_pairs
from gptnorm.report.theory_table import html_table


def theory_page(record: dict[str, Any]) -> str:
    """The HTML of a record as `gptnorm.theory.command.run_theory` makes it."""
    title = "The theory of norms, checked"
    return page.page(
        title,
        [
            tag("header", [tag("h1", title), tag("p", _subtitle(record), class_="subtitle")]),
            page.section("Summary", [_summary(record["checks"])]),
            *(page.section(check["title"], _section(check)) for check in record["checks"]),
            page.section("How it was measured", [page.pairs(_how(record))]),
            page.section("Environment", [page.pairs(environment_pairs(record["environment"]))]),
        ],
    )


def _subtitle(record: dict[str, Any]) -> str:
    verdicts = Counter(check["verdict"] for check in record["checks"])
    told = [f"{verdict}: {count}" for verdict, count in verdicts.items()]
    return f"{plural(len(record['checks']), 'claim')}, of which {', '.join(told)}"


def _summary(checks: list[dict[str, Any]]) -> Markup:
    rows = [
        [
            page.head_cell(check["title"]),
            page.data_cell(check["verdict"], _class(check["verdict"])),
            page.data_cell(page.prose(check["claim"]), "reading"),
        ]
        for check in checks
    ]
    return page.table("Claims and verdicts", ["check", "verdict", "claim"], rows)


def _class(verdict: str) -> str:
    return {"holds": "best", "does not hold": "diverged"}.get(verdict, "")


def _section(check: dict[str, Any]) -> list[Markup]:
    figures = []
    for found in check["panels"]:
        panel = Panel(**{**found, "dashed": frozenset(found["dashed"])})
        svg = draw(panel, f"theory-{check['name']}")
        if svg is not None:
            figures.append(page.figure(svg, panel.alt))
    parts = [
        tag("p", page.prose(f"Claim: {check['claim']}")),
        tag("p", f"Source: {check['source']}", class_="notes"),
        _answer(check),
        tag("div", figures, class_="panels"),
    ]
    for table in check["tables"]:
        content = [html_table(table)]
        if table["detail"]:
            parts.append(page.details(f"{table['title']} ({len(table['rows'])})", content))
        else:
            parts += [tag("h3", table["title"]), *content]
    parts.append(tag("ul", [tag("li", page.prose(note)) for note in check["notes"]], class_="notes terms"))
    return parts


def _answer(check: dict[str, Any]) -> Markup:
    bad = check["verdict"] == "does not hold"
    words = [tag("strong", f"{check['verdict'].capitalize()}: "), page.prose(check["reason"])]
    return tag("div", tag("p", words), class_="answer bad" if bad else "answer")


def _how(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Seeds", f"0 … {record['seeds'] - 1}"),
        ("Widths", ", ".join(map(str, record["widths"]))),
        ("Recipe", record["recipe"]),
        *((f"Time of {name}", duration_text(seconds)) for name, seconds in record["seconds"].items()),
    ]
