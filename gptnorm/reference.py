"""The table of all settings, read off the config's own fields and docstrings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.table import Table

from gptnorm.config import Config


class Setting(NamedTuple):
    """One key that a recipe or the command line may set."""

    key: str
    default: str
    meaning: str


def list_settings(table: Any = Config, prefix: str = "") -> Iterator[Setting]:
    """Every key of `table`, a settings dataclass, the nested ones with dotted names."""
    for field in dataclasses.fields(table):
        if dataclasses.is_dataclass(field.default):
            yield from list_settings(type(field.default), f"{prefix}{field.name}.")
        elif field.name == "strategy" and not prefix:
            yield Setting("strategy.OPTION", "", _meaning(table, "strategy"))
        else:
            default = "" if field.default is None else _text(field.default)
            yield Setting(prefix + field.name, default, _meaning(table, field.name))


def _meaning(table: Any, name: str) -> str:
    """A field's docstring, from the class that wrote it: pydantic does not hand it down."""
    for cls in table.__mro__:
        field = vars(cls).get("__pydantic_fields__", {}).get(name)
        if field is not None and field.description:
            return " ".join(field.description.split())
    return ""


def settings_table(table: Any = Config, prefix: str = "") -> Table:
    """The settings as a terminal table."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("key", style="bold", no_wrap=True)
    shown.add_column("default")
    shown.add_column("meaning")
    for setting in list_settings(table, prefix):
        shown.add_row(*setting)
    return shown


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
