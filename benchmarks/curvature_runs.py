"""Trains and measures, run by run, what the pages on curvature are made of: a process for each of two cores.

Every run goes through the commands that anybody has: `gptnorm train`, then `gptnorm curvature` at some of its
checkpoints. What is there already is not done again, so that a stopped script goes on where it was, and more seeds may
be added. The readings stay beside the page, as the command's JSON; run folders go to a folder of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptnorm.files import write_atomic

WORKERS = 2
COMMAND = "from gptnorm.cli import main; main()"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run and how it is measured."""

    recipe: str
    seed: int
    settings: tuple[str, ...]
    """Of the run, beside its seed."""
    measured: tuple[str, ...]
    """Arguments of `gptnorm curvature`."""
    run: str
    """Its folder's name; of several subjects with one run, the first trains it."""
    name: str
    """Of its reading."""

    def commands(self, runs: Path, reading: Path) -> list[list[str]]:
        """What makes its reading."""
        run = runs / self.run
        train = ["train", self.recipe, f"seed={self.seed}", *self.settings, f"run.dir={run}"]
        return [train, ["curvature", str(run), *self.measured, "--json", str(reading)]]


def measure(subjects: Iterable[Subject], runs: Path, readings: Path) -> None:
    """Whatever has no reading yet; a run that diverges has none, and is said."""
    readings.mkdir(parents=True, exist_ok=True)
    missing = [subject for subject in subjects if not (readings / f"{subject.name}.json").exists()]

    def one(subject: Subject) -> None:
        for command in subject.commands(runs, readings / f"{subject.name}.json"):
            if command[0] == "train" and (runs / subject.run / "status.json").exists():
                continue
            line, one_thread = [sys.executable, "-c", COMMAND, *command], {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(line, env=one_thread, capture_output=True, check=False)
            if done.returncode:
                print(f"{subject.name}: {done.stderr.decode().strip()[-300:]}", file=sys.stderr)
                return
        print(subject.name, flush=True)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(one, missing))


def load(readings: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The readings that there are, by name."""
    paths = {name: readings / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def header(columns: Sequence[str], words: int = 1) -> str:
    """Of a Markdown table whose first columns hold text."""
    return f"{row(columns)}\n{'|:--' * words}{'|--:' * (len(columns) - words)}|"


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def fill(path: Path, name: str, text: str) -> None:
    """Puts text between the page's marks `<!-- name -->` and `<!-- /name -->`, if the page is there."""
    if not path.exists():
        print(text)
        return
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = path.read_text(encoding="utf-8").split(first)
    write_atomic(path, f"{before}{first}\n{text.strip()}\n{last}{rest.split(last)[1]}")
