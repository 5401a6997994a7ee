"""Loss curves of runs: read, averaged over seeds, smoothed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptnorm.records import finite, read_lines
from gptnorm.report.results import RunLine

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Values over steps, in ascending order of steps, all finite."""

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)


def series(rows: list[dict[str, Any]], split: str, field: str = "loss") -> Curve:
    """One field of the metrics of one split; non-finite values are left out, of a repeated step the last counts."""
    points: dict[float, float] = {}
    for row in rows:
        step, value = finite(row.get("step")), finite(row.get(field))
        if row.get("split") == split and step is not None and value is not None:
            points[step] = value
    steps = sorted(points)
    return Curve(np.array(steps, dtype=np.float64), np.array([points[step] for step in steps], dtype=np.float64))


def mean_curve(curves: list[Curve]) -> Curve:
    """The mean over seeds, at the steps that every curve has: it ends where the first seed ends."""
    common = set.intersection(*(set(curve.steps.tolist()) for curve in curves)) if curves else set()
    steps = np.array(sorted(common), dtype=np.float64)
    stack = [curve.values[np.isin(curve.steps, steps)] for curve in curves]
    return Curve(steps, np.mean(stack, axis=0) if len(steps) else np.array([], dtype=np.float64))


def smooth(curve: Curve, window: float | None = None) -> Curve:
    """Exponential moving average over about `window` points to each side.

    Both sides, since the usual one lags behind a falling loss; the weights are normalised at the ends.
    The window defaults to a fiftieth of the curve.
    """
    keep = 1 - 1 / max(1.0, len(curve) / 50 if window is None else window)
    before, weight_before = _running(curve.values, keep)
    after, weight_after = (side[::-1] for side in _running(curve.values[::-1], keep))
    return Curve(curve.steps, (before + after - curve.values) / (weight_before + weight_after - 1))


def _running(values: Floats, keep: float) -> tuple[Floats, Floats]:
    """Sums over everything so far, older values and weights damped by `keep` per point."""
    sums, weights = np.empty(len(values)), np.empty(len(values))
    total = weight = 0.0
    for index, value in enumerate(values):
        total = sums[index] = keep * total + value
        weight = weights[index] = keep * weight + 1
    return sums, weights


def thin(curve: Curve, limit: int = 400) -> Curve:
    """At most about `limit` points, the last one kept: a page need not carry more than its pixels show."""
    stride = -(-len(curve) // limit)
    if stride <= 1:
        return curve
    index = np.union1d(np.arange(0, len(curve), stride), [len(curve) - 1])
    return Curve(curve.steps[index], curve.values[index])


def curves_of(folder: Path, cells: Iterable[RunLine]) -> dict[tuple[str, float], Curve]:
    """Training loss by (strategy, learning rate), mean over the seeds that left any metrics."""
    found: dict[tuple[str, float], list[Curve]] = {}
    for cell in cells:
        # A cell without a run folder must not pick up a stray metrics.jsonl of the study itself.
        if not cell.run:
            continue
        curve = series(read_lines(folder / cell.run / "metrics.jsonl"), "train")
        if len(curve):
            found.setdefault((cell.strategy, cell.lr), []).append(curve)
    means = {key: mean_curve(curves) for key, curves in found.items()}
    return {key: curve for key, curve in means.items() if len(curve)}
