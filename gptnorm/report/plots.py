"""The plots of a study: loss against learning rate, and training curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from gptnorm.format import lr_text
from gptnorm.report.curves import Curve, smooth, thin
from gptnorm.report.figure import (
    WARNING,
    Look,
    legend_below,
    legend_height,
    look,
    new_figure,
    sequential,
    style,
    to_svg,
)
from gptnorm.report.loss_axes import (
    ABOVE,
    STRIP,
    UNSTABLE,
    draw_strip,
    entropy_line,
    lr_ticks,
    ring,
    seed_dashes,
    shown_range,
    strip_marks,
)
from gptnorm.report.results import Row, Study, best_loss

_WIDTH = 4.8


def loss_against_lr(study: Study) -> str:
    """SVG: mean validation loss against learning rate, a line per strategy, a small mark per seed.

    The scale shows the region of the bests. Means above it stand as ↑, and learning rates with a
    diverged seed as ×, in a strip at the top.
    """
    with style():
        figure = new_figure(_WIDTH, 3.9 + legend_height(list(study.strategies), _WIDTH))
        axes = figure.add_subplot()
        axes.set_xscale("log")
        low, high = loss_range(study.rows)
        strip = needs_strip(study.rows, high)
        top = low + (high - low) / (1 - STRIP) if strip else high
        axes.set_ylim(low, top)
        for index, row in enumerate(study.rows):
            loss_line(axes, row, look(index), high)
        if strip:
            draw_strip(axes, high, top)
            for index, row in enumerate(study.rows):
                # Points; the marks of one learning rate stay well apart from those of the next.
                shift = (index - (len(study.rows) - 1) / 2) * min(7.0, 200 / len(study.lrs) / len(study.rows))
                row_marks(axes, row, look(index), high, shift)
        entropy_line(axes, study.unigram_entropy, low, high)
        lr_ticks(axes, study.lrs)
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("validation loss (nats per token)")
        legend_below(figure, axes)
        return to_svg(figure, "lr")


def best_curves(study: Study, curves: dict[tuple[str, float], Curve]) -> str | None:
    """SVG: training loss of each strategy at its own best learning rate, or None where there is no curve."""
    picked: list[tuple[int, Row, Curve]] = []
    for index, row in enumerate(study.rows):
        curve = curves.get((row.strategy, row.best.lr)) if row.best is not None else None
        if curve is not None:
            picked.append((index, row, curve))
    if not picked:
        return None
    with style():
        labels = [f"{row.strategy} at {lr_text(row.best.lr)}" for _, row, _ in picked if row.best is not None]
        figure = new_figure(_WIDTH, 3.6 + legend_height(labels, _WIDTH))
        axes = figure.add_subplot()
        for (index, _, curve), label in zip(picked, labels, strict=True):
            how, even = look(index), smooth(curve)
            shown, raw = thin(even), thin(curve)
            axes.plot(raw.steps, raw.values, color=how.colour, alpha=0.18, linewidth=0.8)
            axes.plot(
                shown.steps,
                shown.values,
                color=how.colour,
                linestyle=how.dash,
                marker=how.marker,
                # Markers stand apart for each strategy, so that lines on top of each other can be told apart.
                markevery=(0.04 + 0.14 * index / max(1, len(study.rows)), 0.18),
                markersize=5,
                label=label,
            )
        axes.set_ylim(*_curve_range([curve for _, _, curve in picked]))
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss (nats per token)")
        legend_below(figure, axes)
        return to_svg(figure, "best")


class RateCurve(NamedTuple):
    """Training loss at one learning rate."""

    lr: float
    curve: Curve
    diverged: bool
    """Whether it ends where a run failed."""
    complete: bool
    """Whether its end has to be in sight."""


def all_curves(study: Study, curves: dict[tuple[str, float], Curve]) -> list[tuple[str, str]]:
    """(strategy, SVG) pairs: a panel per strategy with the curve of every learning rate, all on one scale."""
    panels = []
    for row in study.rows:
        lines = [
            RateCurve(entry.lr, curves[row.strategy, entry.lr], bool(entry.diverged), entry.complete)
            for entry in row.entries
            if (row.strategy, entry.lr) in curves
        ]
        panels.append((row.strategy, lines))
    return rate_panels(panels, study.lrs, "all")


def rate_panels(
    panels: Sequence[tuple[str, Sequence[RateCurve]]], lrs: Sequence[float], prefix: str, points: int = 400
) -> list[tuple[str, str]]:
    """(title, SVG) pairs: a panel with a line per learning rate, all on one scale; none for a panel without lines.

    One figure each, so that a page can set them side by side or below each other.

    Args:
        lrs: every learning rate of the panels, ascending; they give the colours.
        prefix: of the figures' ids.
        points: of each line, about.
    """
    lines = [line for _, found in panels for line in found]
    if not lines:
        return []
    limits = _curve_range([line.curve for line in lines], [line.curve for line in lines if line.complete])
    right = max(float(line.curve.steps[-1]) for line in lines)
    drawn = []
    for number, (title, found) in enumerate(panels):
        if not found:
            continue
        with style():
            figure = new_figure(3.7, 3.1 + 0.2 * -(-len(lrs) // 4))
            axes = figure.add_subplot()
            axes.set_xlim(0, right * 1.03)
            axes.set_ylim(*limits)
            for line in found:
                _panel_line(axes, line, lrs.index(line.lr), len(lrs), points)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylabel("training loss")
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="outside lower center", ncols=4, fontsize=8.5, handlelength=1.4, columnspacing=1.2
            )
            drawn.append((title, to_svg(figure, f"{prefix}{number}")))
    return drawn


def has_strip(study: Study) -> bool:
    """Whether `loss_against_lr` needs its strip for what diverged or lies above the scale."""
    return needs_strip(study.rows, loss_range(study.rows)[1])


def loss_range(rows: Sequence[Row]) -> tuple[float, float]:
    """Limits of the loss axis: the bests and their surroundings, not the far ends of the sweep."""
    entries = [entry for row in rows for entry in row.entries]
    means = [entry.mean for entry in entries if entry.mean is not None]
    seeds = [loss for entry in entries if entry.complete for loss in entry.losses.values()]
    return shown_range(means, [best_loss(row) for row in rows if row.best is not None], seeds)


def needs_strip(rows: Sequence[Row], high: float) -> bool:
    """Whether a mean lies above `high`, or a seed diverged."""
    entries = [entry for row in rows for entry in row.entries]
    return any(entry.diverged or (entry.mean is not None and entry.mean > high) for entry in entries)


def loss_line(axes: Axes, row: Row, how: Look, high: float) -> None:
    """Mean loss against learning rate, single seeds as dashes, the best ringed."""
    lrs = [entry.lr for entry in row.entries]
    means = [np.nan if entry.mean is None else entry.mean for entry in row.entries]
    axes.plot(
        lrs, means, color=how.colour, linestyle=how.dash, marker=how.marker, label=row.strategy, markeredgecolor="white"
    )
    seed_dashes(axes, [(entry.lr, loss) for entry in row.entries for loss in entry.losses.values()], how, high)
    if row.best is not None and best_loss(row) <= high:
        ring(axes, row.best.lr, best_loss(row), how)


def row_marks(axes: Axes, row: Row, how: Look, high: float, shift: float) -> None:
    """× and ↑ in the strip; `shift` (points) keeps strategies at the same learning rate apart."""
    strip_marks(axes, UNSTABLE, [entry.lr for entry in row.entries if entry.diverged], how, shift=shift)
    above = [entry.lr for entry in row.entries if entry.mean is not None and entry.mean > high]
    strip_marks(axes, ABOVE, above, how, shift=shift)


def _panel_line(axes: Axes, line: RateCurve, index: int, count: int, points: int) -> None:
    """Rate number `index` of `count`: its colour says how high it is, a few markers say which it is."""
    shown = thin(smooth(line.curve), points)
    label = f"{lr_text(line.lr)} ×" if line.diverged else lr_text(line.lr)
    axes.plot(
        shown.steps,
        shown.values,
        color=sequential(index, count),
        linewidth=1.5,
        label=label,
        marker=look(index).marker,
        markersize=4,
        # As parts of the panel's diagonal; marks of neighbours do not lie on each other.
        markevery=(0.05 + 0.04 * (index % 4), 0.2),
    )
    if line.diverged:
        end = float(np.clip(shown.values[-1], *axes.get_ylim()))
        axes.plot([shown.steps[-1]], [end], "x", color=WARNING, markersize=8, markeredgewidth=2, clip_on=False)


def _curve_range(curves: list[Curve], shown: list[Curve] | None = None) -> tuple[float, float]:
    """Limits for training curves: the steep start and the spikes of a diverging run are cut.

    The ends of the curves in `shown` are in sight, unless one ends above every start.
    """
    even = [smooth(curve) for curve in curves]
    low = min(float(curve.values.min()) for curve in even)
    # A sixth into training, the median curve has left its start.
    early = [float(curve.values[min(len(curve) - 1, len(curve) // 6)]) for curve in even]
    ends = [float(curve.values[-1]) for curve in even]
    high = max(float(np.median(early)), float(np.median(ends)))
    start = max(float(curve.values[0]) for curve in curves)
    high = max([high, *(min(start, float(curve.values[-1])) for curve in shown or [])])
    span = max(high - low, 1e-3)
    return low - 0.08 * span, high + 0.25 * span
