"""Runs as people start them: a process of its own, stopped in every way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gptnorm", *map(str, arguments)]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`gptnorm …` to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=120, **options)


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has logged `step`, or its process has ended."""
    deadline = time.monotonic() + 60
    log = folder / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and f'"step": {step}, ' in log.read_text():
            return
        time.sleep(0.005)


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=60)
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
