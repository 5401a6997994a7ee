"""The page of a study, from the plain answer down to how it was run."""

from __future__ import annotations

from gptnorm.format import count_text, loss_text, lr_text, plural, spread_text
from gptnorm.report import page
from gptnorm.report.curves import curves_of
from gptnorm.report.gaps import paired_gaps
from gptnorm.report.page import Markup, tag
from gptnorm.report.plots import all_curves, best_curves, has_strip, loss_against_lr
from gptnorm.report.results import Study
from gptnorm.report.shared import provenance_section, settings_section
from gptnorm.report.table import CellText, cell_text, footnotes
from gptnorm.report.verdict import caveats, gap_reading, interval_text, verdict
from gptnorm.study.measures import Estimate


def study_page(study: Study) -> str:
    """The HTML of a study report."""
    curves = curves_of(study.folder, study.cells)
    best, panels = best_curves(study, curves), all_curves(study, curves)
    plots = [
        page.section(
            "Loss against learning rate",
            [
                page.figure(
                    loss_against_lr(study),
                    "Validation loss against peak learning rate, a line per strategy; numbers in the table above.",
                    "Ringed: the best of each strategy. Dashes: single seeds."
                    + (
                        " In the grey strip at the top, × marks learning rates where a seed diverged and ↑ means "
                        "above the scale."
                        if has_strip(study)
                        else ""
                    ),
                )
            ],
        )
    ]
    if best is not None:
        plots.append(
            page.section(
                "Training, each at its own best learning rate",
                [
                    page.figure(
                        best,
                        "Training loss over steps, a line per strategy at its own best learning rate.",
                        "Mean over seeds. Firm: moving average; faint: unsmoothed. The steep start is cut.",
                    )
                ],
            )
        )
    if panels:
        figures = [
            page.figure(svg, f"Training loss over steps of {name}, a line per learning rate.") for name, svg in panels
        ]
        note = "One scale for all. A curve with × ends where the first of its seeds diverged."
        plots.append(
            page.details(
                "Training curves at every learning rate", [tag("p", note), tag("div", figures, class_="panels")]
            )
        )
    content = [
        tag("header", [tag("h1", study.title), tag("p", _subtitle(study), class_="subtitle")]),
        page.answer(verdict(study)),
        page.section("Validation loss by strategy and learning rate", [_grid_table(study), _notes(study)]),
        *_ranking(study),
        *plots,
        settings_section(study),
        provenance_section(study, study.cells),
        page.section("Before you quote this", [tag("ul", [tag("li", page.prose(note)) for note in caveats(study)])]),
    ]
    return page.page(study.title, content)


def _subtitle(study: Study) -> str:
    sizes = [
        plural(len(study.strategies), "strategy", "strategies"),
        plural(len(study.lrs), "learning rate"),
        plural(len(study.seeds), "seed"),
    ]
    return f"{' × '.join(sizes)}; {study.done} of {study.planned} runs ended"


def _grid_table(study: Study) -> Markup:
    rows = []
    for row in study.rows:
        cells = [page.head_cell(row.strategy)]
        for entry in row.entries:
            text = cell_text(study, row, entry)
            class_ = "best" if text.best else "diverged" if entry.diverged else "missing" if not entry.losses else ""
            cells.append(page.data_cell(_cell(text), class_))
        rows.append(cells)
    head = ["strategy", *(lr_text(lr) for lr in study.lrs)]
    return page.table("Validation loss by strategy and learning rate", head, rows, class_="numbers grid")


def _cell(text: CellText) -> list[str]:
    """The mean with its mark, and the spread below: narrow enough for a grid of six on a page."""
    if text.below:
        return [f"{text.value} {text.mark}".strip(), " ", tag("span", text.below, class_="sd")]
    return [str(text)]


def _gap(gap: Estimate) -> list[str]:
    """The gap with its interval below."""
    return [loss_text(gap.value), " ", tag("span", interval_text(gap), class_="sd")]


def _notes(study: Study) -> Markup:
    return tag("ul", [tag("li", note) for note in footnotes(study)], class_="notes")


def _ranking(study: Study) -> list[Markup]:
    """Each strategy at its own best, lowest loss first, with its paired gap."""
    if not study.ranked:
        return []
    gaps = paired_gaps(study)
    rows = []
    for row in study.ranked:
        assert row.best is not None
        gap, trained = gaps.get(row.strategy), study.highest_trained(row)
        edge = " (edge)" if row.at_edge else ""
        rows.append(
            [
                page.head_cell(row.strategy),
                page.data_cell(spread_text(row.best.mean, row.best.sd)),
                page.data_cell(lr_text(row.best.lr) + edge),
                page.data_cell("lowest" if gap is None else _gap(gap)),
                page.data_cell("" if gap is None else gap_reading(gap), "words reading"),
                page.data_cell("none" if trained is None else lr_text(trained)),
                page.data_cell(count_text(row.parameters)),
            ]
        )
    head = ["strategy", "loss", "at", "paired gap", "reading", "trains up to", "parameters"]
    label = "Each strategy at its own best learning rate"
    note = (
        "Edge: the lowest or highest learning rate tried, so no optimum. Paired gap: loss minus that of the "
        "first row, seed by seed, over its 95 % paired t-interval. Trains up to: the highest learning rate of the grid "
        "where every seed finished and learned more than token frequencies."
    )
    ranking = page.table(label, head, rows, class_="numbers grid", words=frozenset({"reading"}))
    return [page.section(label, [ranking, tag("p", note, class_="notes")])]
