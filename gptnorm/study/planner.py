"""Which runs a tolerance study makes: a function of what has ended, and of nothing else.

For one strategy at one place (`Group`), by *curves* of runs over rates:

1. Picking: the strategy as it comes is searched (`gptnorm.study.search`) on the seeds that pick, a point being their
   mean; each other setting to be tuned likewise, but for its edge. The setting of lowest loss is shortlisted, with
   those less than `study.shortlist` above it, and their edges found. Edges are found where they are reported: with
   "all" and "near".
2. Reporting: the strategy as it comes, and with each setting of the shortlist, on each reported seed, at the rates that
   `study.report` names; then each seed's own edge is bracketed, or with "around" its own optimum.
3. Where all seeds together find another best than those that pick, its neighbours are tried on all of them, too, until
   it is bracketed as closely; with "best" there is nothing to find.

The search is always replayed from its beginning, and a step is taken once all the runs that it rests on have ended. So
the runs of a study are the same in whatever order they end, and however often it is killed. What else the ledger holds
(of a smaller study that has grown) counts once all of this has come to its end, and may set it going again: what is
planned and what is reported rest on the same curves. A run of such a further step that has ended cannot be told from
one of the smaller study, so there, and there alone, the order may matter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gptnorm.study.cell import Setup
from gptnorm.study.config import Report, ToleranceConfig
from gptnorm.study.measures import Point, best_point, edge_of, picked_curve, shortlisted
from gptnorm.study.search import Seek, next_rates


class Run(NamedTuple):
    """One run, by what sets it apart."""

    strategy: str
    setup: Setup
    lr: float
    seed: int


Known = Mapping[Run, Point]
"""What the runs came to that have ended."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A strategy at one place."""

    strategy: str
    setups: tuple[Setup, ...]
    """The strategy as it comes, then every other setting to be tried."""


def wanted_runs(group: Group, known: Known, study: ToleranceConfig) -> list[Run]:
    """The runs to make now, those first that others wait for; none: the group is done."""
    return _wanted(group, known, study, extra=False) or _wanted(group, known, study, extra=True)


def _wanted(group: Group, known: Known, study: ToleranceConfig, *, extra: bool) -> list[Run]:
    """As `wanted_runs`; `extra`: whether runs count that no search asked for, which a study that has grown holds."""
    points: dict[tuple[Setup, int], dict[float, Point]] = {}
    for run, point in known.items():
        if run.strategy == group.strategy:
            points.setdefault((run.setup, run.seed), {})[run.lr] = point
    lrs = tuple(sorted(study.lrs))
    whole: Seek = "both" if study.report in ("all", "near") else "optimum"

    def of(setup: Setup, seeds: Sequence[int]) -> list[Mapping[float, Point]]:
        return [points.get((setup, seed), {}) for seed in seeds]

    def picking(setup: Setup, first: Sequence[float], seek: Seek) -> Replay:
        asked = replay(of(setup, study.pick), first, study, seek)
        if not extra or asked.missing:
            return asked
        # No extra is what the edge of a shortlisted setting took, and what all seeds have is `rates_of_all`'s to weigh.
        edge = replay(of(setup, study.pick), [point.lr for point in asked.curve], study, whole)
        common = set.intersection(*map(set, of(setup, study.seeds))) if study.seeds else set()
        return replay(of(setup, study.pick), first, study, seek, common | {point.lr for point in edge.curve})

    def missing_of(setup: Setup, rates: Sequence[float], seeds: Sequence[int]) -> list[Run]:
        runs = [Run(group.strategy, setup, lr, seed) for lr in rates for seed in seeds]
        return [run for run in runs if run not in known]

    own, *others = group.setups
    curves = {own: picking(own, lrs, whole)}
    curves |= {setup: picking(setup, lrs, "optimum") for setup in others}
    wanted = [run for setup, found in curves.items() for run in missing_of(setup, found.missing, study.pick)]
    ready = [own] if not curves[own].missing else []
    if not wanted and others:
        # At the end on all that is known, as the report does it.
        picked = {
            setup: picked_curve([list(points.values()) for points in of(setup, study.pick)], study.stability.worse)
            if extra
            else found.curve
            for setup, found in curves.items()
        }
        for setup in shortlisted(picked, study.shortlist):
            if setup != own:
                curves[setup] = picking(setup, [point.lr for point in curves[setup].curve], whole)
                wanted += missing_of(setup, curves[setup].missing, study.pick)
                ready += [setup] if not curves[setup].missing else []
    everyone = (*study.pick, *study.seeds)
    for setup in ready if study.seeds else ():
        rates = rates_of_all(curves[setup].curve, of(setup, everyone), study, extra=extra)
        missing = missing_of(setup, rates, everyone)
        if not missing:
            # Nobody goes on alone before the rates of all have settled, or it would matter who ends first.
            for seed in study.seeds:
                alone = replay(of(setup, [seed]), rates, study, SEEK[study.report], set() if extra else None)
                missing += missing_of(setup, alone.missing, [seed])
        wanted += missing
    return wanted


SEEK: dict[Report, Seek | None] = {
    "all": "edge",
    "near": "edge",
    "around": "optimum",
    "neighbours": None,
    "best": None,
}
"""What a reported seed goes on to look for from the rates that are reported."""


class Replay(NamedTuple):
    """A search, as far as the runs go that have ended."""

    curve: list[Point]
    """Points of the steps that were taken, ascending, judged against the best of them."""
    missing: list[float]
    """Rates of the next step that some seed has not trained at; none: the search has ended."""


def replay(
    by_seed: Sequence[Mapping[float, Point]],
    first: Sequence[float],
    study: ToleranceConfig,
    seek: Seek | None,
    leave: Collection[float] | None = None,
) -> Replay:
    """The search on the mean of seeds, from its first rates on.

    Args:
        by_seed: what is known, by seed and rate.
        seek: None: the first rates are all.
        leave: once the search has ended it goes on from all that is known but this; None: it does not.
    """
    grid, common = tuple(sorted(study.lrs)), set.intersection(*map(set, by_seed))
    taken: set[float] = set()
    curve: list[Point] = []
    rates = list(first)
    while rates:
        missing = [lr for lr in rates if lr not in common]
        if missing:
            return Replay(curve, missing)
        taken |= set(rates)
        curve = picked_curve([[points[lr] for lr in sorted(taken)] for points in by_seed], study.stability.worse)
        rates = next_rates(curve, grid, study.search, seek, whole=False) if seek else []
        if not rates and leave is not None:
            rates = sorted(common - taken - set(leave))
    return Replay(curve, [])


def rates_of_all(
    curve: Sequence[Point], by_seed: Sequence[Mapping[float, Point]], study: ToleranceConfig, *, extra: bool
) -> list[float]:
    """`rates_to_report`, and those that bracket the best of all seeds together, as far as the runs go that have ended.

    Args:
        curve: of the picking seeds.
        by_seed: what is known, by seed and rate, of picking and reported seeds.
        extra: whether other rates count, too, that all seeds have.
    """
    rates, grid = set(rates_to_report(curve, study)), tuple(sorted(study.lrs))
    if study.report == "best":
        return sorted(rates)
    if extra:
        rates |= set.intersection(*map(set, by_seed))
    while all(rates <= points.keys() for points in by_seed):
        pooled = picked_curve([[points[lr] for lr in sorted(rates)] for points in by_seed], study.stability.worse)
        best = best_point(pooled)
        if best is None:
            break
        tried = sorted(rates | {point.lr for point in curve})
        place = tried.index(best.lr)
        more = {*tried[max(0, place - 1) : place + 2]} - rates
        more = more or {*next_rates(pooled, grid, study.search, "optimum", whole=False)} - rates
        if not more:
            break
        rates |= more
    return sorted(rates)


def rates_to_report(curve: Sequence[Point], study: ToleranceConfig) -> list[float]:
    """What `study.report` says of a curve that the picking seeds made; none where they found nothing stable."""
    rates = [point.lr for point in curve]
    best, edge = best_point(curve), edge_of(curve)
    if best is None or edge is None or study.report == "all":
        return rates if study.report == "all" else []
    if study.report == "best":
        return [best.lr]
    place = rates.index(best.lr)
    if study.report in ("around", "neighbours"):
        return rates[max(0, place - 1) : place + 2]
    # Between best and edge no rate is left out: a reach is read off between two, and a failure may hide between them.
    below, last = rates[max(0, place - 1)], edge.unstable or edge.stable
    return [lr for lr in rates if below <= lr <= last]
