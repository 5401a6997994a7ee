r"""A strategy with its settings tuned beside the rate, and where a value so chosen is an end of what was tried.

As of rates (`gptnorm.report.track`), so of settings: each reported seed has that which is best, at its best rate, on
the mean of all *other* seeds, picking ones included (leave one out). It is one of those that all seeds try, by a rule
that is the same for every strategy: as it comes, and what the picking seeds shortlist (`study.shortlist`). No interval
holds that this may leave out a better one. Where some seed has not trained with all of them yet, or only at the picked
rate, every seed has the setting that is best on the picking ones (`Tuned.by_others`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from gptnorm.model.init import named_std
from gptnorm.report.track import End, Track, Trial
from gptnorm.study.measures import Point, chosen, shortlisted


@dataclass(frozen=True, kw_only=True)
class Tuned(Track):
    """The track of the setting that is best on the mean of all seeds, but that each reported seed has its own."""

    at: Mapping[int, Track]
    """The setting of each reported seed, by seed; empty: that of the track."""

    @property
    def by_others(self) -> bool:
        """Whether each reported seed has the setting that all other seeds pick."""
        return bool(self.at)

    @property
    def as_it_comes(self) -> bool:
        """Whether tuning changes nothing on any reported seed."""
        return not any(track.variant for track in (self, *self.at.values()))

    @property
    def same(self) -> int:
        """Reported seeds that have the setting which is best on the mean of all."""
        return sum(self.at.get(seed, self).variant == self.variant for seed in self.seeds)

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
    tracks = dict(enumerate(sorted(tried, key=lambda track: bool(track.variant))))
    picked = {index: track.picked for index, track in tracks.items()}
    everyones = {index: tracks[index] for index in sorted({0, *shortlisted(picked, shortlist)})}
    if not all(track.whole for track in everyones.values()):
        return _tuned(tracks[chosen(picked) or 0], {}, tried)
    best = chosen({index: track.pooled for index, track in everyones.items()}) or 0
    at = {}
    for seed in tracks[0].seeds:
        index = chosen({index: _one(track.without(seed)) for index, track in everyones.items()})
        at[seed] = tracks[best if index is None else index]
    return _tuned(tracks[best], at, tried)


def _one(point: Point | None) -> list[Point]:
    return [] if point is None else [point]


def _tuned(track: Track, at: Mapping[int, Track], tried: Sequence[Track]) -> Tuned:
    settings = {entry.name: getattr(track, entry.name) for entry in fields(track)}
    return Tuned(**{**settings, "open_ends": _open_ends(track, tried), "at": at})


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
