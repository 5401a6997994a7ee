"""Cells in parallel processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import SpawnContext
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from gptnorm.errors import UserError
from gptnorm.records import read_lines
from gptnorm.study.display import Display
from gptnorm.study.outcome import Training, summarize
from gptnorm.study.workers import Workers
from gptnorm.train.parallel import LAUNCHED
from gptnorm.train.progress import Silent
from gptnorm.train.stop import SIGNALS

if TYPE_CHECKING:
    from gptnorm.study.cell import Cell
    from gptnorm.train.result import Result


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a cell ended."""

    result: Result
    training: Training
    measured: dict[str, Any]
    """What else the ledger says of the run, see `gptnorm.study.aftermath`."""


REPORT_EVERY = 0.3
"""Seconds between a worker's words about its progress."""

_queue: Queue[tuple[str, int, float]] | None = None
"""A worker's way to the parent, set once in each process."""


class _Reporter(Silent):
    """Sends a cell's progress to the parent, a few times a second."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._next = 0.0

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        now = time.monotonic()
        if _queue is not None and now >= self._next:
            self._next = now + REPORT_EVERY
            _queue.put((self._name, step, loss))


def run_cells(
    wanted: Callable[[], list[Cell]], texts: Mapping[str, Path], folder: Path, workers: Workers, console: Console
) -> Iterator[tuple[Cell, Outcome]]:
    """Runs cells in parallel processes and yields each with its outcome as it ends. Several GPUs are dealt out.

    A failing cell ends the study with its exception, a killed worker with a UserError; cells that have ended are kept.

    Args:
        wanted: the cells that are missing; asked at the start, and again whenever one has ended and was dealt with.
        texts: the folder of each text's shards.
    """
    # Fresh interpreters: forking after torch has started its threads can hang.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    others = set(multiprocessing.active_children())
    with Display(console) as display, _processes(workers, queue, context) as pool:
        futures: dict[Future[Outcome], Cell] = {}
        waiting: set[Future[Outcome]] = set()
        asked: set[str] = set()

        def submit() -> None:
            new = list({cell.folder: cell for cell in wanted() if cell.folder not in asked}.values())
            asked.update(cell.folder for cell in new)
            display.add(new)
            for cell in new:
                future = pool.submit(_run_cell, cell, texts, folder)
                futures[future] = cell
                waiting.add(future)

        try:
            submit()
            while waiting:
                done, _ = wait(waiting, timeout=REPORT_EVERY, return_when=FIRST_COMPLETED)
                display.running(_drain(queue))
                # What has ended well is kept before what has not ends the study.
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    outcome = future.result()
                    waiting.remove(future)
                    cell = futures.pop(future)
                    # Whoever reads what is printed may leave; by then the caller has kept it.
                    yield cell, outcome
                    display.finished(cell, outcome.result)
                if done:
                    submit()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            if isinstance(error, BrokenProcessPool):
                fewer = f", with fewer runs at once by study.workers={workers.count // 2}" if workers.count > 1 else ""
                raise UserError(
                    "a process that trained was killed, perhaps for want of memory; ended runs are kept, and the same "
                    f"command goes on{fewer}"
                ) from None
            raise


def _processes(workers: Workers, queue: Any, context: SpawnContext) -> ProcessPoolExecutor:
    """Workers that report to `queue`, none started yet."""
    how = (queue, context.Value("i", 0), workers.gpus, workers.threads)
    return ProcessPoolExecutor(workers.count, mp_context=context, initializer=_start_worker, initargs=how)


def _start_worker(queue: Any, started: Any, gpus: tuple[str, ...], threads: int | None) -> None:
    """Args: started: how many workers have, shared by all."""
    global _queue  # noqa: PLW0603 - the pool's only way to hand a queue to its processes
    _queue = queue
    for key in LAUNCHED:  # the study may have been launched as one process; its workers are none of a group
        os.environ.pop(key, None)
    with started.get_lock():
        number = started.value
        started.value += 1
    if gpus:
        # Read when CUDA is first used, which no worker has done yet.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    if threads is not None:
        torch.set_num_threads(threads)
    # Ctrl-C reaches every process of the terminal, SIGTERM every process of a job; the parent ends its workers itself.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A parent that is killed cannot end its workers, and they would train on unseen.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The parent prints; what a worker's libraries print would tear the display.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run_cell(cell: Cell, texts: Mapping[str, Path], study: Path) -> Outcome:
    from gptnorm.data import Shards
    from gptnorm.study.aftermath import run_and_measure

    folder = study / cell.folder
    # What a kill left of this run; it has not ended, or the ledger would have it.
    shutil.rmtree(folder, ignore_errors=True)
    shards = {name: Shards.open(texts[name]) for name in (cell.text, *cell.evaluated)}
    result, found = run_and_measure(cell, shards, folder, _Reporter(cell.folder))
    losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl") if line.get("split") == "train"]
    return Outcome(
        result=result,
        training=summarize(losses, whole=result.status == "finished"),
        measured=found,
    )


def _drain(queue: Any) -> dict[str, tuple[int, float]]:
    """The latest word of each running cell."""
    latest = {}
    while True:
        try:
            name, step, loss = queue.get_nowait()
        except Empty:
            return latest
        latest[name] = (step, loss)
