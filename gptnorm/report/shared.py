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
    return known + [(key, value_text(value)) for key, value in environment.items() if key not in names]
