"""The tables of a tolerance study for the terminal, as Markdown and for the page, all from the same text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Group

from gptnorm.format import MISSING, count_text, loss_text, lr_text, short_text, value_text
from gptnorm.plan.sizes import amount
from gptnorm.report.budget_table import budget_grids
from gptnorm.report.elsewhere_table import elsewhere_grids
from gptnorm.report.estimates import EDGE, difference_entry, kept_entry, loss_entry, marked, rate_entry, ratio_entry
from gptnorm.report.grids import Entry, Stacked, TextTable, markdown_grids, rich_grids
from gptnorm.report.scaling_table import scaling_grids
from gptnorm.report.tolerance import Pair, Place, ToleranceStudy
from gptnorm.report.tolerance_notes import LINE, notes
from gptnorm.report.tolerance_verdict import answer
from gptnorm.report.track import Track
from gptnorm.study.measures import Estimate, Point, mean_of, paired_difference

SETTINGS = "Every setting at its best rate, on the picking seeds"
REPORTED = "Every setting that was reported, each at its own best rate"
CURVE = "Loss at every rate that all reported seeds tried"
MOST_CURVES = 8
"""Strategies in its table; more would not be readable."""
FACTORS = (1.05, 1.1, 1.2, 1.3, 1.4)
"""Of the own best loss."""
BASELINE = "baseline"
NONE = "none"
WIDE = 4
"""Places that stand side by side; more stand below each other."""


def grids(study: ToleranceStudy) -> list[TextTable]:
    """The tables, those of several places first.

    Where these say all that is known of several places, the tables of each by itself are left to the page.
    """
    found = [*overview_grids(study), *budget_grids(study), *scaling_grids(study), *elsewhere_grids(study)]
    if len(study.places) < 2 or study.follows_rates or study.tune:
        for place in study.places:
            found += place_grids(study, place)
    return found


def place_grids(study: ToleranceStudy, place: Place) -> list[TextTable]:
    """The tables of one place, the answer first; tables without a number are left out."""
    found = [
        _loss_grid(study, place),
        _rate_grid(study, place),
        _line_grid(study, place),
        _curve_grid(study, place),
        *_tuned_grids(study, place),
        _other_grid(study, place),
    ]
    return [grid for grid in found if grid is not None]


def overview_grids(study: ToleranceStudy) -> list[TextTable]:
    """Every strategy against the baseline at each place, and its loss there, if there are several."""
    if len(study.places) < 2:
        return []
    if not study.others:
        return [_places(study)]
    pairs = [place.pairs(tuned=False) for place in study.places]
    base = study.baseline
    found = [_over_places(study, f"Loss minus {base}'s, each at its own best rate", pairs, _difference)]
    if study.tune:
        title = f"Loss minus {base}'s, with {', '.join(study.tune)} tuned for both"
        found.append(_over_places(study, title, [place.pairs(tuned=True) for place in study.places], _difference))
    if study.follows_rates and any(_edge_ratio(pair) != MISSING for at_place in pairs for pair in at_place.values()):
        title = f"Largest stable rate over {base}'s"
        found.append(_over_places(study, title, pairs, _edge_ratio))
    return [*found, _places(study)]


def rich_tolerance(study: ToleranceStudy) -> Group:
    """The tables for the terminal; print it with a `rich.console.Console`."""
    tables = grids(study)
    return rich_grids(study.about.title, tables, notes(study, tables), answer(study))


def markdown_tolerance(study: ToleranceStudy) -> str:
    """The tables and their notes as Markdown, ending in a newline."""
    tables = grids(study)
    return markdown_grids(tables, notes(study, tables), titled=True)


def _loss_grid(study: ToleranceStudy, place: Place) -> TextTable:
    pairs = place.pairs(tuned=False)
    head = ["strategy", "loss", "best rate"]
    if study.others:
        head.append(f"loss minus {study.baseline}'s")
    sensitive = any(track.sensitivity for track in place.own.values())
    if sensitive:
        head.append("LR sensitivity")
    rows = []
    for name in study.ranked(place.own):
        track = place.own.get(name)
        row = [name, _loss(track), _best(track)]
        if study.others:
            row.append(BASELINE if name == study.baseline else _difference(pairs.get(name)))
        if sensitive:
            row.append(loss_entry(track.sensitivity if track else None))
        rows.append(tuple(row))
    return TextTable(
        title=_title("Loss, each at its own best rate", place), head=tuple(head), rows=tuple(rows), words=1
    )


def _rate_grid(study: ToleranceStudy, place: Place) -> TextTable | None:
    tracks, pairs, base = place.own, place.pairs(tuned=False), study.baseline
    edges = any(track.edge for track in tracks.values())
    if not study.follows_rates or (not edges and not any(track.near for track in tracks.values())):
        return None
    columns: dict[str, Callable[[str], Entry]] = {}
    if edges:
        columns["largest stable rate"] = lambda name: rate_entry(tracks[name].edge if name in tracks else None)
    if edges and study.others:
        columns[f"that over {base}'s"] = lambda name: BASELINE if name == base else _edge_ratio(pairs.get(name))
    near = f"within {study.epsilon:g} nats of own best up to"
    columns[near] = lambda name: rate_entry(tracks[name].near if name in tracks else None)
    if study.others:
        columns[f"that over {base}'s "] = lambda name: BASELINE if name == base else _near_ratio(pairs.get(name))
        columns[f"at most {base}'s best loss up to"] = lambda name: _beats(pairs.get(name))
    return TextTable(
        title=_title("How far the rate can be pushed", place),
        head=("strategy", *columns),
        rows=tuple((name, *(entry(name) for entry in columns.values())) for name in study.ranked(tracks)),
        words=1,
    )


def _line_grid(study: ToleranceStudy, place: Place) -> TextTable | None:
    """What is left of the ratios of tolerances if failing is drawn closer to the best."""
    pairs = place.pairs(tuned=False)
    factors = [factor for factor in FACTORS if factor < study.stability.worse]
    rows = [
        (name, *(marked(ratio_entry(pair.ratio_at(factor)), pair.at_end) for factor in factors))
        for name in study.ranked(place.own)
        if (pair := pairs.get(name)) is not None
    ]
    if not study.follows_rates or all(entry == MISSING for row in rows for entry in row[1:]):
        return None
    head = ("strategy", *(f"{factor:g} times" for factor in factors))
    title = _title(LINE.format(study.baseline), place)
    return TextTable(title=title, head=head, rows=tuple(rows), words=1)


def _curve_grid(study: ToleranceStudy, place: Place) -> TextTable | None:
    """What a rate costs: the mean loss of every strategy wherever all reported seeds of it trained."""
    if not study.follows_rates or study.screening or len(place.own) > MOST_CURVES:
        return None
    columns = {name: dict(place.own[name].mean_curve()) for name in study.ranked(place.own) if name in place.own}
    rows = []
    for lr in sorted({lr for curve in columns.values() for lr in curve}):
        entries = [_mean_loss(curve.get(lr, []), len(study.seeds)) for curve in columns.values()]
        if any(entry != MISSING for entry in entries):
            rows.append((lr_text(lr), *entries))
    if not rows:
        return None
    return TextTable(title=_title(CURVE, place), head=("rate", *columns), rows=tuple(rows), words=0)


def _mean_loss(points: Sequence[Point], seeds: int) -> Entry:
    if len(points) < seeds:
        return MISSING
    losses = [point.loss for point in points if point.stable and point.loss is not None]
    if len(losses) < seeds:
        return Stacked("unstable", f"({seeds - len(losses)} of {seeds})")
    return loss_entry(mean_of(losses))


def _tuned_grids(study: ToleranceStudy, place: Place) -> list[TextTable]:
    """What tuning gives each strategy, and what it leaves of the differences."""
    if not study.tune:
        return []
    own, tuned, base = place.own, place.tuned, study.baseline
    names, what = study.ranked(tuned), ", ".join(study.tune)
    gains = []
    for name in names:
        before, after = own.get(name), tuned.get(name)
        setting = _chosen(after) if after and after.best else MISSING
        gain = marked(difference_entry(_gain(before, after)), _at_end(before) or _at_end(after))
        losses = [marked(_loss(track), _at_end(track)) for track in (before, after)]
        gains.append((name, setting, *losses, gain))
    head = ("strategy", "chosen setting", "loss as it comes", "loss tuned", "tuned minus as it comes")
    found = [TextTable(title=_title(f"Tuned: {what}", place), head=head, rows=tuple(gains), words=2)]
    if study.others:
        pairs, both = place.pairs(tuned=False), place.pairs(tuned=True)
        columns: dict[str, Callable[[str], Entry]] = {
            f"loss minus {base}'s, as they come": lambda name: _difference(pairs.get(name)),
            "both tuned": lambda name: _difference(both.get(name)),
        }
        if study.follows_rates and any(_edge_ratio(pair) != MISSING for pair in (*pairs.values(), *both.values())):
            columns[f"largest stable rate over {base}'s, as they come"] = lambda name: _edge_ratio(pairs.get(name))
            columns["both tuned "] = lambda name: _edge_ratio(both.get(name))
        rows = tuple((name, *(entry(name) for entry in columns.values())) for name in names if name != base)
        title = _title(f"Against {base}, as they come and with {what} tuned for both", place)
        found.append(TextTable(title=title, head=("strategy", *(head.strip() for head in columns)), rows=rows, words=1))
    return [*found, *_reported(study, place), _settings(study, place)]


def _chosen(track: Track) -> str:
    """ "init.std = 0.05 (edge: optim.weight_decay)"."""
    ends = ", ".join(key for key, _ in track.open_ends)
    return f"{track.setting} ({EDGE}: {ends})" if ends else track.setting


def _reported(study: ToleranceStudy, place: Place) -> list[TextTable]:
    """Settings on the reported seeds, where more are known than as it comes and that chosen; rows: settings; columns:
    strategies. Then the difference from the baseline with every setting of either, since no interval holds how much
    hangs on which were taken."""
    names = [name for name in study.about.strategies if name in place.own]
    tracks = [] if study.screening else [track for track in place.tracks if track.ended]
    if all(not track.variant or track.variant == place.tuned[track.strategy].variant for track in tracks):
        return []
    losses: dict[str, dict[str, Entry]] = {}
    for track in tracks:
        losses.setdefault(track.setting, {})[track.strategy] = _loss_and_rate(track)
    found = [_by_setting(_title(REPORTED, place), names, losses)]
    theirs = [track for track in tracks if track.strategy == study.baseline]
    for name in study.others:
        ours = [track for track in tracks if track.strategy == name]
        differences = {
            track.setting: {their.setting: _difference(Pair(ours=track, theirs=their)) for their in theirs}
            for track in ours
        }
        title = f"{name}'s loss minus {study.baseline}'s, by {name}'s setting (rows) and {study.baseline}'s (columns)"
        if ours and theirs:
            found.append(_by_setting(_title(title, place), [their.setting for their in theirs], differences))
    return found


def _by_setting(title: str, names: Sequence[str], entries: Mapping[str, Mapping[str, Entry]]) -> TextTable:
    """Rows: settings; columns: what each is known of by name."""
    rows = tuple((setting, *(found.get(name, MISSING) for name in names)) for setting, found in entries.items())
    return TextTable(title=title, head=("setting", *names), rows=rows, words=1)


def _settings(study: ToleranceStudy, place: Place) -> TextTable:
    """Rows: what was tried; columns: strategies."""
    names = [name for name in study.about.strategies if name in place.own]
    losses: dict[str, dict[str, Entry]] = {}
    for track in place.tracks:
        best = track.picked_best
        rate = "" if best is None else str(marked(lr_text(best.lr), track.picked_end is not None))
        at = f"{loss_text(best.loss)} at {rate}" if best else NONE if track.picked else MISSING
        losses.setdefault(track.setting, {})[track.strategy] = at
    return _by_setting(_title(SETTINGS, place), names, losses)


def _other_grid(study: ToleranceStudy, place: Place) -> TextTable | None:
    largest = max((track.memory or 0 for track in place.own.values()), default=0)
    columns: list[tuple[str, Callable[[Track], Entry]]] = [
        ("spikes", lambda track: MISSING if track.spikes is None else f"{track.spikes.value:.3g}"),
        ("validation gap", lambda track: difference_entry(track.gap)),
        ("branch nonlinearity", lambda track: loss_entry(track.nonlinearity)),
        ("parameters", lambda track: count_text(track.parameters)),
        ("seconds per step", lambda track: _significant(track.step_seconds)),
        ("peak memory", lambda track: MISSING if track.memory is None else amount(track.memory, unit_of=largest)),
    ]
    filled = [(head, entry) for head, entry in columns if any(entry(track) != MISSING for track in place.own.values())]
    if not filled:
        return None
    rows = []
    for name in study.ranked(place.own):
        track = place.own.get(name)
        rows.append((name, *(MISSING if track is None else entry(track) for _, entry in filled)))
    title = _title("What else was measured, each at its own best rate", place)
    return TextTable(title=title, head=("strategy", *(head for head, _ in filled)), rows=tuple(rows), words=1)


def _over_places(
    study: ToleranceStudy, title: str, pairs: Sequence[dict[str, Pair]], entry: Callable[[Pair | None], Entry]
) -> TextTable:
    """Strategies by places, or the other way round where there are many places."""
    names = [place.name for place in study.places]

    def text(at_place: dict[str, Pair], name: str) -> Entry:
        return entry(at_place[name]) if name in at_place else MISSING

    if len(names) <= WIDE:
        rows = tuple((name, *(text(at_place, name) for at_place in pairs)) for name in study.others)
        return TextTable(title=title, head=("strategy", *names), rows=rows, words=1)
    rows = tuple(
        (place, *(text(at_place, name) for name in study.others)) for place, at_place in zip(names, pairs, strict=True)
    )
    return TextTable(title=title, head=("at", *study.others), rows=rows, words=1)


def _places(study: ToleranceStudy) -> TextTable:
    """Rows: places, in the order of their compute where it is known; columns: their settings, then strategies."""
    names = study.about.strategies
    found = [(place, next(iter(place.own.values()), None)) for place in study.places]
    columns = {
        "tokens": [count_text(track.tokens if track else None) for _, track in found],
        "FLOPs": [short_text(track.flops) if track and track.flops else MISSING for _, track in found],
    }
    shown = {head: values for head, values in columns.items() if len(set(values) - {MISSING}) > 1}
    rows = []
    for index, (place, track) in enumerate(found):
        size = [values[index] for values in shown.values()]
        losses = [_loss_and_rate(place.own.get(name)) for name in names]
        settings = [value_text(value) for _, value in place.told]
        rows.append(((track.flops if track else None) or 0.0, (*settings, *size, *losses)))
    rows.sort(key=lambda row: row[0])
    title = "Loss at the best rate of each, place by place"
    return TextTable(title=title, head=(*study.heads, *shown, *names), rows=tuple(row for _, row in rows), words=1)


def _loss_and_rate(track: Track | None) -> Entry:
    loss, rate = _loss(track), f"at {_best(track)}"
    if track is None or track.best is None:
        return _best(track)
    return f"{loss} {rate}" if isinstance(loss, str) else Stacked(f"{loss.value} {rate}", loss.below)


def _title(title: str, place: Place) -> str:
    return f"{title}: {place.name}" if place.name else title


def _loss(track: Track | None) -> Entry:
    if track is None or not track.seeds:
        return MISSING
    if track.failed:
        return Stacked("unstable", f"({track.failed} of {track.ended})")
    entry = loss_entry(track.loss)
    if track.loss is None or track.ended == len(track.seeds):
        return entry
    seeds = f"({track.ended} of {len(track.seeds)})"
    return Stacked(entry, seeds) if isinstance(entry, str) else Stacked(entry.value, f"{entry.below} {seeds}")


def _best(track: Track | None) -> str:
    if track is None or not track.picked:
        return MISSING
    if track.best is None:
        return NONE
    return str(marked(lr_text(track.best.lr), _at_end(track)))


def _difference(pair: Pair | None) -> Entry:
    return MISSING if pair is None else marked(difference_entry(pair.difference), pair.at_end)


def _edge_ratio(pair: Pair | None) -> Entry:
    return MISSING if pair is None else marked(ratio_entry(pair.edge_ratio), pair.at_end)


def _near_ratio(pair: Pair | None) -> Entry:
    return MISSING if pair is None else marked(ratio_entry(pair.near_ratio), pair.at_end)


def _beats(pair: Pair | None) -> Entry:
    if pair is None:
        return MISSING
    found = pair.beats
    return marked(NONE if found is not None and found.nowhere else kept_entry(found), pair.at_end)


def _at_end(track: Track | None) -> bool:
    """Whether the best rate, or what was chosen beside it, is no optimum."""
    return track is not None and track.at_end


def _gain(before: Track | None, after: Track | None) -> Estimate | None:
    """What tuning gained; None where the strategy's own setting was chosen, or a seed failed."""
    if before is None or after is None or before.variant == after.variant or before.failed or after.failed:
        return None
    return paired_difference(after.losses, before.losses)


def _significant(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"
