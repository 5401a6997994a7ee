"""Tables of a tolerance study whose runs were evaluated on further texts (study.evaluate)."""

from __future__ import annotations

from collections.abc import Callable

from gptnorm.format import MISSING, value_text
from gptnorm.report.estimates import difference_entry, loss_entry, marked
from gptnorm.report.grids import Entry, TextTable
from gptnorm.report.tolerance import Place, ToleranceStudy

BESIDE = "Loss minus {}'s on each text, each at its own best rate"
ON_EACH = "Loss on each text, at the best rate on the own"


def elsewhere_grids(study: ToleranceStudy) -> list[TextTable]:
    """Every strategy against the baseline on every text, then the losses; none where nothing was evaluated."""
    found = []
    if study.others:
        found.append(_grid(study, BESIDE.format(study.baseline), study.others, _difference))
    found.append(_grid(study, ON_EACH, study.about.strategies, _loss))
    return [grid for grid in found if grid is not None]


def _grid(
    study: ToleranceStudy, title: str, strategies: tuple[str, ...], entry: Callable[[Place, str, str], Entry]
) -> TextTable | None:
    """Rows: places, then texts; columns: strategies."""
    several = len(study.places) > 1
    rows = []
    for place in study.places:
        where = [value_text(value) for _, value in place.told] if several else []
        for text, short in study.evaluated.items():
            found = [entry(place, name, text) for name in strategies]
            if set(found) - {MISSING}:
                rows.append((*where, short, *found))
    if not rows:
        return None
    settings = study.heads if several else ()
    return TextTable(title=title, head=(*settings, "on", *strategies), rows=tuple(rows), words=len(settings) + 1)


def _difference(place: Place, name: str, text: str) -> Entry:
    pair = place.pairs(tuned=False).get(name)
    return MISSING if pair is None else marked(difference_entry(pair.difference_on(text)), pair.at_end)


def _loss(place: Place, name: str, text: str) -> Entry:
    track = place.own.get(name)
    return MISSING if track is None else marked(loss_entry(track.elsewhere(text)), track.end is not None)
