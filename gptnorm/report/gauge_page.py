"""What a run's page says of the loss's curvature while it trained: the gauge's keys in `metrics.jsonl`."""

from __future__ import annotations

import statistics
from typing import Any

from gptnorm.format import count_text, digits_text
from gptnorm.records import finite
from gptnorm.report import page
from gptnorm.report.page import Markup, tag
from gptnorm.report.panels import Panel, draw

MOST_SLOTS = 12
"""Slots drawn in one plot; the table has all of them."""

Column = list[float | None]


def gauge_sections(metrics: list[dict[str, Any]]) -> list[Markup]:
    """The section of the gauge, or nothing where nothing was read."""
    lines = [row for row in metrics if row.get("split") == "train" and finite(row.get("step")) is not None]
    readings = [row for row in lines if finite(row.get("hessian_max")) is not None]
    refused = [row for row in lines if row.get("gauge_refused")]
    if not readings and not refused:
        return []
    notes = [*_meanings(readings), *_cost(lines), *_refusals(refused)]
    content: list[Markup] = []
    if readings:
        figures = [page.figure(svg, panel.alt) for panel in _panels(readings) if (svg := draw(panel, "gauge"))]
        content.append(tag("div", figures, class_="panels"))
    content.append(tag("ul", [tag("li", note) for note in notes], class_="notes"))
    if readings and _slots(readings):
        title = f"Every slot at step {count_text(readings[-1]['step'])}"
        content.append(page.details(title, [_table(readings[-1])]))
    return [page.section("Curvature while training", content)]


def _panels(readings: list[dict[str, Any]]) -> list[Panel]:
    steps = [row["step"] for row in readings]

    def panel(name: str, title: str, lines: dict[str, Column], **more: Any) -> Panel:
        alt = f"{title} over steps: {', '.join(lines)}."
        return Panel(name=name, title=title, x_label="step", x=steps, lines=lines, alt=alt, **more)

    def column(key: str) -> Column:
        return [finite(row.get(key)) for row in readings]

    found = [panel("max", "Largest eigenvalue of the Hessian", {"λ_max": column("hessian_max")})]
    sharpness = {"sharpness": column("adam_sharpness"), "threshold": column("adam_threshold")}
    found.append(panel("adam", "As AdamW sees it", sharpness, dashed=frozenset({"threshold"})))
    slots = _slots(readings)[:MOST_SLOTS]
    if not slots:
        return found
    labels = {slot: slot.split(".", 2)[-1] if len({s.split(".")[1] for s in slots}) == 1 else slot for slot in slots}

    def by_slot(key: str) -> dict[str, Column]:
        return {labels[slot]: [_of(row, slot, key) for row in readings] for slot in slots}

    ratios: dict[str, Column] = {
        labels[slot]: [_ratio(_of(row, slot, "curvature"), _of(row, slot, "gauss_newton")) for row in readings]
        for slot in slots
    }
    return [
        *found,
        panel("h", "‖H‖ in what a slot reads", by_slot("hessian")),
        panel("l", "‖L‖, its Gauss-Newton part", by_slot("gauss_newton")),
        panel("c", "‖C‖, the slot's own curvature", by_slot("curvature")),
        panel("ratio", "‖C‖ / ‖L‖", ratios),
    ]


def _meanings(readings: list[dict[str, Any]]) -> list[str]:
    if not readings:
        return []
    found = [
        "With the weights before the update, on a few sequences of the step.",
        "As AdamW sees it: λ_max(P^-½ H P^-½), P that of the update; above the threshold (2 + 2β₁) / ((1 - β₁) η) "
        "AdamW with P held still is unstable on a quadratic loss.",
    ]
    if _slots(readings):
        found.append("Slots: spectral norms of H = L + C in what a module reads at one token.")
    return found


def _cost(lines: list[dict[str, Any]]) -> list[str]:
    """What a reading costs in steps, and all of them of training time."""
    steps = [value for row in lines if (value := finite(row.get("gauge_steps"))) is not None]
    spent = [value for row in lines if (value := finite(row.get("gauge_seconds"))) is not None]
    total = max((value for row in lines if (value := finite(row.get("seconds")))), default=None)
    found = []
    if steps:
        found.append(f"A reading took the time of {digits_text(statistics.fmean(steps))} steps on average")
    if spent and total:
        share = f"all {len(spent)} readings {sum(spent) / total:.1%} of training time"
        found = [f"{found[0]}, {share}" if found else f"{share[0].upper()}{share[1:]}"]
    return [f"{words}." for words in found]


def _refusals(refused: list[dict[str, Any]]) -> list[str]:
    if not refused:
        return []
    steps = ", ".join(count_text(row["step"]) for row in refused[:5]) + (" and later" if len(refused) > 5 else "")
    return [f"No reading at step {steps}: {refused[0]['gauge_refused']}."]


def _table(reading: dict[str, Any]) -> Markup:
    columns = {"‖H‖": "hessian", "‖L‖": "gauss_newton", "‖C‖": "curvature"}
    rows = []
    for slot in _slots([reading]):
        values = [_of(reading, slot, key) for key in columns.values()]
        cells = [*values, _ratio(values[2], values[1])]
        rows.append([page.head_cell(slot), *(page.data_cell(digits_text(value)) for value in cells)])
    return page.table("Curvature by slot at the last reading", ["slot", *columns, "‖C‖/‖L‖"], rows, class_="numbers")


def _slots(readings: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(slot for row in readings if isinstance(row.get("slots"), dict) for slot in row["slots"]))


def _of(row: dict[str, Any], slot: str, key: str) -> float | None:
    slots = row.get("slots")
    found = slots.get(slot) if isinstance(slots, dict) else None
    return finite(found.get(key)) if isinstance(found, dict) else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
