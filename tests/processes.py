"""Runs as people start them: a process of its own, stopped in every way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE = 600
"""Seconds that anything may take on a machine that is busy with other work; no test is about time."""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gptnorm", *map(str, arguments)]


def torchrun(processes: int, *arguments: object) -> list[str]:
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "gptnorm"]
    return [sys.executable, *words, *map(str, arguments)]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`gptnorm …` to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=PATIENCE, **options)


def launch(processes: int, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """`torchrun … gptnorm …` to its end, in this environment with changes."""
    where = environment(OMP_NUM_THREADS="1", **changes)
    words = torchrun(processes, *arguments)
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE, env=where)


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def start_many(processes: int, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    words, where = torchrun(processes, *arguments), environment(OMP_NUM_THREADS="1")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=where, **pipes, **options)


def workers(job: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun started, in the order of their ranks."""
    found = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))


def kill_all(job: subprocess.Popen[str]) -> None:
    """SIGKILL to torchrun's processes, which have sessions of their own and would live on, and to itself."""
    for pid in (*workers(job), job.pid):
        os.kill(pid, signal.SIGKILL)
    job.communicate()


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the processes of a failed job say, beside torchrun: lines, no traceback."""
    assert done.returncode != 0
    assert "gptnorm/cli/" not in done.stderr, done.stderr
    return re.findall(r"gptnorm(?: \(process \d+\))?: .*", done.stderr)


def told_once(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that they say together."""
    found = told(done)
    assert len(found) == 1, done.stderr
    return found[0]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has logged `step`, or its process has ended."""
    deadline = time.monotonic() + PATIENCE
    log = folder / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and f'"step": {step}, ' in log.read_text():
            return
        time.sleep(0.005)


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def stop_beyond(
    folder: Path, step: int, arguments: tuple[object, ...], number: int = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    """Starts `gptnorm …` and signals it as soon as it has logged `step`."""
    process = start(*arguments)
    wait_for_step(folder, step, process)
    process.send_signal(number)
    return ended(process)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    """Everything of metrics.jsonl that a resume must not change: all but the time."""
    return [
        (line["step"], line["split"], line["loss"], line.get("grad_norm"), line.get("lr")) for line in metrics(folder)
    ]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with changes."""
    return {**os.environ, **changes}
