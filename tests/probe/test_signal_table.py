"""The page of the signal-propagation table is that of its numbers, and its script still measures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("signal_propagation", ROOT / "benchmarks" / "signal_propagation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while the class is made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_page_is_made_of_the_numbers(script: ModuleType) -> None:
    """No number of the two tables was typed by hand."""
    record = json.loads((script.FOLDER / "results.json").read_text(encoding="utf-8"))
    assert script.PAGE.read_text(encoding="utf-8") == script.page(record)
    for positions in script.POSITIONS:
        assert script.table(record, positions).count("\n") == 2 + len(script.ROWS)


def test_recorded_rows_are_those_of_the_script(script: ModuleType) -> None:
    """What a row's strategy and options were when it was measured, and what the check found."""
    record = json.loads((script.FOLDER / "results.json").read_text(encoding="utf-8"))
    rows = {(row.scheme, row.init): row for row in script.ROWS}
    for entry in record["rows"]:
        assert {"commit", "torch", "device"} <= entry["environment"].keys()
        row = rows[entry["scheme"], entry["init"]]
        assert (entry["strategy"], entry["own"], entry["options"]) == (row.strategy, row.own, row.options)
        if entry["layers"] == script.SHOWN_LAYERS:
            assert tuple(entry["theirs"]) == row.theirs
            assert tuple(entry["seeds"]) == script.SEEDS


def test_rows_can_be_measured(script: ModuleType) -> None:
    """At four blocks: a PreNorm stream of unit branches grows by about 1.4 a block (spannorm notes, 7)."""
    rows = {row.name: script.measure(row, 4, 0, 352, "none") for row in script.ROWS}
    assert rows["PreNorm unit"]["variance"] == pytest.approx(1 + 4 * 1.3, rel=0.15)
    assert rows["PreNorm s2L"]["variance"] < 2
    # Variance of a PostNorm sum whose branch has unit variance: 2 and a little.
    assert rows["PostNorm unit"]["variance"] == pytest.approx(2.1, abs=0.4)
    # Both readings of the norm of the whole block keep cos(x_l, x_{l+1}) = 1/sqrt(1 + s^2), s^2 = 1/4 and 1.
    assert rows["SpanNorm A ffnL"]["cosine"] == pytest.approx(0.8**0.5, abs=0.03)
    assert rows["SpanNorm A unit"]["cosine"] == pytest.approx(0.5**0.5, abs=0.06)


def test_agreement_is_judged_against_the_range_over_seeds(script: ModuleType) -> None:
    ours = {"median": 2.0, "low": 1.5, "high": 3.0}
    assert script.agrees("ratio", 3.25, ours)
    assert not script.agrees("ratio", 3.4, ours)
    assert not script.agrees("ratio", 1.3, ours)
    assert not script.agrees("ratio", 1.0, {"median": None, "low": None, "high": None})


def test_cosines_are_judged_next_to_0_and_to_1(script: ModuleType) -> None:
    def around(value: float) -> dict[str, float]:
        return {"median": value, "low": value - 0.0005, "high": value + 0.0005}

    assert script.agrees("token_cosine", 0.02, around(0.018))
    assert not script.agrees("token_cosine", 0.03, around(0.003)), "ten times as large"
    assert script.agrees("cosine", 0.998, around(0.998))
    assert not script.agrees("cosine", 0.998, around(0.995)), "1 - c is 2.5 times as large"
    assert script.agrees("cosine", 0.7, around(0.71))
    assert not script.agrees("cosine", 0.64, around(0.73))
    assert script.agrees("token_cosine", 0.0, {"median": 0.001, "low": -0.001, "high": 0.004})
    assert script.agrees("token_cosine", 1.0, {"median": 1.0, "low": 1.0, "high": 1.0})
    assert not script.agrees("token_cosine", 0.9, {"median": 1.0, "low": 1.0, "high": 1.0})
