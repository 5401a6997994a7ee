"""Which seeds should choose a setting that is tuned beside the rate? How often intervals hold the truth, by rule.

    python benchmarks/choosing.py

Two strategies of the same best loss, the first with k settings of which one is better by a gap than all others, the
second with as many or with the best alone. Five reported seeds and one that picks; every run has normal noise of sd 1,
so that losses and gaps are in units of it. The setting is chosen

- one: on the picking seed;
- others: for each reported seed on the mean of all others;
- all: on the mean of all six seeds.

Printed are the share of 95 % t-intervals of the difference that hold the true one, 0, and the mean difference: a wrong
choice makes it positive, and the luck of what is chosen negative.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from gptnorm.statistics import t_quantile

Rule = Literal["one", "others", "all"]

REPORTED = 5
STUDIES = 20_000
SETTINGS = ((2, 2), (3, 3), (9, 9), (2, 1), (3, 1), (9, 1))
GAPS = (0.0, 0.3, 0.6, 1.0, 1.5, 3.0)


def tuned(draw: np.random.Generator, settings: int, gap: float, rule: Rule) -> np.ndarray:
    """Losses of the reported seeds at the setting chosen (study, seed)."""
    bottoms = np.full(settings, gap)
    bottoms[0] = 0.0
    losses = bottoms + draw.normal(size=(STUDIES, 1 + REPORTED, settings))
    reported, total = losses[:, 1:], losses.sum(axis=1, keepdims=True)
    by = {"one": losses[:, :1], "others": total - reported, "all": total}[rule].argmin(axis=2)
    chosen = np.broadcast_to(by, (STUDIES, REPORTED))
    return np.take_along_axis(reported, chosen[..., None], axis=2)[..., 0]


def held(ours: int, theirs: int, gap: float, rule: Rule) -> tuple[float, float]:
    """The share of intervals that hold 0, and the mean difference."""
    draw = np.random.default_rng(0)
    difference = tuned(draw, ours, gap, rule) - tuned(draw, theirs, gap, rule)
    mean = difference.mean(axis=1)
    half = t_quantile(REPORTED - 1) * difference.std(axis=1, ddof=1) / REPORTED**0.5
    return float((abs(mean) <= half).mean()), float(mean.mean())


def main() -> None:
    table = Table(title=f"Intervals that hold the true difference, and the mean difference; {STUDIES:,} studies each")
    for head in ("settings, ours", "theirs", "gap", *get_args(Rule)):
        table.add_column(head, justify="right")
    for ours, theirs in SETTINGS:
        for gap in GAPS:
            found = [held(ours, theirs, gap, rule) for rule in get_args(Rule)]
            entries = [f"{100 * share:.0f} % {mean:+.2f}" for share, mean in found]
            table.add_row(str(ours), str(theirs), f"{gap:g}", *entries, end_section=gap == GAPS[-1])
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
