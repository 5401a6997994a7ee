"""Tables and sentences of a tolerance or scaling study whose places differ in compute: what its laws say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gptnorm.format import MISSING, names_text, settings_text, short_text
from gptnorm.report.critical_batch import MOST, batches_of
from gptnorm.report.estimates import marked, ratio_entry, side
from gptnorm.report.grids import Entry, Stacked, TextTable
from gptnorm.report.scaling import (
    Law,
    Spot,
    batch_law,
    best_batches,
    by_text,
    frontier,
    loss_law,
    rate_law,
    saving,
    spots_of,
)
from gptnorm.report.tolerance import ToleranceStudy
from gptnorm.study.measures import Bound, Estimate, geometric_mean

LOSS_LAW = "Loss against compute: L = a C^-b along the frontier"
SAVING = "Compute saved: how many times less takes to {}'s loss"
RATE_LAW = "Best rate against size and text"
BATCH_LAW = "Best batch against size and text"
BATCHES = "Best batch, tokens per step"
OVERHEAD = "Tokens to the loss of the best batch, over those that it takes"
FACTORS = {"M": "size, M", "D": "text, D", "B": "batch, B"}
MOST_COLUMNS = 4
"""Amounts of compute at which a saving is told, the largest ones."""


def scaling_grids(study: ToleranceStudy) -> list[TextTable]:
    """The laws first, which want three places that differ in compute."""
    spots = {name: spots_of(study, name) for name in study.about.strategies}
    found = [_overheads(spots)]
    if is_scaling(spots):
        laws = [
            _loss_law(spots),
            _saving(study, spots),
            _laws(RATE_LAW, {name: rate_law(mine) for name, mine in spots.items()}),
            _laws(BATCH_LAW, {name: batch_law(mine) for name, mine in spots.items()}),
            _batches(spots),
        ]
        found = [*laws, *found]
    return [grid for grid in found if grid is not None]


def is_scaling(spots: Mapping[str, Sequence[Spot]]) -> bool:
    """Whether some strategy's places have three amounts of compute or more."""
    return any(len({spot.flops for spot in mine}) > 2 for mine in spots.values())


def scaling_answer(study: ToleranceStudy) -> list[str]:
    """What the laws say in sentences."""
    spots = {name: spots_of(study, name) for name in study.about.strategies}
    if not is_scaling(spots):
        return []
    laws = {name: loss_law(mine) for name, mine in spots.items()}
    told = [f"{name} {_exponent_entry(law.exponents['C'], -1)}" for name, law in laws.items() if law]
    found = [f"Along the frontier the loss falls as compute to the power -b: {names_text(told)}."] if told else []
    theirs = frontier(spots[study.baseline])
    for name in study.others if theirs else ():
        ratio = saving(spots[name], spots[study.baseline], theirs[-1].flops)
        if ratio is None or side(ratio, 1.0) is None:
            continue
        says = {1: "takes less compute", -1: "takes more compute", 0: "is not shown to take more or less compute"}
        found.append(
            f"To {study.baseline}'s loss at its largest compute {name} {says[side(ratio, 1.0) or 0]}: "
            f"{study.baseline}'s over its own is {ratio_entry(ratio)}."
        )
    return found


def scaling_words() -> dict[str, str]:
    """What words of heads and titles mean."""
    return {
        LOSS_LAW: "Frontier: each model and text at its best batch, of these the places that no cheaper one matches, "
        "all picked on the picking seeds. The law has no irreducible loss and says nothing beyond these places.",
        SAVING.split("{", maxsplit=1)[0]: "Compute saved: the compute of a place over what takes us to the same loss "
        "along our frontier; between places the loss is a line in ln(compute), beyond them a bound is known, from "
        "five seeds on.",
        "est rate against size": "Best rate, best batch: vertex of the parabola through the lowest loss and its two "
        "neighbours, against the logarithm, seed by seed; without an interval where reported seeds trained at one rate "
        "alone, so that it is the picking seeds'. A seed looks from there on, so an interval holds no error of the "
        "picking.",
        "exponent of": "Size: FLOPs per token; text: tokens of the run; batch: tokens per step. Exponents: least "
        "squares on logarithms, seed by seed.",
        "left over": "Left over: root mean square of what the line leaves of the mean over seeds, relative. The "
        "interval of an exponent says how far seeds agree, not how straight the line is.",
        "critical batch": f"Critical batch: going up from the best batch of the picking seeds (1; where it is the "
        f"smallest tried, a smaller one may do better, and the critical one be smaller), the tokens per step "
        f"from which on more than {MOST:g} times the text takes to its loss. Text by batch: at the best rate of each, "
        "between amounts of text the loss is a line in ln(tokens), beyond them a bound is known, from five seeds on.",
        "FLOPs": "FLOPs: of a whole run, forward and backward, matrix products and attention.",
    }


def spot_text(spot: Spot) -> str:
    """ "model.d_model = 64, 614,400 tokens"."""
    return ", ".join(filter(None, [settings_text(spot.model), f"{spot.tokens:,} tokens"]))


def _loss_law(spots: dict[str, list[Spot]]) -> TextTable | None:
    laws = {name: loss_law(mine) for name, mine in spots.items()}
    if not any(laws.values()):
        return None
    rows = []
    for name, mine in spots.items():
        law, found = laws[name], frontier(mine)
        exponent = _exponent_entry(law.exponents["C"], -1) if law else MISSING
        ends = f"{short_text(found[0].flops)} to {short_text(found[-1].flops)}" if found else MISSING
        rows.append((name, exponent, _rms(law), str(len(found)), ends))
    head = ("strategy", "b", "left over, rms", "places on the frontier", "FLOPs from, to")
    return TextTable(title=LOSS_LAW, head=head, rows=tuple(rows), words=1)


def _saving(study: ToleranceStudy, spots: dict[str, list[Spot]]) -> TextTable | None:
    theirs = spots.get(study.baseline, [])
    budgets = [spot.flops for spot in frontier(theirs)][-MOST_COLUMNS:]
    rows = tuple(
        (name, *(ratio_entry(saving(spots[name], theirs, flops)) for flops in budgets)) for name in study.others
    )
    if all(entry == MISSING for row in rows for entry in row[1:]):
        return None
    head = ("strategy", *(f"at {short_text(flops)} FLOPs" for flops in budgets))
    return TextTable(title=SAVING.format(study.baseline), head=head, rows=rows, words=1)


def _laws(title: str, laws: dict[str, Law | None]) -> TextTable | None:
    known = [law for law in laws.values() if law]
    if not known:
        return None
    names = [name for name in FACTORS if any(name in law.exponents for law in known)]
    rows = []
    for strategy, law in laws.items():
        exponents = [_exponent_entry(law.exponents.get(name) if law else None) for name in names]
        rows.append((strategy, *exponents, _rms(law), str(law.points) if law else MISSING))
    head = ("strategy", *(f"exponent of {FACTORS[name]}" for name in names), "left over, rms", "places")
    return TextTable(title=title, head=head, rows=tuple(rows), words=1)


def _batches(spots: dict[str, list[Spot]]) -> TextTable | None:
    """Rows: models with their text; columns: strategies."""
    groups = {name: by_text(mine) for name, mine in spots.items()}
    rows: dict[str, dict[str, Entry]] = {}
    for name, mine in groups.items():
        for group in mine.values():
            if len(group) > 2:
                rows.setdefault(spot_text(group[0]), {})[name] = _batch(group)
    if not rows:
        return None
    table = tuple((place, *(found.get(name, MISSING) for name in spots)) for place, found in rows.items())
    return TextTable(title=BATCHES, head=("at", *spots), rows=table, words=1)


def _overheads(spots: dict[str, list[Spot]]) -> TextTable | None:
    """Rows: strategies with a model and its text; columns: batches."""
    found = {name: batches_of(mine) for name, mine in spots.items()}
    sizes = sorted({batch for mine in found.values() for at in mine for batch in at.tokens})
    if not sizes:
        return None
    several = len({at.best.model for mine in found.values() for at in mine}) > 1
    rows = []
    for name, mine in found.items():
        for at in mine:
            where = spot_text(at.best) if several else f"{at.best.tokens:,} tokens"
            ratios = [_times(at.tokens.get(batch)) for batch in sizes]
            rows.append((name, where, *ratios, marked(_critical(at.critical), at.at_end)))
    head = ("strategy", "at", *(f"batch {size:,}" for size in sizes), "critical batch")
    return TextTable(title=OVERHEAD, head=head, rows=tuple(rows), words=2)


def _times(found: Estimate | None) -> Entry:
    """Of the best batch 1 as such, unless less text takes it there, too."""
    return "1" if found is not None and found.low == found.value == found.high == 1 else ratio_entry(found)


def _critical(found: Bound | None) -> Entry:
    if found is None:
        return MISSING
    low, high = (None if end is None else f"{end:,.0f}" for end in (found.low, found.high))
    value = f"{found.value:,.0f}"
    if found.at_least:
        return f"≥ {value}" if low is None else Stacked(f"≥ {value}", f"[{low}, ∞)")
    return value if low is None or high is None else Stacked(value, f"[{low}, {high}]")


def _batch(group: Sequence[Spot]) -> Entry:
    found = best_batches(group)
    if all(math.isinf(spot.picked_loss) for spot in group):
        return "none"
    if len(found) < len(group[0].track.seeds):
        best = min(group, key=lambda spot: spot.picked_loss)
        at_end = best.batch in (group[0].batch, group[-1].batch) or best.track.end is not None
        return marked(f"{best.batch:,}", at_end)
    mean = geometric_mean(list(found.values()))
    if mean.low is None or mean.high is None:
        return f"{mean.value:,.0f}"
    return Stacked(f"{mean.value:,.0f}", f"[{mean.low:,.0f}, {mean.high:,.0f}]")


def _exponent_entry(found: Estimate | None, sign: int = 1) -> Entry:
    if found is None:
        return MISSING
    value = _signed(sign * found.value)
    if found.low is None or found.high is None:
        return value
    low, high = sorted((sign * found.low, sign * found.high))
    return Stacked(value, f"[{_signed(low)}, {_signed(high)}]")


def _signed(exponent: float) -> str:
    # Adding zero makes -0.0 the +0.0 that it is.
    return f"{round(exponent, 3) + 0.0:+.3f}"


def _rms(law: Law | None) -> str:
    return MISSING if law is None else f"{100 * law.rms:.2g} %"
