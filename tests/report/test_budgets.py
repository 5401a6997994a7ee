"""Speed-up and the loss after the same time against closed forms, and as tables of a study."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance_folders import line, make_tolerance

from gptnorm.report import load_tolerance, markdown_tolerance
from gptnorm.report.budget_table import budget_grids
from gptnorm.report.budgets import around, at_equal_time, loss_at, needed, speed_up, tried

BUDGETS = (100, 200, 400, 800)


def line_in_log(start: float, slope: float, faster: float = 1.0) -> dict[int, float]:
    """ℓ(T) = start - slope ln(faster T): straight in ln T, so interpolation is exact."""
    return {budget: start - slope * math.log(faster * budget) for budget in BUDGETS}


@settings(deadline=None)  # what it computes is quick, the machine may be busy
@given(st.floats(1.01, 1.99), st.floats(0.01, 1.0), st.floats(1, 9))
def test_who_is_faster_by_a_factor_needs_so_many_times_fewer(faster: float, slope: float, start: float) -> None:
    theirs, ours = line_in_log(start, slope), line_in_log(start, slope, faster)
    for budget in BUDGETS[1:]:
        found = speed_up({1: ours}, {1: theirs}, budget)
        assert found is not None
        assert found.value == pytest.approx(faster)
        back = speed_up({1: theirs}, {1: ours}, budget // 2)
        assert back is not None
        assert back.value == pytest.approx(1 / faster)


def test_over_seeds() -> None:
    """Speed-ups that differ by seed: geometric mean and t-interval by hand; 2.776 is a table's."""
    factors = {1: 1.2, 2: 1.5, 3: 1.4, 4: 1.7, 5: 1.3}
    theirs = {seed: line_in_log(3.0 + 0.01 * seed, 0.2) for seed in factors}
    ours = {seed: line_in_log(3.0 + 0.01 * seed, 0.2, factor) for seed, factor in factors.items()}
    found = speed_up(ours, theirs, 400)
    logs = [math.log(factor) for factor in factors.values()]
    half = 2.776 * statistics.stdev(logs) / math.sqrt(5)
    ends = [math.exp(statistics.fmean(logs) + side * half) for side in (0, -1, 1)]
    assert found is not None
    assert [found.value, found.low, found.high] == pytest.approx(ends, rel=1e-3)
    assert found.seeds == 5


def test_bounds_at_the_ends() -> None:
    slow, fast = line_in_log(3.0, 0.2), line_in_log(3.0, 0.2, 3.0)
    five = range(1, 6)
    at_least = speed_up(dict.fromkeys(five, fast), dict.fromkeys(five, slow), 200)
    assert at_least is not None
    assert (at_least.low, at_least.high) == (pytest.approx(2.0), None)  # 200 over the smallest budget, 100
    assert speed_up(dict.fromkeys(range(4), fast), dict.fromkeys(range(4), slow), 200) is None, "four are too few"
    at_most = speed_up(dict.fromkeys(five, slow), dict.fromkeys(five, fast), 400)
    assert at_most is not None
    assert (at_most.low, at_most.high) == (None, pytest.approx(0.5))  # 400 over the largest, 800
    # To the loss at 200 the slow one takes 600 steps, the fast one at most 100.
    mixed = speed_up(dict.fromkeys(five, fast) | {1: slow}, dict.fromkeys(five, slow) | {1: fast}, 200)
    assert mixed is not None
    assert (mixed.low is None, mixed.high) == (False, None)
    low, high = {100: 2.0, 200: 1.9}, {100: 1.0, 200: 0.9}
    assert speed_up({1: low, 2: high}, {1: high, 2: low}, 100) is None, "a bound on either side tells nothing"
    assert speed_up({1: slow}, {2: slow}, 100) is None
    assert speed_up({1: {}}, {1: slow}, 100) is None


def test_needed_is_the_first_budget_that_gets_there() -> None:
    bumpy = {100: 3.0, 200: 2.0, 400: 2.5, 800: 1.5}
    found = needed(bumpy, 2.2)
    assert found is not None
    assert (found.budget, found.bound) == (pytest.approx(100 * 2**0.8), None)
    assert needed(bumpy, 3.0) == (100, None)
    assert needed(bumpy, 3.1) == (100, "at most")
    assert needed(bumpy, 1.0) == (800, "more than")
    assert [tried(bumpy, level) for level in (3.0, 2.2, 1.6, 1.0)] == [[100], [100, 200], [*BUDGETS], [*BUDGETS]]


def test_loss_after_the_same_time() -> None:
    curve = line_in_log(3.0, 0.2)
    assert loss_at(curve, 300) == pytest.approx(3.0 - 0.2 * math.log(300))
    assert loss_at(curve, 100) == curve[100]
    assert loss_at(curve, 99) is None
    assert loss_at(curve, 801) is None
    assert [around(curve, at) for at in (99, 100, 300, 801)] == [[], [100], [200, 400], []]
    # A quarter slower: 400 of their steps take as long as 320 of ours.
    found = at_equal_time({1: line_in_log(2.9, 0.2)}, {1: curve}, 400, {1: 1.25})
    assert found is not None
    assert found.value == pytest.approx(-0.1 + 0.2 * math.log(1.25))
    two = at_equal_time(dict.fromkeys((1, 2), line_in_log(2.9, 0.2)), {1: curve, 2: curve}, 400, {1: 1.25, 2: 1.6})
    assert two is not None
    assert two.value == pytest.approx(-0.1 + 0.2 * math.log(1.25 * 1.6) / 2)
    assert at_equal_time({1: curve}, {1: curve}, 100, {1: 1.25}) is None
    assert at_equal_time({1: curve}, {1: curve}, 800, {1: 0.8}) is None


def test_a_seed_whose_time_is_outside_leaves_no_number() -> None:
    """The others would be a selection: at the ends it is chance whose run was timed a little faster."""
    curve = line_in_log(3.0, 0.2)
    ours, theirs = ({seed: curve for seed in range(1, 6)} for _ in range(2))
    slowdown = {1: 0.98, 2: 1.01, 3: 0.97, 4: 1.02, 5: 0.99}
    assert at_equal_time(ours, theirs, 800, slowdown) is None
    assert at_equal_time(ours, theirs, 100, slowdown) is None
    found = at_equal_time(ours, theirs, 400, slowdown)
    assert found is not None
    assert found.seeds == 5
    # Of a seed that has trained at one budget alone nothing is known yet, wherever its time is.
    begun = at_equal_time(ours | {6: {100: 2.0}}, theirs | {6: curve}, 400, slowdown | {6: 1.0})
    assert begun == found


def test_tables(tmp_path: Path) -> None:
    """Twice as fast in steps, a quarter slower in time; three rates, of which the middle one is best."""
    rates, lines = (1e-3, 2e-3, 4e-3), []
    for strategy, faster, seconds in (("base", 1.0, 1.0), ("ours", 2.0, 1.25)):
        for budget, loss in line_in_log(2.9, 0.1, faster).items():
            for lr in rates:
                for seed in range(6):
                    off = 0.0 if lr == 2e-3 else 0.1
                    entry = line(strategy, lr, seed, loss + off, place={"train.steps": budget})
                    lines.append({**entry, "seconds": seconds * budget})
    folder = make_tolerance(tmp_path, lines, lrs=rates, asked={"places": [{"train.steps": n} for n in BUDGETS]})
    text = markdown_tolerance(load_tolerance(folder))
    rows = [entry for entry in text.splitlines() if entry.startswith("| ours |")]
    speed = next(i for i, entry in enumerate(text.splitlines()) if entry.startswith("**Speed-up over base"))
    assert text.splitlines()[speed + 4] == (
        r"| ours | ≥ 1.00 | 2.00 \[2.00, 2.00] | 2.00 \[2.00, 2.00] | 2.00 \[2.00, 2.00] |"
    )
    lead = -0.1 * math.log(2) + 0.1 * math.log(1.25)
    expected = rf"{lead:+.4f} \[{lead:+.4f}, {lead:+.4f}]"
    assert f"| ours | – | {expected} | {expected} | {expected} |" in rows
    assert "Speed-up at T steps" in text
    assert "After the same time" in text


@pytest.mark.parametrize(
    ("base", "ours", "told"),
    [((0, 1, 1), (0, 0, 1), True), ((0, 0, 0), (1, 1, 1), False), ((0, 1, 1), (0, 0, 0), True)],
)
def test_times_are_compared_within_an_environment(
    tmp_path: Path, base: tuple[int, ...], ours: tuple[int, ...], told: bool
) -> None:
    """Where a run at each of three rates was made; the second environment is three times as slow."""
    rates, lines = (1e-3, 2e-3, 4e-3), []
    for strategy, faster, seconds, where in (("base", 1.0, 1.0, base), ("ours", 2.0, 1.25, ours)):
        for budget, loss in line_in_log(2.9, 0.1, faster).items():
            for lr, environment in zip(rates, where, strict=True):
                took = {"seconds": seconds * budget * 3**environment, "environment": environment}
                for seed in range(6):
                    off = 0.0 if lr == 2e-3 else 0.1
                    lines.append({**line(strategy, lr, seed, loss + off, place={"train.steps": budget}), **took})
    folder = make_tolerance(tmp_path, lines, lrs=rates, asked={"places": [{"train.steps": n} for n in BUDGETS]})
    text = markdown_tolerance(load_tolerance(folder))
    lead = -0.1 * math.log(2) + 0.1 * math.log(1.25)
    assert (rf"| {lead:+.4f} \[{lead:+.4f}, {lead:+.4f}]" in text) is told
    assert ("**Loss minus base's after the same time" in text) is told


def test_a_seed_whose_times_cannot_be_compared_is_not_left_out() -> None:
    """The others alone would be fewer than the table says."""
    curves = {seed: line_in_log(3.0, 0.2) for seed in range(1, 6)}
    assert at_equal_time(curves, curves, 400, dict.fromkeys(range(1, 6), 1.1)) is not None
    assert at_equal_time(curves, curves, 400, dict.fromkeys(range(1, 5), 1.1)) is None


@pytest.mark.parametrize(
    ("who", "budget", "speed", "time"),
    [
        # Ours reaches their loss at T with T / 2, and has T / 1.25 in the same time, between T / 2 and T.
        ("base", 400, "400", "400"),
        ("ours", 100, "100 200 400 800", "200"),
        ("ours", 400, "800", "400 800"),
        ("ours", 800, "", "800"),
    ],
)
def test_a_best_rate_at_an_end_is_marked(tmp_path: Path, who: str, budget: int, speed: str, time: str) -> None:
    """In what rests on it: at that budget the lowest of three rates is the best of one strategy."""
    rates, lines = (1e-3, 2e-3, 4e-3), []
    for strategy, faster, seconds in (("base", 1.0, 1.0), ("ours", 2.0, 1.25)):
        for steps, loss in line_in_log(2.9, 0.1, faster).items():
            best = 1e-3 if (strategy, steps) == (who, budget) else 2e-3
            for lr in rates:
                for seed in range(6):
                    entry = line(strategy, lr, seed, loss + 0.1 * (lr != best), place={"train.steps": steps})
                    lines.append({**entry, "seconds": seconds * steps})
    asked = {"places": [{"train.steps": n} for n in BUDGETS]}
    study = load_tolerance(make_tolerance(tmp_path, lines, lrs=rates, asked=asked))
    for grid, expected in zip(budget_grids(study), (speed, time), strict=True):
        (row,) = grid.rows
        marks = [str(steps) for steps, entry in zip(BUDGETS, row[1:], strict=True) if " edge" in str(entry)]
        assert marks == expected.split(), grid.title
    assert "edge: lowest or highest rate (or batch, or value of what is tuned) tried" in markdown_tolerance(study)
