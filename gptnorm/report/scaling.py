r"""How loss, best rate and best batch move with compute, size and text: what several places tell together.

A place has a model, $D$ tokens and $B$ tokens per step; $C$ is the FLOPs of its run (`gptnorm.plan.flops`) and
$M = C / D$ those per token, which stands for the size: six times the weights that multiply, and attention.

| law | fitted to |
|---|---|
| $L = a\, C^{-b}$ | the frontier: each model and text at its best batch, of these what no cheaper one matches |
| $\eta^* \propto M^\alpha D^\beta B^\gamma$ | the places where every reported seed has an optimum |
| $B^* \propto M^\alpha D^\beta$ | each model and text where every one has an optimum among three batches or more |

The forms are those of Kaplan et al. 2020 (arXiv 2001.08361) and, but for M in place of their weights and B in the
second, Li et al. 2025 (arXiv 2503.04715). The first has no irreducible loss, so it says nothing beyond the places.

Laws are straight lines in logarithms, fitted by least squares to each reported seed by itself; an exponent is the mean
over seeds with its 95 % t-interval. That says how far seeds agree, not how straight the line is: for that there is the
rms of what the mean over seeds leaves. Frontier and best batches are picked on the picking seeds. A seed's best rate or
batch is the vertex of the parabola through its lowest loss and the neighbours (`gptnorm.report.optimum`), that of a
batch from the losses at the best rates of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptnorm.report.budgets import LossByBudget, speed_up
from gptnorm.report.optimum import Tried, best_rate
from gptnorm.report.tolerance import ToleranceStudy
from gptnorm.report.track import Track
from gptnorm.study.cell import TEXT, Pairs
from gptnorm.study.measures import Estimate, Point, mean_of

RUN = ("train.steps", "train.batch_size")
"""Settings of a place that are not its model's."""


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One strategy at one place.

    A seed looks for its best rate from that of the picking seeds on: an interval over seeds holds no error of the
    picking, which on flat or noisy curves is the larger one.
    """

    track: Track
    model: Pairs
    """What the place sets beside `RUN`."""
    tokens: int
    """D."""
    batch: int
    """B."""
    flops: float
    """C."""

    @property
    def size(self) -> float:
        """M."""
        return self.flops / self.tokens

    @property
    def compared(self) -> bool:
        """Whether its best rate is an optimum, and every reported seed has trained there and is stable."""
        track = self.track
        return track.best is not None and not track.end and len(track.losses) == len(track.seeds)

    @property
    def picked_loss(self) -> float:
        """Of the picking seeds at their best rate."""
        best = self.track.picked_best
        return math.inf if best is None or best.loss is None else best.loss

    @property
    def picked_rate(self) -> float | None:
        """The best rate of the picking seeds' mean; None where it is no optimum."""
        return _best_rate(self.track.picked)

    @property
    def rates(self) -> dict[int, float]:
        """The best rate of each reported seed, of those that have an optimum."""
        found = {seed: _best_rate(self.track.curve(seed)) for seed in self.track.seeds}
        return {seed: rate for seed, rate in found.items() if rate is not None}

    @property
    def all_have_rates(self) -> bool:
        """Whether every reported seed has an optimum."""
        return bool(self.track.seeds) and self.rates.keys() == set(self.track.seeds)


@dataclass(frozen=True, kw_only=True)
class Law:
    """A fitted power law."""

    exponents: dict[str, Estimate]
    """By what they belong to, such as "C"."""
    rms: float
    """Of the logarithms' residuals, the mean over seeds being fitted: about the relative error."""
    points: int


def spots_of(study: ToleranceStudy, strategy: str) -> list[Spot]:
    """The strategy as it comes at every place whose compute is known, that of the least compute first.

    None where places have texts of their own: losses on different texts are no points of one law.
    """
    if TEXT in study.mapped:
        return []
    found = []
    for place in study.places:
        track = place.own.get(strategy)
        if track is None or not track.flops or not track.tokens or not track.step_tokens:
            continue
        model = tuple((key, value) for key, value in place.settings if key not in RUN)
        found.append(Spot(track=track, model=model, tokens=track.tokens, batch=track.step_tokens, flops=track.flops))
    return sorted(found, key=lambda spot: (spot.flops, spot.batch))


def by_text(spots: Sequence[Spot]) -> dict[tuple[Pairs, int], list[Spot]]:
    """The batches of each model and amount of text."""
    groups: dict[tuple[Pairs, int], list[Spot]] = {}
    for spot in spots:
        groups.setdefault((spot.model, spot.tokens), []).append(spot)
    return groups


def best_of(group: Sequence[Spot]) -> Spot | None:
    """The batch of the lowest loss on the picking seeds; None where that one cannot be compared: the next best is not
    the best."""
    best = min(group, key=lambda spot: spot.picked_loss)
    return best if best.compared else None


def frontier(spots: Sequence[Spot]) -> list[Spot]:
    """Those that no cheaper one matches, each model and text at its best batch, on the seeds that pick."""
    best = [spot for group in by_text(spots).values() if (spot := best_of(group))]
    kept: list[Spot] = []
    for spot in sorted(best, key=lambda spot: (spot.flops, spot.picked_loss)):
        if not kept or spot.picked_loss < kept[-1].picked_loss:
            kept.append(spot)
    return kept


def loss_law(spots: Sequence[Spot]) -> Law | None:
    """Of the frontier; the exponent of "C" is -b."""
    found = frontier(spots)
    seeds = seeds_of_all([spot.track.losses for spot in found])
    return fit_law({s: [spot.track.losses[s] for spot in found] for s in seeds}, {"C": [spot.flops for spot in found]})


def rate_law(spots: Sequence[Spot]) -> Law | None:
    """Of every reported seed's best rates; where these are nowhere known (`report = "best"`), of the picking seeds'."""
    known = [spot for spot in spots if spot.all_have_rates]
    values = {seed: [spot.rates[seed] for spot in known] for seed in seeds_of_all([spot.rates for spot in known])}
    if not known:
        known = [spot for spot in spots if spot.picked_rate]
        values = {0: [spot.picked_rate or math.nan for spot in known]}
    return fit_law(
        values, {"M": [s.size for s in known], "D": [s.tokens for s in known], "B": [s.batch for s in known]}
    )


def best_batches(group: Sequence[Spot]) -> dict[int, float]:
    """B* of each reported seed, in tokens per step, of those that have an optimum among three batches or more; none
    where the best batch cannot be compared."""
    if best_of(group) is None:
        return {}
    ordered = sorted((spot for spot in group if spot.compared), key=lambda spot: spot.batch)
    found = {
        seed: _vertex([(float(spot.batch), spot.track.losses[seed]) for spot in ordered])
        for seed in seeds_of_all([spot.track.losses for spot in ordered])
    }
    return {seed: batch for seed, batch in found.items() if batch is not None}


def batch_law(spots: Sequence[Spot]) -> Law | None:
    """Of the models and amounts of text for which every seed has a best batch."""
    groups = list(by_text(spots).values())
    found = [(group[0], best_batches(group)) for group in groups]
    whole = [(spot, batches) for spot, batches in found if batches.keys() == set(spot.track.seeds)]
    seeds = seeds_of_all([batches for _, batches in whole])
    return fit_law(
        {seed: [batches[seed] for _, batches in whole] for seed in seeds},
        {"M": [spot.size for spot, _ in whole], "D": [spot.tokens for spot, _ in whole]},
    )


def saving(ours: Sequence[Spot], theirs: Sequence[Spot], flops: float) -> Estimate | None:
    """How many times less compute we take to the other's loss at `flops` on its frontier; see `budgets.speed_up`."""
    return speed_up(_curves(frontier(ours)), _curves(frontier(theirs)), flops)


def fit_law(values: Mapping[int, Sequence[float]], columns: Mapping[str, Sequence[float]]) -> Law | None:
    r"""$\ln y = c + \sum_k e_k \ln x_k$ by least squares, over the x that differ at all.

    Args:
        values: y, by seed, in the order of the columns.
        columns: x.

    Returns:
        None without a seed, where nothing differs, with fewer than two points more than exponents, or where one x is
        a power of others (all text grows as the model, say), so that their exponents can't be told apart.
    """
    names = [name for name, column in columns.items() if column and max(column) > min(column) * (1 + 1e-6)]
    if not values or not names:
        return None
    logs = np.stack([np.log(np.asarray(columns[name], dtype=float)) for name in names], axis=1)
    centred = logs - logs.mean(axis=0)
    points = len(logs)
    # Columns of length one: what counts is the angle between them, not how far each reaches.
    units = centred / np.linalg.norm(centred, axis=0)
    if points < len(names) + 2 or np.linalg.svd(units, compute_uv=False)[-1] < 0.05:
        return None

    def solve(y: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(centred, y - y.mean(), rcond=None)[0]

    ys = {seed: np.log(np.asarray(found, dtype=float)) for seed, found in values.items()}
    fits = [solve(y) for y in ys.values()]
    mean = np.mean(list(ys.values()), axis=0)
    left = mean - mean.mean() - centred @ solve(mean)
    return Law(
        exponents={name: mean_of([float(fit[i]) for fit in fits]) for i, name in enumerate(names)},
        rms=float(np.sqrt(np.mean(left**2))),
        points=points,
    )


def _best_rate(curve: Sequence[Point]) -> float | None:
    return _vertex([(point.lr, point.loss if point.stable else None) for point in curve])


def _vertex(points: Sequence[Tried]) -> float | None:
    best = best_rate(sorted(points, key=lambda point: point[0]))
    return best.lr if best is not None and best.is_optimum else None


def seeds_of_all(found: Sequence[Mapping[int, float]]) -> list[int]:
    """Those that all have."""
    return sorted(set.intersection(*(set(by_seed) for by_seed in found))) if found else []


def _curves(spots: Sequence[Spot]) -> dict[int, LossByBudget]:
    """Loss by compute, for each reported seed."""
    return {
        s: {spot.flops: spot.track.losses[s] for spot in spots} for s in seeds_of_all([p.track.losses for p in spots])
    }
