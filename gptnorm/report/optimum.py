r"""The best and the largest stable learning rate of one strategy at one size.

A rate counts as *stable* if every seed finished there and ended at least `MARGIN` nats below the unigram entropy: a
run that collapsed onto token frequencies is finite, too.

The *best rate* is the vertex of the parabola through the loss at the best stable rate of the grid and at its two
neighbours, loss against $\ln$ rate; with an even grid of step h,
$\ln\eta^* = \ln\eta_0 + \tfrac{h}{2}\,(y_- - y_+) / (y_- - 2 y_0 + y_+)$. It is no better known than the parabola is
right, and never more than half a step from the grid's own best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptnorm.report.results import Row
from gptnorm.study.outcome import Stability

MARGIN = Stability().margin
"""Nats below the unigram entropy."""


Tried = tuple[float, float | None]
"""A learning rate, and the loss there; None where it is not stable."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """Where the loss is lowest."""

    lr: float
    """The vertex; on the grid where there is none."""
    grid_lr: float
    loss: float
    """At `grid_lr`."""
    kind: Literal["fit", "beside", "lowest", "highest", "only"]
    """fit: a vertex. beside: a neighbour is not stable, so the grid's best stands for it. The others: an edge of the
    rates tried, so no optimum."""

    @property
    def is_optimum(self) -> bool:
        """Whether rates on both sides were tried and found worse."""
        return self.kind in ("fit", "beside")


@dataclass(frozen=True, kw_only=True)
class Stable:
    """The largest stable rate of the grid."""

    lr: float
    open: bool
    """Whether it is the highest tried, so that the true one may be higher."""


def best_rate(points: Sequence[Tried]) -> Best | None:
    """Of the rates tried, in ascending order; None if none of them is stable."""
    stable = [(loss, index) for index, (_, loss) in enumerate(points) if loss is not None]
    if not stable:
        return None
    loss, index = min(stable)
    here = points[index][0]
    if len(points) == 1:
        return Best(lr=here, grid_lr=here, loss=loss, kind="only")
    if index in (0, len(points) - 1):
        return Best(lr=here, grid_lr=here, loss=loss, kind="highest" if index else "lowest")
    (left, left_loss), (right, right_loss) = points[index - 1], points[index + 1]
    if left_loss is None or right_loss is None:
        return Best(lr=here, grid_lr=here, loss=loss, kind="beside")
    vertex = _vertex((left, here, right), (left_loss, loss, right_loss))
    return Best(lr=vertex, grid_lr=here, loss=loss, kind="fit")


def largest_stable(points: Sequence[Tried]) -> Stable | None:
    """Of the rates tried, in ascending order; None if none of them is stable."""
    stable = [lr for lr, loss in points if loss is not None]
    return Stable(lr=stable[-1], open=stable[-1] == points[-1][0]) if stable else None


def mean_points(row: Row, entropy: float | None) -> list[Tried]:
    """The row's rates of which it is known whether they are stable, with the mean loss over seeds where they are.

    One seed that fails settles it; a rate where none has, and some are still to come, is left out.
    """
    found = []
    for entry in row.entries:
        if entry.diverged or any(loss > _limit(entropy) for loss in entry.losses.values()):
            found.append((entry.lr, None))
        elif len(entry.losses) == entry.planned:
            found.append((entry.lr, entry.mean))
    return found


def seed_points(row: Row, seed: int, entropy: float | None) -> list[Tried]:
    """The same of one seed alone."""
    found = []
    for entry in row.entries:
        if seed in entry.losses or seed in entry.diverged:
            loss = entry.losses.get(seed)
            found.append((entry.lr, loss if loss is not None and loss <= _limit(entropy) else None))
    return found


def _limit(entropy: float | None) -> float:
    return math.inf if entropy is None else entropy - MARGIN


def _vertex(lrs: tuple[float, float, float], losses: tuple[float, float, float]) -> float:
    """The lowest point of the parabola in ln lr through three points, the middle one the lowest."""
    u, _, v = (math.log(lr / lrs[1]) for lr in lrs)
    a, b = ((losses[side] - losses[1]) / x for side, x in ((0, u), (2, v)))
    # y = y0 + c1 x + c2 x^2 with c2 = (b - a) / (v - u), c1 = a - c2 u.
    curvature = (b - a) / (v - u)
    if curvature <= 0:  # three equal losses
        return lrs[1]
    return lrs[1] * math.exp(-(a - curvature * u) / (2 * curvature))
