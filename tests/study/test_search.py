"""The search against loss functions whose optimum and edge are known."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptnorm.study.measures import Point, best_point, edge_of
from gptnorm.study.search import Search, log_grid, next_rates

GRID = (1e-3, 3e-3, 1e-2, 3e-2)


def parabola(optimum, edge, curvature=0.1, noise=0.0, seed=0):
    """ℓ(η) = 2 + c ln²(η/η*), diverged from `edge` on; noise follows from seed and rate."""

    def loss(lr):
        bend = random.Random(f"{seed}/{lr!r}").gauss(0, noise)
        return Point(lr, 2 + curvature * math.log(lr / optimum) ** 2 + bend if lr < edge else None, lr < edge)

    return loss


def search(loss, grid=GRID, settings=None, **more):
    """Every point that was asked for, in rounds."""
    tried, rounds = [], 0
    while rates := next_rates(tried, grid, settings or Search(), **more):
        assert rates == sorted(set(rates))
        assert not {point.lr for point in tried} & set(rates), "nothing is asked for twice"
        tried = sorted([*tried, *map(loss, rates)])
        rounds += 1
    return tried, rounds


log_rates = st.floats(math.log(2e-5), math.log(1.0))


@given(log_rates, st.floats(0.2, 4.0), st.floats(1.1, 3), st.floats(1.1, 3))
def test_optimum_and_edge_are_bracketed(ln_optimum, room, closeness, sharpness):
    optimum, edge = math.exp(ln_optimum), math.exp(ln_optimum + room)
    tried, rounds = search(parabola(optimum, edge), settings=Search(optimum=closeness, edge=sharpness, reach=9))
    found, at = edge_of(tried), [point.lr for point in tried].index(best_point(tried).lr)
    if found.unstable is not None:
        assert found.stable < edge <= found.unstable
        assert found.unstable / found.stable <= sharpness * 1.01
    for neighbour in tried[max(0, at - 1) : at + 2]:
        if neighbour.stable and at > 0:
            assert max(neighbour.lr / tried[at].lr, tried[at].lr / neighbour.lr) <= closeness * 1.01
    if 0 < at < len(tried) - 1:
        assert tried[at - 1].lr < optimum
        assert not tried[at + 1].stable or optimum < tried[at + 1].lr
    if found.unstable is not None or found.stable > tried[at].lr:
        reached = [point.lr for point in tried[at:] if point.lr <= found.stable]
        assert all(high / low <= closeness * 1.01 for low, high in pairwise(reached))
    assert rounds < 40


def test_what_is_asked_for_is_little():
    tried, rounds = search(parabola(6e-3, 7e-2))
    assert len(tried) <= 10
    assert rounds <= 5


def test_a_best_at_the_end_of_the_grid_is_no_result():
    low, _ = search(parabola(2e-5, 1.0))
    assert low[0].lr == pytest.approx(1e-3 / 3**4, rel=0.01)
    assert best_point(low).lr < 1e-4
    high, _ = search(parabola(0.2, 1.2))
    assert best_point(high).lr == pytest.approx(0.2, rel=0.5)
    assert edge_of(high).unstable is not None


def test_it_reaches_only_so_far():
    tried, _ = search(parabola(1e9, math.inf), settings=Search(reach=3))
    assert len([p for p in tried if p.lr > GRID[-1]]) == 3
    assert edge_of(tried).unstable is None
    nothing, _ = search(lambda lr: Point(lr, None, False), settings=Search(reach=2))
    assert [p.lr for p in nothing] == [pytest.approx(1e-3 / 9, rel=0.01), pytest.approx(1e-3 / 3, rel=0.01), *GRID]


def test_where_nothing_is_stable_it_goes_where_the_loss_falls():
    """Of rates that are all too small the loss falls to the last one; elsewhere rates are taken for too large."""

    def tried(*losses):
        return [Point(1e-3 * 10**k, loss, False) for k, loss in enumerate(losses)]

    grid, search = (1e-3, 1e-2), Search(reach=2)
    assert next_rates(tried(5.0, 4.0), grid, search) == [1e-1]
    assert next_rates(tried(5.0, 4.0, 3.5, 3.2), grid, search) == [], "as far as it may"
    assert next_rates(tried(5.0, 4.0, 4.5), grid, search) == [1e-4]
    assert next_rates(tried(4.0, 5.0), grid, search) == [1e-4]
    assert next_rates(tried(4.0, None), grid, search) == [1e-4]


def test_nothing_lies_beyond_the_numbers_of_the_machine():
    nothing, _ = search(lambda lr: Point(lr, None, False), grid=(1e-170, 1.0), settings=Search(reach=2))
    assert [p.lr for p in nothing] == [1e-170, 1.0]
    stable, _ = search(lambda lr: Point(lr, -lr, True), grid=(1e-10, 1e300), settings=Search(reach=2))
    assert stable[-1].lr == 1e300


def test_the_edge_alone():
    """A seed whose optimum is known from others: the rates of the grid, then bisection."""
    tried, _ = search(parabola(1e-5, 2e-2), seek="edge")
    assert min(p.lr for p in tried) == GRID[0]
    assert edge_of(tried).unstable / edge_of(tried).stable <= 1.5


@given(st.integers(0, 200))
def test_noise_does_not_lead_astray(seed):
    tried, rounds = search(parabola(1e-2, 8e-2, noise=0.02, seed=seed))
    assert rounds < 40
    assert edge_of(tried).stable < 8e-2 <= edge_of(tried).unstable
    assert abs(math.log(best_point(tried).lr / 1e-2)) < math.log(3.5)


@pytest.mark.parametrize(
    ("low", "high", "grid"),
    [
        (3e-4, 3e-1, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
        (1e-3, 1e-1, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
        (2e-4, 2e-2, (2e-4, 6.32e-4, 2e-3, 6.32e-3, 2e-2)),
        (1e-3, 2e-3, (1e-3, 2e-3)),
    ],
)
def test_log_grid(low, high, grid):
    assert log_grid(low, high) == grid


@given(st.floats(1e-8, 1e3), st.floats(1.001, 1e6))
def test_a_grid_is_about_even_whatever_its_ends(low, ratio):
    grid = log_grid(low, low * ratio)
    assert (grid[0], grid[-1]) == (low, low * ratio)
    assert len(grid) == 1 + max(1, round(2 * math.log10(ratio)))
    even = ratio ** (1 / (len(grid) - 1))
    assert all(0.8 < b / a / even < 1.25 for a, b in pairwise(grid))  # Each end off by a tenth.
