"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, nothing in a worker."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 20
"""Plain lines that a run prints, spread over its steps."""


class Watcher(Protocol):
    """Is told how a run goes: steps are updates done, losses nats per token. A validation loss need not be finite."""

    def start(self, step: int, steps: int) -> None: ...
    def step(self, step: int, loss: float, tokens_per_second: float) -> None: ...
    def validation(self, step: int, loss: float) -> None: ...
    def note(self, step: int, words: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Watches without a word."""

    def start(self, step: int, steps: int) -> None: ...
    def step(self, step: int, loss: float, tokens_per_second: float) -> None: ...
    def validation(self, step: int, loss: float) -> None: ...
    def note(self, step: int, words: str) -> None: ...
    def stop(self) -> None: ...


class Bar:
    """A live bar with loss, tokens per second and time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tok/s"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )

    def start(self, step: int, steps: int) -> None:
        self._task = self._progress.add_task("", total=steps, completed=step, loss="–", rate="–")
        self._progress.start()

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        self._progress.update(self._task, completed=step, loss=f"{loss:.3f}", rate=f"{tokens_per_second:,.0f}")

    def validation(self, step: int, loss: float) -> None:
        self._progress.console.print(f"step {step}: validation loss {loss:.4f}")

    def note(self, step: int, words: str) -> None:
        self._progress.console.print(f"step {step}: {words}", highlight=False, markup=False)

    def stop(self) -> None:
        self._progress.stop()


class Lines:
    """About twenty plain lines."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, step: int, steps: int) -> None:
        self._first, self._steps, self._started = step, steps, time.monotonic()
        self._every = max(1, steps // LINES)
        self._next = step + self._every

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        if step < self._next and step != self._steps:
            return
        self._next = step + self._every
        spent = time.monotonic() - self._started
        left = spent / max(1, step - self._first) * (self._steps - step)
        self._print(f"step {step}/{self._steps}  loss {loss:.3f}  {tokens_per_second:,.0f} tok/s  {_clock(left)} left")

    def validation(self, step: int, loss: float) -> None:
        self._print(f"step {step}/{self._steps}  validation loss {loss:.4f}")

    def note(self, step: int, words: str) -> None:
        self._print(f"step {step}/{self._steps}  {words}")

    def stop(self) -> None: ...

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def make_watcher(console: Console) -> Watcher:
    """A bar where it can move, else lines."""
    return Bar(console) if console.is_terminal else Lines(console)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
