"""A study whose parent dies leaves nothing running."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from gptnorm.errors import UserError
from gptnorm.recipe import load_recipe
from gptnorm.study import pool
from gptnorm.study.cell import Cell
from gptnorm.study.display import Display
from gptnorm.study.grid import Grid
from gptnorm.study.outcome import summarize
from gptnorm.study.pool import Outcome
from gptnorm.study.run import run_study
from gptnorm.study.workers import Workers

PROC = Path("/proc")


def children(pid: int) -> set[int]:
    """Processes started by `pid` that are interpreters of the pool."""
    found = set()
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == pid and "spawn_main" in command:
            found.add(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def two_cells(folder: Path) -> Iterator[tuple[subprocess.Popen[str], set[int]]]:
    """A study and the processes of its two workers, both of which train."""
    arguments = ["quickstart", "train.steps=100000", "study.workers=2", "model.d_model=16", "model.n_layers=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gptnorm", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        logs = "runs/quickstart/cells/*/*/metrics.jsonl"
        assert wait_for(lambda: sum(p.stat().st_size > 0 for p in folder.glob(logs)) == 2, 60), "no cell started"
        workers = children(process.pid)
        assert len(workers) == 2
        yield process, workers
    finally:
        process.kill()


@pytest.mark.skipif(not PROC.is_dir(), reason="looks processes up in /proc")
def test_a_killed_worker_is_said_to_be_one(tmp_path: Path) -> None:
    with two_cells(tmp_path) as (process, workers):
        os.kill(min(workers), signal.SIGKILL)
        _, err = process.communicate(timeout=120)
        assert wait_for(lambda: not any(map(alive, workers)), 60), "the other worker went on"
    assert process.returncode == 2
    (line,) = err.strip().splitlines()
    assert "was killed, perhaps for want of memory" in line
    assert "study.workers=1" in line


@pytest.mark.skipif(not PROC.is_dir(), reason="looks processes up in /proc")
def test_a_study_that_was_launched_as_a_single_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a cluster's job of one process: its workers are no group, and none waits for another."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with two_cells(tmp_path):
        assert len(list(tmp_path.glob("runs/quickstart/cells/*/*/metrics.jsonl"))) == 2


def test_a_study_is_not_launched_many_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^WORLD_SIZE = 2: .* without torchrun$"):
        run_study(Grid(), "quickstart", (), tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not PROC.is_dir(), reason="looks processes up in /proc")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path: Path, sign: signal.Signals) -> None:
    with two_cells(tmp_path) as (process, workers):
        process.send_signal(sign)
        _, err = process.communicate(timeout=120)
        assert wait_for(lambda: not any(map(alive, workers)), 60), "workers went on without their parent"
    if sign != signal.SIGKILL:
        how = "interrupted" if sign == signal.SIGINT else "stopped by SIGTERM"
        assert process.returncode == 128 + sign
        assert err.strip() == f"gptnorm: {how}; runs that have ended are kept, and the same command goes on"
        assert not (tmp_path / "runs/quickstart/lock").exists()


@pytest.mark.skipif(not PROC.is_dir(), reason="looks processes up in /proc")
def test_a_signal_to_all_processes_of_a_job_is_none_of_a_killed_worker(tmp_path: Path) -> None:
    with two_cells(tmp_path) as (process, workers):
        for pid in (*workers, process.pid):
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.5)
        _, err = process.communicate(timeout=120)
        assert wait_for(lambda: not any(map(alive, workers)), 60)
    assert process.returncode == 143
    assert "stopped by SIGTERM" in err


def test_a_run_is_kept_though_nobody_reads_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a pipe to `head`: the run has been handed over by the time that its line cannot be printed."""

    class Gone(Display):
        def finished(self, cell: Cell, result: Any) -> None:
            raise SystemExit(1)

    result: Any = SimpleNamespace(val_loss=1.0)
    ran = Outcome(result=result, training=summarize([1.0], whole=True), measured={})
    monkeypatch.setattr(pool, "Display", Gone)
    monkeypatch.setattr(pool, "_processes", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(pool, "_run_cell", lambda *_: ran)
    bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    bystander.start()
    cell = Cell(strategy="prenorm", lr=1e-3, seed=0, config=load_recipe("laptop/prenorm").resolve())
    found = []
    try:
        with pytest.raises(SystemExit):
            found.extend(pool.run_cells(lambda: [cell], {}, tmp_path, Workers(count=1), Console(quiet=True)))
        assert found == [(cell, ran)]
        assert bystander.is_alive(), "a process that is none of the study's"
    finally:
        bystander.terminate()
        bystander.join()
