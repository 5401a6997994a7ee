"""Which runs a tolerance study makes, on loss functions whose optimum and edge are known."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptnorm.study.cell import Setup
from gptnorm.study.config import ToleranceConfig
from gptnorm.study.measures import Point, best_point, edge_of, judged, picked_curve
from gptnorm.study.planner import Group, rates_to_report, wanted_runs

OWN, TUNED, WORSE = Setup(), Setup(variant=(("init.std", "published"),)), Setup(variant=(("init.std", 1.0),))


def study(**more):
    given = {"title": "t", "strategies": ("a",), "lrs": (1e-3, 3e-3, 1e-2, 3e-2), "seeds": (1, 2, 3)}
    return ToleranceConfig(**{**given, **more})


def landscape(optimum=6e-3, edge=7e-2, noise=0.01, curve=0.1, number=0):
    """ℓ = 2 + 0.1 ln²(η/η*) + noise, worse for WORSE and better for TUNED; the edge moves with the seed."""

    def run(run):
        draw = random.Random(repr((number, run.setup.label, run.lr, run.seed)))
        stable = run.lr < edge * math.exp(random.Random(run.seed).gauss(0, 0.3))
        shift = {OWN: 0.0, TUNED: -0.2, WORSE: 0.2}[run.setup]
        loss = 2 + shift + curve * math.log(run.lr / optimum) ** 2 + draw.gauss(0, noise)
        return Point(run.lr, loss if stable else None, stable)

    return run


def carried_out(group, truth, asked, order=None, chances=None):
    """All the runs in the order in which they end; `order` shuffles, `chances` forgets what was queued (a kill)."""
    ended, queue = {}, []
    while True:
        queue += [run for run in wanted_runs(group, ended, asked) if run not in queue and run not in ended]
        if not queue:
            return ended
        if chances and chances.random() < 0.3:
            queue = []
            continue
        run = queue.pop(order.randrange(min(4, len(queue))) if order else 0)
        assert run not in ended, "a run is made once"
        ended[run] = truth(run)


def curve(ended, setup, seed):
    return sorted(point for run, point in ended.items() if (run.setup, run.seed) == (setup, seed))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["all", "near", "around", "neighbours", "best"]),
    st.sampled_from([(0,), (0, 9)]),
    st.sampled_from([0.02, 0.1]),
    st.sampled_from([0.01, 0.03]),
    st.sampled_from([(OWN,), (OWN, TUNED, WORSE)]),
    st.sampled_from([0.0, 0.21, 1.0]),
)
def test_neither_order_nor_kills_matter(number, report, pick, curve, noise, setups, shortlist):
    """Steep curves and flat ones, on which every seed finds another best."""
    group = Group(strategy="a", setups=setups)
    truth = landscape(noise=noise, curve=curve, number=number)
    asked = study(report=report, pick=pick, shortlist=shortlist)
    expected = carried_out(group, truth, asked)
    disturbed = carried_out(group, truth, asked, random.Random(number), random.Random(number + 1))
    assert disturbed == expected


def test_the_picking_seed_brackets_best_and_edge():
    asked = study(seeds=())
    ended = carried_out(Group(strategy="a", setups=(OWN,)), landscape(), asked)
    assert {run.seed for run in ended} == {0}
    found = curve(ended, OWN, 0)
    best, edge = best_point(found), edge_of(found)
    assert best is not None
    assert edge is not None
    assert 3e-3 < best.lr < 1.2e-2
    assert edge.unstable is not None
    assert edge.unstable / edge.stable <= asked.search.edge * 1.01


@pytest.mark.parametrize("report", ["all", "near", "around", "neighbours", "best"])
def test_reported_seeds_train_where_it_says(report):
    asked = study(report=report)
    ended = carried_out(Group(strategy="a", setups=(OWN,)), landscape(), asked)
    picked = curve(ended, OWN, 0)
    tried = [point.lr for point in picked]
    _, best = min((point.loss, at) for at, point in enumerate(picked) if point.stable)
    failed = next((at for at, point in enumerate(picked) if at > best and not point.stable), len(tried))
    first, last = {
        "all": (0, len(tried)), "near": (best - 1, failed), "around": (best - 1, best + 1),
        "neighbours": (best - 1, best + 1), "best": (best, best),
    }[report]  # fmt: skip
    expected = tried[first : last + 1]
    assert best > 1, "some rates are left out"
    assert failed > best + 1, "some rates lie between"
    assert rates_to_report(picked, asked) == expected
    for seed in asked.seeds:
        mine = curve(ended, OWN, seed)
        rates = {point.lr for point in mine}
        assert set(expected) <= rates
        if report == "best":
            assert rates == {tried[best]}
        if report in ("best", "around", "neighbours"):
            continue
        edge = edge_of(mine)
        assert edge.unstable / edge.stable <= asked.search.edge * 1.01, "each seed's own edge is bracketed"
        if report == "near":
            assert min(rates) > picked[0].lr, "what is far below the best is left out"


def test_around_brackets_each_seed_s_own_optimum_and_no_edge():
    """Optima that move with the seed by up to a factor three, an edge so far out that no search for optima meets it."""

    def own_optimum(seed):
        return 6e-3 * 3.0 ** random.Random(seed).uniform(-1, 1)

    def truth(run):
        return Point(run.lr, 2 + 0.05 * math.log(run.lr / own_optimum(run.seed)) ** 2, run.lr < 5.0)

    asked = study(report="around", seeds=(1, 2, 3, 4))
    ended = carried_out(Group(strategy="a", setups=(OWN,)), truth, asked)
    for seed in (0, *asked.seeds):
        mine = [point.lr for point in curve(ended, OWN, seed)]
        best = best_point(curve(ended, OWN, seed)).lr
        below, above = mine[mine.index(best) - 1], mine[mine.index(best) + 1]
        assert below < own_optimum(seed) < above
        assert above / below <= asked.search.optimum**2 * 1.01
        assert max(mine) < 0.1, "nobody looks for an edge"
    picked = best_point(curve(ended, OWN, 0)).lr
    assert all(picked in {point.lr for point in curve(ended, OWN, seed)} for seed in asked.seeds)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["all", "near", "around", "neighbours"]))
def test_the_best_of_all_seeds_is_bracketed_on_all_of_them(number, report):
    """On a curve so flat and noisy that the picking seed is often wrong."""

    def truth(run):
        draw = random.Random(repr((number, run)))
        return Point(run.lr, 2 + 0.02 * math.log(run.lr / 6e-3) ** 2 + draw.gauss(0, 0.02), run.lr < 0.5)

    asked = study(report=report)
    ended = carried_out(Group(strategy="a", setups=(OWN,)), truth, asked)
    curves = [curve(ended, OWN, seed) for seed in (0, *asked.seeds)]
    pooled = picked_curve(curves, asked.stability.worse)
    rates, best = [point.lr for point in pooled], best_point(pooled).lr
    place = rates.index(best)
    assert best_point(curves[0]).lr in rates
    assert 0 < place < len(rates) - 1
    for neighbour in (rates[place - 1], rates[place + 1]):
        factor = max(best / neighbour, neighbour / best)
        assert factor <= asked.search.optimum * 1.01 or neighbour >= 0.5


def test_only_the_strategy_as_it_comes_and_the_chosen_setting_are_reported():
    asked = study()
    ended = carried_out(Group(strategy="a", setups=(OWN, TUNED, WORSE)), landscape(), asked)
    reported = {run.setup for run in ended if run.seed in asked.seeds}
    assert reported == {OWN, TUNED}
    edges = {setup: edge_of(curve(ended, setup, 0)) for setup in (OWN, TUNED, WORSE)}
    assert all(edges[s].unstable / edges[s].stable <= asked.search.edge * 1.01 for s in (OWN, TUNED))
    ended = carried_out(Group(strategy="a", setups=(OWN, WORSE)), landscape(), asked)
    assert {run.setup for run in ended if run.seed in asked.seeds} == {OWN}


@pytest.mark.parametrize("report", ["all", "near", "around", "neighbours"])
@pytest.mark.parametrize(("shortlist", "reported"), [(0.1, {OWN, TUNED}), (0.5, {OWN, TUNED, WORSE})])
def test_settings_near_the_best_are_reported(report, shortlist, reported):
    """The tuned one lies 0.2 below the strategy as it comes, the worse one 0.4 above the tuned one."""
    group, asked = Group(strategy="a", setups=(OWN, WORSE, TUNED)), study(report=report, shortlist=shortlist)
    ended = carried_out(group, landscape(noise=0.003), asked)
    assert {run.setup for run in ended if run.seed in asked.seeds} == reported
    for setup in reported:
        pooled = picked_curve([curve(ended, setup, seed) for seed in (0, *asked.seeds)], asked.stability.worse)
        place = [point.lr for point in pooled].index(best_point(pooled).lr)
        assert 0 < place < len(pooled) - 1, "each is known on all seeds on both sides of its best"


def test_of_equals_that_as_it_comes_is_shortlisted():
    """A setting that does nothing is not run on every seed."""

    def truth(run):
        return Point(run.lr, 2 + abs(math.log(run.lr / 8e-3)), True)

    ended = carried_out(Group(strategy="a", setups=(OWN, TUNED)), truth, study())
    assert {run.setup for run in ended if run.seed in study().seeds} == {OWN}


def test_nothing_stable_ends():
    asked = study(report="near")
    ended = carried_out(Group(strategy="a", setups=(OWN, TUNED)), lambda run: Point(run.lr, None, False), asked)
    assert {run.seed for run in ended} == {0}
    assert len(ended) == 2 * (4 + asked.search.reach)


def test_the_edge_is_where_far_less_is_learned():
    """Nothing diverges, but losses grow beyond any use: 1.5 times the best at ln²(η/η*) = 10."""
    asked = study()

    def truth(run):
        return Point(run.lr, 2 + 0.1 * math.log(run.lr / 6e-3) ** 2, True)

    ended = carried_out(Group(strategy="a", setups=(OWN,)), truth, asked)
    expected = 6e-3 * math.exp(math.sqrt(10))
    for seed in (0, *asked.seeds):
        edge = edge_of(judged(curve(ended, OWN, seed), asked.stability.worse))
        assert edge.stable < expected * 1.05
        assert edge.unstable > expected * 0.95
        assert edge.unstable / edge.stable <= asked.search.edge * 1.01


@settings(max_examples=40, deadline=None)
@given(st.floats(math.log(2e-3), math.log(2e-1)), st.floats(0.02, 0.3), st.integers(0, 10**6))
def test_a_setting_that_is_better_everywhere_is_chosen(ln_cliff, gain, number):
    """Losses that fall up to a cliff: the others must be searched as closely as the strategy as it comes."""
    slope = random.Random(number).uniform(0.02, 0.3)

    def truth(run):
        stable = math.log(run.lr) < ln_cliff
        better = gain if run.setup == TUNED else 0.0
        return Point(run.lr, 2.5 - slope * (math.log(run.lr) + 7) - better if stable else None, stable)

    asked = study(seeds=(1,))
    ended = carried_out(Group(strategy="a", setups=(OWN, TUNED)), truth, asked)
    assert {run.setup for run in ended if run.seed == 1} == {OWN, TUNED}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["all", "near", "around", "neighbours", "best"]))
def test_what_has_grown_is_reported_where_it_is_best(number, report):
    """A study of few rates grows; every seed then stands at the rate that its whole ledger says is best."""
    draw = random.Random(number)
    truth = landscape(optimum=math.exp(draw.uniform(math.log(2e-3), math.log(5e-2))), edge=0.3, noise=0.05)
    group = Group(strategy="a", setups=(OWN, TUNED))
    small = study(lrs=(1e-3, 1e-2, 1e-1), seeds=(1, 2), report=report)
    large = study(lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), seeds=(1, 2, 3, 4), report=report)
    ended = carried_out(group, truth, small)
    while runs := wanted_runs(group, ended, large):
        ended |= {run: truth(run) for run in runs}
    best = best_point(judged(curve(ended, OWN, 0), large.stability.worse))
    for seed in large.seeds:
        assert best.lr in {point.lr for point in curve(ended, OWN, seed)}


def test_a_seed_that_fails_where_others_do_not_is_followed_down():
    def truth(run):
        stable = run.lr < (2e-3 if run.seed == 2 else 7e-2)
        return Point(run.lr, 2 + 0.1 * math.log(run.lr / 6e-3) ** 2 if stable else None, stable)

    asked = study(report="near")
    ended = carried_out(Group(strategy="a", setups=(OWN,)), truth, asked)
    found = edge_of(curve(ended, OWN, 2))
    assert found.stable < 2e-3 <= found.unstable


def test_a_seed_s_edge_is_looked_for_as_far_as_the_grid_goes():
    def truth(run):
        stable = run.lr < (1.0 if run.seed == 2 else 7e-2)
        return Point(run.lr, 2 + 0.01 * math.log(run.lr / 6e-3) ** 2 if stable else None, stable)

    for report in ("all", "near"):
        ended = carried_out(Group(strategy="a", setups=(OWN,)), truth, study(report=report))
        found = edge_of(curve(ended, OWN, 2))
        assert found.stable < 1.0 <= found.unstable


def test_rates_that_rounding_cannot_tell_apart_end():
    asked = study(lrs=(1e-3, 1.001e-3), seeds=())
    ended = carried_out(Group(strategy="a", setups=(OWN,)), lambda run: Point(run.lr, 3 - run.lr, True), asked)
    assert len(ended) < 10
