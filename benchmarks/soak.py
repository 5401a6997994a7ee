"""A run that is killed over and over against one that is left alone.

    python benchmarks/soak.py [--kills N] [--processes P] [--folder FOLDER] [KEY=VALUE ...]

The run saves a checkpoint every few steps and is killed (SIGKILL, its whole process group) at a random moment: while it
starts, trains, validates, writes or removes a checkpoint. Now and then it is asked to stop with SIGTERM instead. It is
resumed, until it ends. Every loss, gradient norm and learning rate of metrics.jsonl and every tensor of the last
checkpoint must be those of the undisturbed run, bit by bit, and no kill may leave a damaged checkpoint.

The result goes to benchmarks/results/, with device, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gptnorm.environment import describe_environment
from gptnorm.train.checkpoint import checkpoints_in, verify_checkpoint

RESULTS = Path(__file__).parent / "results"
RECIPE = "laptop/prenorm"
SETTINGS = (
    "model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.dropout=0.1", "train.steps=4000",
    "train.batch_size=4", "train.accumulate=2", "train.seq_len=32", "train.eval_every=70", "train.eval_sequences=8",
    "train.device=cpu", "checkpoint.every=5", "checkpoint.best=true", "guard.sigmas=6", "watch.every=50",
)  # fmt: skip
TIMES = ("seconds", "gauge_seconds", "gauge_steps")
"""What a resumed run need not have the same."""
LONGEST = 3.0
"""Seconds that a process is left alone at most: from its start, or from its first step."""
STOPPED = {0: "ended", 143: "stopped"}


def launch(processes: int, *arguments: str) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "gptnorm", *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*torchrun, "-m", "gptnorm", *arguments]


def numbers(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def tensors(folder: Path) -> dict[str, bytes]:
    newest = checkpoints_in(folder / "checkpoints")[-1]
    return {
        f"{newest.name}/{path.name}/{name}": tensor.numpy().tobytes()
        for path in newest.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def disturb(folder: Path, arguments: list[str], dice: random.Random, processes: int) -> str:
    """Starts the command and ends it at a random moment, one time in four counted from its start; how it ended."""
    began, log = time.time(), folder / "metrics.jsonl"
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    gently = processes == 1 and dice.random() < 0.1
    trains = dice.random() < 0.75
    while trains and process.poll() is None and not (log.exists() and log.stat().st_mtime > began):
        time.sleep(0.01)
    try:
        _, err = process.communicate(timeout=dice.uniform(0, LONGEST))
    except subprocess.TimeoutExpired:
        # torchrun's processes have sessions of their own, and would live on.
        for pid in (*children(process.pid), process.pid):
            os.kill(pid, signal.SIGTERM if gently else signal.SIGKILL)
        _, err = process.communicate()
    if process.returncode == -signal.SIGKILL:
        return "killed"
    if process.returncode == -signal.SIGTERM:
        return "asked to stop before it listened"
    assert process.returncode in STOPPED, err.decode()
    return STOPPED[process.returncode]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=200, help="how often at least")
    parser.add_argument("--processes", type=int, default=1, help="of torchrun; 1: without it")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; default: a temporary folder")
    options = parser.parse_intermixed_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    settings = (*SETTINGS, *options.settings)
    straight, cut = root / "straight", root / "cut"
    subprocess.run(launch(options.processes, "train", RECIPE, f"run.dir={straight}", *settings), check=True)

    dice, ends, where, damaged = random.Random(options.seed), Counter[str](), Counter[str](), 0
    began = time.monotonic()
    while ends["killed"] < options.kills:
        if ends["ended"]:
            # It came to its end before it was killed often enough: go back to an early step and on from there.
            check(straight, cut)
            for checkpoint in checkpoints_in(cut / "checkpoints"):
                shutil.rmtree(checkpoint)
            shutil.rmtree(cut)
            ends["begun again"] += 1
            ends["ended"] = 0
        resumable = bool(checkpoints_in(cut / "checkpoints"))
        if not resumable:
            shutil.rmtree(cut, ignore_errors=True)
        words = ("resume", str(cut)) if resumable else ("train", RECIPE, f"run.dir={cut}", *settings)
        began_now = time.time()
        end = disturb(cut, launch(options.processes, *words), dice, options.processes)
        ends[end] += 1
        if end == "killed":
            partial = list((cut / "checkpoints").glob(".step-*")) if cut.exists() else []
            trained = (cut / "metrics.jsonl").exists() and (cut / "metrics.jsonl").stat().st_mtime > began_now
            training = "while it trained" if trained else "while it started"
            where["while writing or removing a checkpoint" if partial else training] += 1
        for checkpoint in checkpoints_in(cut / "checkpoints"):
            try:
                verify_checkpoint(checkpoint)
            except Exception as error:
                damaged += 1
                print(error)
        print(f"\r{ends['killed']} kills", end="", file=sys.stderr)
    words = ("resume", str(cut)) if checkpoints_in(cut / "checkpoints") else ("resume", str(cut), "--step", "0")
    subprocess.run(launch(options.processes, *words), check=True)
    check(straight, cut)
    assert not damaged, f"{damaged} damaged checkpoints"

    environment = describe_environment(torch.device("cpu"))
    result = {
        "what": "soak: kills and resumes against an undisturbed run, bit-identical metrics and tensors",
        "command": " ".join(["python", *sys.argv]),
        "recipe": RECIPE,
        "settings": settings,
        "ends": dict(ends),
        "kills": dict(where),
        "damaged_checkpoints": damaged,
        "last_loss": numbers(cut)[-1]["loss"],
        "undisturbed_last_loss": numbers(straight)[-1]["loss"],
        "seconds": round(time.monotonic() - began),
        "environment": environment,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"soak_{options.processes}_{environment['started'][:10]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{ends['killed']} kills, the same to the last bit: {path}")
    if options.folder is None:
        shutil.rmtree(root)


def check(straight: Path, cut: Path) -> None:
    """The two runs are the same, bit by bit."""
    assert numbers(cut) == numbers(straight), "metrics differ"
    assert tensors(cut) == tensors(straight), "tensors differ"


if __name__ == "__main__":
    main()
