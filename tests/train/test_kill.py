"""A process that is killed for real, again and again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SETTINGS = ("train.steps=400", "checkpoint.every=20", "train.eval_every=50")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gptnorm", *map(str, arguments)]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stop_beyond(run: Path, step: int, arguments: list[str], sign: int) -> subprocess.CompletedProcess[str]:
    """Runs the command and signals it as soon as it has logged `step`."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    log = run / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and f'"step": {step}, ' in log.read_text():
            process.send_signal(sign)
            break
        time.sleep(0.005)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_kill_9_twice_then_resume_is_bit_identical(recipe, tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    done = subprocess.run(
        command("train", recipe, f"run.dir={straight}", *SETTINGS), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"validation loss {metrics(straight)[-1]['loss']:.4f}"

    for at, arguments in ((45, ("train", recipe, f"run.dir={cut}", *SETTINGS)), (130, ("resume", cut))):
        killed = stop_beyond(cut, at, command(*arguments), signal.SIGKILL)
        assert killed.returncode == -signal.SIGKILL
        for path in (cut / "checkpoints").glob("step-*"):
            assert (path / "manifest.json").is_file(), "half a checkpoint"
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14')
    done = subprocess.run(command("resume", cut), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

    def key(line):
        return line["step"], line["split"], line["loss"], line.get("grad_norm")

    assert list(map(key, metrics(cut))) == list(map(key, metrics(straight)))
    name = "checkpoints/step-000400/optimizer.safetensors"
    assert (cut / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT between processes")
def test_ctrl_c_is_one_line_and_130(recipe, tmp_path):
    run = tmp_path / "run"
    ended = stop_beyond(run, 30, command("train", recipe, f"run.dir={run}", "train.steps=100000"), signal.SIGINT)
    # click puts a line end after the ^C of the terminal.
    assert (ended.returncode, ended.stderr.strip()) == (130, "gptnorm: interrupted")
    assert json.loads((run / "status.json").read_text())["status"] == "interrupted"
