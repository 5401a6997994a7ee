"""What study and run reports both show: settings and the environment."""

from __future__ import annotations

from typing import Any

from gptnorm.report import page
from gptnorm.report.format import value_text
from gptnorm.report.page import Markup


def setting_table(settings: dict[str, Any]) -> Markup:
    """Dotted keys and their values."""
    rows = [[page.head_cell(key), page.data_cell(value_text(value))] for key, value in settings.items()]
    return page.table("Settings", ["setting", "value"], rows)


def environment_pairs(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Versions, device and the like, under names a person reads."""
    names = {
        "gptnorm": "gptnorm",
        "commit": "Commit",
        "python": "Python",
        "torch": "PyTorch",
        "device": "Device",
        "threads": "Threads",
        "platform": "Platform",
        "started": "Started",
    }
    known = [(name, value_text(environment[key])) for key, name in names.items() if key in environment]
    more = [(key, value_text(value)) for key, value in environment.items() if key not in (*names, "resumed")]
    return known + more + _resumed_pairs(environment, names)


def _resumed_pairs(environment: dict[str, Any], names: dict[str, str]) -> list[tuple[str, str]]:
    """Where a run went on, each with what was other than before."""
    pairs, before = [], environment
    parts = environment.get("resumed")
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict):
            other = {key: value for key, value in part.items() if key != "step" and before.get(key) != value}
            if isinstance(other.get("settings"), list):
                other["settings"] = " ".join(map(str, other["settings"]))
            words = "; ".join(f"{names.get(key, key)}: {value_text(value)}" for key, value in other.items())
            pairs.append((f"Resumed at step {value_text(part.get('step'))}", words))
            before = {**before, **part}
    return pairs
