"""How long a step takes, as the run goes."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 101
"""Stretches of steps that the median is over."""


class Pace:
    """The median time of a step over the last stretches.

    A stretch ends where the host waited for the device: before that its clock says nothing of a GPU's work.
    """

    def __init__(self) -> None:
        self._stretches: deque[float] = deque(maxlen=WINDOW)
        self._seconds, self._steps = 0.0, 0

    def add(self, seconds: float, *, waited: bool) -> None:
        """A step more, what is done now and then beside it left out."""
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        if waited:
            self._stretches.append(self._seconds / self._steps)
            self._seconds, self._steps = 0.0, 0

    @property
    def step(self) -> float | None:
        """Seconds; None before the first stretch has ended."""
        return statistics.median(self._stretches) if self._stretches else None
