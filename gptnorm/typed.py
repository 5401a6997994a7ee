"""From plain tables (TOML, command line) to typed, frozen settings; every mismatch is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from gptnorm.errors import UserError, bad_value

T = TypeVar("T")


def read_table(cls: type[T], table: dict[str, Any], *, key: str = "") -> T:
    """An instance of the dataclass `cls` from a table of plain values.

    Args:
        key: the dotted name of the table, for the error's text; "" for the whole file.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range.
    """
    # JSON is the strict mode in which a list may stand for a tuple, as in TOML.
    try:
        return TypeAdapter(cls).validate_json(json.dumps(table, ensure_ascii=False).encode(), strict=True)
    except ValidationError as error:
        raise _one_line(error.errors(), cls, table, key) from None
    except (TypeError, ValueError):
        raise _not_plain(table, key) from None


def field_names(cls: Any) -> list[str]:
    """The keys of a settings table."""
    return [field.name for field in dataclasses.fields(cls)]


def unknown_key(key: str, known: list[str]) -> UserError:
    """The error for a key that does not exist."""
    table, _, leaf = key.rpartition(".")
    close = difflib.get_close_matches(leaf, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    there = f"{table or 'the top level'} has {', '.join(known)}" if known else f"{table} has no keys"
    return UserError(f"{key}: unknown key; {there}{hint}")


def _one_line(errors: list[ErrorDetails], cls: Any, table: dict[str, Any], key: str) -> UserError:
    """The first wrong key; where a union was tried, all that it would have taken."""
    path, value, owner = _locate(errors[0]["loc"], table, cls)
    name = ".".join(filter(None, [key, *path]))
    here = [e for e in errors if _locate(e["loc"], table, cls)[0] == path]
    missing = errors[0]["loc"][-1:] if errors[0]["type"] == "missing" else ()
    if missing and isinstance(missing[0], str):
        return UserError(f"{'.'.join(filter(None, [name, missing[0]]))}: is missing")
    # A wrong entry also makes its list too short; the entry is what the person got wrong.
    here = [e for e in here if e["type"] != "too_short"] or here
    if any(e["type"] in ("unexpected_keyword_argument", "extra_forbidden") for e in here):
        return unknown_key(name, field_names(owner))
    wants = dict.fromkeys(_want(e) for e in here)
    if any(e["type"] == "dataclass_type" for e in here):
        wants = {"must be a table": None}
    if "must be a table" in wants and any(isinstance(part, int) for part in errors[0]["loc"]):
        return bad_value(name, value, "must be a list of tables, such as [{KEY = 1}, {KEY = 2}]")
    if "must be a table" in wants:
        return bad_value(name, value, f"must be a table; write its keys as {name}.KEY")
    first, *others = wants
    return bad_value(name, value, " or ".join([first, *(want.removeprefix("must be ") for want in others)]))


def _not_plain(table: dict[str, Any], key: str) -> UserError:
    """Names the first value that JSON cannot hold: a date, or text that is not Unicode."""
    for name, value in table.items():
        path = ".".join(filter(None, [key, name]))
        if isinstance(value, dict):
            with contextlib.suppress(LookupError):
                return _not_plain(value, path)
        elif not _is_plain(value):
            return bad_value(path, value, "must be a number, text, true or false, or a list of them")
    raise LookupError(key)


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        return False
    return True


def _locate(loc: tuple[int | str, ...], table: dict[str, Any], cls: Any) -> tuple[list[str], Any, Any]:
    """The part of an error's location that names keys (the rest names branches of a union)."""
    path: list[str] = []
    value: Any = table
    owner = cls
    for part in loc:
        if isinstance(value, dict) and part in value:
            path.append(str(part))
            value = value[part]
            if isinstance(value, dict) and len(path) < len(loc):
                owner = _table_type(owner, str(part)) or owner
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
    return path, value, owner


def _table_type(owner: Any, name: str) -> Any:
    """The dataclass of a nested table."""
    hint = get_type_hints(owner).get(name)
    return next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)


def _want(error: ErrorDetails) -> str:
    """What would have been accepted, in a user's words."""
    simple = {
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "dict_type": "must be a table",
        "tuple_type": 'must be a list, such as [1, 2] or ["a", "b"]',
        "string_too_short": "must not be empty",
        "too_long": "has an entry too many",
        "missing": "needs an entry more",
    }
    if error["type"] == "too_short":
        least = error.get("ctx", {}).get("min_length", 1)
        return "must not be empty" if least == 1 else f"needs {least} or more"
    if error["type"] in simple:
        return simple[error["type"]]
    for key, words in (("ge", "at least"), ("gt", "greater than"), ("le", "at most"), ("lt", "less than")):
        bound = error.get("ctx", {}).get(key)
        if bound in (math.inf, -math.inf):  # whatever is no number
            return "must be a number"
        if bound is not None:
            return f"must be {words} {bound:g}" if isinstance(bound, float) else f"must be {words} {bound}"
    return error["msg"].replace("Input should be", "must be")
