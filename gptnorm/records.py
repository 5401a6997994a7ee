"""Readers of the files in run and study folders.

A run may be killed at any moment, so the last line of a `.jsonl` file may be cut short.
Such a line is left out; what a damaged one before it means is for its reader to say.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
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
        raise UserError(f"{path}: no such file, so {path.parent} holds no results") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def read_object_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one where the file is missing."""
    return read_object(path) if path.exists() else {}


def numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The lines of a `.jsonl` file from 1 on, None for one that is no JSON object; a missing file is empty.

    A last line without its end counts if it is whole: a kill may have left half of one.
    """
    if not path.exists():
        return
    *lines, cut = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate([*lines, cut], 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number > len(lines):
                return
            row = None
        yield number, row if isinstance(row, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a `.jsonl` file; lines that cannot be read are left out."""
    return [row for _, row in numbered_lines(path) if row is not None]


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a `config.toml`, or an empty dict where the file is missing."""
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error})") from None
