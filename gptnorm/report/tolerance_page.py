"""The page of a tolerance study, from the plain answer down to how it was run."""

from __future__ import annotations

from gptnorm.format import plural
from gptnorm.report import page
from gptnorm.report.budget_table import budget_grids
from gptnorm.report.elsewhere_table import elsewhere_grids
from gptnorm.report.grids import TextTable, grid_table
from gptnorm.report.page import Markup, tag
from gptnorm.report.scaling_plots import best_rate_panels, loss_against_compute
from gptnorm.report.scaling_table import scaling_grids
from gptnorm.report.shared import provenance_section, settings_section
from gptnorm.report.tolerance import Place, ToleranceStudy
from gptnorm.report.tolerance_notes import notes, seeds_text
from gptnorm.report.tolerance_plots import loss_against_rate, place_panels, tolerance_bars, training_panels
from gptnorm.report.tolerance_table import grids, overview_grids, place_grids
from gptnorm.report.tolerance_verdict import answer, caveats

MOST_POINTS = 20_000
"""Of all training curves of a page together, about: half a megabyte."""


def tolerance_page(study: ToleranceStudy) -> str:
    """The HTML of a tolerance study's report."""
    about = study.about
    tables = grids(study)
    places = [_place(study, place, number) for number, place in enumerate(study.places)]
    if len(places) > 1:
        places = [
            page.details(f"At {place.name}", content) for place, content in zip(study.places, places, strict=True)
        ]
        places = [page.section("Each place by itself", places)]
    else:
        places = [part for content in places for part in content]
    words = tag("ul", [_term(note) for note in notes(study, tables)], class_="notes terms")
    content = [
        tag("header", [tag("h1", about.title), tag("p", _subtitle(study), class_="subtitle")]),
        page.answer(answer(study)),
        *_scaling(study),
        *_overview(study),
        *(_titled(grid) for grid in elsewhere_grids(study)),
        *places,
        page.section("What the words mean", [words]),
        settings_section(about),
        provenance_section(about, study.cells, _seeds(study)),
        page.section("Before you quote this", [tag("ul", [tag("li", page.prose(note)) for note in caveats(study)])]),
    ]
    return page.page(about.title, content)


def _subtitle(study: ToleranceStudy) -> str:
    parts = [plural(len(study.about.strategies), "strategy", "strategies")]
    if study.mapped:
        parts.append(plural(len(study.places), "place"))
    seeds = plural(len(study.seeds), "seed")
    if study.seeds and study.crossing == "all":
        parts.append(f"{seeds}, each at the rate that all others pick")
    elif study.seeds and study.crossing == "some":
        parts.append(f"{seeds}, each at the rate that {seeds_text(study.pick)} or all others pick")
    else:
        reported = f"reported on {plural(len(study.seeds), 'other')}" if study.seeds else "none reported"
        parts.append(f"rates picked on {plural(len(study.pick), 'seed')}, {reported}")
    parts.append(f"{plural(len(study.cells), 'run')} ended")
    return "; ".join(parts)


def _seeds(study: ToleranceStudy) -> str:
    reported = f", {seeds_text(study.seeds)} reported" if study.seeds else ""
    return f"{seeds_text(study.pick)} to pick{reported}"


def _overview(study: ToleranceStudy) -> list[Markup]:
    """What several places show together."""
    tables = [*overview_grids(study), *budget_grids(study)]
    if not tables:
        return []
    panels = [
        page.figure(svg, f"{what.capitalize()} against that of {study.baseline} at every place; numbers in the table.")
        for what, svg in place_panels(study)
    ]
    note = (
        f"Bars: 95 % intervals. Dotted: {study.baseline}. A line joins neighbours that differ in one number alone. "
        "A hollow triangle: only this lower end is known."
    )
    drawn = [tag("div", panels, class_="panels"), tag("p", note, class_="notes")] if panels else []
    over, *more = tables
    head = f"Against {study.baseline}, place by place" if study.others else "Place by place"
    parts = [page.section(head, [*drawn, _titled(over)])]
    return [*parts, *(_titled(grid) for grid in more)]


def _scaling(study: ToleranceStudy) -> list[Markup]:
    """What places that differ in compute show together."""
    tables = scaling_grids(study)
    if not tables:
        return []
    compute = loss_against_compute(study)
    drawn = []
    if compute:
        alt = "Validation loss against the compute of a run, a line per strategy; numbers in the table."
        drawn.append(page.figure(compute, alt, "Lines: the frontier, whiskers the range over seeds. Pale: the rest."))
    panels = [
        page.figure(svg, f"Best learning rate of {name} against size or text; numbers in the table.")
        for name, svg in best_rate_panels(study)
    ]
    sections = [page.section("Loss against compute", drawn)] if drawn else []
    if panels:
        note = (
            "At the best batch of each. Whiskers: 95 % intervals over the reported seeds; none of a single one, and "
            "none where one has no optimum: there the picking seeds' rate is drawn. One scale for all."
        )
        content = [tag("div", panels, class_="panels"), tag("p", note, class_="notes")]
        sections.append(page.section("Best rate against size and text", content))
    return [*sections, *(_titled(grid) for grid in tables)]


def _place(study: ToleranceStudy, place: Place, number: int) -> list[Markup]:
    """Plots and tables of one place, and training curves on demand."""
    sections = []
    rates = loss_against_rate(study, place, f"rates{number}")
    if rates:
        alt = "Validation loss against peak learning rate, a line per strategy; numbers in the tables."
        sections.append(page.section("Loss against learning rate", [page.figure(rates, alt, _rates_caption(study))]))
    bars = tolerance_bars(study, place, f"bars{number}") if study.follows_rates else None
    if bars:
        alt = "For each strategy a bar from its best to its largest stable learning rate; numbers in the tables."
        caption = (
            "Whisker: 95 % interval of the largest stable rate, cut at the axis. Arrow: at least. Lowest loss first."
        )
        if study.others:
            caption += f" No triangle: at its own best rate the mean loss is not known to reach {study.baseline}'s."
        sections.append(page.section("From the best rate to the largest stable one", [page.figure(bars, alt, caption)]))
    sections += [_titled(grid) for grid in place_grids(study, place)]
    lines = sum(len(track.picked) for at_place in study.places for track in at_place.own.values())
    points = max(40, min(200, MOST_POINTS // max(1, lines)))
    panels = [
        page.figure(svg, f"Training loss over steps of {name}, a line per learning rate.")
        for name, svg in training_panels(study, place, f"train{number}-", points)
    ]
    if panels:
        note = (
            "One scale for all. Mean over all seeds; a curve with × has an unstable one, and ends where the first ends."
        )
        content = [tag("p", note), tag("div", panels, class_="panels")]
        sections.append(page.details("Training curves at every learning rate", content))
    return sections


def _rates_caption(study: ToleranceStudy) -> str:
    if study.screening:
        line = "Mean and range over the seeds that picked."
    else:
        line = (
            "Firm: mean over the reported seeds, band: their range; pale: the seeds that picked. Dashes: single seeds."
        )
    return (
        f"{line} Ringed: the best of each strategy. Grey strip, a lane per strategy with its marker at the left: × "
        "where a seed is not stable, ↑ above the scale."
    )


def _term(note: str) -> Markup:
    """A note with the word that it explains set off."""
    term, colon, meaning = note.partition(":")
    return tag("li", [tag("strong", term), colon, page.prose(meaning)]) if colon else tag("li", page.prose(note))


def _titled(grid: TextTable) -> Markup:
    return page.section(grid.title, [grid_table(grid)])
