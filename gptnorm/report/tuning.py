"""Where a setting that is tuned beside the rate has its best value at an end of what was tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptnorm.model.init import named_std
from gptnorm.report.track import End, Track


def open_ends(chosen: Track, tried: Sequence[Track]) -> tuple[tuple[str, End], ...]:
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
