"""The plots of a reading of curvature: the spectrum, and what each slot's Hessian is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gptnorm.curvature.algorithms import Density
from gptnorm.report.figure import INK, look, new_figure, style, to_svg
from gptnorm.report.loss_axes import log_ticks

_WIDTH = 4.8
_POINTS = 600
_BLUR = 0.01
"""Standard deviation of an eigenvalue in the plot, as part of the range."""
_LEAST = 1e-7
"""Density, times the range, that is the bottom of the plot: an eigenvalue among ten million shows."""


def spectrum(reading: dict[str, Any], prefix: str) -> str:
    """SVG: the density of the Hessian's eigenvalues on a logarithmic scale, with the ends that were measured."""
    found = reading["spectrum"]
    density = Density(
        values=torch.tensor(found["values"], dtype=torch.float64),
        weights=torch.tensor(found["weights"], dtype=torch.float64),
    )
    sharpness = reading["sharpness"]
    ends = [sharpness["smallest"]["value"], sharpness["largest"]["value"]]
    low, high = min(float(density.values.min()), *ends), max(float(density.values.max()), *ends)
    span = high - low or 1.0
    grid = torch.linspace(low - 0.05 * span, high + 0.05 * span, _POINTS, dtype=torch.float64)
    curve = (density.on_grid(grid, _BLUR * span) * span).numpy()
    with style():
        figure = new_figure(_WIDTH, 3.0)
        axes = figure.add_subplot()
        how = look(0)
        axes.fill_between(grid.numpy(), _LEAST, np.maximum(curve, _LEAST), color=how.colour, alpha=0.25, linewidth=0)
        axes.plot(grid.numpy(), np.maximum(curve, _LEAST), color=how.colour)
        for end in ends:
            axes.axvline(end, color=INK, linestyle=(0, (4, 2)), linewidth=1)
        axes.set_yscale("log")
        axes.set_ylim(_LEAST, max(float(curve.max()) * 2, 1.0))
        log_ticks(axes.yaxis)
        axes.set_xlabel("eigenvalue λ")
        axes.set_ylabel("density × range")
        axes.set_title(f"Step {reading['step']}", fontsize=10.5)
        return to_svg(figure, prefix)


def slot_norms(rows: Sequence[dict[str, Any]], prefix: str) -> str | None:
    """SVG: ‖L‖ and ‖C‖ of each slot side by side; None if all are 0."""
    kinds = {"‖L‖ Gauss-Newton": "gauss_newton", "‖C‖ of the norm": "curvature", "‖H‖ whole": "hessian"}
    values = {label: [row[key]["value"] or 0.0 for row in rows] for label, key in kinds.items()}
    positive = [value for column in values.values() for value in column if value > 0]
    if not positive:
        return None
    with style():
        figure = new_figure(_WIDTH, 1.5 + 0.42 * len(rows))
        axes = figure.add_subplot()
        places = np.arange(len(rows))
        for index, (label, column) in enumerate(values.items()):
            how = look(index)
            shown = [(value, place) for value, place in zip(column, places, strict=True) if value > 0]
            if shown:
                x, y = zip(*shown, strict=True)
                axes.plot(
                    x, np.array(y) + 0.2 * (index - 1), linestyle="", marker=how.marker, color=how.colour, label=label
                )
        axes.set_xscale("log")
        low, high = min(positive), max(positive)
        axes.set_xlim(low / 2, high * 2)
        log_ticks(axes.xaxis)
        axes.set_yticks(places, [row["name"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("spectral norm")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, columnspacing=1.0)
        return to_svg(figure, prefix)
