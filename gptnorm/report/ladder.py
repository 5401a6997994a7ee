r"""A depth or width ladder as data: how the best and the largest stable learning rate move with the size.

A *climb* is one strategy (in a width ladder: under one rule) over all rungs, a *level* one rung of it. With
$\eta^*(n)$ the best rate at size n, over the rungs that have an optimum:

* shift $= \log_2(\eta^*_\mathrm{last} / \eta^*_\mathrm{first})$, in octaves: -1 is half the rate;
* slope: that of the least-squares line of $\log_2 \eta^*$ on $\log_2 n$, in octaves per doubling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gptnorm.errors import UserError
from gptnorm.records import finite
from gptnorm.report.optimum import Best, Stable, Tried, best_rate, largest_stable, mean_points, seed_points
from gptnorm.report.results import Row, Study, load_study
from gptnorm.statistics import sample_sd
from gptnorm.study.schema import read_facts


@dataclass(frozen=True, kw_only=True)
class MeanSignal:
    """Signal propagation, mean over seeds; see `gptnorm.study.signal`. None: not finite, or not recorded."""

    grad: tuple[float | None, ...]
    """Of the stream after each block; geometric mean."""
    cosine: tuple[float | None, ...]
    """Of the streams before and after each block."""
    token_cosine: float | None

    @property
    def grad_ratio(self) -> float | None:
        """Gradient after the first block over that after the last."""
        first, last = self.grad[0], self.grad[-1]
        return first / last if first and last else None

    @property
    def top_cosine(self) -> float | None:
        """Mean cosine over the last quarter of the blocks (at least one)."""
        return _mean(list(self.cosine[-max(1, len(self.cosine) // 4) :]))


@dataclass(frozen=True, kw_only=True)
class Level:
    """One strategy at one rung."""

    size: int
    row: Row
    entropy: float | None
    signals: dict[tuple[float, str], MeanSignal]
    """By learning rate and "init" or "trained"."""

    @cached_property
    def points(self) -> list[Tried]:
        """The rates of which it is known whether they are stable."""
        return mean_points(self.row, self.entropy)

    @property
    def pending(self) -> bool:
        """Whether of some rate it is not known yet if it is stable."""
        return len(self.points) < len(self.row.entries)

    @cached_property
    def best(self) -> Best | None:
        return best_rate(self.points)

    @cached_property
    def stable(self) -> Stable | None:
        return largest_stable(self.points)

    def best_of(self, seed: int) -> Best | None:
        """The best rate as this seed alone shows it."""
        return best_rate(seed_points(self.row, seed, self.entropy))

    def signal(self, when: Literal["init", "trained"]) -> MeanSignal | None:
        """At the rate of the lowest loss, a collapsed one included."""
        return self.signals.get((self.row.best.lr, when)) if self.row.best else None


@dataclass(frozen=True, kw_only=True)
class Climb:
    """One strategy over the rungs."""

    strategy: str
    rule: str | None
    levels: tuple[Level, ...]
    """In ascending order of size."""
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        if self.rule is None:
            return self.strategy
        return f"{self.strategy}, {'no rule' if self.rule == 'none' else self.rule}"

    @property
    def usable(self) -> tuple[Level, ...]:
        """The levels that have an optimum."""
        return tuple(level for level in self.levels if level.best and level.best.is_optimum)

    @property
    def shift(self) -> float | None:
        rates = [level.best.lr for level in self.usable if level.best]
        return math.log2(rates[-1] / rates[0]) if len(rates) > 1 else None

    @property
    def slope(self) -> float | None:
        return _slope([(level.size, level.best.lr) for level in self.usable if level.best])

    @cached_property
    def per_seed(self) -> list[list[tuple[int, float]]]:
        """(size, best rate) over the same rungs as each seed alone shows them, of the seeds that have all optima."""
        found = []
        for seed in self.seeds:
            bests = [(level.size, level.best_of(seed)) for level in self.usable]
            points = [(size, best.lr) for size, best in bests if best and best.is_optimum]
            if len(points) == len(bests) > 1:
                found.append(points)
        return found

    @property
    def shift_sd(self) -> float | None:
        """Sample standard deviation of the shift over seeds; None if one of them has no optimum at some rung, since
        the others alone are those that moved least."""
        if len(self.per_seed) < len(self.seeds):
            return None
        return sample_sd([math.log2(points[-1][1] / points[0][1]) for points in self.per_seed])

    @property
    def slope_sd(self) -> float | None:
        """Sample standard deviation of the slope over seeds; None as that of the shift."""
        if len(self.per_seed) < len(self.seeds):
            return None
        return sample_sd([slope for points in self.per_seed if (slope := _slope(points)) is not None])

    @property
    def kept_cost(self) -> float | None:
        """Nats that the last rung loses at the first rung's best rate of the grid, against its own best; infinite if
        it is not stable there. None where either best is an end of the rates tried, and so no optimum."""
        first, last = self.levels[0].best, self.levels[-1].best
        if first is None or last is None or not (first.is_optimum and last.is_optimum):
            return None
        points = dict(self.levels[-1].points)
        if first.grid_lr not in points:
            return None
        loss = points[first.grid_lr]
        return math.inf if loss is None else loss - last.loss


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """A study folder with rungs, read."""

    axis: Literal["depth", "width"]
    sizes: tuple[int, ...]
    climbs: tuple[Climb, ...]
    """Rules next to each other, in the order of the study."""
    study: Study
    """All of its cells and what is common to them; not one grid, so its rows mean nothing."""
    planned: int
    done: int

    @property
    def unit(self) -> str:
        """What a size counts."""
        return "blocks" if self.axis == "depth" else "d"

    def label(self, size: int) -> str:
        """ "8 blocks" or "d 64"."""
        return f"{size} blocks" if self.axis == "depth" else f"d {size}"


def load_ladder(folder: str | Path) -> Ladder:
    """Reads a ladder's folder; one that was stopped midway gives a partial ladder.

    Raises UserError where `study.json` is missing, wrong, or names no ladder.
    """
    folder = Path(folder)
    asked = read_facts(folder).get("ladder")
    if asked is None:
        raise UserError(f"{folder / 'study.json'}: names no ladder")
    sizes, rules = sorted(asked["sizes"]), asked["rules"] or [None]
    grids = {(size, rule): load_study(folder, {"size": size, "rule": rule}) for rule in rules for size in sizes}
    first = next(iter(grids.values()))
    climbs = [
        Climb(
            strategy=strategy,
            rule=rule,
            levels=tuple(_level(grids[size, rule], index, size) for size in sizes),
            seeds=first.seeds,
        )
        for index, strategy in enumerate(first.strategies)
        for rule in rules
    ]
    return Ladder(
        axis=asked["axis"],
        sizes=tuple(sizes),
        climbs=tuple(climbs),
        study=replace(first, cells=tuple(cell for grid in grids.values() for cell in grid.cells)),
        planned=sum(grid.planned for grid in grids.values()),
        done=sum(grid.done for grid in grids.values()),
    )


def _level(grid: Study, index: int, size: int) -> Level:
    row = grid.rows[index]
    cells = [cell for cell in grid.cells if cell.strategy == row.strategy]
    signals = {}
    for lr in grid.lrs:
        for when in ("init", "trained"):
            found = [cell.signal.get(when) for cell in cells if cell.lr == lr]
            if kept := [signal for signal in found if isinstance(signal, dict)]:
                signals[lr, when] = _mean_signal(kept)
    return Level(size=size, row=row, entropy=grid.unigram_entropy, signals=signals)


def _mean_signal(signals: list[dict[str, Any]]) -> MeanSignal:
    def blocks(key: str, mean: Callable[[list[Any]], float | None]) -> tuple[float | None, ...]:
        return tuple(mean(list(values)) for values in zip(*(signal[key] for signal in signals), strict=True))

    return MeanSignal(
        grad=blocks("grad", _geometric_mean),
        cosine=blocks("cosine", _mean),
        token_cosine=_mean([signal["token_cosine"] for signal in signals]),
    )


def _mean(values: list[Any]) -> float | None:
    numbers = [finite(value) for value in values]
    kept = [number for number in numbers if number is not None]
    return sum(kept) / len(kept) if kept and len(kept) == len(numbers) else None


def _geometric_mean(values: list[Any]) -> float | None:
    numbers = [finite(value) for value in values]
    mean = _mean([math.log(number) if number and number > 0 else None for number in numbers])
    return None if mean is None else math.exp(mean)


def _slope(points: list[tuple[int, float]]) -> float | None:
    """Of the least-squares line of log2 rate on log2 size; None for fewer than two points."""
    if len(points) < 2:
        return None
    x, y = ([math.log2(value) for value in values] for values in zip(*points, strict=True))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
