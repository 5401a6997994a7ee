r"""Which learning rates to try next, so that the optimum and the edge of divergence are bracketed and the rest is not.

The curve of one strategy over the rates tried so far is asked again and again:

1. every rate of the grid is tried;
2. while the best stands at an end of what was tried, or nothing has diverged above it, the next rate outwards is tried,
   a factor on that the grid's outermost two differ by; where no rate is stable that is downwards, but upwards where the
   loss falls from each rate to the next, for these may have been too small to learn anything;
3. while the best stands between others, but the next ones are more than a factor `optimum` away, the rates midway are
   tried;
4. while the largest stable rate and the first unstable one above it are further apart than a factor `edge`, the rate
   midway is tried: bisection;
5. then, from the best to the edge, the rate midway of neighbours more than a factor `optimum` apart: up to which rate a
   loss stays below a limit is interpolated between two.

Midway is $\sqrt{\eta_1 \eta_2}$, rounded to three digits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT
from gptnorm.study.measures import Point, best_point, edge_of

CLOSEST = 1.05
"""Factor between two rates; less of one can be blurred by rounding to three digits."""

Factor = Annotated[float, Field(gt=CLOSEST, allow_inf_nan=False)]


Seek = Literal["both", "optimum", "edge"]
"""What is looked for."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Search:
    """How closely, and how far."""

    optimum: Factor = 2.0
    """Factor between the best rate and its neighbours at most; where edges are looked for, between any two neighbours
    from the best to the edge."""
    edge: Factor = 1.5
    """Factor between the largest stable rate and the first unstable one at most."""
    reach: Annotated[int, Field(ge=0)] = 4
    """Steps, each of the grid's last factor, that rates may be tried beyond either end of the grid."""


def next_rates(
    tried: Sequence[Point], grid: Sequence[float], search: Search, seek: Seek = "both", *, whole: bool = True
) -> list[float]:
    """The rates to try now, ascending; none: the search is done, or has reached as far as it may.

    Args:
        tried: ascending.
        grid: ascending, of two rates or more.
        seek: "edge": the optimum is known from elsewhere, and rules 2 (downwards), 3 and 5 are left out. "optimum": the
            edge does not matter, and rules 2 (for the edge's sake), 4 and 5 are left out, but where the edge is next to
            the best.
        whole: whether rule 1 holds; else the grid only says how far to go outwards, and how far at once.
    """
    known = [point.lr for point in tried]
    missing = [lr for lr in grid if not _has(known, lr)]
    if missing and whole:
        return missing
    best, edge = best_point(tried), edge_of(tried)
    wanted: list[float] = []
    if best is None or edge is None:
        return _beyond(known, grid, search, downwards=not _falls(tried))
    if best.lr == known[0] and seek != "edge":
        wanted += _beyond(known, grid, search, downwards=True)
    if edge.unstable is None and (seek != "optimum" or best.lr == known[-1]):
        wanted += _beyond(known, grid, search, downwards=False)
    elif (
        edge.unstable is not None
        and edge.unstable / edge.stable > search.edge
        and (seek != "optimum" or edge.stable == best.lr)
    ):
        wanted.append(_midway(edge.stable, edge.unstable))
    place = known.index(best.lr)
    if 0 < place < len(known) - 1 and seek != "edge":
        for neighbour in (known[place - 1], known[place + 1]):
            # Beyond the edge there is no optimum; rule 4 looks there.
            stable = edge.unstable is None or neighbour < edge.unstable
            if stable and max(best.lr / neighbour, neighbour / best.lr) > search.optimum:
                wanted.append(_midway(best.lr, neighbour))
    if not wanted and seek == "both":
        between = itertools.pairwise(known[place : known.index(edge.stable) + 1])
        wanted = [_midway(low, high) for low, high in between if high / low > search.optimum]
    # Rates may stand so close that a rounded one is known already.
    return sorted({lr for lr in wanted if not _has(known, lr)})


def log_grid(low: float, high: float, per_decade: int = 2) -> tuple[float, ...]:
    """Rates from `low` to `high`, both included, evenly in the logarithm, about `per_decade` of them in each decade.

    Those between are rounded to 1 or 3 times a power of ten where that is within a tenth, the rates that people give by
    hand: so a study asked for by its ends goes on with the runs of one that lists them.
    """
    steps = max(1, round(per_decade * math.log10(high / low)))
    inner = (low * (high / low) ** (i / steps) for i in range(1, steps))
    return (low, *(_usual(lr) for lr in inner), high)


def _beyond(known: list[float], grid: Sequence[float], search: Search, *, downwards: bool) -> list[float]:
    end, factor = (grid[0], grid[0] / grid[1]) if downwards else (grid[-1], grid[-1] / grid[-2])
    lr = _rounded(known[0 if downwards else -1] * factor)
    if not 0 < lr < math.inf or _has(known, lr):
        return []
    steps = math.log(lr / end) / math.log(factor)
    return [lr] if steps < search.reach + 0.5 else []


def _falls(curve: Sequence[Point]) -> bool:
    """Whether every rate has a loss, and that of a higher rate is lower."""
    losses = [point.loss for point in curve if point.loss is not None]
    return len(losses) == len(curve) > 1 and all(after < before for before, after in itertools.pairwise(losses))


def _midway(a: float, b: float) -> float:
    return _rounded(math.sqrt(a * b))


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")


def _usual(lr: float) -> float:
    decade = math.floor(math.log10(lr))
    for usual in (float(f"{digit}e{power}") for power in (decade, decade + 1) for digit in (1, 3)):
        if math.isclose(lr, usual, rel_tol=0.1):
            return usual
    return _rounded(lr)


def _has(known: list[float], lr: float) -> bool:
    return any(math.isclose(lr, other, rel_tol=1e-9) for other in known)
