"""Tables of a tolerance study that compares strategies at several budgets (study.map.train.steps)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from gptnorm.format import MISSING, settings_text
from gptnorm.report.budgets import LossByBudget, around, at_equal_time, speed_up, tried
from gptnorm.report.estimates import difference_entry, marked, ratio_entry
from gptnorm.report.grids import Entry, TextTable
from gptnorm.report.tolerance import Place, ToleranceStudy

AXIS = "train.steps"

SPEED_UP = "Speed-up over {}: how many times fewer steps to its loss"
EQUAL_TIME = "Loss minus {}'s after the same time"

Budgets = dict[float, Place]
"""Places that differ in the number of steps alone."""


def budget_grids(study: ToleranceStudy) -> list[TextTable]:
    """Speed-up and the loss after the same time, for each set of budgets."""
    found: list[TextTable | None] = []
    for name, budgets in _groups(study):
        title = SPEED_UP.format(study.baseline) + (f": {name}" if name else "")
        found.append(_grid(study, title, budgets, _speed_up))
        title = EQUAL_TIME.format(study.baseline) + (f": {name}" if name else "")
        found.append(_grid(study, title, budgets, _at_equal_time))
    return [grid for grid in found if grid is not None]


def _groups(study: ToleranceStudy) -> list[tuple[str, Budgets]]:
    """(the other settings in words, budgets) of which there are two or more."""
    groups: dict[str, Budgets] = {}
    for place in study.places:
        settings = dict(place.told)
        steps = settings.pop(AXIS, None)
        if isinstance(steps, int):
            groups.setdefault(settings_text(settings.items()), {})[steps] = place
    return [(name, dict(sorted(budgets.items()))) for name, budgets in groups.items() if len(budgets) > 1]


def _grid(
    study: ToleranceStudy, title: str, budgets: Budgets, entry: Callable[[Budgets, str, str, float], Entry]
) -> TextTable | None:
    rows = tuple((name, *(entry(budgets, name, study.baseline, budget) for budget in budgets)) for name in study.others)
    if all(text == MISSING for row in rows for text in row[1:]):
        return None
    return TextTable(title=title, head=("strategy", *(f"at {budget} steps" for budget in budgets)), rows=rows, words=1)


def _curves(budgets: Budgets, strategy: str) -> Mapping[int, LossByBudget]:
    """Loss by budget for each reported seed; without the budgets at which a seed failed."""
    found: dict[int, dict[float, float]] = {}
    for budget, place in budgets.items():
        track = place.own.get(strategy)
        if track is not None and not track.failed:
            for seed, loss in track.losses.items():
                found.setdefault(seed, {})[budget] = loss
    return found


def _speed_up(budgets: Budgets, ours: str, theirs: str, budget: float) -> Entry:
    mine, other = _curves(budgets, ours), _curves(budgets, theirs)
    found = speed_up(mine, other, budget)
    levels = {seed: curve[budget] for seed, curve in other.items() if seed in mine and budget in curve}
    used = {at for seed, level in levels.items() for at in tried(mine[seed], level)}
    return marked(ratio_entry(found), _at_end(budgets, ours, used) or _at_end(budgets, theirs, [budget]))


def _at_equal_time(budgets: Budgets, ours: str, theirs: str, budget: float) -> Entry:
    tracks = [budgets[budget].own.get(name) for name in (ours, theirs)]
    # Of each seed by itself, so that the interval holds how much times differ from run to run.
    slowdown = tracks[0].slowdown_by_seed(tracks[1]) if tracks[0] and tracks[1] else {}
    mine = _curves(budgets, ours)
    found = at_equal_time(mine, _curves(budgets, theirs), budget, slowdown)
    used = {at for seed in mine.keys() & slowdown.keys() for at in around(mine[seed], budget / slowdown[seed])}
    return marked(difference_entry(found), _at_end(budgets, ours, used) or _at_end(budgets, theirs, [budget]))


def _at_end(budgets: Budgets, strategy: str, used: Iterable[float]) -> bool:
    """Whether a best rate is the lowest or highest tried at one of these budgets."""
    tracks = [budgets[budget].own.get(strategy) for budget in used]
    return any(track is not None and track.end is not None for track in tracks)
