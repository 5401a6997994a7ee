"""Plain tables, and how their values are written."""

from __future__ import annotations

import math
import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gptnorm.tables import toml_value

SCALARS = st.text(st.characters(exclude_categories=["Cs"])) | st.booleans() | st.floats() | st.integers(-(2**63), 2**63)


@given(st.recursive(SCALARS, lambda values: st.lists(values, max_size=4)))
def test_values_are_read_back_as_they_were(value: Any) -> None:
    """By the standard library's reader of TOML."""
    found = tomllib.loads(f"key = {toml_value(value)}")["key"]
    assert repr(found) == repr(value)


def test_numbers_that_json_lacks() -> None:
    found = tomllib.loads(f"key = {toml_value((math.inf, -math.inf, math.nan))}")["key"]
    assert list(map(repr, found)) == ["inf", "-inf", "nan"]
