r"""One strategy with one setting at one place as data: what it bears, at its own best, on seeds that had no say in it.

The picking seeds alone find rates to try; then every number below is taken seed by seed on the reported seeds, each at
the rate $\eta^*_s$ that is best on the mean of all other seeds, picking ones included (leave one out). So no seed has a
say in where it is reported, and yet a rate does not hang on the luck of one or two. A mean over seeds has its 95 %
t-interval. Where the reported seeds trained at the picked rate alone (`study.report = "best"`) that is $\eta^*$ for
all, and no interval holds the error of the picking (`crossed`). A study without reported seeds is a *screening*: its
numbers are those of the picking seeds, flattered by the picking, and it says so. The functions named are
`gptnorm.study.measures`'.

| number | on one seed |
|---|---|
| loss | validation loss at $\eta^*_s$ |
| edge | `edge_of`: the largest stable rate and the first unstable one above |
| near | `reach_of` the loss at $\eta^*_s$ plus epsilon; of `Pair.ratio_at`, that loss times a factor |
| sensitivity | from the first to the last rate of the grid, with $\ell_0 = \ln V$, of a model that knows nothing |
| gap | validation loss minus the mean training loss of the last 5 % of the steps, at $\eta^*_s$ |
| spikes | at $\eta^*_s$ |
| nonlinearity | mean over blocks, at $\eta^*_s$; `gptnorm.probe.linearity` |
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from gptnorm.format import settings_text
from gptnorm.report.results import RunLine
from gptnorm.study.cell import Pairs
from gptnorm.study.measures import (
    Bound,
    Bracket,
    Edge,
    Estimate,
    Point,
    best_point,
    best_without,
    edge_of,
    judged,
    mean_of,
    mean_point,
    mean_rate,
    picked_curve,
    reach_of,
    sensitivity,
)

End = Literal["lowest", "highest"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run that has ended."""

    cell: RunLine
    point: Point
    tail: float | None
    """Mean training loss over the last 5 % of the steps."""
    spikes: int
    nonlinearity: float | None
    """Mean over blocks."""
    memory: float | None
    """Most bytes that tensors took at once; `gptnorm.study.aftermath`."""
    flops: float | None
    """Of the whole run; `gptnorm.plan.flops`."""
    elsewhere: Mapping[str, float | None]
    """Loss on other texts, by their names."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """One strategy with one setting at one place."""

    strategy: str
    variant: Pairs
    """What was tuned; empty: the strategy as it comes."""
    tuned: Mapping[str, Any] = field(default_factory=dict)
    """Its value of every setting that the study tunes."""
    open_ends: tuple[tuple[str, End], ...] = ()
    """Of a setting that was chosen, what is the lowest or highest value tried; `gptnorm.report.tuning`."""
    by_all: bool = False
    """Of a setting that was chosen, whether on all seeds, not on those alone that pick."""
    width: int | None
    """Of the model, d."""
    trials: tuple[Trial, ...]
    pick: tuple[int, ...]
    seeds: tuple[int, ...]
    """Those reported; of a screening, those that pick."""
    grid: tuple[float, ...]
    epsilon: float
    worse: float
    """Of `gptnorm.study.outcome.Stability`."""
    cap: float | None
    """ℓ₀."""
    steps: int | None
    step_tokens: int | None
    """Tokens of a step."""

    @property
    def setting(self) -> str:
        """The variant in words."""
        return settings_text(self.variant) or "as it comes"

    @cached_property
    def picked(self) -> list[Point]:
        """The curve that says which rates to try: means over the picking seeds, of the rates that all of them have."""
        return picked_curve([self._points(seed) for seed in self.pick], self.worse)

    @cached_property
    def picked_best(self) -> Point | None:
        """Of the picking seeds."""
        return best_point(self.picked)

    @cached_property
    def _everyones(self) -> dict[int, list[Point]]:
        """The points of every seed, picking and reported, at the rates that all of these have."""
        seeds = (*self.pick, *self.seeds)
        rates = set.intersection(*({point.lr for point in self._points(seed)} for seed in seeds))
        return {seed: [point for point in self._points(seed) if point.lr in rates] for seed in seeds}

    @cached_property
    def fails(self) -> bool:
        """Whether some seed is not stable at every rate that all have, the picked one and its neighbours among them."""
        pooled = picked_curve(list(self._everyones.values()), self.worse)
        tried = [point.lr for point in self.picked]
        if self.picked_best is None or best_point(pooled) is not None:
            return False
        place = tried.index(self.picked_best.lr)
        return {*tried[max(0, place - 1) : place + 2]} <= {point.lr for point in pooled}

    @cached_property
    def _common(self) -> dict[int, list[Point]]:
        """The points of every seed, picking and reported, at the rates that all of these have.

        Where the best at these has no neighbour, some seed may only have begun: then a reported one counts once it has
        trained at the best of most of them and its neighbours, so that such a seed takes nothing away from the others.
        """
        picks = {seed: self._points(seed) for seed in self.pick}
        if self.fails or self._brackets(picked_curve(list(self._everyones.values()), self.worse)):
            return self._everyones
        tried = {point.lr for point in self.picked}
        reported = {seed: {p.lr: p for p in self._points(seed) if p.lr in tried} for seed in self.seeds}
        half = sum(map(bool, reported.values())) / 2
        most = sorted(lr for lr in tried if sum(lr in points for points in reported.values()) > half)
        means = [
            mean_point(lr, [p for seed in (*self.pick, *self.seeds) for p in self._points(seed) if p.lr == lr])
            for lr in most
        ]
        best = best_point(means)
        if best is None or self.seeds == self.pick:
            return picks
        place = most.index(best.lr)
        needed = set(most[max(0, place - 1) : place + 2])
        whole = {seed: points for seed, points in reported.items() if needed <= points.keys()}
        rates = tried.intersection(*whole.values())
        return {seed: [point for point in self._points(seed) if point.lr in rates] for seed in (*self.pick, *whole)}

    @cached_property
    def pooled(self) -> list[Point]:
        """Means over all seeds, those that pick and those reported, at the rates that all of them have."""
        return picked_curve(list(self._common.values()), self.worse)

    @cached_property
    def crossed(self) -> bool:
        """Whether each reported seed, of two or more, stands at the rate that all others pick.

        It does where the best of all has neighbours on all of them, or is an end of everything that was tried.
        """
        return len(self._common) >= len(self.pick) + 2 and self._brackets(self.pooled)

    def _brackets(self, pooled: Sequence[Point]) -> bool:
        """Whether the best has neighbours, or is an end of everything that was tried."""
        best = best_point(pooled)
        if best is None or len(pooled) < 2:
            return False
        end = _end(pooled, best)
        return end is None or end == _end(self.picked, best)

    @property
    def whole(self) -> bool:
        """Whether every seed stands at the rate that all others pick, and none is still to come."""
        return self.crossed and {*self.pick, *self.seeds} == self._common.keys()

    @cached_property
    def best(self) -> Point | None:
        """The point of lowest loss over all seeds; over those that pick where it is not known to be one."""
        return best_point(self.pooled) if self.crossed else self.picked_best

    @property
    def end(self) -> End | None:
        """Whether the best is the lowest or highest rate tried, and so no optimum."""
        return _end(self.picked, self.best)

    @property
    def at_end(self) -> bool:
        """Whether its rate, or a setting that was chosen for it, is the lowest or highest tried."""
        return self.end is not None or bool(self.open_ends)

    @property
    def picked_end(self) -> End | None:
        """Whether the best of the picking seeds is."""
        return _end(self.picked, self.picked_best)

    @cached_property
    def rate_by_seed(self) -> dict[int, float]:
        """The rate at which each reported seed is reported, which is best on all the others."""
        if self.best is None:
            return {}
        if not self.crossed:
            return dict.fromkeys(self.seeds, self.best.lr)
        found = {seed: best_without(self._common, seed, self.worse) or self.best for seed in self.seeds}
        return {seed: point.lr for seed, point in found.items()}

    @cached_property
    def lrs(self) -> list[float]:
        """Every rate that was tried, ascending."""
        return sorted({trial.point.lr for trial in self.trials})

    @cached_property
    def _by_seed(self) -> dict[int, list[Trial]]:
        found: dict[int, list[Trial]] = {}
        for trial in sorted(self.trials, key=lambda trial: trial.point.lr):
            found.setdefault(trial.cell.seed, []).append(trial)
        return found

    def curve(self, seed: int) -> list[Point]:
        """One seed's points, ascending, judged against the best of them."""
        return judged(self._points(seed), self.worse)

    def _points(self, seed: int) -> list[Point]:
        return [trial.point for trial in self._by_seed.get(seed, [])]

    def mean_curve(self) -> list[tuple[float, list[Point]]]:
        """Every rate with its points on the reported seeds, ascending."""
        found = [(lr, [p for seed in self.seeds for p in self.curve(seed) if p.lr == lr]) for lr in self.lrs]
        return [(lr, points) for lr, points in found if points]

    @cached_property
    def losses(self) -> dict[int, float]:
        """At the rate of each, by reported seed; those that failed there are missing."""
        found = {
            seed: next((point for point in self.curve(seed) if point.lr == self.rate_by_seed.get(seed)), None)
            for seed in self.seeds
        }
        return {
            seed: point.loss
            for seed, point in found.items()
            if point is not None and point.stable and point.loss is not None
        }

    @property
    def failed(self) -> int:
        """Reported seeds that are not stable at the rate of each."""
        return sum(self._at_best(seed) is not None and seed not in self.losses for seed in self.seeds)

    @property
    def ended(self) -> int:
        """Reported seeds that have trained at the rate of each, whatever came of it."""
        return sum(self._at_best(seed) is not None for seed in self.seeds)

    @property
    def loss(self) -> Estimate | None:
        """None where a seed failed: a mean over those that did not would flatter."""
        return mean_of(list(self.losses.values())) if self.losses and not self.failed else None

    @cached_property
    def edges(self) -> dict[int, Edge]:
        """By reported seed, of those with more than one rate; none if one of these is stable at none of them, since
        a mean over the others would flatter."""
        found = {seed: edge_of(self.curve(seed)) for seed in self.seeds if len(self.curve(seed)) > 1}
        edges = {seed: edge for seed, edge in found.items() if edge is not None}
        return edges if len(edges) == len(found) else {}

    @property
    def edge(self) -> Bound | None:
        """Where training fails."""
        return mean_rate([edge.bracket for edge in self.edges.values()])

    @property
    def near(self) -> Bound | None:
        """The largest rate within epsilon of the own best; None where a seed failed there."""
        return mean_rate(list(self.near_by_seed.values()))

    @property
    def near_by_seed(self) -> dict[int, Bracket]:
        return self.reaches(lambda loss: loss + self.epsilon)

    def reaches(self, level: Callable[[float], float]) -> dict[int, Bracket]:
        """By reported seed, the rate up to which its loss stays at or below a level that its best one sets; none where
        a seed failed at its best rate."""
        if self.failed:
            return {}
        found = {seed: reach_of(self.curve(seed), level(loss)) for seed, loss in self.losses.items()}
        # Of a seed that holds at the best rate there is always one.
        return {seed: reach.bracket for seed, reach in found.items() if reach is not None}

    @property
    def sensitivity(self) -> Estimate | None:
        """Of the reported seeds if all trained over the whole grid, else of those that picked."""
        return self._sensitivity(self.seeds) or self._sensitivity(self.pick)

    @property
    def sensitivity_reported(self) -> bool:
        """Whether it is that of the reported seeds."""
        return self._sensitivity(self.seeds) is not None

    def _sensitivity(self, seeds: tuple[int, ...]) -> Estimate | None:
        if self.cap is None:
            return None
        low, high = self.grid[0], self.grid[-1]
        found = [
            sensitivity(curve, low, high, self.cap) if {*self.grid} <= {point.lr for point in curve} else None
            for curve in map(self.curve, seeds)
        ]
        values = [value for value in found if value is not None]
        return mean_of(values) if values and len(values) == len(found) else None

    @property
    def gap(self) -> Estimate | None:
        return self._mean(lambda trial: _minus(trial.point.loss, trial.tail))

    @property
    def spikes(self) -> Estimate | None:
        return self._mean(lambda trial: float(trial.spikes))

    @property
    def nonlinearity(self) -> Estimate | None:
        return self._mean(lambda trial: trial.nonlinearity)

    def elsewhere(self, text: str) -> Estimate | None:
        """Loss on another text, at the best rate on the own; None where a seed failed, on either."""
        found = self.elsewhere_by_seed(text)
        return mean_of(list(found.values())) if found else None

    def elsewhere_by_seed(self, text: str) -> dict[int, float]:
        """By reported seed; none at all where one failed, on either text."""
        trials = {seed: self._at_best(seed) for seed in self.losses}
        found = {
            seed: loss
            for seed, trial in trials.items()
            if trial is not None and (loss := trial.elsewhere.get(text)) is not None
        }
        return found if len(found) == len(self.losses) and not self.failed else {}

    @property
    def memory(self) -> float | None:
        """That of the run that took most."""
        return max((trial.memory for trial in self.trials if trial.memory is not None), default=None)

    @property
    def step_seconds(self) -> float | None:
        """Median over the runs that came to their end, on whatever machine they ran."""
        return self._step_seconds(self.trials)

    def slowdown_by_seed(self, theirs: Track) -> dict[int, float]:
        """Our seconds per step over another's, by reported seed, each the median over that seed's finished runs.

        Within an environment, since what another machine or commit took says nothing about a strategy; of several that
        both have, the median of the ratios. A seed that shares none is left out. What else the machine did is not told
        apart.
        """
        found = {}
        for seed in self.seeds:
            ours, others = (track._seconds_by_environment(seed) for track in (self, theirs))
            ratios = [ours[environment] / others[environment] for environment in ours.keys() & others.keys()]
            if ratios:
                found[seed] = statistics.median(ratios)
        return found

    def _seconds_by_environment(self, seed: int) -> dict[int, float]:
        trials: dict[int, list[Trial]] = {}
        for trial in self._by_seed.get(seed, ()):
            trials.setdefault(trial.cell.environment, []).append(trial)
        found = {environment: self._step_seconds(group) for environment, group in trials.items()}
        return {environment: seconds for environment, seconds in found.items() if seconds is not None}

    def _step_seconds(self, trials: Sequence[Trial]) -> float | None:
        seconds = [trial.cell.seconds for trial in trials if trial.cell.finished and trial.cell.seconds]
        return statistics.median(seconds) / self.steps if seconds and self.steps else None

    @property
    def tokens(self) -> int | None:
        """Of a whole run."""
        return self.steps * self.step_tokens if self.steps and self.step_tokens else None

    @property
    def flops(self) -> float | None:
        """Of a whole run, the same in all of them."""
        return next((trial.flops for trial in self.trials if trial.flops is not None), None)

    @property
    def parameters(self) -> int | None:
        return next((trial.cell.parameters for trial in self.trials if trial.cell.parameters is not None), None)

    def _at_best(self, seed: int) -> Trial | None:
        lr = self.rate_by_seed.get(seed)
        return next((trial for trial in self._by_seed.get(seed, []) if trial.point.lr == lr), None)

    def _mean(self, value: Callable[[Trial], float | None]) -> Estimate | None:
        trials = [trial for seed in self.seeds if (trial := self._at_best(seed)) is not None]
        found = [value(trial) for trial in trials]
        values = [number for number in found if number is not None]
        return mean_of(values) if values and len(values) == len(found) else None


def _end(curve: Sequence[Point], best: Point | None) -> End | None:
    if best is None or not curve:
        return None
    ends: dict[float, End] = {curve[-1].lr: "highest", curve[0].lr: "lowest"}
    return ends.get(best.lr)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
