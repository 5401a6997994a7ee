"""The plots of places that differ in compute: loss against compute, and the best rate against size or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gptnorm.format import lr_text
from gptnorm.report.figure import Look, legend_below, legend_height, look, new_figure, sequential, style, to_svg
from gptnorm.report.loss_axes import log_ticks
from gptnorm.report.scaling import Spot, by_text, frontier, spots_of
from gptnorm.report.scaling_table import is_scaling
from gptnorm.report.tolerance import ToleranceStudy
from gptnorm.study.measures import geometric_mean

_WIDTH = 4.8
_PANEL = 3.7


def loss_against_compute(study: ToleranceStudy) -> str | None:
    """SVG: every place's loss against its compute, and each strategy's frontier as a line; None where none is drawn."""
    spots = {name: spots_of(study, name) for name in study.about.strategies}
    if not is_scaling(spots) or not any(frontier(mine) for mine in spots.values()):
        return None
    with style():
        figure = new_figure(_WIDTH, 3.5 + legend_height(list(spots), _WIDTH))
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        for index, (name, mine) in enumerate(spots.items()):
            _draw_frontier(axes, name, mine, look(index))
        log_ticks(axes.xaxis)
        axes.yaxis.set_major_locator(MaxNLocator(7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.set_xlabel("compute of a run (FLOPs)")
        axes.set_ylabel("validation loss (nats per token)")
        legend_below(figure, axes)
        return to_svg(figure, "compute")


def best_rate_panels(study: ToleranceStudy) -> list[tuple[str, str]]:
    """(strategy, SVG) pairs: the best rate against the size, a line for each amount of text, at the best batch.

    Where there is one size only, against the text. Whiskers: 95 % interval of the reported seeds; none: that of the
    picking seeds, where some reported seed has no optimum. The others alone would be those that lie lucky.
    """
    spots = {name: spots_of(study, name) for name in study.about.strategies}
    if not is_scaling(spots):
        return []
    best = {
        name: [min(group, key=lambda spot: spot.picked_loss) for group in by_text(mine).values()]
        for name, mine in spots.items()
    }
    rates = [rate for mine in best.values() for spot in mine if (rate := spot.picked_rate)]
    return [
        (name, _rate_panel(name, mine, number, (min(rates) / 2, max(rates) * 2)))
        for number, (name, mine) in enumerate(best.items())
        if any(spot.picked_rate for spot in mine)
    ]


def _draw_frontier(axes: Axes, name: str, spots: Sequence[Spot], how: Look) -> None:
    line = frontier(spots)
    others = [spot for spot in spots if spot not in line and spot.compared and spot.track.loss]
    axes.plot(
        [spot.flops for spot in others] or [np.nan],
        [spot.track.loss.value for spot in others if spot.track.loss] or [np.nan],
        linestyle="",
        marker=how.marker,
        markersize=4,
        color=how.colour,
        alpha=0.45,
    )
    axes.plot(
        [spot.flops for spot in line] or [np.nan],
        [spot.track.loss.value for spot in line if spot.track.loss] or [np.nan],
        color=how.colour,
        linestyle=how.dash,
        marker=how.marker,
        label=name,
        markeredgecolor="white",
    )
    for spot in line:
        losses = list(spot.track.losses.values())
        axes.plot([spot.flops] * 2, [min(losses), max(losses)], color=how.colour, linewidth=1.2)


def _rate_panel(name: str, spots: Sequence[Spot], number: int, limits: tuple[float, float]) -> str:
    sizes = sorted({spot.model for spot in spots}, key=lambda model: min(s.size for s in spots if s.model == model))
    texts = sorted({spot.tokens for spot in spots})
    over_text = len(sizes) == 1
    labels = ["all"] if over_text else [f"{tokens:,} tokens" for tokens in texts]
    with style():
        figure = new_figure(_PANEL, 2.9 + (0 if over_text else legend_height(labels, _PANEL)))
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        for index, label in enumerate(labels):
            mine = [spot for spot in spots if over_text or spot.tokens == texts[index]]
            mine = sorted((s for s in mine if s.picked_rate), key=lambda s: s.tokens if over_text else s.size)
            colour, marker = sequential(index, len(labels)), look(index).marker
            _draw_rates(axes, mine, [s.tokens if over_text else s.size for s in mine], label, colour, marker)
        axes.set_ylim(limits)
        log_ticks(axes.yaxis)
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: lr_text(value)))
        axes.set_xlabel("text (tokens)" if over_text else "size (FLOPs per token)")
        axes.set_ylabel("best peak learning rate")
        axes.set_title(name)
        if not over_text:
            legend_below(figure, axes)
        return to_svg(figure, f"best{number}")


def _draw_rates(axes: Axes, spots: Sequence[Spot], x: Sequence[float], label: str, colour: Any, marker: str) -> None:
    means = {i: geometric_mean(list(spot.rates.values())) for i, spot in enumerate(spots) if spot.all_have_rates}
    y = [means[i].value if i in means else spot.picked_rate for i, spot in enumerate(spots)]
    axes.plot(x, np.array(y, dtype=float), color=colour, marker=marker, label=label)
    for i, mean in means.items():
        if mean.low is not None and mean.high is not None:
            axes.plot([x[i]] * 2, [mean.low, mean.high], color=colour, linewidth=1.2)
