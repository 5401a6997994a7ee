"""Exponents of power laws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from gptnorm.study.measures import Estimate, mean_of


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y on log x by least squares; nan where a value is not above 0 or there is one point."""
    if len(set(x)) < 2 or not all(value > 0 for value in y):
        return math.nan
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def exponent_over(seeds: Mapping[int, Sequence[float]], x: Sequence[float]) -> Estimate:
    """Of each seed's own values, their mean with its 95 % t-interval: seed by seed, so that what seeds do not share
    falls out of the slope."""
    return mean_of([exponent(x, values) for values in seeds.values()])


def holds_zero(found: Estimate, zero: float = 0.0) -> bool:
    """Whether the interval holds `zero`; without one, nothing is excluded."""
    return (found.low is None or found.low <= zero) and (found.high is None or found.high >= zero)
