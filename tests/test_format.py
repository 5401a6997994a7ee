"""Numbers as text."""

from __future__ import annotations

import itertools
import math

import pytest

from gptnorm.format import (
    count_text,
    digits_text,
    duration_text,
    evenly_chosen,
    lr_text,
    names_text,
    settings_text,
    value_text,
)


@pytest.mark.parametrize(
    ("lr", "text"),
    [(1e-3, "1e-3"), (3e-2, "3e-2"), (0.1, "1e-1"), (2.5e-4, "2.5e-4"), (1.0, "1"), (20.0, "2e1"), (0.3 * 0.1, "3e-2")],
)
def test_learning_rates_are_compact(lr: float, text: str) -> None:
    assert lr_text(lr) == text


def test_other_numbers() -> None:
    assert [duration_text(value) for value in (None, 5.04, 75, 3600, 7199.9)] == [
        "–",
        "5.0 s",
        "1 min 15 s",
        "1 h 0 min",
        "2 h 0 min",
    ]
    assert count_text(1234567) == "1,234,567"
    assert [value_text(value) for value in (None, "x", 1e-5, 0.02, True, [1, 2.5])] == [
        "–",
        "x",
        "1e-05",
        "0.02",
        "true",
        "[1, 2.5]",
    ]
    assert [names_text(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_digits() -> None:
    texts = [digits_text(value) for value in (None, math.nan, math.inf, 0.5, 17.84, 3.0, 123.4, -1e-7)]
    assert texts == ["–", "–", "inf", "0.500", "17.8", "3.00", "123", "-1.00e-07"]


def test_settings() -> None:
    assert settings_text([]) == ""
    assert settings_text({"options.gain": True, "init.std": 0.02, "a.b": ("x", 1)}.items()) == (
        'options.gain = true, init.std = 0.02, a.b = ["x", 1]'
    )


@pytest.mark.parametrize("most", [2, 6, 12])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 100])
def test_evenly_chosen_has_both_ends_and_even_steps(count: int, most: int) -> None:
    found = evenly_chosen(count, most)
    assert (found[0], found[-1], len(found)) == (0, count - 1, min(count, most))
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert not steps or max(steps) - min(steps) <= 1
