"""Nested tables of plain values, as TOML has them, and dotted keys into them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys: `{"optim": {"lr": 1}}` → `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def nest(key: str, value: Any) -> Tree:
    """`("optim.lr", 1)` → `{"optim": {"lr": 1}}`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def toml_value(value: Any) -> str:
    """A scalar, or a list of them, as TOML writes it.

    JSON is TOML but for three things: infinity, NaN, and that TOML takes no surrogate pair and no bare DEL.
    """
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def merge(into: Tree, other: Tree) -> None:
    """Sets every leaf of `other` in `into`."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of those, or in a table that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
