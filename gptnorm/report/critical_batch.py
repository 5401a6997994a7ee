r"""How many times as many tokens a larger batch takes to the same loss, and up to which batch that is little.

For a model and $D$ tokens, $B^\circ$ is the batch of lowest loss on the picking seeds and $\ell$ its loss. With a batch
$B$, what takes us there is

$$r(B) = D_B(\ell) / D$$

times the text, $D_B$ read off the losses of $B$ at all amounts of text that were tried, each at its own best rate,
straight in $\ln D$ (`gptnorm.report.budgets`). The *critical batch* is where, going up from $B^\circ$, $r$ passes 1.2:
a fifth more than if twice the batch were half the steps. So Zhang et al. 2024 (arXiv 2410.21676) define it, on runs of
a constant rate whose weights are averaged; here every amount of text has a schedule of its own. Where $B^\circ$ is the
smallest batch tried, a still smaller one may do better, and the critical one is then smaller, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gptnorm.report.budgets import LossByBudget, Needed, needed, speed_up
from gptnorm.report.scaling import Spot, best_of, seeds_of_all
from gptnorm.study.measures import Bound, Bracket, Estimate, mean_rate

MOST = 1.2
"""Times the tokens at the critical batch."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of one model and amount of text."""

    best: Spot
    """Of the lowest loss on the picking seeds."""
    tokens: dict[int, Estimate | None]
    """r by batch, in tokens per step, ascending."""
    critical: Bound | None
    """In tokens per step; None where the best batch is the largest."""

    @property
    def at_end(self) -> bool:
        """Whether the best batch is the smallest tried, so that a smaller one may do better."""
        return self.best.batch == min(self.tokens)


def batches_of(spots: Sequence[Spot]) -> list[Batches]:
    """Those of one strategy, for each of its models and amounts of text but a model's largest, from which on a batch
    that takes more has nothing to be read off, and but those whose best batch cannot be compared."""
    curves = _curves([spot for spot in spots if spot.compared])
    found = []
    for model in dict.fromkeys(spot.model for spot in spots):
        mine = sorted((s for s in spots if s.model == model), key=lambda s: (s.tokens, s.batch))
        for tokens in sorted({spot.tokens for spot in mine if spot.compared})[:-1]:
            group = [spot for spot in mine if spot.tokens == tokens]
            best, compared = best_of(group), [spot for spot in group if spot.compared]
            if best is not None and len(compared) > 1:
                found.append(_batches(best, compared, {spot.batch: curves[model, spot.batch] for spot in compared}))
    return found


def _batches(best: Spot, group: Sequence[Spot], curves: Mapping[int, Mapping[int, LossByBudget]]) -> Batches:
    theirs, tokens = curves[best.batch], float(best.tokens)
    above = [spot.batch for spot in group if spot.batch >= best.batch]
    brackets = []
    for seed, curve in theirs.items():
        found = [(batch, needed(curves[batch][seed], curve[tokens])) for batch in above]
        brackets.append(_crossing([(batch, need) for batch, need in found if need is not None], tokens))
    return Batches(
        best=best,
        tokens={spot.batch: _inverse(speed_up(curves[spot.batch], theirs, tokens)) for spot in group},
        critical=mean_rate(brackets) if len(above) > 1 else None,
    )


def _crossing(found: Sequence[tuple[int, Needed]], tokens: float) -> Bracket:
    """Of one seed, the last batch that takes at most `MOST` times the tokens and the first that takes more; both are
    the crossing itself where both numbers are known, and there is no upper end where it cannot be told."""
    for (low, before), (high, after) in pairwise(found):
        ratio = after.budget / tokens
        if after.bound != "more than" and ratio <= MOST:
            continue
        if after.bound == "at most" or ratio < MOST:
            return low, None
        if before.bound or after.bound:
            return low, high
        start, end = math.log(before.budget / tokens), math.log(ratio)
        crossing = low * (high / low) ** ((math.log(MOST) - start) / (end - start))
        return crossing, crossing
    return found[-1][0], None


def _inverse(found: Estimate | None) -> Estimate | None:
    if found is None:
        return None
    low, high = (None if end is None else 1 / end for end in (found.high, found.low))
    return Estimate(value=1 / found.value, low=low, high=high, seeds=found.seeds)


def _curves(spots: Sequence[Spot]) -> dict[tuple[object, int], dict[int, LossByBudget]]:
    """Loss by tokens for each model and batch, by reported seed; where an optimum is known all of them have one."""
    groups: dict[tuple[object, int], list[Spot]] = {}
    for spot in spots:
        groups.setdefault((spot.model, spot.batch), []).append(spot)
    return {
        key: {
            seed: {float(spot.tokens): spot.track.losses[seed] for spot in group}
            for seed in seeds_of_all([spot.track.losses for spot in group])
        }
        for key, group in groups.items()
    }
