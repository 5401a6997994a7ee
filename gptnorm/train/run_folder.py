"""The folder of a run: what it was, what it measured, how it ended.

| file | content |
|---|---|
| config.toml | the resolved settings |
| environment.json | versions, device, commit |
| metrics.jsonl | one object a line, each with `step` (updates done), `split` and `loss` |
| watch.jsonl | one object a line, each with `step`; see `gptnorm.train.watch`. Only if something is watched |
| status.json | `status` (running, finished, diverged, interrupted), `step`, `val_loss`, `reason` |
| checkpoints/step-NNNNNN/ | see `gptnorm.train.checkpoint` |
| report.html | the same for people |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from gptnorm.config import Config
from gptnorm.errors import UserError, bad_value
from gptnorm.files import write_atomic
from gptnorm.recipe import dump_toml, read_config

Status = Literal["running", "finished", "diverged", "interrupted"]


class RunFolder:
    """Reads and writes one run folder; see the module's table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"
        self._watch = path / "watch.jsonl"
        self._lines: Any = None

    @classmethod
    def create(cls, path: Path, config: Config, environment: dict[str, Any]) -> RunFolder:
        """A new run's folder.

        Raises:
            UserError: the folder holds a run, or cannot be made.
        """
        try:
            if (path / "config.toml").exists():
                raise bad_value(
                    "run.dir",
                    str(path),
                    f"holds a run already; continue it with 'gptnorm resume {path}', or name another",
                )
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / "environment.json", json.dumps(environment, indent=2) + "\n")
            (path / "metrics.jsonl").touch()
            write_atomic(path / "config.toml", dump_toml(config))
        except OSError as error:
            raise bad_value("run.dir", str(path), f"cannot be written: {error.strerror}") from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A run's folder that exists; UserError if there is none."""
        if not (path / "config.toml").is_file():
            raise UserError(f"{path}: not a run folder (it has no config.toml)")
        return cls(path)

    def config(self) -> Config:
        return read_config(self.path / "config.toml")

    def log(self, **fields: Any) -> None:
        """Appends a line to metrics.jsonl."""
        if self._lines is None:
            self._lines = self._metrics.open("a", encoding="utf-8")
        self._lines.write(json.dumps(fields) + "\n")
        self._lines.flush()

    def log_watch(self, **fields: Any) -> None:
        """Appends a line to watch.jsonl; these are few, so the file is not kept open."""
        with self._watch.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Every complete line of metrics.jsonl; a kill may have left half a line at the end."""
        if not self._metrics.is_file():
            raise UserError(f"{self._metrics}: no such file, so the run cannot be continued")
        return _complete_lines(self._metrics)

    def rewind(self, step: int) -> None:
        """Drops every line after `step`, so that after a resume each step stands once."""
        self.close()
        files = {self._metrics: self.metrics()}
        if self._watch.is_file():
            files[self._watch] = _complete_lines(self._watch)
        for path, lines in files.items():
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))

    def set_status(
        self, status: Status, step: int, *, val_loss: float | None = None, reason: str | None = None
    ) -> None:
        record = {"status": status, "step": step, "val_loss": val_loss, "reason": reason}
        write_atomic(self.path / "status.json", json.dumps(record, indent=2) + "\n")

    def status(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"status": "running", "step": 0, "val_loss": None, "reason": None}

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def free_run_dir(recipe: str, strategy: str) -> Path:
    """runs/<recipe>-<strategy>-<number>, the first number that is free."""
    stem = recipe if recipe.endswith(strategy) else f"{recipe}-{strategy}"
    number = 1
    while (path := Path("runs") / f"{stem}-{number:03d}").exists():
        number += 1
    return path
