"""Cells in parallel processes, with one live display."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gptnorm.report.records import read_lines
from gptnorm.study.outcome import Training, summarize

if TYPE_CHECKING:
    from gptnorm.config import Config
    from gptnorm.study.grid import Cell
    from gptnorm.study.signal import Signal
    from gptnorm.train.loop import Result


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a cell ended."""

    result: Result
    training: Training
    signal: dict[str, Signal | None] | None
    """In a ladder: signal propagation at initialisation and at the end."""


REPORT_EVERY = 0.3
"""Seconds between a worker's words about its progress."""

_queue: Queue[tuple[str, int, float]] | None = None
"""A worker's way to the parent, set once in each process."""


class _Reporter:
    """Sends a cell's progress to the parent, a few times a second."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._next = 0.0

    def start(self, step: int, steps: int) -> None: ...

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        now = time.monotonic()
        if _queue is not None and now >= self._next:
            self._next = now + REPORT_EVERY
            _queue.put((self._name, step, loss))

    def validation(self, step: int, loss: float) -> None: ...

    def stop(self) -> None: ...


def run_cells(
    cells: list[Cell], shards: Path, folder: Path, workers: int, console: Console
) -> Iterator[tuple[Cell, Outcome]]:
    """Runs the cells in `workers` processes and yields each with its outcome as it ends.

    A failing cell ends the study with its exception; cells that have ended are kept.
    """
    # Fresh interpreters: forking after torch has started its threads can hang.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with (
        _Display(cells, console) as display,
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(queue,)) as pool,
    ):
        futures = {
            pool.submit(_run_cell, cell.config, shards, folder / cell.folder, cell.folder, cell.rung is not None): cell
            for cell in cells
        }
        waiting: set[Future[Outcome]] = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=REPORT_EVERY, return_when=FIRST_COMPLETED)
                display.running(_drain(queue))
                for future in done:
                    outcome = future.result()
                    display.finished(futures[future], outcome.result)
                    yield futures[future], outcome
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start_worker(queue: Any) -> None:
    global _queue  # noqa: PLW0603 - the pool's only way to hand a queue to its processes
    _queue = queue
    # Ctrl-C reaches every process of the terminal; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed cannot end its workers, and they would train on unseen.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The parent prints; what a worker's libraries print would tear the display.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run_cell(config: Config, shards: Path, folder: Path, name: str, signal: bool) -> Outcome:
    from gptnorm.data import Shards
    from gptnorm.study.signal import run_with_signal
    from gptnorm.train.loop import start_run

    # What a kill left of this run; it has not ended, or the ledger would have it.
    shutil.rmtree(folder, ignore_errors=True)
    text, reporter, found = Shards.open(shards), _Reporter(name), None
    if signal:
        result, found = run_with_signal(config, text, folder, reporter)
    else:
        result = start_run(config, text, folder, reporter)
    losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl") if line.get("split") == "train"]
    return Outcome(result=result, training=summarize(losses, whole=result.status == "finished"), signal=found)


def _drain(queue: Any) -> dict[str, tuple[int, float]]:
    """The latest word of each running cell."""
    latest = {}
    while True:
        try:
            name, step, loss = queue.get_nowait()
        except Empty:
            return latest
        latest[name] = (step, loss)


class _Display:
    """A bar on a terminal, a line per ended cell elsewhere."""

    def __init__(self, cells: list[Cell], console: Console) -> None:
        self._console = console
        self._steps = {cell.folder: cell.config.train.steps for cell in cells}
        # A step costs about as much more as the model is deeper or wider: good enough for the time left.
        self._weights = {cell.folder: cell.rung.size if cell.rung else 1 for cell in cells}
        self._short = {
            cell.folder: cell.rung.label if cell.rung else cell.folder.removeprefix("cells/") for cell in cells
        }
        self._reached: dict[str, int] = {}
        self._now: dict[str, str] = {}
        self._ended = 0
        self._progress = Progress(
            TextColumn("{task.fields[cells]}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("spent,"),
            TimeRemainingColumn(),
            TextColumn("left  {task.fields[now]}"),
            console=console,
        )

    def __enter__(self) -> _Display:
        if self._console.is_terminal:
            self._task = self._progress.add_task("", total=self._weigh(self._steps), cells=self._count(), now="")
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def running(self, latest: dict[str, tuple[int, float]]) -> None:
        """Moves the bar to what the workers last said."""
        self._reached |= {name: step for name, (step, _) in latest.items()}
        if self._console.is_terminal:
            self._now |= {name: f"{self._short[name]} {loss:.2f}" for name, (_, loss) in latest.items()}
            done, now = self._weigh(self._reached), ", ".join(self._now.values())
            self._progress.update(self._task, completed=done, cells=self._count(), now=now)

    def finished(self, cell: Cell, result: Result) -> None:
        """Counts a cell and says how it ended."""
        self._ended += 1
        self._now.pop(cell.folder, None)
        self._reached[cell.folder] = self._steps[cell.folder]
        ended = f"{result.val_loss:.4f}" if result.val_loss is not None else f"diverged at step {result.step}"
        rung = f"  {cell.rung.label}" if cell.rung else ""
        where = f"{cell.strategy}{rung}  lr {cell.lr:g}  seed {cell.seed}"
        line = f"{self._count()}  {where}  {ended}  ({result.seconds:.0f} s)"
        self._progress.console.print(line, highlight=False, soft_wrap=True)

    def _weigh(self, steps: dict[str, int]) -> int:
        return sum(self._weights[name] * count for name, count in steps.items())

    def _count(self) -> str:
        return f"{self._ended}/{len(self._steps)} runs"
