"""What a run leaves in a study's ledger about its training, and when it counts as diverged."""

from __future__ import annotations

import math
import operator
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as typed

from gptnorm.config import STRICT
from gptnorm.records import finite
from gptnorm.study.measures import Point

TAIL = 0.05
"""Fraction of the run over which losses are averaged: its end, and any stretch as long."""

SPIKE = 0.3
"""Nats above the running median from which a step's loss is a spike."""

SPIKE_WINDOW = 50
"""Losses before the step that the running median is taken over."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run's training losses in three numbers."""

    tail: float | None
    """Mean over the last `TAIL` of them."""
    lowest: float | None
    """The lowest mean over any stretch as long."""
    spikes: int
    """Losses above the median of the `SPIKE_WINDOW` before by more than `SPIKE`; steps in a row count as one."""


@typed(frozen=True, kw_only=True, config=STRICT)
class Stability:
    """When a run counts as stable; each rule can be switched off with inf (the margin with -inf)."""

    rise: Annotated[float, Field(gt=0)] = 0.5
    """Nats that the mean training loss at the end may lie above its lowest."""
    margin: Annotated[float, Field(ge=-math.inf)] = 0.1
    """Nats that the final validation loss must lie below the unigram entropy: a collapsed run is finite."""
    worse: Annotated[float, Field(gt=1)] = 1.5
    """Times the loss at the best rate that the final validation loss may be: what learned far less
    than at another rate has failed, too."""

    def holds(self, loss: float | None, training: Training, entropy: float | None) -> bool:
        """Whether a run with that final validation loss (None: not finite) is stable, looked at by itself.

        Args:
            entropy: of the validation tokens under training frequencies, in nats; None: not known, no rule.
        """
        if loss is None or training.tail is None or training.lowest is None:
            return False
        if entropy is not None and loss > entropy - self.margin:
            return False
        return training.tail <= training.lowest + self.rise


def to_json(table: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that JSON has no sign for as text."""
    return {key: value if math.isfinite(value) else str(value) for key, value in table.items()}


def from_json(table: Any) -> Any:
    """What `to_json` wrote; anything else as it is."""
    if not isinstance(table, dict):
        return table
    return {key: float(value) if value in ("inf", "-inf") else value for key, value in table.items()}


def point_of(line: Mapping[str, Any], stability: Stability, entropy: float | None) -> Point:
    """A line of the ledger as a point of a curve."""
    loss = finite(line.get("val_loss")) if line.get("status") == "finished" else None
    training = Training(tail=finite(line.get("tail_loss")), lowest=finite(line.get("lowest_loss")), spikes=0)
    return Point(float(line["lr"]), loss, stability.holds(loss, training, entropy))


def summarize(losses: Sequence[float], *, whole: bool) -> Training:
    """The numbers of a run from its training losses, step by step, all of them finite.

    Args:
        whole: whether the run came to its end.
    """
    if not whole or not losses:
        return Training(tail=None, lowest=None, spikes=count_spikes(losses))
    length = max(1, round(TAIL * len(losses)))
    lowest = min(_sliding_sums(losses, length))
    return Training(tail=sum(losses[-length:]) / length, lowest=lowest / length, spikes=count_spikes(losses))


def _sliding_sums(values: Sequence[float], length: int) -> Iterator[float]:
    """Of every stretch as long, by additions alone: taking a huge loss out of a sum again would leave its rounding.

    A stretch is the end of one block of that length and the start of the next.
    """
    for start in range(0, len(values) - length + 1, length):
        ends = list(accumulate(reversed(values[start : start + length])))[::-1]
        starts = accumulate(values[start + length : start + 2 * length - 1], initial=0.0)
        yield from map(operator.add, ends, starts)


def count_spikes(losses: Sequence[float]) -> int:
    """As `Training.spikes`; the first steps, with fewer than half a window before them, have none."""
    before: deque[float] = deque(maxlen=SPIKE_WINDOW)
    count, within = 0, False
    for loss in losses:
        spike = len(before) >= SPIKE_WINDOW // 2 and loss > statistics.median(before) + SPIKE
        count += spike and not within
        within = spike
        before.append(loss)
    return count
