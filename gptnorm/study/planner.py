"""Which runs a tolerance study makes: a function of what has ended, and of nothing else.

For one strategy at one place (`Group`), by *curves* of runs over rates:

1. Picking: the strategy as it comes is searched (`gptnorm.study.search`) on the seeds that pick, a point being their
   mean; each other setting to be tuned likewise, but for its edge. The setting of lowest loss is chosen, and its edge
   found.
2. Reporting: the strategy as it comes, and as it was chosen to be, on each reported seed, at the rates that
   `study.report` names; then each seed's own edge is bracketed.

The search is always replayed from its beginning, and a step is taken once all the runs that it rests on have ended. So
the runs of a study are the same in whatever order they end, and however often it is killed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gptnorm.study.cell import Setup
from gptnorm.study.config import ToleranceConfig
from gptnorm.study.measures import Point, best_point, edge_of, judged
from gptnorm.study.search import Seek, next_rates


class Run(NamedTuple):
    """One run, by what sets it apart."""

    strategy: str
    setup: Setup
    lr: float
    seed: int


Known = Callable[[Run], Point | None]
"""What a run came to; None: it has not ended."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A strategy at one place."""

    strategy: str
    setups: tuple[Setup, ...]
    """The strategy as it comes, then every other setting to be tried."""


def wanted_runs(group: Group, known: Known, study: ToleranceConfig) -> list[Run]:
    """The runs to make now, those first that others wait for; none: the group is done."""
    lrs = tuple(sorted(study.lrs))

    def picking(setup: Setup, first: Sequence[float], seek: Seek) -> Replay:
        def mean(lr: float) -> Point | None:
            return _mean(lr, [known(Run(group.strategy, setup, lr, seed)) for seed in study.pick])

        return replay(mean, first, lrs, study, seek)

    def pick_runs(setup: Setup, rates: Sequence[float]) -> list[Run]:
        runs = [Run(group.strategy, setup, lr, seed) for lr in rates for seed in study.pick]
        return [run for run in runs if known(run) is None]

    own, *others = group.setups
    curves = {own: picking(own, lrs, "both")}
    curves |= {setup: picking(setup, lrs, "optimum") for setup in others}
    wanted = [run for setup, found in curves.items() for run in pick_runs(setup, found.missing)]
    ready = [own] if not curves[own].missing else []
    if not wanted and others:
        chosen = chosen_setup({setup: found.curve for setup, found in curves.items()})
        if chosen is not None and chosen != own:
            curves[chosen] = picking(chosen, [point.lr for point in curves[chosen].curve], "both")
            wanted += pick_runs(chosen, curves[chosen].missing)
            ready += [chosen] if not curves[chosen].missing else []
    for seed in study.seeds:
        for setup in ready:
            first = rates_to_report(curves[setup].curve, study)

            def single(lr: float, setup: Setup = setup, seed: int = seed) -> Point | None:
                return known(Run(group.strategy, setup, lr, seed))

            seek: Seek | None = None if study.report == "best" else "edge"
            grid = lrs if study.report == "all" else first
            missing = replay(single, first, grid, study, seek).missing
            wanted += [Run(group.strategy, setup, lr, seed) for lr in missing]
    return wanted


class Replay(NamedTuple):
    """A search, as far as the runs go that have ended."""

    curve: list[Point]
    """Points of the steps that were taken, ascending, judged against the best of them."""
    missing: list[float]
    """Rates of the next step that are not known; none: the search has ended."""


def replay(
    known: Callable[[float], Point | None],
    first: Sequence[float],
    grid: Sequence[float],
    study: ToleranceConfig,
    seek: Seek | None,
) -> Replay:
    """The search from its first rates on.

    Args:
        grid: see `next_rates`.
        seek: None: the first rates are all.
    """
    curve: list[Point] = []
    rates = list(first)
    while rates:
        points = {lr: known(lr) for lr in rates}
        missing = [lr for lr, point in points.items() if point is None]
        if missing:
            return Replay(curve, missing)
        tried = sorted([*curve, *(point for point in points.values() if point is not None)])
        curve = judged(tried, study.stability.worse)
        rates = next_rates(curve, grid, study.search, seek) if seek and len(grid) > 1 else []
    return Replay(curve, [])


def chosen_setup(curves: dict[Setup, list[Point]]) -> Setup | None:
    """That of the lowest loss, of equals the first; None if nothing is stable."""
    bests = {setup: best_point(curve) for setup, curve in curves.items()}
    losses = {setup: best.loss for setup, best in bests.items() if best is not None and best.loss is not None}
    return min(losses, key=lambda setup: losses[setup], default=None)


def rates_to_report(curve: Sequence[Point], study: ToleranceConfig) -> list[float]:
    """What `study.report` says of a curve that the picking seeds made; none where they found nothing stable."""
    rates = [point.lr for point in curve]
    best, edge = best_point(curve), edge_of(curve)
    if best is None or edge is None or study.report == "all":
        return rates if study.report == "all" else []
    if study.report == "best":
        return [best.lr]
    # Between best and edge no rate is left out: a reach is read off between two, and a failure may hide between them.
    below, last = rates[max(0, rates.index(best.lr) - 1)], edge.unstable or edge.stable
    return [lr for lr in rates if below <= lr <= last]


def _mean(lr: float, points: Sequence[Point | None]) -> Point | None:
    """Of several seeds; stable where all are, None where one is missing."""
    losses = [point.loss for point in points if point is not None and point.loss is not None]
    if any(point is None for point in points):
        return None
    whole = len(losses) == len(points)
    stable = whole and all(point is not None and point.stable for point in points)
    return Point(lr, sum(losses) / len(losses) if whole else None, stable)
