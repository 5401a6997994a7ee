"""Measures on curves with known answers, with and without noise, and whether intervals cover."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptnorm.study.measures import (
    Bracket,
    Edge,
    Point,
    Reach,
    best_point,
    edge_of,
    geometric_mean,
    judged,
    kept,
    mean_rate,
    rate_ratio,
    reach_of,
    sensitivity,
)

RATES = tuple(10 ** (-4 + k / 4) for k in range(13))


def curve_of(loss, edge=math.inf, rates=RATES):
    return [Point(lr, loss(lr) if lr < edge else None, lr < edge) for lr in rates]


def parabola(optimum, curvature=0.1):
    return lambda lr: 2 + curvature * math.log(lr / optimum) ** 2


def test_best_and_edge():
    curve = curve_of(parabola(1e-3), edge=2e-2)
    assert best_point(curve).lr == pytest.approx(1e-3)
    edge = edge_of(curve)
    assert edge.stable == pytest.approx(10**-1.75)
    assert edge.unstable == pytest.approx(10**-1.5)
    assert edge.bracket == (edge.stable, edge.unstable)
    assert edge_of(curve_of(parabola(1e-3))) == Edge(stable=RATES[-1], unstable=None)
    assert edge_of([Point(lr, None, False) for lr in RATES]) is None


def test_slow_runs_and_islands_are_no_edge():
    """Too slow to learn at the lowest rates, and one lucky run above the edge."""
    stable = [False, False, True, True, True, False, True, False]
    losses = [3.0, 3.0, 2.5, 2.0, 2.2, None, 2.1, None]
    curve = [Point(0.001 * 2**k, *pair) for k, pair in enumerate(zip(losses, stable, strict=True))]
    assert edge_of(curve) == Edge(stable=0.016, unstable=0.032)


def test_reach_where_the_crossing_is_known():
    """ℓ = 2 + |ln(η/η*)| is a straight line in ln η: the level 2.5 is crossed at η* e^0.5."""
    curve = curve_of(lambda lr: 2 + abs(math.log(lr / 1e-3)))
    found = reach_of(curve, 2.5)
    assert found.low == found.high == pytest.approx(1e-3 * math.exp(0.5))
    assert reach_of(curve, 1.9) is None
    assert reach_of(curve, 99) == Reach(low=RATES[-1], high=None)
    cut = reach_of(curve_of(lambda lr: 2 + abs(math.log(lr / 1e-3)), edge=2e-3), 99)
    assert cut == Reach(low=pytest.approx(10**-2.75), high=pytest.approx(10**-2.5)), "somewhere between the two"


OFF = (-0.03, 0.01, 0.02, 0.05, -0.05)
"""Of five seeds, with the mean 0."""
HALF = 2.7764 * np.std(OFF, ddof=1) / math.sqrt(5)
"""Half of the 95 % t-interval of their mean."""
LEVELS = dict.fromkeys(range(5), 2.0)


def lines_above(lead, slope=0.1, edges=(math.inf,) * 5):
    """d_s = off_s - lead + slope ln(η/1e-3): straight in ln η, so what is interpolated is exact."""
    return {
        seed: curve_of(lambda lr, off=off: 2.0 + off - lead + slope * math.log(lr / 1e-3), edge=edges[seed])
        for seed, off in enumerate(OFF)
    }


def test_kept_where_the_crossings_are_known():
    """The mean crosses 0 at 1e-3 e^(lead / slope), its limits a half-interval before and after."""
    found = kept(lines_above(0.2), LEVELS, RATES[4])
    crossings = [1e-3 * math.exp(y / 0.1) for y in (0.2, 0.2 - HALF, 0.2 + HALF)]
    assert [found.value, found.low, found.high] == pytest.approx(crossings, rel=1e-3)
    assert (found.seeds, found.at_least, found.nowhere) == (5, False, False)
    assert HALF > 0.04, "some seeds alone lie above 0 long before the mean"
    raised = {seed: [p._replace(loss=p.loss + seed) for p in curve] for seed, curve in lines_above(0.2).items()}
    again = kept(raised, {seed: level + seed for seed, level in LEVELS.items()}, RATES[4])
    assert again.low == pytest.approx(found.low), "paired by seed"


def test_kept_says_what_is_in_doubt_at_the_first_rate():
    doubt = kept(lines_above(HALF / 2), LEVELS, RATES[4])
    assert doubt.value == pytest.approx(1e-3 * math.exp(HALF / 2 / 0.1), rel=1e-3)
    assert (doubt.low, doubt.nowhere) == (None, False)
    assert doubt.high == pytest.approx(1e-3 * math.exp(1.5 * HALF / 0.1), rel=1e-3)
    above = kept(lines_above(-HALF / 2), LEVELS, RATES[4])
    assert (above.value, above.low, above.nowhere, above.at_least) == (None, None, False, False)
    assert above.high == pytest.approx(1e-3 * math.exp(HALF / 2 / 0.1), rel=1e-3)
    never = kept(lines_above(-1.1 * HALF), LEVELS, RATES[4])
    assert (never.value, never.low, never.high, never.nowhere) == (None, None, None, True)


def test_kept_up_to_the_highest_rate_tried():
    """ln(RATES[-1] / 1e-3) / 10 = 0.46 is how far the lines rise."""
    rise = 0.1 * math.log(RATES[-1] / 1e-3)
    whole = kept(lines_above(rise + 2 * HALF), LEVELS, RATES[4])
    assert (whole.value, whole.low, whole.high, whole.at_least) == (RATES[-1], RATES[-1], None, True)
    mean = kept(lines_above(rise + HALF / 2), LEVELS, RATES[4])
    assert (mean.value, mean.high, mean.at_least) == (RATES[-1], None, True)
    assert mean.low == pytest.approx(RATES[-1] * math.exp(-HALF / 2 / 0.1), rel=1e-3)
    limit = kept(lines_above(rise - HALF / 2), LEVELS, RATES[4])
    assert (limit.high, limit.at_least) == (None, False)
    assert limit.value == pytest.approx(RATES[-1] * math.exp(-HALF / 2 / 0.1), rel=1e-3)
    nothing = kept(lines_above(-HALF / 2, slope=0.0), LEVELS, RATES[4])
    assert (nothing.value, nothing.low, nothing.high, nothing.nowhere) == (None, None, None, False)


def test_kept_ends_where_any_seed_is_unstable():
    """The fourth seed fails from RATES[6] on, tried by it alone, the others later."""
    edges = (math.inf, math.inf, math.inf, RATES[6], math.inf)
    curves = {seed: curve if seed == 3 else [p for p in curve if p.lr != RATES[6]]
              for seed, curve in lines_above(5.0, edges=edges).items()}  # fmt: skip
    found = kept(curves, LEVELS, RATES[4])
    assert (found.low, found.high, found.at_least) == (RATES[5], RATES[6], False)
    assert found.value == pytest.approx(math.sqrt(RATES[5] * RATES[6]))
    assert kept(curves, LEVELS, RATES[7]) is None, "not stable on all seeds at the first rate"
    del curves[3]
    assert kept(curves, LEVELS, RATES[4]).at_least, "of the others none fails"


def test_kept_over_the_seeds_and_rates_in_common():
    curves = lines_above(0.2)
    found = kept({7: curves[0], 0: curves[0]}, {0: 2.0, 9: 2.0}, RATES[4])
    assert found.value == pytest.approx(1e-3 * math.exp(0.23 / 0.1)), "seed 0 alone"
    assert (found.low, found.high, found.seeds) == (None, None, 1)
    assert kept({0: curves[0]}, {0: 1.0}, RATES[4]).nowhere, "of one seed, too"
    assert kept(curves, {9: 2.0}, RATES[4]) is None
    # A rate that four of five have would lift the mean of those.
    extra = {seed: sorted([*curve, Point(1.1e-3, 9.0, True)]) if seed else curve for seed, curve in curves.items()}
    assert kept(extra, LEVELS, RATES[4]) == kept(curves, LEVELS, RATES[4])


@pytest.mark.parametrize(
    ("alike", "slope", "index", "least", "most"),
    [
        # What a seed is off is the same at all rates; then, another at each, with the crossing at one of them.
        (True, 0.1, 6.5, 0.935, 0.965),
        (False, 0.3, 7, 0.935, 0.965),
        # All rates before the crossing lie within the noise, and the lower limit may leave 0 at any of them: too early.
        (False, 0.003, 7, 0.905, 0.945),
    ],
)
def test_intervals_of_a_crossing_cover(alike, slope, index, least, most):
    """The true mean crosses 0 at the rate of an index; five seeds of sd 0.05."""
    draw, hits, trials = np.random.default_rng(0), 0, 2000
    line = 2.0 + slope * math.log(10) / 4 * (np.arange(len(RATES)) - index)
    truth = RATES[0] * 10 ** (index / 4)
    for _ in range(trials):
        rows = (line + draw.normal(0, 0.05, (5, 1 if alike else len(RATES)))).tolist()
        curves = {seed: [Point(*pair, True) for pair in zip(RATES, row, strict=True)] for seed, row in enumerate(rows)}
        found = kept(curves, LEVELS, RATES[4])
        # An end that is not there claims nothing.
        too_high = found.low is not None and found.low > truth * (1 + 1e-9)
        too_low = found.nowhere or (found.high is not None and found.high < truth * (1 - 1e-9))
        hits += not too_high and not too_low
    assert least < hits / trials < most


@settings(deadline=None)  # what it computes is quick, the machine may be busy
@given(st.lists(st.floats(-9, 0), min_size=3, max_size=12, unique=True), st.floats(0.5, 3), st.randoms())
def test_sensitivity_is_the_integral(exponents, cap, draw):
    """Against the mean of the same broken line at many places, for uneven points."""
    xs = sorted(exponents)
    if min(np.diff(xs)) < 1e-3:
        return
    losses = [draw.choice([None, draw.uniform(0.1, 4)]) for _ in xs]
    if all(loss is None for loss in losses):
        losses[0] = 1.0
    curve = [Point(math.exp(x), loss, loss is not None) for x, loss in zip(xs, losses, strict=True)]
    low, high = math.exp(xs[0] + 0.1 * (xs[-1] - xs[0])), math.exp(xs[-1])
    excess = [max(0, min(cap, cap if loss is None else loss) - best_point(curve).loss) for loss in losses]
    places = np.linspace(math.log(low), xs[-1], 200_001)
    middles = np.interp((places[1:] + places[:-1]) / 2, xs, excess)
    assert sensitivity(curve, low, high, cap) == pytest.approx(middles.mean(), abs=1e-4)


def test_what_failed_is_not_better_than_the_best():
    """A run that failed may end below the best of those that did not, and a curve may lie above what counts at most."""
    curve = [Point(1.0, 2.5, True), Point(math.e, 2.0, True), Point(math.e**2, 1.5, False)]
    assert sensitivity(curve, 1.0, math.e**2, 5.0) == pytest.approx(0.125)
    assert sensitivity([Point(1.0, 6.0, True), Point(math.e, 6.0, True)], 1.0, math.e, 5.5) == 0


def test_sensitivity_in_closed_form():
    """ℓ − ℓ* = c ln²(η/η*) over ±w around η*: the mean is c w² / 3; a flat curve has none."""
    rates = [1e-3 * math.exp(-1 + k / 500) for k in range(1001)]
    found = sensitivity(curve_of(parabola(1e-3, 0.3), rates=rates), rates[0], rates[-1], 99)
    assert found == pytest.approx(0.1, rel=1e-3)
    assert sensitivity(curve_of(lambda lr: 2.0), RATES[0], RATES[-1], 5) == 0
    assert sensitivity(curve_of(lambda lr: 2.0), 1e-9, RATES[-1], 5) is None


def test_more_points_do_not_weigh_more():
    """What refinement adds on a straight piece changes nothing."""
    coarse = curve_of(lambda lr: 2 + abs(math.log(lr / 1e-3)))
    fine = sorted([*coarse, *(Point(lr, 2 + abs(math.log(lr / 1e-3)), True) for lr in (1.2e-3, 1.3e-3, 1.4e-3))])
    a, b = RATES[0], RATES[-1]
    assert sensitivity(fine, a, b, 99) == pytest.approx(sensitivity(coarse, a, b, 99))


def exactly(edges):
    return {seed: (edge, edge) for seed, edge in enumerate(edges)}


def test_intervals_cover():
    """Log-normal tolerances of five seeds: 95 of 100 intervals hold the true ratio; 2.776 is Student's t of a table."""
    draw, hits, trials = np.random.default_rng(0), 0, 2000
    for trial in range(trials):
        theirs = np.exp(draw.normal(-4, 0.3, 5))
        ours = 3.0 * theirs * np.exp(draw.normal(0, 0.2, 5))
        found = rate_ratio(exactly(ours), exactly(theirs))
        hits += found.low <= 3.0 <= found.high
        if trial < 20:
            logs = np.log(ours / theirs)
            half = 2.776 * logs.std(ddof=1) / math.sqrt(5)
            ends = math.exp(logs.mean() - half), math.exp(logs.mean() + half)
            assert (found.low, found.high) == pytest.approx(ends, rel=1e-3)
    assert 0.935 < hits / trials < 0.965


def test_ratios_are_paired_by_seed():
    ours = {1: (2.0, 2.0), 2: (8.0, 8.0), 9: (1.0, 1.0)}
    theirs = {1: (1.0, 1.0), 2: (4.0, 4.0), 5: (7.0, 7.0)}
    found = rate_ratio(ours, theirs)
    assert (found.value, found.seeds, found.at_least) == (pytest.approx(2.0), 2, False)
    assert rate_ratio({1: theirs[1]}, {2: theirs[1]}) is None
    alone = geometric_mean([4.0])
    assert (alone.value, alone.low, alone.high) == (pytest.approx(4.0), None, None)


def test_an_edge_that_was_not_reached_bounds_from_one_side():
    open_, closed = (4.0, None), (4.0, 5.0)
    theirs = dict.fromkeys(range(5), (1.0, 2.0))
    ours = {0: open_, **dict.fromkeys(range(1, 5), closed)}
    found = rate_ratio(ours, theirs)
    assert found.at_least
    assert found.high is None
    assert found.low == pytest.approx(2.0), "4 over 2, five times"
    assert rate_ratio(theirs, ours) is None
    mean = mean_rate(list(ours.values()))
    assert (mean.value, mean.low, mean.high) == (pytest.approx(4.0), pytest.approx(4.0), None)
    assert mean.at_least
    assert mean_rate([]) is None
    # Four seeds that reached the same end say too little of how much they differ.
    del ours[4]
    assert (mean_rate(list(ours.values())).low, rate_ratio(ours, theirs).low) == (None, None)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 8])
def test_bounds_claim_too_much_seldom(seeds):
    """Edges with an sd of 0.3, of which the highest rate tried cuts off those above: the lower end, where there is one,
    is to be above the truth in a fortieth of the cases, wherever that rate lies."""
    draw, trials = random.Random(seeds), 4000
    for end in (-0.1, 0.0, 0.03, 0.15):
        above = 0
        for _ in range(trials):
            edges = [draw.gauss(0, 0.3) for _ in range(seeds)]
            brackets = [(math.exp(min(edge, end)), None if edge >= end else math.exp(edge)) for edge in edges]
            mean = mean_rate(brackets)
            above += mean.low is not None and mean.low > 1
        assert above / trials < 0.045


def test_two_seeds_give_no_interval_of_rates():
    """Both may fall between the same two rates that were tried; what they differ by is not known then."""
    two, three = [(1.0, 1.5)] * 2, [(1.0, 1.5)] * 3
    assert (mean_rate(two).low, mean_rate(two).high) == (None, None)
    assert (mean_rate(three).low, mean_rate(three).high) == (pytest.approx(1.0), pytest.approx(1.5))
    ratio = rate_ratio(dict(enumerate(two)), dict(enumerate(two)))
    assert (ratio.value, ratio.low, ratio.high) == (pytest.approx(1.0), None, None)


def test_edges_found_by_bisection_cover():
    """The whole chain: edges that differ by seed, known only to a factor; the intervals still cover."""
    from gptnorm.study.search import Search, next_rates

    draw, trials = random.Random(1), 300
    ratios, means, widths = 0, 0, []
    grid = (1e-3, 3e-3, 1e-2, 3e-2)
    for _ in range(trials):
        edges = {name: {seed: draw.gauss(math.log(mean), 0.3) for seed in range(5)} for name, mean in
                 (("ours", 6e-2), ("theirs", 2e-2))}  # fmt: skip
        found: dict[str, dict[int, Bracket]] = {"ours": {}, "theirs": {}}
        for name, by_seed in edges.items():
            for seed, edge in by_seed.items():
                tried: list[Point] = []
                while rates := next_rates(tried, grid, Search(edge=1.3), seek="edge"):
                    new = [Point(lr, 2 + math.log(lr / 5e-3) ** 2, math.log(lr) < edge) for lr in rates]
                    tried = sorted([*tried, *new])
                found[name][seed] = edge_of(tried).bracket
        ratio = rate_ratio(found["ours"], found["theirs"])
        ratios += ratio.low <= 3.0 <= ratio.high
        mean = mean_rate(list(found["ours"].values()))
        means += mean.low <= 6e-2 <= mean.high
        widths.append(math.log(mean.high / mean.low))
    # They also hold how closely edges are known, so they cover more often than 95 of 100.
    assert ratios / trials > 0.95
    assert means / trials > 0.95
    # A t-interval of five edges with an sd of 0.3, were they known exactly, is 0.7 wide on the mean; either end of what
    # they are known to, a factor 1.3 at most, adds up to 0.26.
    assert 0.7 < statistics.fmean(widths) < 0.7 + 0.26


def test_what_learned_far_less_than_at_the_best_rate_has_failed():
    """Above it only: what is too slow below is no failure of stability."""
    curve = [Point(1e-3, 3.5, True), Point(1e-2, 2.0, True), Point(3e-2, 2.9, True), Point(1e-1, 3.1, True),
             Point(3e-1, 2.95, True), Point(1.0, None, False)]  # fmt: skip
    assert [point.stable for point in judged(curve, 1.5)] == [True, True, True, False, True, False], (
        "above the best only"
    )
    assert edge_of(judged(curve, 1.5)).unstable == 1e-1
    assert judged(curve, math.inf) == curve
    nothing = [Point(1e-3, None, False)]
    assert judged(nothing, 1.5) == nothing
