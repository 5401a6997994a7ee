r"""What several budgets tell: how many times fewer steps to the same loss, and the loss after the same time.

A budget T is the number of steps of a full schedule; loss curves below are over budgets, one per seed, each budget at
the strategy's own best rate there. Between two budgets the loss is a straight line in ln T.

| measure | definition | source |
|---|---|---|
| speed-up at T | $T / T'$, $T'$ the first budget at which our loss is the baseline's at T | docs/tolerance.md |
| difference at equal time | our loss at $T\, s_b / s$ minus theirs at T; s, s_b: a seed's seconds per step | ours |

All budgets have the same tokens per step, so fewer steps are fewer tokens. The source does not say how it reads $T'$
off; nothing is extrapolated here, so at the ends of the budgets only a bound may be known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, NamedTuple

from gptnorm.study.measures import FEWEST_BOUNDED, Estimate, geometric_mean, paired_difference

LossByBudget = Mapping[float, float]
"""Loss by budget."""


class Needed(NamedTuple):
    """The budget that a loss takes."""

    budget: float
    bound: Literal["at most", "more than"] | None
    """The smallest budget's loss is lower still, or the largest one's is not low enough."""


def needed(curve: LossByBudget, level: float) -> Needed | None:
    """The first budget at which the loss comes down to `level`; None for a curve without a budget."""
    points = sorted(curve.items())
    if not points:
        return None
    if points[0][1] <= level:
        return Needed(points[0][0], None if points[0][1] == level else "at most")
    for (start, above), (end, loss) in pairwise(points):
        if loss <= level:
            share = (above - level) / (above - loss)
            return Needed(start * (end / start) ** share, None)
    return Needed(points[-1][0], "more than")


def tried(curve: LossByBudget, level: float) -> list[float]:
    """The budgets that `needed` rests on: up to the first whose loss is at most `level`, or all."""
    budgets = sorted(curve)
    first = next((index for index, budget in enumerate(budgets) if curve[budget] <= level), len(budgets))
    return budgets[: first + 1]


def loss_at(curve: LossByBudget, budget: float) -> float | None:
    """The loss at a budget; None outside those of the curve."""
    known = around(curve, budget)
    if not known:
        return None
    start, end = known[0], known[-1]
    if start == end:
        return curve[start]
    return curve[start] + (curve[end] - curve[start]) * math.log(budget / start) / math.log(end / start)


def around(curve: LossByBudget, budget: float) -> list[float]:
    """The budgets of the curve that its loss at `budget` rests on: that one, or the two beside it; none outside."""
    for known in curve:
        if math.isclose(known, budget, rel_tol=1e-9):
            return [known]
    return next(([start, end] for start, end in pairwise(sorted(curve)) if start < budget < end), [])


def speed_up(ours: Mapping[int, LossByBudget], theirs: Mapping[int, LossByBudget], budget: float) -> Estimate | None:
    """How many times less of it (fewer steps, less compute) takes us to the baseline's loss at `budget`.

    Over the seeds that have both.

    Args:
        ours, theirs: a curve for each seed.

    Returns:
        The geometric mean with its interval. Where some seed gives a bound alone, the interval has no end on that side;
        None where seeds give bounds on both sides, or there are fewer than `measures.FEWEST_BOUNDED`, and where no
        seed has both.
    """
    found = [
        (budget / need.budget, need.bound)
        for seed in sorted(ours.keys() & theirs.keys())
        if budget in theirs[seed] and (need := needed(ours[seed], theirs[seed][budget])) is not None
    ]
    bounds = {bound for _, bound in found}
    bounded = bounds - {None}
    if not found or len(bounded) > 1 or (bounded and len(found) < FEWEST_BOUNDED):
        return None
    mean = geometric_mean([ratio for ratio, _ in found])
    low = None if "more than" in bounds else mean.low
    high = None if "at most" in bounds else mean.high
    return Estimate(value=mean.value, low=low, high=high, seeds=mean.seeds)


def at_equal_time(
    ours: Mapping[int, LossByBudget], theirs: Mapping[int, LossByBudget], budget: float, slowdown: Mapping[int, float]
) -> Estimate | None:
    """Our loss minus the baseline's at `budget`, we being given the same time, seed by seed.

    Over the seeds that have both, and all budgets that any has; the others are still to come.

    Args:
        slowdown: for each seed, our seconds per step over the baseline's; none where they cannot be compared.

    Returns:
        None where no seed is left, a seed has no slowdown, or the time of one is that of a budget outside ours: near
        the first and the last budget it is chance whose time is inside, and those alone would be a selection.
    """
    budgets = set().union(*ours.values())
    whole = {seed for seed, curve in ours.items() if curve.keys() == budgets and budget in theirs.get(seed, {})}
    if not whole <= slowdown.keys():
        return None
    our_loss = {seed: loss_at(ours[seed], budget / slowdown[seed]) for seed in whole}
    known = {seed: loss for seed, loss in our_loss.items() if loss is not None}
    if len(known) < len(our_loss):
        return None
    return paired_difference(known, {seed: theirs[seed][budget] for seed in known})
