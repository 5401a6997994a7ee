"""The table of all settings, read off the fields and docstrings of the dataclasses that hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from rich.table import Table

from gptnorm.config import Config
from gptnorm.errors import bad_value
from gptnorm.study.config import ToleranceConfig
from gptnorm.study.scaling import ScalingConfig


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
            default = "" if field.default in (None, dataclasses.MISSING) else _text(field.default)
            yield Setting(prefix + field.name, default, _meaning(table, field.name))


def list_study_settings() -> Iterator[Setting]:
    """Every key of a recipe's `[study]` table: those of all studies, of tolerance studies and of scaling studies."""
    known = list(list_settings(ToleranceConfig, "study."))
    yield from known
    keys = {setting.key for setting in known}
    yield from (setting for setting in list_settings(ScalingConfig, "study.") if setting.key not in keys)


def settings_of(table: str | None) -> list[Setting]:
    """Every key that the command line may set, or those of one table, such as "optim" or "study.search", or one key.

    Raises:
        UserError: there is no such table or key.
    """
    every = [*list_settings(), *list_study_settings()]
    if table is None:
        return every
    found = [setting for setting in every if f"{setting.key}.".startswith(f"{table.rstrip('.')}.")]
    if not found:
        tables = sorted({setting.key.rpartition(".")[0] or setting.key for setting in every})
        raise bad_value("TABLE", table, f"must be one of {', '.join(tables)}, or a key of one")
    return found


def _meaning(table: Any, name: str) -> str:
    """A field's docstring, from the class that wrote it: pydantic does not hand it down."""
    for cls in table.__mro__:
        field = vars(cls).get("__pydantic_fields__", {}).get(name)
        if field is not None and field.description:
            return " ".join(field.description.split())
    return ""


def settings_table(settings: Iterable[Setting]) -> Table:
    """The settings as a terminal table."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("key", style="bold", no_wrap=True)
    shown.add_column("default")
    shown.add_column("meaning")
    for setting in settings:
        shown.add_row(*setting)
    return shown


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
