"""How far each strategy is from the best one, seed by seed, and how much a few seeds can tell.

Seeds are paired: seed s gives both strategies the same data order, so the spread of the
differences is what matters, not the spread of the losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptnorm.report.results import Row, Study
from gptnorm.statistics import sample_sd, t_quantile


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Loss of `strategy` minus loss of `reference`, each at its own best learning rate."""

    strategy: str
    reference: str
    mean: float
    sd: float | None
    """Sample standard deviation of the paired differences; None for fewer than two seeds."""
    seeds: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % paired t-interval of the mean gap, normal differences assumed; None for one seed."""
        if self.sd is None:
            return None
        half = t_quantile(self.seeds - 1) * self.sd / math.sqrt(self.seeds)
        return self.mean - half, self.mean + half

    @property
    def may_be_chance(self) -> bool:
        """Whether the interval holds zero, or there is none."""
        return self.interval is None or self.interval[0] <= 0 <= self.interval[1]


def paired_gaps(study: Study) -> tuple[Gap, ...]:
    """The gap of every other strategy that has a best, in the order of `study.ranked`."""
    if not study.ranked:
        return ()
    reference, *others = study.ranked
    return tuple(_gap(row, reference) for row in others)


def _gap(row: Row, reference: Row) -> Gap:
    assert row.best is not None
    assert reference.best is not None
    seeds = sorted(row.best.losses.keys() & reference.best.losses.keys())
    differences = [row.best.losses[seed] - reference.best.losses[seed] for seed in seeds]
    return Gap(
        strategy=row.strategy,
        reference=reference.strategy,
        mean=sum(differences) / len(differences),
        sd=sample_sd(differences),
        seeds=len(seeds),
    )
