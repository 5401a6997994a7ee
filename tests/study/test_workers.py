"""A study whose parent dies leaves nothing running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, sign: signal.Signals) -> None:
    with two_cells(tmp_path) as (process, workers):
        process.send_signal(sign)
        _, err = process.communicate(timeout=120)
        assert wait_for(lambda: not any(map(alive, workers)), 60), "workers went on without their parent"
    if sign == signal.SIGINT:
        assert process.returncode == 130
        assert err.strip() == "gptnorm: interrupted"
