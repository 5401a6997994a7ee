r"""What a curve of losses over learning rates says about tolerance.

A *curve* is one strategy with one seed, its points in ascending order of the rate η. A point is *stable* or not
(`gptnorm.study.outcome`, and `judged` against the curve's best); a loss that is not finite is None.

| measure | definition | source |
|---|---|---|
| best | the stable point of lowest loss, ℓ* at η* | |
| edge | going up from the best, the last rate before the first unstable one, η_max | ours |
| reach | going up from the best, the rate up to which ℓ(η) ≤ a level | ours |
| kept | going up from a rate, that up to which the mean over seeds of ℓ_s(η) - level_s is ≤ 0 | ours |
| sensitivity | $\frac{1}{\ln(b/a)} \int_a^b \max(0, \min(\ell(\eta), \ell_0) - \ell^*)\; d\ln\eta$ | arXiv 2309.14322 |

Between two points the loss is a straight line in ln η. Lower rates may be unstable, too: a run that is too slow to
learn more than token frequencies counts as such. So edges are looked for upwards from the best, and an island of
stability above the edge does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

from gptnorm.statistics import sample_sd, t_quantile

Bracket = tuple[float, float | None]
"""Two rates between which another one is known to lie; None: it was not reached."""


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
    def bracket(self) -> Bracket:
        return self.stable, self.unstable


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The rate up to which a level of the loss is kept, between two that are equal where the loss crosses the level."""

    low: float
    """It is kept up to here at least."""
    high: float | None
    """The first unstable rate, where one ends it; None: it is kept up to the highest rate tried."""

    @property
    def bracket(self) -> Bracket:
        return self.low, self.high

    @property
    def middle(self) -> float | None:
        """The reach itself; None where it was not reached."""
        return _middle(self.bracket)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Up to which rate a mean over seeds stays at or below 0.

    Its interval inverts the 95 % t-interval of the mean at every rate: from where the upper limit leaves 0 to where the
    lower one does.
    """

    mean: Reach | None
    """Of the mean; None: it is above 0 at the first rate."""
    upper: Reach | None
    """Of the upper limit, which ends first; None: it is above 0 at the first rate, or there is one seed."""
    lower: Reach | None
    """Of the lower limit, which ends last; None: it is above 0 at the first rate, or there is one seed."""
    seeds: int

    @property
    def value(self) -> float | None:
        """Up to which rate the mean stays, or the highest rate tried; None: at none."""
        if self.mean is None:
            return None
        return self.mean.low if self.mean.middle is None else self.mean.middle

    @property
    def at_least(self) -> bool:
        """Whether the mean stays up to the highest rate tried."""
        return self.mean is not None and self.mean.high is None

    @property
    def low(self) -> float | None:
        """The interval's lower end; None: the first rate itself is in doubt, or there is one seed."""
        return None if self.upper is None else self.upper.low

    @property
    def high(self) -> float | None:
        """The interval's upper end; None: it is open, or there is one seed, or `nowhere`."""
        return None if self.lower is None else self.lower.high

    @property
    def nowhere(self) -> bool:
        """Whether it is above 0 at the first rate, beyond doubt if there are several seeds."""
        return self.mean is None and self.lower is None


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
    if best is None:
        return None
    line, end = [], None
    for point in curve:
        if point.lr < best.lr:
            continue
        if not point.stable or point.loss is None:
            end = point.lr
            break
        line.append((point.lr, point.loss))
    return _reach(line, level, end)


def _reach(line: Sequence[tuple[float, float]], level: float, end: float | None) -> Reach | None:
    """How far up a line of (rate, value) stays at or below `level`; None if its first point lies above.

    Args:
        end: the unstable rate at which it breaks off; None: it goes up to the highest rate tried.
    """
    if line[0][1] > level:
        return None
    for (lr0, y0), (lr1, y1) in pairwise(line):
        if y1 > level:
            crossing = lr0 * (lr1 / lr0) ** ((level - y0) / (y1 - y0))
            return Reach(low=crossing, high=crossing)
    return Reach(low=line[-1][0], high=end)


def kept(curves: Mapping[int, Sequence[Point]], levels: Mapping[int, float], start: float) -> Kept | None:
    """Up to which rate from `start` the mean over seeds of d_s(η) = ℓ_s(η) - level_s stays at or below 0.

    Over the seeds with a curve and a level, at the rates that all of them have; a rate at which any of them is unstable
    ends it. Between two rates the mean, and each limit of its t-interval, is a straight line in ln η.

    Returns:
        None where no seed has both, or not all of them are stable at `start`.
    """
    seeds = sorted(curves.keys() & levels.keys())
    means, end = _excess([curves[seed] for seed in seeds], [levels[seed] for seed in seeds], start)
    if not means or means[0][0] != start:
        return None

    def reach(limit: Callable[[Estimate], float | None]) -> Reach | None:
        line = [(lr, y) for lr, mean in means if (y := limit(mean)) is not None]
        return _reach(line, 0.0, end) if line else None

    return Kept(
        mean=reach(lambda mean: mean.value),
        upper=reach(lambda mean: mean.high),
        lower=reach(lambda mean: mean.low),
        seeds=len(seeds),
    )


def _excess(
    curves: Sequence[Sequence[Point]], levels: Sequence[float], start: float
) -> tuple[list[tuple[float, Estimate]], float | None]:
    """The mean of how far the curves lie above their levels, at each rate from `start` that all have, and the first
    rate at which one is unstable; there the means end."""
    found: list[tuple[float, Estimate]] = []
    pairs = [(point, level) for curve, level in zip(curves, levels, strict=True) for point in curve]
    for lr in sorted({point.lr for point, _ in pairs if point.lr >= start}):
        points = [(point, level) for point, level in pairs if point.lr == lr]
        above = [point.loss - level for point, level in points if point.stable and point.loss is not None]
        if len(above) < len(points):
            return found, lr
        if len(above) == len(curves):
            found.append((lr, mean_of(above)))
    return found, None


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
    # What failed may end below the best of what did not; it is no better for that.
    ys = [max(0.0, min(cap, cap if point.loss is None else point.loss) - best.loss) for point in curve]
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


FEWEST_BOUNDED = 5
"""Seeds from which on a mean over bounds has an end. Bounds are alike where what they stand for differs: of three seeds
whose true values lie around a bound, all are on its far side one time in eight."""


def _rate_mean(values: Sequence[float]) -> Estimate:
    """`geometric_mean`, without an interval for two: rates are known from a few that were tried, and where both fall
    between the same two an interval would hold nothing of how much seeds differ."""
    found = geometric_mean(values)
    return found if len(values) > 2 else replace(found, low=None, high=None)


def mean_rate(brackets: Sequence[Bracket]) -> Bound | None:
    """The geometric mean of rates over seeds, each known between two; None without one.

    Its interval, which takes three seeds, runs from the lower end of that of the lower rates to the upper end of that
    of the upper ones, so that it also holds how closely the rates are known. Where a seed has no upper one, the value
    is that of the lower rates, and there is no upper end; nor is there a lower one below `FEWEST_BOUNDED` seeds.
    """
    if not brackets:
        return None
    low = _rate_mean([a for a, _ in brackets])
    uppers = [b for _, b in brackets if b is not None]
    if len(uppers) < len(brackets):
        end = low.low if len(brackets) >= FEWEST_BOUNDED else None
        return Bound(value=low.value, low=end, high=None, seeds=low.seeds, at_least=True)
    high = _rate_mean(uppers)
    return Bound(value=math.sqrt(low.value * high.value), low=low.low, high=high.high, seeds=low.seeds, at_least=False)


def rate_ratio(ours: Mapping[int, Bracket], theirs: Mapping[int, Bracket]) -> Bound | None:
    """How many times as far out our rates are, seed by seed; None where no seed has both, or theirs was not reached.

    As in `mean_rate`, the interval also holds how closely the rates are known.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or any(theirs[seed][1] is None for seed in seeds):
        return None
    reached = all(ours[seed][1] is not None for seed in seeds)
    # Without an upper end of ours the value, too, is one that it is at least.
    nominal = [(_middle(ours[seed]) if reached else ours[seed][0], _middle(theirs[seed])) for seed in seeds]
    value = geometric_mean([our / their for our, their in nominal if our and their]).value
    low = _rate_mean([ours[seed][0] / high for seed in seeds if (high := theirs[seed][1])]).low
    if not reached and len(seeds) < FEWEST_BOUNDED:
        low = None
    uppers = [high / theirs[seed][0] for seed in seeds if (high := ours[seed][1])]
    high = _rate_mean(uppers).high if reached else None
    return Bound(value=value, low=low, high=high, seeds=len(seeds), at_least=not reached)


def _middle(bracket: Bracket) -> float | None:
    low, high = bracket
    return None if high is None else math.sqrt(low * high)


def mean_point(lr: float, points: Sequence[Point]) -> Point:
    """Of several seeds at one rate; stable where all are, without a loss where one has none."""
    losses = [point.loss for point in points if point.loss is not None]
    whole = len(losses) == len(points)
    return Point(lr, sum(losses) / len(losses) if whole else None, whole and all(point.stable for point in points))


def picked_curve(curves: Sequence[Sequence[Point]], worse: float) -> list[Point]:
    """Means over seeds, at the rates that all of them have, judged against the best of them."""
    by_rate = [{point.lr: point for point in curve} for curve in curves]
    rates = sorted(set.intersection(*map(set, by_rate))) if by_rate else []
    return judged([mean_point(lr, [points[lr] for points in by_rate]) for lr in rates], worse)


def best_without(curves: Mapping[int, Sequence[Point]], seed: int, worse: float) -> Point | None:
    """The best of the mean over all seeds but one: picked where that one's loss had no say in it."""
    return best_point(picked_curve([curve for other, curve in curves.items() if other != seed], worse))


T = TypeVar("T")


def chosen(curves: Mapping[T, Sequence[Point]]) -> T | None:
    """That of the lowest loss at its best, of equals the first; None if nothing is stable."""
    losses = _best_losses(curves)
    return min(losses, key=lambda key: losses[key], default=None)


def shortlisted(curves: Mapping[T, Sequence[Point]], within: float) -> list[T]:
    """The chosen one, and those whose loss at their best is less than so many nats above its; empty if nothing is
    stable."""
    losses, first = _best_losses(curves), chosen(curves)
    return [key for key, loss in losses.items() if key == first or loss < min(losses.values()) + within]


def _best_losses(curves: Mapping[T, Sequence[Point]]) -> dict[T, float]:
    bests = {key: best_point(curve) for key, curve in curves.items()}
    return {key: best.loss for key, best in bests.items() if best is not None and best.loss is not None}
