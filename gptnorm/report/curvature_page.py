"""The page of a reading of curvature: of a model at initialisation, or of a run at some of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptnorm.format import count_text, evenly_chosen, loss_text
from gptnorm.records import finite
from gptnorm.report import page
from gptnorm.report.curvature_plots import slot_norms, spectrum
from gptnorm.report.curvature_tables import Sheet, curvature_sheets, general_notes, number_text, slot_ratio
from gptnorm.report.page import Markup, tag
from gptnorm.report.panels import Panel, draw
from gptnorm.report.shared import environment_pairs, setting_table
from gptnorm.tables import flatten

MOST_SPECTRA = 6
"""Steps whose spectrum is drawn, evenly chosen."""

MOST_SLOTS = 12
"""Slots in one plot over steps."""

Readings = list[dict[str, Any]]


def curvature_page(record: dict[str, Any]) -> str:
    """The HTML of a record as `gptnorm.curvature.command.Curvature.record` makes it."""
    config, readings = flatten(record["config"]), record["readings"]
    title = f"Curvature: {config['model.strategy']}, {_when([reading['step'] for reading in readings])}"
    subtitle = f"{config['model.backbone']}, {record['source']}"
    figures: dict[str, Callable[[Readings], list[Markup]]] = {
        "sharpness": _ends_over_steps,
        "adam": _adam_over_steps,
        "spectrum": _spectra,
        "slots": _slots,
    }
    content = []
    for key, sheet in curvature_sheets(record).items():
        drawn = figures[key]([reading for reading in readings if reading[key]]) if key in figures else []
        shown = [tag("div", drawn, class_="panels")] if drawn else []
        content.append(page.section(sheet.title, [*shown, _table(sheet), _notes(sheet.notes)]))
    return page.page(
        title,
        [
            tag("header", [tag("h1", title), tag("p", subtitle, class_="subtitle")]),
            page.section("Summary", [page.pairs(_summary(record)), _notes(general_notes(record))]),
            *content,
            page.details(f"Settings ({len(config)})", [setting_table(config)]),
            page.section("Environment", [page.pairs(environment_pairs(record["environment"]))]),
        ],
    )


def _when(steps: list[int]) -> str:
    if steps == [0]:
        return "at initialisation"
    if len(steps) == 1:
        return f"after {count_text(steps[0])} steps"
    return f"at steps {count_text(min(steps))} to {count_text(max(steps))}"


def _summary(record: dict[str, Any]) -> list[tuple[str, str]]:
    last = record["readings"][-1]
    sharpness, adam = last["sharpness"], last["adam"]
    found = [
        ("Tokens", f"{record['sequences']} × {record['seq_len']} of {record['text']}, {record['dtype']}"),
        ("Parameters", f"{count_text(sharpness['parameters'])} ({record['part']})"),
        ("Loss on these tokens", f"{loss_text(finite(sharpness['loss']))} nats per token"),
        ("Largest eigenvalue", number_text(sharpness["largest"]["value"])),
        ("Smallest eigenvalue", number_text(sharpness["smallest"]["value"])),
    ]
    if adam is not None and adam["threshold"]:
        found.append(("As AdamW sees it", f"{adam['largest']['value'] / adam['threshold']:.2f} of its threshold"))
    return found


def _ends_over_steps(readings: Readings) -> list[Markup]:
    found = [reading["sharpness"] for reading in readings]
    lines = {
        "λ_max of H": [s["largest"]["value"] for s in found],
        "λ_max of G": [s["gauss_newton"]["value"] for s in found],
        "-λ_min of H": [-s["smallest"]["value"] if s["smallest"]["value"] < 0 else None for s in found],
    }
    loss = {"loss": [s["loss"] for s in found]}
    return _over_steps(readings, ends=("Ends of the spectrum", lines), loss=("Loss on these tokens", loss))


def _adam_over_steps(readings: Readings) -> list[Markup]:
    lines = {
        "λ_max": [reading["adam"]["largest"]["value"] for reading in readings],
        "threshold": [reading["adam"]["threshold"] for reading in readings],
    }
    return _over_steps(readings, adam=("λ_max as AdamW sees it", lines))


def _spectra(readings: Readings) -> list[Markup]:
    figures = []
    for index in evenly_chosen(len(readings), MOST_SPECTRA):
        reading = readings[index]
        low, high = (number_text(reading["sharpness"][end]["value"]) for end in ("smallest", "largest"))
        alt = f"Density of the Hessian's eigenvalues at step {reading['step']}, from {low} to {high}."
        caption = "Each eigenvalue as wide as a hundredth of the range; dashes: the ends as measured."
        figures.append(page.figure(spectrum(reading, f"spectrum-{index}"), alt, caption))
    return figures


def _slots(readings: Readings) -> list[Markup]:
    last = readings[-1]
    names = [row["name"] for row in last["slots"]]
    norms = slot_norms(last["slots"], "slots")
    alt = f"Spectral norms of L, C and H of each slot at step {last['step']}. The numbers are in the table below."
    figures = [] if norms is None else [page.figure(norms, alt, f"At step {count_text(last['step'])}.")]

    def lines(value: Callable[[dict[str, Any]], float | None]) -> dict[str, list[float | None]]:
        by_name = [{row["name"]: value(row) for row in reading["slots"]} for reading in readings]
        return {name: [row.get(name) for row in by_name] for name in names[:MOST_SLOTS]}

    scaled = lines(lambda row: row["scale_free"])
    return figures + _over_steps(readings, ratio=("‖C‖ / ‖L‖", lines(slot_ratio)), scaled=("RMS(x)² ‖H‖", scaled))


def _over_steps(readings: Readings, **panels: tuple[str, dict[str, list[float | None]]]) -> list[Markup]:
    """Plots by name, of a title and its lines; none of a single step."""
    steps = [reading["step"] for reading in readings]
    if len(steps) < 2:
        return []
    found = []
    for name, (title, lines) in panels.items():
        alt = f"{title} over steps: {', '.join(lines)}. The numbers are in the table below."
        svg = draw(Panel(name=name, title=title, x_label="step", x=steps, lines=lines, alt=alt), "curvature")
        if svg is not None:
            found.append(page.figure(svg, alt))
    return found


def _table(sheet: Sheet) -> Markup:
    rows = [
        [
            page.head_cell(step),
            *(
                page.data_cell(cell, "words" if name in sheet.words else "")
                for name, cell in zip(sheet.head[1:], cells, strict=True)
            ),
        ]
        for step, *cells in sheet.rows
    ]
    return page.table(sheet.title, sheet.head, rows, class_="numbers", words=sheet.words)


def _notes(lines: list[str]) -> Markup:
    return tag("ul", [tag("li", line) for line in lines], class_="notes")
