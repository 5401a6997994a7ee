"""What a run's page says of its norms while it trained: the readings of `watch.jsonl`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from gptnorm.format import count_text, digits_text, evenly_chosen
from gptnorm.records import finite
from gptnorm.report import page
from gptnorm.report.page import Markup, tag
from gptnorm.report.panels import Panel, draw

MOST_LINES = 6
"""Blocks drawn in one plot, evenly chosen."""


def watch_sections(readings: list[dict[str, Any]]) -> list[Markup]:
    """The section of the watch, or nothing where nothing was read."""
    readings = [row for row in readings if isinstance(row.get("stream_norm"), list) and finite(row.get("step"))]
    if not readings:
        return []
    first, more = _panels(readings)
    notes = [
        "Norms: ‖·‖₂ over a token's features, mean over tokens, with the weights before the step.",
        "Update over weight: ‖ΔW‖ / ‖W‖ of one step, median over blocks.",
        "Attention logits: the worst head of all blocks; the bound is scale · max‖q‖ · max‖k‖, the largest is exact "
        "over the sequences watched.",
    ]
    content = [
        tag("div", _figures(first), class_="panels"),
        tag("ul", [tag("li", note) for note in notes], class_="notes"),
        page.details("Variances, cosines and gains", [tag("div", _figures(more), class_="panels")]),
        page.details(f"Every block at step {count_text(readings[-1]['step'])}", [_table(readings[-1])]),
        *_heads(readings[-1]),
    ]
    return [page.section("Norms while training", content)]


def _figures(panels: Iterable[Panel]) -> list[Markup]:
    return [page.figure(svg, panel.alt) for panel in panels if (svg := draw(panel, "watch")) is not None]


def _panels(readings: list[dict[str, Any]]) -> tuple[list[Panel], list[Panel]]:
    """What is shown at once, and what on demand."""
    steps = [row["step"] for row in readings]
    blocks = len(readings[0]["stream_norm"])
    shown = evenly_chosen(blocks, MOST_LINES)

    def panel(name: str, title: str, lines: dict[str, list[float | None]], **more: Any) -> Panel:
        alt = f"{title} over steps: {', '.join(lines)}. Last values are in the table below."
        return Panel(name=name, title=title, x_label="step", x=steps, lines=lines, alt=alt, **more)

    def by_block(key: str) -> dict[str, list[float | None]]:
        return {f"block {layer + 1}": [_at(row.get(key), layer) for row in readings] for layer in shown}

    def worst(key: str) -> list[float | None]:
        return [max(_known(row.get(key)), default=None) for row in readings]

    roles = dict.fromkeys(role for row in readings for role in _table_of(row, "update", "roles"))
    ends = dict.fromkeys(role for row in readings for role in _table_of(row, "update", "ends"))
    updates = {
        **{role: [_median(_table_of(row, "update", "roles").get(role)) for row in readings] for role in roles},
        **{role: [finite(_table_of(row, "update", "ends").get(role)) for row in readings] for role in ends},
    }
    places = dict.fromkeys(place for row in readings for place in _table_of(row, "gains"))

    def gains(key: str) -> dict[str, list[float | None]]:
        columns = {}
        for place in places:
            values = [_known(_table_of(row, "gains", place).get(key)) for row in readings]
            columns[place] = [
                None if not known else max(known) if key == "max" else statistics.fmean(known) for known in values
            ]
        return columns

    return [
        panel("h", "Norm of the stream, ‖h‖", by_block("stream_norm"), ordered=True),
        panel("a", "Norm of the attention branch", by_block("attn_norm"), ordered=True),
        panel("m", "Norm of the feed-forward branch", by_block("ffn_norm"), ordered=True),
        panel("logits", "Attention logits", {"bound": worst("logit_bound"), "largest": worst("logit_max")}),
        panel("updates", "Update over weight", updates),
    ], [
        panel("va", "Variance of the attention branch", by_block("attn_variance"), ordered=True),
        panel("vm", "Variance of the feed-forward branch", by_block("ffn_variance"), ordered=True),
        panel("cos", "Cosine of a block's input and output", by_block("cosine"), ordered=True, limits=(-0.1, 1.05)),
        panel("tok", "Cosine of two tokens", by_block("token_cosine"), ordered=True, limits=(-0.1, 1.05)),
        panel("gmean", "Gains: mean |γ| over blocks", gains("mean")),
        panel("gmax", "Gains: largest |γ| of all blocks", gains("max")),
    ]


def _table(reading: dict[str, Any]) -> Markup:
    columns = {
        "‖h‖": "stream_norm",
        "‖attention‖": "attn_norm",
        "‖feed-forward‖": "ffn_norm",
        "attention variance": "attn_variance",
        "feed-forward variance": "ffn_variance",
        "cos in, out": "cosine",
        "cos tokens": "token_cosine",
        "logit bound": "logit_bound",
        "largest logit": "logit_max",
    }
    rows = []
    for layer in range(len(reading["stream_norm"])):
        values = [digits_text(_at(reading.get(key), layer)) for key in columns.values()]
        rows.append([page.head_cell(str(layer + 1)), *map(page.data_cell, values)])
    return page.table("Norms by block at the last reading", ["block", *columns], rows, class_="numbers")


def _heads(reading: dict[str, Any]) -> list[Markup]:
    """Bound and largest logit of every head; nothing where they were not read."""
    bounds, largest = (_table_of(reading, "heads").get(key) for key in ("logit_bound", "logit_max"))
    if not isinstance(bounds, list) or not bounds or not all(isinstance(row, list) for row in bounds):
        return []
    rows = []
    for layer, bound in enumerate(bounds):
        found = largest[layer] if isinstance(largest, list) and layer < len(largest) else None
        cells = [f"{digits_text(_at(bound, head))} / {digits_text(_at(found, head))}" for head in range(len(bound))]
        rows.append([page.head_cell(str(layer + 1)), *map(page.data_cell, cells)])
    columns = ["block", *(f"head {head + 1}" for head in range(max(map(len, bounds))))]
    table = page.table("Attention logits by head: bound / largest", columns, rows, class_="numbers")
    return [page.details(f"Every head at step {count_text(reading['step'])}: bound and largest logit", [table])]


def _at(column: object, index: int) -> float | None:
    return finite(column[index]) if isinstance(column, list) and index < len(column) else None


def _known(column: object) -> list[float]:
    values = map(finite, column) if isinstance(column, list) else ()
    return [value for value in values if value is not None]


def _median(column: object) -> float | None:
    known = _known(column)
    return statistics.median(known) if known else None


def _table_of(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
