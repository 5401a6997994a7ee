"""What study and run reports both show: settings and the environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptnorm.report import page
from gptnorm.report.format import value_text
from gptnorm.report.page import Markup


def setting_table(settings: dict[str, Any]) -> Markup:
    """Dotted keys and their values."""
    rows = [[page.head_cell(key), page.data_cell(value_text(value))] for key, value in settings.items()]
    return page.table("Settings", ["setting", "value"], rows)


_NAMES = {
    "gptnorm": "gptnorm",
    "commit": "Commit",
    "python": "Python",
    "torch": "PyTorch",
    "device": "Device",
    "threads": "Threads",
    "platform": "Platform",
    "started": "Started",
}
"""Names of an environment's keys that a person reads."""


def environment_pairs(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Versions, device and the like."""
    known = [(name, value_text(environment[key])) for key, name in _NAMES.items() if key in environment]
    more = [(key, value_text(value)) for key, value in environment.items() if key not in (*_NAMES, "resumed")]
    return known + more + _resumed_pairs(environment)


def environments_pairs(environments: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The first in full, of every other what differs from it; a key that it lacks is "–"."""
    if not environments:
        return []
    first, *others = environments
    pairs = environment_pairs(first)
    for other in others:
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        words = "; ".join(f"{_NAMES.get(key, key)}: {value_text(other.get(key))}" for key in keys)
        pairs.append(("Also made with", words))
    return pairs


def _resumed_pairs(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a run went on, each with what was other than before."""
    pairs, before = [], environment
    parts = environment.get("resumed")
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict):
            other = {key: value for key, value in part.items() if key != "step" and before.get(key) != value}
            if isinstance(other.get("settings"), list):
                other["settings"] = " ".join(map(str, other["settings"]))
            words = "; ".join(f"{_NAMES.get(key, key)}: {value_text(value)}" for key, value in other.items())
            pairs.append((f"Resumed at step {value_text(part.get('step'))}", words))
            before = {**before, **part}
    return pairs
