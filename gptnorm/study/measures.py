r"""What a curve of losses over learning rates says about tolerance.

A *curve* is one strategy with one seed, its points in ascending order of the rate η. A point is *stable* or not
(`gptnorm.study.outcome`, and `judged` against the curve's best); a loss that is not finite is None.

| measure | definition | source |
|---|---|---|
| best | the stable point of lowest loss, ℓ* at η* | |
| edge | going up from the best, the last rate before the first unstable one, η_max | simplegpt.md §6 |
| reach | going up from the best, the rate up to which ℓ(η) ≤ a level | ours |
| sensitivity | $\frac{1}{\ln(b/a)} \int_a^b \min(\ell(\eta), \ell_0) - \ell^*\; d\ln\eta$ | arXiv 2309.14322 |

Between two points the loss is a straight line in ln η. Lower rates may be unstable, too: a run that is too slow to
learn more than token frequencies counts as such. So edges are looked for upwards from the best, and an island of
stability above the edge does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from gptnorm.statistics import sample_sd, t_quantile


class Point(NamedTuple):
    """One run, or the mean of several."""

    lr: float
    loss: float | None
    """Nats per token; None where it is not finite."""
    stable: bool


@dataclass(frozen=True, kw_only=True)
class Edge:
    """Where stability ends."""

    stable: float
    """The largest stable rate that was tried."""
    unstable: float | None
    """The first unstable one above it; None: nothing above was tried, or nothing failed."""

    @property
    def middle(self) -> float | None:
        """The edge itself, at most √(unstable / stable) off; None where it was not reached."""
        return None if self.unstable is None else math.sqrt(self.stable * self.unstable)


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The rate up to which a level of the loss is kept, between two that are equal where the loss crosses the level."""

    low: float
    """It is kept up to here at least."""
    high: float | None
    """The first unstable rate, where one ends it; None: it is kept up to the highest rate tried."""

    @property
    def middle(self) -> float | None:
        """The reach itself; None where it was not reached."""
        return None if self.high is None else math.sqrt(self.low * self.high)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its 95 % t-interval; no ends from one seed."""

    value: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Bound(Estimate):
    """A mean rate, or a ratio of rates, that may be known from below alone."""

    at_least: bool
    """Whether the true value may be higher, since no failure was seen on some seed."""


def best_point(curve: Sequence[Point]) -> Point | None:
    """The stable point of lowest loss, of equals the one of lowest rate; None if there is none."""
    stable = [(point.loss, point.lr, point) for point in curve if point.stable and point.loss is not None]
    return min(stable)[2] if stable else None


def judged(curve: Sequence[Point], worse: float) -> list[Point]:
    """The curve, its points unstable, too, where above the best rate the loss is more than so many times the best."""
    best = best_point(curve)
    if best is None or best.loss is None:
        return list(curve)
    limit = worse * best.loss

    def holds(point: Point) -> bool:
        return point.stable and point.loss is not None and (point.lr < best.lr or point.loss <= limit)

    return [point._replace(stable=holds(point)) for point in curve]


def edge_of(curve: Sequence[Point]) -> Edge | None:
    """None if nothing is stable."""
    best = best_point(curve)
    if best is None:
        return None
    stable = best.lr
    for point in curve:
        if point.lr > best.lr:
            if not point.stable:
                return Edge(stable=stable, unstable=point.lr)
            stable = point.lr
    return Edge(stable=stable, unstable=None)


def reach_of(curve: Sequence[Point], level: float) -> Reach | None:
    """How far up from the best rate the loss stays at or below `level`; None if the best itself lies above.

    Where the next point is stable the crossing is interpolated in ln η; an unstable one ends the reach somewhere
    between the last rate before it and its own.
    """
    best = best_point(curve)
    if best is None or best.loss is None or best.loss > level:
        return None
    last = best
    for point in curve:
        if point.lr <= best.lr:
            continue
        if not point.stable or point.loss is None:
            return Reach(low=last.lr, high=point.lr)
        if point.loss > level:
            assert last.loss is not None
            share = (level - last.loss) / (point.loss - last.loss)
            crossing = last.lr * (point.lr / last.lr) ** share
            return Reach(low=crossing, high=crossing)
        last = point
    return Reach(low=last.lr, high=None)


def sensitivity(curve: Sequence[Point], low: float, high: float, cap: float) -> float | None:
    """Mean excess over the curve's own best loss, over ln η from `low` to `high`, in nats.

    Args:
        low, high: rates that the curve has points at, or beyond.
        cap: ℓ₀, what a loss counts for at most; one that is not finite counts as that.

    Returns:
        None where nothing is stable, or the curve does not span the rates.
    """
    best = best_point(curve)
    if best is None or best.loss is None or curve[0].lr > low * (1 + 1e-9) or curve[-1].lr < high * (1 - 1e-9):
        return None
    xs = [math.log(point.lr) for point in curve]
    ys = [min(cap, cap if point.loss is None else point.loss) - best.loss for point in curve]
    start, end = math.log(low), math.log(high)
    total = 0.0
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        a, b = max(x0, start), min(x1, end)
        if a < b:
            slope = (y1 - y0) / (x1 - x0)
            total += (b - a) * (y0 + slope * ((a + b) / 2 - x0))
    return total / (end - start)


def mean_of(values: Sequence[float]) -> Estimate:
    """Of one value or more, normal ones assumed."""
    mean, sd = sum(values) / len(values), sample_sd(values)
    if sd is None:
        return Estimate(value=mean, low=None, high=None, seeds=len(values))
    half = t_quantile(len(values) - 1) * sd / math.sqrt(len(values))
    return Estimate(value=mean, low=mean - half, high=mean + half, seeds=len(values))


def geometric_mean(values: Sequence[float]) -> Estimate:
    """Of one value or more, normal logarithms assumed."""
    found = mean_of([math.log(value) for value in values])
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Estimate(value=math.exp(found.value), low=low, high=high, seeds=found.seeds)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """How much larger ours are, seed by seed; None where no seed has both."""
    seeds = sorted(ours.keys() & theirs.keys())
    return mean_of([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def mean_rate(brackets: Sequence[tuple[float, float | None]]) -> Bound | None:
    """The geometric mean of rates over seeds, each known between two; None without one.

    Its interval runs from the lower end of that of the lower rates to the upper end of that of the upper ones, so that
    it also holds how closely the rates are known. Where a seed has no upper one, the value is that of the lower rates,
    and there is no upper end.
    """
    if not brackets:
        return None
    low = geometric_mean([a for a, _ in brackets])
    uppers = [b for _, b in brackets if b is not None]
    if len(uppers) < len(brackets):
        return Bound(value=low.value, low=low.low, high=None, seeds=low.seeds, at_least=True)
    high = geometric_mean(uppers)
    return Bound(value=math.sqrt(low.value * high.value), low=low.low, high=high.high, seeds=low.seeds, at_least=False)


def edge_ratio(ours: Mapping[int, Edge], theirs: Mapping[int, Edge]) -> Bound | None:
    """How many times as far out our edges are, seed by seed; None where no seed has both, or theirs was not reached.

    As in `mean_rate`, the interval also holds how closely the edges are known.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    if not pairs or any(their.unstable is None for _, their in pairs):
        return None
    low = geometric_mean([our.stable / their.unstable for our, their in pairs if their.unstable])
    if any(our.unstable is None for our, _ in pairs):
        value = geometric_mean([our.stable / their.middle for our, their in pairs if their.middle]).value
        return Bound(value=value, low=low.low, high=None, seeds=len(pairs), at_least=True)
    high = geometric_mean([our.unstable / their.stable for our, their in pairs if our.unstable])
    value = geometric_mean([our.middle / their.middle for our, their in pairs if our.middle and their.middle]).value
    return Bound(value=value, low=low.low, high=high.high, seeds=len(pairs), at_least=False)


def mean_point(lr: float, points: Sequence[Point]) -> Point:
    """Of several seeds at one rate; stable where all are, without a loss where one has none."""
    losses = [point.loss for point in points if point.loss is not None]
    whole = len(losses) == len(points)
    return Point(lr, sum(losses) / len(losses) if whole else None, whole and all(point.stable for point in points))


def picked_curve(curves: Sequence[Sequence[Point]], worse: float) -> list[Point]:
    """Means over the seeds that pick, at the rates that all of them have, judged against the best of them."""
    by_rate = [{point.lr: point for point in curve} for curve in curves]
    rates = sorted(set.intersection(*map(set, by_rate))) if by_rate else []
    return judged([mean_point(lr, [points[lr] for points in by_rate]) for lr in rates], worse)


T = TypeVar("T")


def chosen(curves: Mapping[T, Sequence[Point]]) -> T | None:
    """That of the lowest loss at its best, of equals the first; None if nothing is stable."""
    bests = {key: best_point(curve) for key, curve in curves.items()}
    losses = {key: best.loss for key, best in bests.items() if best is not None and best.loss is not None}
    return min(losses, key=lambda key: losses[key], default=None)
