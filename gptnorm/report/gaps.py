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
    def standard_error(self) -> float | None:
        """sd / √seeds."""
        return None if self.sd is None else self.sd / math.sqrt(self.seeds)

    @property
    def within_seed_spread(self) -> bool:
        """|mean| ≤ 2·sd/√n, or too few seeds to tell."""
        return self.standard_error is None or abs(self.mean) <= 2 * self.standard_error


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


def coverage(seeds: int, errors: float = 2.0) -> float:
    """How often mean ± `errors` standard errors from `seeds` normal values holds the true mean.

    P(|T| ≤ errors) for Student's t with ν = seeds − 1 degrees of freedom, by Simpson's rule. The
    familiar 95 % holds for many seeds only: it is 70 % for two and 82 % for three.
    """
    assert seeds >= 2
    nu = seeds - 1
    log_scale = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)
    steps = 400
    width = errors / steps
    total = 0.0
    for index in range(steps + 1):
        weight = 1 if index in (0, steps) else 4 if index % 2 else 2
        t = index * width
        total += weight * math.exp(log_scale - (nu + 1) / 2 * math.log1p(t * t / nu))
    return 2 * total * width / 3
