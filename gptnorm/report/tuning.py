r"""A strategy with its settings tuned beside the rate, and where a value so chosen is an end of what was tried.

As of rates (`gptnorm.report.track`), so of settings: each reported seed has that which is best, at its best rate, on
the mean of all *other* seeds, picking ones included (leave one out). It is one of those that all seeds try, by a rule
that is the same for every strategy: as it comes, and what the picking seeds shortlist (`study.shortlist`) on all the
rates at which they have trained. No interval holds the error of leaving a better one out. A setting that is stable at
no rate on all seeds is none of them. Where some seed has not trained with all of them yet, or only at the picked rate,
every seed has the setting that is best on the picking ones (`Tuned.by_others`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from gptnorm.model.init import named_std
from gptnorm.report.track import End, Track, Trial
from gptnorm.study.measures import Point, chosen, shortlisted


@dataclass(frozen=True, kw_only=True)
class Tuned(Track):
    """The track of the setting that is best on the mean of all seeds, but that each reported seed has its own.

    What is taken at the rate of each reported seed, or along its curve, is that of its setting: `loss`, `failed`,
    `edges`, `near`, `reaches`, `gap` and the like. Rates, `best`, `sensitivity` and times are those of the track.
    """

    at: Mapping[int, Track]
    """The setting of each reported seed, by seed; empty: that of the track."""

    @property
    def by_others(self) -> bool:
        """Whether each reported seed has the setting that all other seeds pick."""
        return bool(self.at)

    @property
    def as_it_comes(self) -> bool:
        """Whether tuning changes nothing on any reported seed."""
        return not any(self.at.get(seed, self).variant for seed in self.seeds)

    @property
    def same(self) -> int:
        """Reported seeds that have the setting which is best on the mean of all."""
        return sum(self.at.get(seed, self).variant == self.variant for seed in self.seeds)

    @property
    def at_end(self) -> bool:
        return bool(self.open_ends) or any(track.end is not None for track in (self, *self.at.values()))

    @cached_property
    def rate_by_seed(self) -> dict[int, float]:
        found = {seed: track.rate_by_seed[seed] for seed, track in self.at.items() if seed in track.rate_by_seed}
        return {**super().rate_by_seed, **found}

    def curve(self, seed: int) -> list[Point]:
        return self.at[seed].curve(seed) if seed in self.at else super().curve(seed)

    def trials_of(self, seed: int) -> list[Trial]:
        return self.at[seed].trials_of(seed) if seed in self.at else super().trials_of(seed)


def tuned(tried: Sequence[Track], shortlist: float) -> Tuned:
    """One strategy at one place, with the best of the settings that were tried, as it comes among them.

    Args:
        shortlist: `study.shortlist`, nats.
    """
    # As it comes first: of equals that is chosen.
    tracks = sorted(tried, key=lambda track: bool(track.variant))
    picked = {index: track.picked for index, track in enumerate(tracks)}
    everyones = [tracks[index] for index in sorted({0, *shortlisted(picked, shortlist)})]
    able = [track for track in everyones if track.picked_best is not None and not track.fails]
    if not able or not all(track.whole for track in able):
        return _tuned(tracks[chosen(picked) or 0], {}, tried)
    best = min(able, key=lambda track: _loss(track.best))
    return _tuned(best, {seed: _best_without(seed, able) for seed in best.seeds}, tried)


def _best_without(seed: int, able: Sequence[Track]) -> Track:
    return min(able, key=lambda track: _loss(track.without(seed)))


def _loss(point: Point | None) -> float:
    return math.inf if point is None or point.loss is None else point.loss


def _tuned(track: Track, at: Mapping[int, Track], tried: Sequence[Track]) -> Tuned:
    settings = {entry.name: getattr(track, entry.name) for entry in fields(track)}
    ends = dict.fromkeys(end for chosen in (track, *at.values()) for end in _open_ends(chosen, tried))
    return Tuned(**{**settings, "open_ends": tuple(ends), "at": at})


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
