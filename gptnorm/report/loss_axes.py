"""What plots of loss against learning rate share: scale, strip at the top, marks and ticks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.path import Path as MarkerPath
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from gptnorm.format import loss_text, lr_text
from gptnorm.report.figure import INK, MUTED, Look

STRIP = 0.1
"""Share of the axis, at its top, that is kept for what has no place on the scale."""

UNSTABLE = "x"

ABOVE = MarkerPath([(0, -1), (0, 1), (-0.6, 0.2), (0, 1), (0.6, 0.2)], [1, 2, 1, 2, 2])
"""An arrow of two strokes, each begun with a move (1) and drawn with lines (2); no strategy's own marker."""


def shown_range(means: Sequence[float], bests: Sequence[float], seeds: Sequence[float]) -> tuple[float, float]:
    """Limits of the loss axis: the bests and their surroundings, not the far ends of the sweep.

    Args:
        means: every loss that has a place on the scale if there is room.
        bests: those that must be seen, one per line.
        seeds: single ones, of which the lowest is seen, too.
    """
    if not means:
        return 0.0, 1.0
    low, worst = min([*means, *seeds]), max(means)
    # Every best with as much room again, and at least 15 % above the lowest loss.
    wanted = low + max(2 * (max(bests, default=low) - low), 0.15 * abs(low))
    high = worst if worst - low <= 1.6 * (wanted - low) else wanted
    span = max(high - low, 1e-3, 1e-4 * abs(low))
    return low - 0.06 * span, high + 0.08 * span


def draw_strip(axes: Axes, high: float, top: float) -> None:
    """The grey ground for marks of what lies above `high`."""
    axes.axhspan(high, top, color="#f1f3f5", zorder=2.5)


def strip_marks(
    axes: Axes,
    marker: Any,
    lrs: Sequence[float],
    how: Look,
    *,
    shift: float = 0.0,
    height: float = 1 - STRIP / 2,
    size: float = 6.0,
    alpha: float = 1.0,
) -> None:
    """`UNSTABLE` or `ABOVE` in the strip, at rates.

    Args:
        shift: points to the right, which keep strategies at the same rate apart.
        height: where, as a share of the axis.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    place = blended_transform_factory(axes.transData, axes.transAxes)
    place = place + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
    marks = axes.plot(
        list(lrs),
        [height] * len(lrs),
        linestyle="",
        marker=marker,
        markersize=size,
        color=how.colour,
        alpha=alpha,
        markeredgewidth=2 if size >= 6 else 1.5,
        fillstyle="none",
        transform=place,
        zorder=5,
        clip_on=False,
    )
    # The layout would make room for them as if they stood in data coordinates.
    for mark in marks:
        mark.set_in_layout(False)


def seed_dashes(axes: Axes, points: Sequence[tuple[float, float]], how: Look, high: float) -> None:
    """A short dash for each single (rate, loss) up to `high`."""
    shown = [point for point in points if point[1] <= high]
    if shown:
        axes.plot(*zip(*shown, strict=True), linestyle="", marker="_", markersize=7, color=how.colour, alpha=0.6)


def ring(axes: Axes, lr: float, loss: float, how: Look, alpha: float = 1.0) -> None:
    """The mark of a line's best."""
    axes.plot(
        [lr],
        [loss],
        marker=how.marker,
        markersize=11,
        markerfacecolor=how.colour,
        markeredgecolor=INK,
        markeredgewidth=1.8,
        linestyle="",
        alpha=alpha,
        zorder=4,
    )


def entropy_line(axes: Axes, entropy: float | None, low: float, high: float) -> None:
    """The loss of a model that knows token frequencies alone, if it is between the limits."""
    if entropy is None or not low < entropy < high:
        return
    axes.axhline(entropy, color=MUTED, linestyle=":", linewidth=1.5)
    axes.annotate(
        f"token frequencies only: {loss_text(entropy)}",
        (0.01, entropy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        color=MUTED,
        fontsize=8.5,
    )


def lr_ticks(axes: Axes, lrs: Sequence[float]) -> None:
    """The learning rates tried, and room beside them."""
    stride = -(-len(lrs) // 8)
    axes.set_xticks(list(lrs), [lr_text(lr) if index % stride == 0 else "" for index, lr in enumerate(lrs)])
    axes.set_xticks([], minor=True)
    lowest, highest = min(lrs), max(lrs)
    margin = (highest / lowest) ** (0.5 / (len(lrs) - 1)) if len(lrs) > 1 else 2.0
    axes.set_xlim(lowest / margin, highest * margin)


def log_ticks(axis: Any) -> None:
    """Decades, in short ranges with a tick between, written like every other rate."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(10, subs=(1.0, 3.0) if decades < 3 else (1.0,), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: lr_text(value) if value > 0 else ""))
