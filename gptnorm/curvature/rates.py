r"""How large a step the loss bears, from forward passes alone.

Along an update u the critical rate is the smallest $\eta_c > 0$ with $\ell(\theta - \eta_c u) \ge \ell(\theta)$; what
is found is such a crossing, the one next to the rate at which the search begins. Of a quadratic loss and
$u = \nabla \ell$ it is $2\, u^\top u / u^\top H u$, so that $2 / \eta_c$ is a directional sharpness.

Source: Kalra et al. 2026 (arXiv 2601.16979), critical sharpness; the bracketing is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CriticalRate:
    """A rate between two that were tried."""

    low: float
    """The largest tried below `high` at which the loss is lower than at the start; 0: none."""
    high: float | None
    """The smallest at which it is higher, or not finite; None: nowhere up to the largest rate tried."""
    passes: int
    """Evaluations of the loss."""

    @property
    def value(self) -> float | None:
        """The geometric mean of both; None where one is not known."""
        return math.sqrt(self.low * self.high) if self.high is not None and self.low > 0 else None


def critical_rate(
    loss_at: Callable[[float], float], start: float, *, tolerance: float = 0.05, most: int = 60, noise: float = 1e-6
) -> CriticalRate:
    """Doubles or halves from `start` until it is bracketed, then bisects in the logarithm.

    A start whose step changes the loss by less than can be seen says nothing; the search goes up from it.

    Args:
        loss_at: the loss after a step of that rate; 0: none.
        start: a rate to begin with, above 0.
        tolerance: the bracket is at most this factor (plus one) wide.
        most: evaluations of the loss, the one at 0 included.
        noise: a loss counts as lower or higher if it is so by more than this part of it: rounding is no descent.
    """
    assert start > 0
    floor = loss_at(0.0)
    passes, margin = 1, noise * abs(floor)

    def change(rate: float) -> int:
        """-1: lower; 1: higher, or not finite; 0: neither can be seen."""
        nonlocal passes
        passes += 1
        by = loss_at(rate) - floor
        return -1 if by < -margin else 0 if by <= margin else 1

    def room(rate: float) -> bool:
        return passes < most and 0 < rate < math.inf

    low, high, rate, now = 0.0, None, start, change(start)
    unseen = int(now == 0)
    while now == 0 and room(2 * rate):
        rate *= 2
        now = change(rate)
    if now < 0:
        low = rate
        while high is None and room(2 * rate):
            rate *= 2
            low, high = (rate, None) if change(rate) < 0 else (low, rate)
    elif now > 0:
        high = rate
        rate = start if unseen else rate
        # Just at the crossing nothing is seen, either; below a second such rate nothing will be.
        while low == 0 and unseen < 2 and room(rate / 2):
            rate /= 2
            now = change(rate)
            low, high = (rate, high) if now < 0 else (low, min(high, rate) if now > 0 else high)
            unseen += now == 0
    if high is None or low == 0:
        return CriticalRate(low=low, high=high, passes=passes)
    while high / low > 1 + tolerance and passes < most:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if change(middle) < 0 else (low, middle)
    return CriticalRate(low=low, high=high, passes=passes)


def critical_rate_along(
    loss: Callable[[], float],
    leaves: Sequence[Tensor],
    update: Sequence[Tensor],
    start: float,
    *,
    constrain: Callable[[], None] = lambda: None,
    constrained: Sequence[Tensor] = (),
) -> CriticalRate:
    """Of steps that subtract a multiple of the update from the leaves. Afterwards all is as it was, bit by bit.

    Args:
        loss: of the leaves as they are.
        start: as for `critical_rate`.
        constrain: puts the weights back where they have to be, after each step.
        constrained: what that may change, beside the leaves.
    """
    moved = dict.fromkeys((*leaves, *constrained))
    before = [tensor.detach().clone() for tensor in moved]

    def restore() -> None:
        for tensor, old in zip(moved, before, strict=True):
            tensor.data.copy_(old)

    def loss_at(rate: float) -> float:
        restore()
        with torch.no_grad():
            for leaf, u in zip(leaves, update, strict=True):
                leaf.data.sub_(rate * u)
        constrain()
        return loss()

    try:
        return critical_rate(loss_at, start)
    finally:
        restore()
