"""How every plot looks, and how a figure becomes an SVG string.

Series differ in colour (Okabe–Ito), marker and line style at once, so that they can be told apart
with any colour vision and in greyscale. Text is drawn as paths: it looks the same on a machine
without the font. The same figure gives the same bytes.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1c2126"
MUTED = "#59636e"
GRID = "#dfe3e8"
WARNING = "#b3261e"

# Okabe–Ito without its yellow, which vanishes on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "p", "h")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.6, 1.2, 1.6)))

_RC: dict[str, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "gptnorm",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,
    "legend.frameon": False,
    "lines.linewidth": 1.9,
    "lines.markersize": 6,
    "lines.markeredgewidth": 0.6,
}


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    colour: str
    marker: str
    dash: Any


def look(index: int) -> Look:
    """The look of series number `index`; the first 56 differ in colour or marker, the first 32 also in greyscale."""
    return Look(_COLOURS[index % 7], _MARKERS[index % 8], _DASHES[(index + index // 8) % 4])


def sequential(index: int, count: int) -> Any:
    """Colour number `index` of `count` in an ordered set: dark to light, never too light for white paper."""
    share = 0.0 if count < 2 else index / (count - 1)
    return matplotlib.colormaps["viridis"](0.86 * share)


def style() -> Any:
    """The context in which figures are made and saved; nobody else's matplotlib settings leak in."""
    settings: Any = {**matplotlib.rcParamsDefault, **_RC, "backend": "svg"}
    return matplotlib.rc_context(settings)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, size in inches; call inside `style()`."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def legend_columns(labels: list[str], width: float) -> int:
    """Two columns where the labels fit side by side into `width` inches, else one."""
    half = -(-len(labels) // 2)
    columns = [labels[:half], labels[half:]]
    # Points: about 6.3 a letter at size 10, 50 for the handle and the gaps.
    needed = sum(50 + 6.3 * max(map(len, column)) for column in columns if column)
    return 2 if len(labels) > 1 and needed <= 72 * width else 1


def legend_height(labels: list[str], width: float) -> float:
    """Inches that the legend under a plot takes."""
    return 0.24 * -(-len(labels) // legend_columns(labels, width))


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend under the plot, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = legend_columns(labels, figure.get_figwidth())
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)


def to_svg(figure: Figure, prefix: str) -> str:
    """The figure as an `<svg>` element, to be put into a page; call inside `style()`.

    `prefix` keeps its ids apart from those of other figures on the page: a figure in a closed
    `<details>` would otherwise hide clip paths and glyphs that a visible one shares with it.
    """
    buffer = io.StringIO()
    # Without date, creator and the rest the bytes depend on the data alone, and no address is left in the file.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    # The page sizes it; the viewBox keeps the proportions.
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    return f"{head}>{rest}"
