"""How far each strategy is from the best one, seed by seed, and how much a few seeds can tell.

Seeds are paired: seed s gives both strategies the same data order, so the spread of the
differences is what matters, not the spread of the losses.
"""

from __future__ import annotations

from gptnorm.report.estimates import side
from gptnorm.report.results import Study
from gptnorm.study.measures import Estimate, paired_difference


def paired_gaps(study: Study) -> dict[str, Estimate]:
    """Loss of every other strategy that has a best minus that of the first of `study.ranked`, in its order.

    Each at its own best learning rate.
    """
    if not study.ranked:
        return {}
    (_, theirs), *others = ((row.strategy, row.best.losses) for row in study.ranked if row.best is not None)
    gaps = {name: paired_difference(ours, theirs) for name, ours in others}
    return {name: gap for name, gap in gaps.items() if gap is not None}


def may_be_chance(gap: Estimate) -> bool:
    """Whether its interval holds zero, or there is none."""
    return not side(gap)
