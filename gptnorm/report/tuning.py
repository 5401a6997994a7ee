r"""A strategy with its settings tuned beside the rate, and where a value so chosen is an end of what was tried.

The setting is that which is best, at its best rate, on the mean of *all* seeds, those that pick and those reported. It
is one of those that all seeds try, by a rule that is the same for every strategy: as it comes, and what the picking
seeds shortlist (`study.shortlist`) on all the rates at which they have trained. A setting that is stable at no rate on
all seeds is none of them. Where some seed has not trained with all of them yet, or only at the picked rate, it is the
one that is best on the picking seeds alone (`Track.by_all`).

Rates are chosen on all seeds without the one that is reported (`gptnorm.report.track`), which keeps its own luck out.
With settings that would do harm: of two that are as good, each seed would get the one that it likes less, for the
others like it more, and the tuned loss could be above that of either. One setting for all seeds takes the luckier of
equals for either strategy alike, so that this falls out of their difference; it stays in what tuning gains. How much
either matters: `benchmarks/choosing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gptnorm.model.init import named_std
from gptnorm.report.track import End, Track
from gptnorm.study.measures import chosen, shortlisted


def tuned(tried: Sequence[Track], shortlist: float) -> Track:
    """One strategy at one place, with the best of the settings that were tried, as it comes among them.

    Args:
        shortlist: `study.shortlist`, nats.
    """
    # As it comes first: of equals that is chosen.
    tracks = dict(enumerate(sorted(tried, key=lambda track: bool(track.variant))))
    picked = {index: track.picked for index, track in tracks.items()}
    everyones = {index: tracks[index] for index in sorted({0, *shortlisted(picked, shortlist)})}
    able = {index: track for index, track in everyones.items() if track.picked_best is not None and not track.fails}
    by_all = bool(able) and all(track.whole for track in able.values())
    best = chosen({index: track.pooled for index, track in able.items()} if by_all else picked)
    track = tracks[best or 0]
    return replace(track, by_all=by_all, open_ends=_open_ends(track, tried))


def _open_ends(chosen: Track, tried: Sequence[Track]) -> tuple[tuple[str, End], ...]:
    """The settings whose chosen value is the lowest or highest of those tried, so that one further out may do better.

    Values that are no numbers have no order, and below 0 there is nothing: a weight decay of 0 is an optimum.
    """
    found: list[tuple[str, End]] = []
    for key, value in chosen.tuned.items():
        sizes = {size for track in tried if (size := _size(track, key, track.tuned[key])) is not None}
        size = _size(chosen, key, value)
        if size is None or len(sizes) < 2:
            continue
        if size == max(sizes):
            found.append((key, "highest"))
        elif size == min(sizes) and size != 0:
            found.append((key, "lowest"))
    return tuple(found)


def _size(track: Track, key: str, value: Any) -> float | None:
    """A setting's value as a number; None where it has no place in an order."""
    if key == "init.std" and value in ("published", "twin") and track.width is not None:
        return named_std(value, track.width)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
