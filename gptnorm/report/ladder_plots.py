"""The plots of a ladder: loss against rate at every size, rates against size, signal through the blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptnorm.report.figure import Look, legend_columns, legend_height, look, new_figure, sequential, style, to_svg
from gptnorm.report.ladder import Ladder, Level, MeanSignal
from gptnorm.report.loss_axes import STRIP, draw_strip, log_ticks, lr_ticks
from gptnorm.report.plots import loss_line, loss_range, needs_strip, row_marks
from gptnorm.report.results import Row

_PANEL = 3.7
"""Inches, as of all small multiples."""


def loss_panels(ladder: Ladder) -> list[tuple[str, str]]:
    """(climb, SVG) pairs: loss against learning rate, a line per size, all on one scale."""
    low, high, strip = _limits(ladder)
    top = low + (high - low) / (1 - STRIP) if strip else high
    panels = []
    for number, climb in enumerate(ladder.climbs):
        with style():
            figure = new_figure(_PANEL, 3.3)
            axes = figure.add_subplot()
            axes.set_xscale("log")
            axes.set_ylim(low, top)
            if strip:
                draw_strip(axes, high, top)
            looks = _size_looks(ladder)
            for index, (level, how) in enumerate(zip(climb.levels, looks, strict=True)):
                row = _row(ladder, level)
                loss_line(axes, row, how, high)
                if strip:
                    # Points; the marks of one learning rate stay well apart from those of the next.
                    room = min(7.0, 150 / len(row.entries) / len(looks))
                    row_marks(axes, row, how, high, (index - (len(looks) - 1) / 2) * room)
            lr_ticks(axes, ladder.study.lrs)
            axes.set_title(climb.name)
            axes.set_xlabel("peak learning rate")
            axes.set_ylabel("validation loss")
            _legend(figure, axes, 4)
            panels.append((climb.name, to_svg(figure, f"loss{number}")))
    return panels


def needs_marks(ladder: Ladder) -> bool:
    """Whether `loss_panels` has a strip at the top."""
    return _limits(ladder)[2]


def _limits(ladder: Ladder) -> tuple[float, float, bool]:
    """The scale of `loss_panels` from below to its strip, and whether it needs one."""
    levels = [level for climb in ladder.climbs for level in climb.levels]
    # What collapsed lies above the scale, and its mark in the strip says so.
    low, high = loss_range([level.row for level in levels if level.best])
    return low, high, needs_strip([level.row for level in levels], high)


def rates_against_size(ladder: Ladder, which: Literal["best", "stable"]) -> str | None:
    """SVG: the best or the largest stable rate against the size, a line per climb; None where there is none.

    Hollow: an edge of the rates tried, so a bound at best.
    """
    if not any(level.best for climb in ladder.climbs for level in climb.levels):
        return None
    with style():
        names = [climb.name for climb in ladder.climbs]
        figure = new_figure(_PANEL, 2.9 + legend_height(names, _PANEL))
        axes = figure.add_subplot()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for index, climb in enumerate(ladder.climbs):
            how = look(index)
            # Climbs on the same rate of the grid would hide each other.
            shift = 2 ** (0.05 * (index - (len(names) - 1) / 2))
            points = [(level.size * shift, *_rate(level, which)) for level in climb.levels if level.best]
            x, y = [point[0] for point in points], [point[1] for point in points]
            axes.plot(x, y, color=how.colour, linestyle=how.dash, label=climb.name, marker=how.marker)
            hollow = [(a, b) for a, b, bound in points if bound]
            if hollow:
                axes.plot(
                    *zip(*hollow, strict=True),
                    linestyle="",
                    marker=how.marker,
                    markerfacecolor="white",
                    markeredgecolor=how.colour,
                    markeredgewidth=1.5,
                )
        lowest, highest = min(ladder.study.lrs), max(ladder.study.lrs)
        axes.set_ylim(lowest / 1.5, highest * 1.5)
        log_ticks(axes.yaxis)
        axes.set_xticks(list(ladder.sizes), [str(size) for size in ladder.sizes])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("blocks" if ladder.axis == "depth" else "width d")
        axes.set_title("best rate" if which == "best" else "largest stable rate")
        axes.set_ylabel("peak learning rate")
        _legend(figure, axes, legend_columns(names, _PANEL))
        return to_svg(figure, f"rate-{which}")


def signal_panels(ladder: Ladder) -> list[tuple[str, str, str]]:
    """(climb, what, SVG): gradient and cosine block by block, a line per size, all climbs on one scale.

    Dashed: at initialisation; firm: after training, at the rate of the lowest loss.
    """
    # One scale for each quantity, so that climbs can be compared.
    levels = [level for climb in ladder.climbs for level in climb.levels]
    spreads = {what: [v for level in levels for v in _all_values(level, values)] for what, _, values in _QUANTITIES}
    panels = []
    for number, climb in enumerate(ladder.climbs):
        for what, title, values in _QUANTITIES:
            spread = spreads[what]
            if not spread:
                continue
            with style():
                figure = new_figure(_PANEL, 3.1)
                axes = figure.add_subplot()
                for level, how in zip(climb.levels, _size_looks(ladder), strict=True):
                    _signal_lines(axes, level, how, values, ladder.label(level.size))
                if what == "gradient":
                    axes.set_yscale("log")
                    axes.set_ylim(min(spread) / 2, max(spread) * 2)
                    log_ticks(axes.yaxis)
                else:
                    low = min(spread)
                    axes.set_ylim(low - 0.06 * (1.02 - low), 1.02)
                axes.set_xlim(0, 1.02)
                axes.set_title(f"{climb.name}: {what}")
                axes.set_xlabel("block, as a share of the depth")
                axes.set_ylabel(title, fontsize=9)
                _legend(figure, axes, 4)
                panels.append((climb.name, what, to_svg(figure, f"{what}{number}")))
    return panels


def _signal_lines(
    axes: Axes, level: Level, how: Look, values: Callable[[MeanSignal], tuple[float | None, ...]], label: str
) -> None:
    for when, dash in (("init", (0, (4, 1.6))), ("trained", "-")):
        signal = level.signal("init" if when == "init" else "trained")
        if signal is None:
            continue
        y = np.array([np.nan if v is None else v for v in values(signal)])
        x = np.arange(1, len(y) + 1) / len(y)
        axes.plot(
            x,
            y,
            color=how.colour,
            linestyle=dash,
            linewidth=1.5,
            marker=how.marker if when == "trained" else "",
            markersize=4.5,
            markevery=max(1, len(y) // 8),
            label=label if when == "trained" else None,
        )


def _grad(signal: MeanSignal) -> tuple[float | None, ...]:
    return tuple(v if v else None for v in signal.grad)


def _cosine(signal: MeanSignal) -> tuple[float | None, ...]:
    return signal.cosine


_QUANTITIES: tuple[tuple[str, str, Callable[[MeanSignal], tuple[float | None, ...]]], ...] = (
    ("gradient", "‖∂loss/∂x‖ after each block", _grad),
    ("cosine", "cosine of a block's input and output", _cosine),
)


def _all_values(level: Level, values: Callable[[MeanSignal], tuple[float | None, ...]]) -> list[float]:
    signals = [signal for signal in (level.signal("init"), level.signal("trained")) if signal]
    return [v for signal in signals for v in values(signal) if v is not None]


def _rate(level: Level, which: str) -> tuple[float, bool]:
    """The rate, and whether it is an edge of what was tried."""
    assert level.best is not None
    assert level.stable is not None, "what has a best rate is stable there"
    return (level.best.lr, not level.best.is_optimum) if which == "best" else (level.stable.lr, level.stable.open)


def _row(ladder: Ladder, level: Level) -> Row:
    """The level's row, which the legend then calls by its size."""
    return replace(level.row, strategy=ladder.label(level.size))


def _size_looks(ladder: Ladder) -> list[Look]:
    """Sizes have an order, and so have their colours: dark to light."""
    count = len(ladder.sizes)
    return [Look(sequential(index, count), look(index).marker, look(index).dash) for index in range(count)]


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            fontsize=8.5,
            handlelength=2.2,
            columnspacing=1.1,
        )
