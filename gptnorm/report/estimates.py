"""Means over seeds and their intervals as text, one way for every table and sentence."""

from __future__ import annotations

from gptnorm.format import MISSING, digits_text, loss_text, short_text
from gptnorm.report.grids import Entry, Stacked
from gptnorm.study.measures import Bound, Estimate, Kept

EDGE = "edge"
"""Marks a best rate that is the lowest or highest tried, and what is compared at one."""


def ratio_text(ratio: float) -> str:
    """A ratio to three significant digits: "3.10", "17.8", "1.52e3"."""
    return digits_text(ratio) if 0.01 <= ratio < 999.5 else short_text(ratio)


def difference_text(nats: float) -> str:
    """A difference of losses with its sign."""
    # Adding zero makes -0.0 the +0.0 that it is.
    return f"{round(nats, 4) + 0.0:+.4f}"


def loss_entry(found: Estimate | None) -> Entry:
    """ "1.4321 [1.4300, 1.4342]"; the mean alone from one seed."""
    if found is None or found.low is None or found.high is None:
        return loss_text(None if found is None else found.value)
    return Stacked(loss_text(found.value), f"[{loss_text(found.low)}, {loss_text(found.high)}]")


def difference_entry(found: Estimate | None) -> Entry:
    """ "-0.0657 [-0.0712, -0.0602]"; the mean alone from one seed."""
    if found is None:
        return MISSING
    if found.low is None or found.high is None:
        return difference_text(found.value)
    return Stacked(difference_text(found.value), f"[{difference_text(found.low)}, {difference_text(found.high)}]")


def rate_entry(found: Bound | None) -> Entry:
    """ "1.48e-2 [1.32e-2, 1.66e-2]", or "≥ 5.62e-2 [4.2e-2, ∞)" where no failure was seen."""
    if found is None:
        return MISSING
    value = short_text(found.value)
    if found.at_least:
        value = f"≥ {value}"
        return value if found.low is None else Stacked(value, f"[{short_text(found.low)}, ∞)")
    if found.low is None or found.high is None:
        return value
    return Stacked(value, f"[{short_text(found.low)}, {short_text(found.high)}]")


def kept_entry(found: Kept | None) -> Entry:
    """ "1.48e-2 [1.32e-2, 1.66e-2]" with "≥" where the highest rate tried is reached, "∞)" where the interval is open
    above, "–" for a lower end that is not known; "≤ 1.66e-2" where that is all that is known."""
    if found is None or (found.value is None and found.high is None):
        return MISSING
    high = None if found.high is None else short_text(found.high)
    if found.value is None:
        return f"≤ {high}"
    value = f"≥ {short_text(found.value)}" if found.at_least else short_text(found.value)
    if found.seeds == 1:
        return value
    low = MISSING if found.low is None else short_text(found.low)
    return Stacked(value, f"[{low}, ∞)" if high is None else f"[{low}, {high}]")


def marked(entry: Entry, at_end: bool) -> Entry:
    """With the mark behind the number, if there is one."""
    if not at_end or entry == MISSING:
        return entry
    return f"{entry} {EDGE}" if isinstance(entry, str) else Stacked(f"{entry.value} {EDGE}", entry.below)


def ratio_entry(found: Estimate | None) -> Entry:
    """ "3.10 [2.20, 4.40]", "≥ 2.20" or "≤ 4.40" where only one end is known: never without any."""
    if found is None:
        return MISSING
    if found.low is not None and found.high is not None:
        return Stacked(ratio_text(found.value), f"[{ratio_text(found.low)}, {ratio_text(found.high)}]")
    if found.low is not None:
        return f"≥ {ratio_text(found.low)}"
    return MISSING if found.high is None else f"≤ {ratio_text(found.high)}"


def side(found: Estimate | None, zero: float = 0.0) -> int | None:
    """1 if the whole interval lies above `zero`, -1 if below, 0 if it holds it or is open there; None without one."""
    if found is None or (found.low is None and found.high is None):
        return None
    if found.low is not None and found.low > zero:
        return 1
    return -1 if found.high is not None and found.high < zero else 0
