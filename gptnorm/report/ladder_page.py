"""The page of a depth or width ladder, from the plain answer down to how it was run."""

from __future__ import annotations

import itertools
import math

from gptnorm.format import lr_text, names_text, plural
from gptnorm.report import page
from gptnorm.report.grids import TextTable, grid_table
from gptnorm.report.ladder import Climb, Ladder
from gptnorm.report.ladder_plots import loss_panels, needs_marks, rates_against_size, signal_panels
from gptnorm.report.ladder_table import grids, notes, octaves_text, stable_text
from gptnorm.report.page import Markup, tag
from gptnorm.report.shared import provenance_section, settings_section

MOST_NAMED = 4
"""Climbs that a sentence lists one by one."""


def ladder_page(ladder: Ladder) -> str:
    """The HTML of a ladder's report."""
    tables = grids(ladder)
    content = [
        tag("header", [tag("h1", ladder.study.title), tag("p", _subtitle(ladder), class_="subtitle")]),
        page.answer(answer(ladder)),
        *(page.section(grid.title, [grid_table(grid)]) for grid in tables[:2]),
        tag("ul", [tag("li", page.prose(note)) for note in notes(ladder)], class_="notes"),
        _loss_section(ladder),
        *_rates_section(ladder),
        *_signal_section(ladder, tables[2:]),
        settings_section(ladder.study),
        provenance_section(ladder.study, ladder.study.cells),
        page.section("Before you quote this", [tag("ul", [tag("li", page.prose(note)) for note in caveats(ladder)])]),
    ]
    return page.page(ladder.study.title, content)


def answer(ladder: Ladder) -> list[str]:
    """What the ladder says, most important sentence first."""
    if not any(level.best for climb in ladder.climbs for level in climb.levels):
        pending = any(level.pending for climb in ladder.climbs for level in climb.levels)
        why = "of no rate is every seed known to be stable" if pending else "at no size is any rate stable"
        return [f"There is nothing to compare yet: {ladder.done} of {plural(ladder.planned, 'run')} ended, and {why}."]
    return [*_moves(ladder), *_without(ladder), *_stable(ladder), *_ends(ladder)]


def caveats(ladder: Ladder) -> list[str]:
    """What a careful reader should know before quoting the numbers."""
    study = ladder.study
    found = []
    if len(study.lrs) > 1:
        step = max(math.log2(b / a) for a, b in itertools.pairwise(study.lrs))
        found.append(
            f"Rates are up to {step:.1f} octaves apart. A vertex is a guess between them, and the best rate of the "
            "grid alone is known to half a step on either side."
        )
    if len(study.seeds) < 2:
        found.append("One seed shows no spread: no shift here can be told from chance.")
    elif len(study.seeds) < 5:
        found.append(f"The spread is over {plural(len(study.seeds), 'seed')}: five or more are needed to know it.")
    if any(climb.rule for climb in ladder.climbs):
        found.append("Depth, batch size, length of training and the width of a head are the same at every width.")
    else:
        found.append("Width, batch size and length of training are the same at every depth.")
    found.append("Every size is trained on the same number of tokens, which is fewer per parameter the larger it is.")
    found.append(
        "How a rate moves can change with model size, data, length of training and batch size; this ladder shows it "
        "for the settings above only."
    )
    return found


def _subtitle(ladder: Ladder) -> str:
    study = ladder.study
    rules = list(dict.fromkeys(climb.rule for climb in ladder.climbs if climb.rule))
    sizes = [
        plural(len(study.strategies), "strategy", "strategies"),
        *([plural(len(rules), "rule")] if len(rules) > 1 else []),
        plural(len(ladder.sizes), ladder.axis),
        plural(len(study.lrs), "learning rate"),
        plural(len(study.seeds), "seed"),
    ]
    return f"{' × '.join(sizes)}; {ladder.done} of {ladder.planned} runs ended"


def _moves(ladder: Ladder) -> list[str]:
    moved = sorted(
        [climb for climb in ladder.climbs if climb.slope is not None], key=lambda climb: abs(climb.slope or 0.0)
    )
    if not moved:
        return ["No shift of the best rate can be given: no strategy has an optimum at two sizes or more."]

    def told(climb: Climb) -> str:
        return f"{octaves_text(climb.slope, climb.slope_sd)} octaves"

    if len({climb.rule for climb in ladder.climbs}) > 1:
        return [f"The best rate, per doubling of the {ladder.axis}: {_by_rule(ladder)}."]
    least, most = moved[0], moved[-1]
    if least is most:
        return [f"The best rate of {least.name} moves by {told(least)} per doubling of the {ladder.axis}."]
    return [
        f"Per doubling of the {ladder.axis} the best rate moves least for {least.name} ({told(least)}) "
        f"and most for {most.name} ({told(most)})."
    ]


def _by_rule(ladder: Ladder) -> str:
    """ "a -0.93 octaves without a rule, -0.09 under align; b …"."""
    told = []
    for strategy in ladder.study.strategies:
        climbs = [climb for climb in ladder.climbs if climb.strategy == strategy and climb.slope is not None]
        slopes = [
            f"{octaves_text(climb.slope, climb.slope_sd)} "
            + ("without a rule" if climb.rule == "none" else f"under {climb.rule}")
            for climb in climbs
        ]
        if slopes:
            told.append(f"{strategy} {', '.join(slopes)}")
    return f"{'; '.join(told)} (octaves)"


def _without(ladder: Ladder) -> list[str]:
    names = [climb.name for climb in ladder.climbs if climb.slope is None]
    if not names or len(names) == len(ladder.climbs):
        return []
    who = names_text(names) if len(names) <= MOST_NAMED else f"{len(names)} others"
    return [f"For {who} no shift can be given: fewer than two sizes have an optimum inside the rates tried."]


def _stable(ladder: Ladder) -> list[str]:
    if len(ladder.climbs) > MOST_NAMED or len(ladder.sizes) < 2:
        return []
    ends = [
        f"{stable_text(climb.levels[0])} → {stable_text(climb.levels[-1])} for {climb.name}" for climb in ladder.climbs
    ]
    where = f"from {ladder.label(ladder.sizes[0])} to {ladder.label(ladder.sizes[-1])}"
    return [f"The largest stable rate, {where}: {'; '.join(ends)}."]


def _ends(ladder: Ladder) -> list[str]:
    sentences = []
    diverged = sum(cell.diverged for cell in ladder.study.cells)
    if ladder.done > 1:
        count = f"{diverged} of" if diverged else "None of the"
        sentences.append(f"{count} {ladder.done} runs that ended diverged.")
    if ladder.done < ladder.planned:
        sentences.append(f"This report is partial: {ladder.done} of {ladder.planned} runs ended. It may change.")
    return sentences


def _loss_section(ladder: Ladder) -> Markup:
    figures = [
        page.figure(svg, f"Validation loss against peak learning rate of {name}, a line per {ladder.axis}.")
        for name, svg in loss_panels(ladder)
    ]
    note = "One scale for all. Ringed: the best of the grid. Short dashes: single seeds."
    if needs_marks(ladder):
        note += " In the grey strip, × marks rates where a seed diverged and ↑ means above the scale."
    return page.section("Loss against learning rate", [tag("div", figures, class_="panels"), _note(note)])


def _rates_section(ladder: Ladder) -> list[Markup]:
    first, last = (lr_text(rate) for rate in (ladder.study.lrs[0], ladder.study.lrs[-1]))
    plots = [
        (rates_against_size(ladder, "best"), f"Best learning rate against {ladder.axis}; numbers in the table."),
        (rates_against_size(ladder, "stable"), f"Largest stable rate against {ladder.axis}; numbers in the table."),
    ]
    figures = [page.figure(svg, alt) for svg, alt in plots if svg]
    if not figures:
        return []
    note = f"Hollow: at the edge of the rates tried ({first} to {last}). Drawn side by side where they would overlap."
    title = f"Rates against {ladder.axis}"
    return [page.section(title, [tag("div", figures, class_="panels"), _note(note)])]


def _signal_section(ladder: Ladder, tables: list[TextTable]) -> list[Markup]:
    if not tables:
        return []
    figures = [
        page.figure(svg, f"{what.capitalize()} block by block of {name}, a line per {ladder.axis}.")
        for name, what, svg in signal_panels(ladder)
    ]
    note = (
        "Dashed: at initialisation; firm: after training, at the rate of the lowest loss. One scale for all; the "
        "gradient is that of the mean loss of one batch by the stream."
    )
    content = [grid_table(tables[0]), tag("div", figures, class_="panels"), _note(note)]
    if ladder.axis == "depth":
        return [page.section(tables[0].title, content)]
    # Not what a width ladder is asked for.
    return [page.details(tables[0].title, content)]


def _note(text: str) -> Markup:
    return tag("p", page.prose(text), class_="notes")
