"""The plot of one run: training and validation loss over its learning rate."""

from __future__ import annotations

from typing import Any

from gptnorm.report.curves import series, smooth, thin
from gptnorm.report.figure import INK, legend_below, look, new_figure, style, to_svg


def run_curves(metrics: list[dict[str, Any]]) -> str | None:
    """SVG: training loss (raw faint, smoothed firm), validation loss and learning rate; None without losses."""
    train, val, lr = series(metrics, "train"), series(metrics, "val"), series(metrics, "train", "lr")
    if not len(train) and not len(val):
        return None
    with style():
        figure = new_figure(4.8, 4.9 if len(lr) else 3.6)
        if len(lr):
            axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
        else:
            axes = below = figure.add_subplot()
        if len(train):
            how, raw, even = look(0), thin(train, 800), thin(smooth(train))
            axes.plot(raw.steps, raw.values, color=how.colour, alpha=0.25, linewidth=0.8)
            axes.plot(even.steps, even.values, color=how.colour, label="training (smoothed)")
        if len(val):
            how = look(1)
            axes.plot(val.steps, val.values, color=how.colour, marker=how.marker, markersize=5, label="validation")
        if len(lr):
            shown = thin(lr)
            below.plot(shown.steps, shown.values, color=INK, linewidth=1.5)
            below.set_ylabel("learning rate")
            below.set_ylim(bottom=0)
            below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        axes.set_ylabel("loss (nats per token)")
        below.set_xlabel("step")
        below.set_xlim(left=0)
        legend_below(figure, axes)
        return to_svg(figure, "run")
