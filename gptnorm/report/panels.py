"""Small multiples: one figure for each quantity, so that a page can set them side by side or below each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gptnorm.format import lr_text
from gptnorm.records import finite
from gptnorm.report.figure import look, new_figure, sequential, style, to_svg

_WIDTH = 3.7
_LOG_FROM = 12.0
"""Ratio of the largest to the smallest value from which a scale is logarithmic."""
_LEAST_SPAN = 10.0
"""Ratio of the ends of a logarithmic scale, at least."""
_FLOOR = 1e-30
"""What is smaller stands for zero and has no place on a logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity: lines over blocks or steps."""

    name: str
    """Short, for ids; letters only."""
    title: str
    x_label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]
    """Values by label; None leaves a gap."""
    alt: str
    """What the plot shows, for those who cannot see it."""
    ordered: bool = False
    """Whether the lines have an order (blocks), which colours then show."""
    limits: tuple[float, float] | None = None
    dashed: frozenset[str] = field(default_factory=frozenset)
    """Lines drawn dashed in the colour of the line before them."""
    ranges: Mapping[str, Sequence[tuple[float | None, float | None]]] = field(default_factory=dict)
    """Intervals of lines by their labels, drawn as bars."""
    log_x: bool = False
    log_y: bool = False
    """Whether the scale is logarithmic even where the values span little, so that a power law is a straight line."""


def draw(panel: Panel, prefix: str) -> str | None:
    """SVG of a panel; None without a single finite value."""
    lines = {label: _numbers(values) for label, values in panel.lines.items()}
    lines = {label: values for label, values in lines.items() if np.isfinite(values).any()}
    if not lines:
        return None
    with style():
        columns = _legend_columns(list(lines))
        figure = new_figure(_WIDTH, 2.6 + (0.22 * -(-len(lines) // columns) if len(lines) > 1 else 0.0))
        axes = figure.add_subplot()
        log = _wants_log(lines, panel.limits, 1.0 if panel.log_y else _LOG_FROM)
        if log:
            lines = {label: np.where(values > _FLOOR, values, np.nan) for label, values in lines.items()}
        colours = _colours(list(lines), panel)
        for index, (label, values) in enumerate(lines.items()):
            how = look(index)
            few = len(panel.x) <= 24
            axes.plot(
                list(panel.x),
                values,
                color=colours[label],
                linestyle=(0, (4, 1.6)) if label in panel.dashed else "-" if panel.ordered else how.dash,
                marker=how.marker,
                markersize=4.5,
                # In long lines markers stand apart for each, so that lines on top of each other can be told apart.
                markevery=1 if few else (0.02 + 0.08 * index / len(lines), 0.12),
                linewidth=1.6,
                label=label,
            )
            _bars(axes, panel, label, colours[label])
        _y_axis(axes, panel, log)
        _x_axis(axes, panel)
        axes.set_title(panel.title, fontsize=10.5)
        if len(lines) > 1:
            _legend(figure, axes, columns)
        return to_svg(figure, f"{prefix}-{panel.name}")


def _bars(axes: Axes, panel: Panel, label: str, colour: Any) -> None:
    for x, (low, high) in zip(panel.x, panel.ranges.get(label, ()), strict=False):
        if low is not None and high is not None:
            axes.plot([x, x], [low, high], color=colour, linewidth=1.2, alpha=0.6, zorder=1.5)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if (number := finite(value)) is None else number for value in values])


def _wants_log(lines: Mapping[str, np.ndarray], limits: tuple[float, float] | None, least: float) -> bool:
    if limits is not None:
        return False
    values = np.concatenate(list(lines.values()))
    values = values[np.isfinite(values)]
    if (values < 0).any():
        return False
    positive = values[values > _FLOOR]
    return len(positive) > 0 and float(positive.max() / positive.min()) >= least


def _colours(labels: list[str], panel: Panel) -> dict[str, Any]:
    if panel.ordered:
        return {label: sequential(index, len(labels)) for index, label in enumerate(labels)}
    colours: dict[str, Any] = {}
    taken, last = 0, look(0).colour
    for label in labels:
        if label not in panel.dashed:
            last, taken = look(taken).colour, taken + 1
        colours[label] = last
    return colours


def _legend_columns(labels: list[str]) -> int:
    """As many columns as the labels fit into side by side, at most four."""
    # Points: about 5.6 a letter at size 9, 42 for the handle and the gaps.
    return max(1, min(4, len(labels), int(72 * _WIDTH // (42 + 5.6 * max(map(len, labels))))))


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        handlelength=2.4,
        columnspacing=1.2,
        labelspacing=0.3,
    )


def _y_axis(axes: Axes, panel: Panel, log: bool) -> None:
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    elif log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high / low < _LEAST_SPAN:
            # What hardly moves is to look flat.
            low, high = (math.sqrt(low * high) * factor for factor in (_LEAST_SPAN**-0.5, _LEAST_SPAN**0.5))
            axes.set_ylim(low, high)
        decades = math.log10(high / low)
        # Two ticks a decade where there are few of them; written like every other number of the page.
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0) if decades < 3 else (1.0,), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: lr_text(value) if value > 0 else ""))
    elif axes.get_ylim()[0] >= 0 or axes.dataLim.y0 >= 0:
        # From zero, so that noise does not look like a trend.
        axes.set_ylim(0, max(axes.dataLim.y1 * 1.08, 1e-12))


def _x_axis(axes: Axes, panel: Panel) -> None:
    axes.set_xlabel(panel.x_label)
    if panel.log_x:
        axes.set_xscale("log")
        few = len(panel.x) <= 6
        axes.xaxis.set_major_locator(FixedLocator(list(panel.x)) if few else LogLocator(10, numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        whole = all(float(x).is_integer() for x in panel.x)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole, min_n_ticks=1))
    if len(set(panel.x)) == 1:
        # One point would else stand on an axis of fractions.
        axes.set_xlim(panel.x[0] - 1, panel.x[0] + 1)
