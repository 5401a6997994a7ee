"""Amounts of memory, as people write them."""

from __future__ import annotations

import math
import re

from gptnorm.errors import bad_value

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str, key: str) -> int:
    """`"80GiB"` → 85899345920 bytes; UserError without a number above 0 and a unit.

    Args:
        key: what is being set, for the error's text.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if found is None or found[2].lower() not in units or not float(found[1]):
        raise bad_value(key, text, f"must be a number above 0 with a unit ({', '.join(UNITS)}), such as 80GiB")
    size = float(found[1]) * units[found[2].lower()]
    if not math.isfinite(size) or not 1 <= size < 2**60:
        raise bad_value(key, text, "must be at least a byte and below 2^60 bytes")
    return int(size)


def amount(size: float, unit_of: float | None = None) -> str:
    """Bytes as GiB, or as MiB below one, with two digits after the point.

    Args:
        unit_of: take the unit that this amount would have.
    """
    unit = "GiB" if (size if unit_of is None else unit_of) >= 2**30 else "MiB"
    return f"{size / UNITS[unit]:,.2f} {unit}"


def duration(days: float) -> str:
    """`1.39 days`, `14.2 hours`, `35.1 seconds`: in the largest unit of which it is one or more."""
    for unit, size in (("days", 1.0), ("hours", 1 / 24), ("minutes", 1 / 1440)):
        if days >= size:
            return f"{days / size:.3g} {unit}"
    return f"{days * 86_400:.3g} seconds"
