"""The plots of a study: loss against learning rate, and training curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.path import Path as MarkerPath
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from gptnorm.report.curves import Curve, smooth, study_curves, thin
from gptnorm.report.figure import (
    INK,
    MUTED,
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
from gptnorm.report.format import loss_text, lr_text
from gptnorm.report.results import Row, Study, best_loss

_WIDTH = 4.8
_ARROW_UP = MarkerPath([(0, -1), (0, 1), (-0.6, 0.2), (0, 1), (0.6, 0.2)], [1, 2, 1, 2, 2])
"""An arrow of two strokes, each begun with a move (1) and drawn with lines (2); no strategy's own marker."""

STRIP = 0.1
"""Share of the axis, at its top, that is kept for what has no place on the scale."""


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
            axes.axhspan(high, top, color="#f1f3f5", zorder=2.5)
            for index, row in enumerate(study.rows):
                # Points; the marks of one learning rate stay well apart from those of the next.
                shift = (index - (len(study.rows) - 1) / 2) * min(7.0, 200 / len(study.lrs) / len(study.rows))
                strip_marks(axes, row, look(index), high, shift)
        if study.unigram_entropy is not None and low < study.unigram_entropy < high:
            axes.axhline(study.unigram_entropy, color=MUTED, linestyle=":", linewidth=1.5)
            axes.annotate(
                f"token frequencies only: {loss_text(study.unigram_entropy)}",
                (0.01, study.unigram_entropy),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                color=MUTED,
                fontsize=8.5,
            )
        lr_ticks(axes, study.lrs)
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("validation loss (nats per token)")
        legend_below(figure, axes)
        return to_svg(figure, "lr")


def best_curves(study: Study, curves: dict[tuple[str, float], Curve] | None = None) -> str | None:
    """SVG: training loss of each strategy at its own best learning rate, or None where there is no curve."""
    curves = study_curves(study) if curves is None else curves
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


def all_curves(study: Study, curves: dict[tuple[str, float], Curve] | None = None) -> list[tuple[str, str]]:
    """(strategy, SVG) pairs: a panel per strategy with the curve of every learning rate, all on one scale.

    One figure each, so that a page can set them side by side or below each other.
    """
    curves = study_curves(study) if curves is None else curves
    if not curves:
        return []
    complete = [(row.strategy, entry.lr) for row in study.rows for entry in row.entries if entry.complete]
    limits = _curve_range(list(curves.values()), [curves[key] for key in complete if key in curves])
    right = max(float(curve.steps[-1]) for curve in curves.values())
    panels = []
    for number, row in enumerate(study.rows):
        if not any(curve_row == row.strategy for curve_row, _ in curves):
            continue
        with style():
            figure = new_figure(3.7, 3.1 + 0.2 * -(-len(study.lrs) // 4))
            axes = figure.add_subplot()
            axes.set_xlim(0, right * 1.03)
            axes.set_ylim(*limits)
            for index, entry in enumerate(row.entries):
                curve = curves.get((row.strategy, entry.lr))
                if curve is not None:
                    colour = sequential(index, len(study.lrs))
                    _panel_line(axes, curve, colour=colour, label=lr_text(entry.lr), diverged=bool(entry.diverged))
            axes.set_title(row.strategy)
            axes.set_xlabel("step")
            axes.set_ylabel("training loss")
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="outside lower center", ncols=4, fontsize=8.5, handlelength=1.4, columnspacing=1.2
            )
            panels.append((row.strategy, to_svg(figure, f"all{number}")))
    return panels


def has_strip(study: Study) -> bool:
    """Whether `loss_against_lr` needs its strip for what diverged or lies above the scale."""
    return needs_strip(study.rows, loss_range(study.rows)[1])


def loss_range(rows: Sequence[Row]) -> tuple[float, float]:
    """Limits of the loss axis: the bests and their surroundings, not the far ends of the sweep."""
    means = sorted(entry.mean for row in rows for entry in row.entries if entry.mean is not None)
    if not means:
        return 0.0, 1.0
    low, worst = means[0], means[-1]
    seeds = [loss for row in rows for entry in row.entries if entry.complete for loss in entry.losses.values()]
    low = min([low, *seeds])
    # Every strategy's best with as much room again, and at least 15 % above the lowest loss.
    bests = [best_loss(row) for row in rows if row.best is not None]
    wanted = low + max(2 * (max(bests, default=low) - low), 0.15 * abs(low))
    high = worst if worst - low <= 1.6 * (wanted - low) else wanted
    span = max(high - low, 1e-3, 1e-4 * abs(low))
    return low - 0.06 * span, high + 0.08 * span


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
    points = [(entry.lr, loss) for entry in row.entries for loss in entry.losses.values() if loss <= high]
    if points:
        axes.plot(*zip(*points, strict=True), linestyle="", marker="_", markersize=7, color=how.colour, alpha=0.6)
    if row.best is not None and best_loss(row) <= high:
        axes.plot(
            [row.best.lr],
            [best_loss(row)],
            marker=how.marker,
            markersize=11,
            markerfacecolor=how.colour,
            markeredgecolor=INK,
            markeredgewidth=1.8,
            linestyle="",
            zorder=4,
        )


def strip_marks(axes: Axes, row: Row, how: Look, high: float, shift: float) -> None:
    """× and ↑ in the strip; `shift` (points) keeps strategies at the same learning rate apart."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    place = blended_transform_factory(axes.transData, axes.transAxes)
    place = place + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
    for marker, lrs in (
        ("x", [entry.lr for entry in row.entries if entry.diverged]),
        (_ARROW_UP, [entry.lr for entry in row.entries if entry.mean is not None and entry.mean > high]),
    ):
        marks = axes.plot(
            lrs,
            [1 - STRIP / 2] * len(lrs),
            linestyle="",
            marker=marker,
            color=how.colour,
            markeredgewidth=2,
            fillstyle="none",
            transform=place,
            zorder=5,
            clip_on=False,
        )
        # The layout would make room for them as if they stood in data coordinates.
        for mark in marks:
            mark.set_in_layout(False)


def _panel_line(axes: Axes, curve: Curve, *, colour: Any, label: str, diverged: bool) -> None:
    shown = thin(smooth(curve))
    axes.plot(shown.steps, shown.values, color=colour, linewidth=1.5, label=f"{label} ×" if diverged else label)
    if diverged:
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


def lr_ticks(axes: Axes, lrs: Sequence[float]) -> None:
    """The learning rates tried, and room beside them."""
    stride = -(-len(lrs) // 8)
    axes.set_xticks(list(lrs), [lr_text(lr) if index % stride == 0 else "" for index, lr in enumerate(lrs)])
    axes.set_xticks([], minor=True)
    lowest, highest = min(lrs), max(lrs)
    margin = (highest / lowest) ** (0.5 / (len(lrs) - 1)) if len(lrs) > 1 else 2.0
    axes.set_xlim(lowest / margin, highest * margin)
