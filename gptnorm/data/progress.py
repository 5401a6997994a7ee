"""What a person sees of a build: a bar on a terminal, plain lines elsewhere, nothing in a worker."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

PATIENCE = 10.0
"""Seconds of work before the first plain line: what takes less needs none."""

EVERY = 60.0
"""Seconds between plain lines, at most."""

LINES = 20
"""Plain lines of a step whose end is known, if it takes less than `EVERY` for each."""

REDRAW = 0.1
"""Seconds between two states of a bar, at least."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a step of a build has come, all in all."""

    share: float | None
    """Part of the work that is done, 0 to 1; None: nobody knows how much there is."""
    text_bytes: int
    documents: int = 0
    tokens: int = 0


class Watcher(Protocol):
    """Is told how a build goes, step by step."""

    def begin(self, step: str) -> None: ...
    def update(self, now: Progress) -> None: ...
    def end(self) -> None: ...


class Silent:
    """Watches without a word."""

    def begin(self, step: str) -> None: ...
    def update(self, now: Progress) -> None: ...
    def end(self) -> None: ...


class Bar:
    """A live bar with counts, rates and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None

    def begin(self, step: str) -> None:
        self.end()
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[words]}"), console=self._console
        )
        self._task = self._bars.add_task(step, total=None, words="")
        self._pace = Pace()
        self._next = 0.0
        self._bars.start()

    def update(self, now: Progress) -> None:
        if self._bars is None:
            return
        self._pace.see(now)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REDRAW
            total = None if now.share is None else 1.0
            self._bars.update(self._task, total=total, completed=now.share or 0, words=self._pace.words(now))

    def end(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class Lines:
    """Plain lines, none for a step that takes less than `PATIENCE`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, step: str) -> None:
        self._step = step
        self._pace = Pace()
        self._due = time.monotonic() + PATIENCE
        self._late = self._due
        self._after = 0.0

    def update(self, now: Progress) -> None:
        self._pace.see(now)
        clock = time.monotonic()
        if clock < self._due or (clock < self._late and (now.share is None or now.share < self._after)):
            return
        self._due, self._late = clock + 1, clock + EVERY
        self._after = (now.share or 0) + 1 / LINES
        line = f"{self._step}: {self._pace.words(now)}"
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def end(self) -> None: ...


class Pace:
    """Rates since the step began, and the time left at them.

    A build that goes on where it was cut off begins with what it had: neither rate counts that.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first: Progress | None = None

    def see(self, now: Progress) -> None:
        self._first = self._first or now

    def words(self, now: Progress) -> str:
        """Counts, rates and time left, in words."""
        first = self._first or now
        spent = max(1e-9, time.monotonic() - self._started)
        words = []
        if now.share is not None:
            words.append(f"{100 * now.share:.1f} %")
        if now.documents:
            words.append(f"{now.documents:,} documents")
            words.append(f"{in_short(now.tokens)} tokens")
            words.append(f"{(now.documents - first.documents) / spent:,.0f} documents/s")
        words.append(f"{(now.text_bytes - first.text_bytes) / spent / 1e6:,.1f} MB/s")
        if now.documents:
            words.append(f"{in_short((now.tokens - first.tokens) / spent)} tokens/s")
        if now.share is not None and first.share is not None and now.share > first.share:
            words.append(f"{clock((1 - now.share) / (now.share - first.share) * spent)} left")
        return "  ".join(words)


def make_watcher(console: Console) -> Watcher:
    """A bar where it can move, else lines."""
    return Bar(console) if console.is_terminal else Lines(console)


def in_short(number: float) -> str:
    """`12345678` → "12.3M"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
