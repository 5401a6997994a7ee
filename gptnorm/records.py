"""Readers of the files in run and study folders.

A run may be killed at any moment, so the last line of a `.jsonl` file may be cut short.
Such a line is skipped; everything before it counts.
"""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

from gptnorm.errors import UserError


def finite(value: object) -> float | None:
    """The number `value`, or None where it is missing, not a number, infinite or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, which must exist.

    Raises UserError where it is missing or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file, so {path.parent} holds no results to report") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def read_object_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one where the file is missing."""
    return read_object(path) if path.exists() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a `.jsonl` file; cut lines are skipped, a missing file is empty."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a `config.toml`, or an empty dict where the file is missing."""
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error})") from None
