"""How far each strategy is from the best one, seed by seed, and how much a few seeds can tell.

Seeds are paired: seed s gives both strategies the same data order, so the spread of the
differences is what matters, not the spread of the losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptnorm.report.results import Row, Study, sample_sd


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


def t_quantile(nu: int, level: float = 0.95) -> float:
    """The x with P(|T| ≤ x) = level for Student's t with ν degrees of freedom, by bisection.

    12.7 for two seeds, 4.3 for three, 2.8 for five: the familiar 2 holds for many seeds only.
    """
    low, high = 0.0, 1.0
    while _within(high, nu) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, nu) < level else (low, middle)
    return high


def _within(x: float, nu: int) -> float:
    """P(|T| ≤ x): the closed series of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(x / math.sqrt(nu))
    cos, sin = math.cos(theta), math.sin(theta)
    if nu % 2:
        term, total = cos, 0.0
        for k in range(1, nu - 1, 2):
            total += term
            term *= cos * cos * (k + 1) / (k + 2)
        return 2 / math.pi * (theta + sin * total)
    term, total = 1.0, 0.0
    for k in range(0, nu - 1, 2):
        total += term
        term *= cos * cos * (k + 1) / (k + 2)
    return sin * total
