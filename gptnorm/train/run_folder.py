"""The folder of a run: what it was, what it measured, how it ended.

| file | content |
|---|---|
| config.toml | the resolved settings |
| environment.json | versions, device, commit; `resumed`: those of later parts and their settings, where they differ |
| metrics.jsonl | one object a line, each with `step` (updates done), `split` and `loss`; a gauge adds its own keys |
| watch.jsonl | one object a line, each with `step`; see `gptnorm.train.watch`. Only if something is watched |
| status.json | `status` (running, finished, diverged, interrupted), `step`, `val_loss`, `reason`, `skipped` |
| checkpoints/step-NNNNNN/ | see `gptnorm.train.checkpoint` |
| report.html | the same for people |
| lock | held by the process that is at work here |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from gptnorm.config import Config
from gptnorm.errors import UserError, bad_value
from gptnorm.files import write_atomic
from gptnorm.recipe import dump_toml, read_config
from gptnorm.records import numbered_lines
from gptnorm.train.checkpoint import set_aside_beyond
from gptnorm.train.lock import FolderLock

Status = Literal["running", "finished", "diverged", "interrupted"]


_OWN = (
    "config.toml",
    "environment.json",
    "metrics.jsonl",
    "watch.jsonl",
    "status.json",
    "checkpoints",
    "lock",
    "tensorboard",
)
"""What is written here; none of it may be a link to somewhere else."""


class RunFolder:
    """Reads and writes one run folder; see the module's table.

    With several processes all have one, and only the first one's `writes`.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.writes = writes
        self._lock = FolderLock(path)
        self._metrics = path / "metrics.jsonl"
        self._watch = path / "watch.jsonl"
        self._lines: Any = None
        self._unsynced_watch = False

    def begin(self, config: Config, environment: dict[str, Any]) -> None:
        """Makes the folder of a new run and takes its lock.

        Raises:
            UserError: the folder holds a run or something else, or cannot be made.
        """
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(map(_is_foreign, path.iterdir())) and not (path / "config.toml").exists():
                raise bad_value("run.dir", str(path), "holds something else than a run; name another folder")
            self._lock.acquire()
            if (path / "config.toml").exists():
                self._lock.release()
                raise bad_value(
                    "run.dir",
                    str(path),
                    f"holds a run already; continue it with 'gptnorm resume {path}', or name another",
                )
            write_atomic(path / "environment.json", json.dumps(environment, indent=2) + "\n")
            (path / "metrics.jsonl").touch()
            write_atomic(path / "config.toml", dump_toml(config))
        except OSError as error:
            self._lock.release()
            raise bad_value("run.dir", str(path), f"cannot be written: {error.strerror}") from None

    @classmethod
    def open(cls, path: Path, *, writes: bool = True) -> RunFolder:
        """A run's folder that exists, without its lock.

        Raises:
            UserError: there is none, or a file of it is a symbolic link (a stranger's folder could have us write
                through it).
        """
        try:
            is_run = (path / "config.toml").is_file()
        except OSError as error:
            # A name that is too long for a file, or a folder that may not be entered.
            raise UserError(f"{path}: not a run folder ({error.strerror})") from None
        if not is_run:
            raise UserError(f"{path}: not a run folder (it has no config.toml)")
        checkpoints = path / "checkpoints"
        inside = checkpoints.iterdir() if checkpoints.is_dir() and not checkpoints.is_symlink() else ()
        for own in (*(path / name for name in _OWN), *inside):
            if own.is_symlink():
                raise UserError(f"{own}: a symbolic link, which is not followed; move the whole run folder")
        return cls(path, writes=writes)

    def lock(self) -> None:
        """Takes the lock; UserError if another process is at work here."""
        self._lock.acquire()

    def config(self) -> Config:
        """The resolved settings; UserError where they are not what a run writes."""
        path = self.path / "config.toml"
        try:
            config = read_config(path)
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        if not config.model.strategy:
            raise UserError(f"{path}: names no model.strategy, so it is not what a run writes")
        return config

    def log(self, **fields: Any) -> None:
        """Appends a line to metrics.jsonl."""
        if not self.writes:
            return
        if self._lines is None:
            self._lines = self._metrics.open("a", encoding="utf-8")
        self._lines.write(json.dumps(fields) + "\n")
        self._lines.flush()

    def log_watch(self, **fields: Any) -> None:
        """Appends a line to watch.jsonl; these are few, so the file is not kept open."""
        if not self.writes:
            return
        with self._watch.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, allow_nan=False) + "\n")
        self._unsynced_watch = True

    def metrics(self) -> list[dict[str, Any]]:
        """Every complete line of metrics.jsonl; UserError if one is damaged."""
        if not self._metrics.is_file():
            raise UserError(f"{self._metrics}: no such file, so the run cannot be continued")
        return _complete_lines(self._metrics)

    def rewind(self, step: int, environment: dict[str, Any], settings: Iterable[str] = ()) -> None:
        """Makes the folder that of a run at `step`, so that after a resume each step stands once.

        Lines after `step` are dropped, checkpoints after it set aside; environment and settings are recorded if they
        are others.
        """
        self._close_lines()
        # Before the lines are cut: a kill in between must not leave a checkpoint whose lines are gone.
        set_aside_beyond(self.checkpoints, step)
        files = {self._metrics: self.metrics()}
        if self._watch.is_file():
            files[self._watch] = _complete_lines(self._watch)
        for path, lines in files.items():
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
        self._note_environment(step, environment, list(settings))

    def _note_environment(self, step: int, environment: dict[str, Any], settings: list[str]) -> None:
        """Records where and how the run goes on, if that is not as it was before."""
        path = self.path / "environment.json"
        known = _read_object(path)
        parts = [{key: value for key, value in known.items() if key != "resumed"}, *known.get("resumed", [])]
        here = {"step": step, **environment, **({"settings": settings} if settings else {})}
        moved = any(parts[-1].get(key) != value for key, value in environment.items() if key != "started")
        if moved or parts[-1].get("settings", []) != settings:
            known["resumed"] = [*known.get("resumed", []), here]
            write_atomic(path, json.dumps(known, indent=2) + "\n")

    def set_status(
        self, status: Status, step: int, *, val_loss: float | None = None, reason: str | None = None, skipped: int = 0
    ) -> None:
        if not self.writes:
            return
        record = {"status": status, "step": step, "val_loss": val_loss, "reason": reason, "skipped": skipped}
        write_atomic(self.path / "status.json", json.dumps(record, indent=2) + "\n")

    def unwritable(self, error: OSError) -> UserError:
        """What a user is told of it: a full disk, for one."""
        return UserError(f"{self.path}: cannot be written ({error.strerror or error})")

    def close(self) -> None:
        """Closes the files and lets go of the lock."""
        try:
            self._close_lines()
        finally:
            self._lock.release()

    def sync(self) -> None:
        """Makes the lines written so far durable, as the checkpoint that stands for them will be."""
        if self._lines is not None:
            os.fsync(self._lines.fileno())
        if self._unsynced_watch:
            with self._watch.open("ab") as file:
                os.fsync(file.fileno())
            self._unsynced_watch = False

    def _close_lines(self) -> None:
        lines, self._lines = self._lines, None
        if lines is not None:
            lines.close()


def _is_foreign(path: Path) -> bool:
    """Whether a run would write over it, or into the midst of it.

    Not what is left of a run that was killed while it made its folder, nor what a run has no use for (a job's log).
    """
    if path.name == "metrics.jsonl":
        return path.stat().st_size > 0
    theirs = ("watch.jsonl", "status.json", "checkpoints", "tensorboard", "report.html")
    return path.name in theirs or path.name in ("study.json", "cells.jsonl", "cells")


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines; a kill may have left half of one at the end, which is left out."""
    found = []
    for number, line in numbered_lines(path):
        if line is None or not isinstance(line.get("step"), int):
            raise UserError(f"{path}: line {number} is none that a run writes; without it the run can go on")
        found.append(line)
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    resumed = found.get("resumed", []) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(resumed, list) or not all(isinstance(x, dict) for x in resumed):
        raise UserError(f"{path}: not what a run writes")
    return found


def free_run_dir(recipe: str, strategy: str) -> Path:
    """runs/<recipe>-<strategy>-<number>, the first number that is free."""
    stem = recipe if recipe.endswith(strategy) else f"{recipe}-{strategy}"
    number = 1
    while (path := Path("runs") / f"{stem}-{number:03d}").exists():
        number += 1
    return path
