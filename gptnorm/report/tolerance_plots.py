"""The plots of a tolerance study: loss against rate, what each strategy bears, and both over places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gptnorm.format import value_text
from gptnorm.records import finite
from gptnorm.report.curves import curves_of
from gptnorm.report.figure import (
    INK,
    MUTED,
    Look,
    legend_below,
    legend_columns,
    legend_height,
    look,
    new_figure,
    style,
    to_svg,
)
from gptnorm.report.loss_axes import (
    ABOVE,
    UNSTABLE,
    draw_strip,
    entropy_line,
    log_ticks,
    ring,
    seed_dashes,
    shown_range,
    strip_marks,
)
from gptnorm.report.plots import RateCurve, rate_panels
from gptnorm.report.tolerance import Pair, Place, ToleranceStudy
from gptnorm.report.track import Track
from gptnorm.study.measures import Estimate, Kept

RATE = "largest stable rate"
"""Names its panel, whose numbers are ratios."""

_Compared = tuple[Estimate | None, bool]
"""Ours against the baseline's, and whether a best that it stands on is an end of what was tried."""

_WIDTH = 4.8
_PANEL = 3.7
_PALE = 0.4
_LANE = 0.11
"""Inches of the strip that each strategy has to itself."""
_MOST_STRIP = 1.2


@dataclass(frozen=True, kw_only=True)
class RateLine:
    """What the plot of loss against rate shows of one strategy; a rate with an unstable seed has no loss."""

    firm: list[tuple[float, float, float, float]]
    """(rate, mean, lowest, highest loss) over the reported seeds, where all of them trained."""
    single: list[tuple[float, float]]
    """(rate, loss) of reported seeds where not all trained."""
    pale: list[tuple[float, float]]
    """(rate, mean loss) over the seeds that pick."""
    unstable: list[float]
    pale_unstable: list[float]
    """Of the seeds that pick, where no reported one trained."""
    best: tuple[float, float] | None
    """(rate, loss), over the seeds that pick where no reported one has ended."""
    reported: bool
    """Whether it is over the reported seeds."""

    @property
    def losses(self) -> list[float]:
        """Every mean."""
        return [point[1] for point in (*self.firm, *self.pale)]


def rate_line(track: Track) -> RateLine:
    """The line of a track."""
    firm, single, unstable = [], [], []
    for lr, points in track.mean_curve():
        losses = [point.loss for point in points if point.stable and point.loss is not None]
        if len(losses) < len(points):
            unstable.append(lr)
        elif len(points) >= max(1, track.ended):
            firm.append((lr, sum(losses) / len(losses), min(losses), max(losses)))
        if len(points) < track.ended or len(losses) < len(points):
            single += [(lr, loss) for loss in losses]
    reported = {lr for lr, _ in track.mean_curve()}
    screening = track.seeds == track.pick
    picked = [] if screening else [point for point in track.picked if point.stable and point.loss is not None]
    best = None
    if track.best is not None and track.best.loss is not None and not track.failed:
        # On the line: the loss in the tables is that of each seed at a rate of its own.
        best = track.best.lr, next((mean for lr, mean, *_ in firm if lr == track.best.lr), track.best.loss)
    return RateLine(
        firm=firm,
        single=single,
        pale=[(point.lr, point.loss) for point in picked if point.loss is not None],
        unstable=unstable,
        pale_unstable=[point.lr for point in track.picked if not point.stable and point.lr not in reported],
        best=best,
        reported=track.loss is not None,
    )


def loss_against_rate(study: ToleranceStudy, place: Place, prefix: str) -> str | None:
    """SVG: validation loss against learning rate, a line per strategy as it comes; None where nothing is stable.

    At the top, a lane per strategy with × where a seed is not stable and ↑ for a mean above the scale.
    """
    lines = {name: rate_line(place.own[name]) for name in study.about.strategies if name in place.own}
    means = [loss for line in lines.values() for loss in line.losses]
    if not means:
        return None
    lowest = [low for line in lines.values() for _, _, low, _ in line.firm]
    low, high = shown_range(means, [line.best[1] for line in lines.values() if line.best], lowest)
    lanes = [
        name
        for name, line in lines.items()
        if line.unstable or line.pale_unstable or max(line.losses, default=0.0) > high
    ]
    with style():
        names = list(lines)
        room = min(_LANE * len(lanes), _MOST_STRIP)
        height = 3.6 + legend_height(names, _WIDTH) + room
        figure = new_figure(_WIDTH, height)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        strip = (0.05 + room) / (height - 0.75 - legend_height(names, _WIDTH)) if lanes else 0.0
        top = low + (high - low) / (1 - strip)
        axes.set_ylim(low, top)
        if lanes:
            draw_strip(axes, high, top)
        for index, name in enumerate(study.about.strategies):
            if name in lines:
                _draw_line(axes, name, lines[name], look(index), high)
            if name in lanes:
                share = (lanes.index(name) + 0.5) / len(lanes)
                _draw_marks(axes, lines[name], look(index), high, 1 - strip * (0.04 + 0.92 * share))
        entropy_line(axes, place.entropy, low, high)
        lrs = [lr for name in lines for lr in place.own[name].lrs]
        axes.set_xlim(min(lrs) / 1.3, max(lrs) * 1.3)
        log_ticks(axes.xaxis)
        # Ticks inside the strip would claim losses there.
        axes.set_yticks([tick for tick in MaxNLocator(7).tick_values(low, high) if low <= tick <= high])
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("validation loss (nats per token)")
        legend_below(figure, axes)
        return to_svg(figure, prefix)


def _draw_line(axes: Axes, name: str, line: RateLine, how: Look, high: float) -> None:
    if line.pale:
        lrs, means = zip(*line.pale, strict=True)
        axes.plot(lrs, means, color=how.colour, alpha=_PALE, linewidth=1.1, marker=how.marker, markersize=3)
    lrs, means, lows, highs = zip(*_broken(line), strict=True) if line.firm else ((np.nan,),) * 4
    axes.fill_between(lrs, lows, highs, color=how.colour, alpha=0.16, linewidth=0)
    axes.plot(lrs, means, color=how.colour, linestyle=how.dash, marker=how.marker, label=name, markeredgecolor="white")
    seed_dashes(axes, line.single, how, high)
    if line.best is not None and line.best[1] <= high:
        ring(axes, *line.best, how, alpha=1.0 if line.reported else _PALE)


def _broken(line: RateLine) -> list[tuple[float, float, float, float]]:
    """The firm points, with a gap where a rate between was tried that is not one of them."""
    firm = {point[0] for point in line.firm}
    tried = [lr for lr, _ in (*line.single, *line.pale)] + line.unstable + line.pale_unstable
    gaps = [(lr, np.nan, np.nan, np.nan) for lr in {*tried} - firm]
    return sorted([*line.firm, *gaps])


def _draw_marks(axes: Axes, line: RateLine, how: Look, high: float, height: float) -> None:
    above = [lr for lr, mean, _, _ in line.firm if mean > high]
    known = {lr for lr, *_ in line.firm} | set(line.unstable)
    pale_above = [lr for lr, mean in line.pale if mean > high and lr not in known]
    for marker, lrs, alpha in (
        (UNSTABLE, line.unstable, 1.0),
        (UNSTABLE, line.pale_unstable, _PALE),
        (ABOVE, above, 1.0),
        (ABOVE, pale_above, _PALE),
    ):
        strip_marks(axes, marker, lrs, how, height=height, size=4.5, alpha=alpha)
    # Beside the lane, where the axis has no ticks: whose it is, for those who do not tell the colours apart.
    axes.plot(
        [-0.025], [height], color=how.colour, marker=how.marker, markersize=4, transform=axes.transAxes, clip_on=False
    )


def tolerance_bars(study: ToleranceStudy, place: Place, prefix: str) -> str | None:
    """SVG: for each strategy as it comes a bar from its best rate to its edge; None where no edge is known.

    Whisker: 95 % interval of the edge. An arrow stands for "at least".
    """
    names = [name for name in study.ranked(place.own) if name in place.own and place.own[name].best]
    tracks = [place.own[name] for name in names]
    if not any(track.edge for track in tracks):
        return None
    pairs = place.pairs(tuned=False)
    beats = {name: pair.beats for name, pair in pairs.items()}
    rates = [lr for track in tracks for lr in (track.best.lr if track.best else None, _value(track.edge)) if lr]
    rates += [lr for lr in map(_value, (*(track.near for track in tracks), *beats.values())) if lr]
    low, high = min(rates) / 1.8, max(rates) * 2.2
    with style():
        keys = _bar_keys(study)
        labels = [label for _, label in keys]
        figure = new_figure(_WIDTH, 0.85 + 0.42 * len(names) + legend_height(labels, _WIDTH))
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        for row, (name, track) in enumerate(zip(names, tracks, strict=True)):
            _draw_bar(axes, row, track, look(study.about.strategies.index(name)), (low, high))
            if (near := track.near) is not None:
                axes.plot([near.value], [row], marker="|", color=INK, markersize=13, markeredgewidth=2.2)
            if (reach := _value(beats.get(name))) is not None:
                axes.plot([reach], [row], marker="v", color=INK, markerfacecolor="white", markeredgewidth=1.4)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.45, -0.55)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        log_ticks(axes.xaxis)
        axes.set_xlabel("peak learning rate")
        columns = legend_columns(labels, _WIDTH)
        figure.legend([key for key, _ in keys], labels, loc="outside lower center", ncols=columns, handlelength=2.0)
        return to_svg(figure, prefix)


def _bar_keys(study: ToleranceStudy) -> list[tuple[Line2D, str]]:
    dot = Line2D([], [], linestyle="", marker="o", color=MUTED, markersize=7)
    near = Line2D([], [], linestyle="", marker="|", color=INK, markersize=11, markeredgewidth=2.2)
    beats = Line2D([], [], linestyle="", marker="v", color=INK, markerfacecolor="white", markeredgewidth=1.4)
    whisker = Line2D([], [], color=INK, linewidth=1.2, marker="D", markersize=4)
    found = [(dot, "own best"), (near, f"within {study.epsilon:g} nats")]
    if study.others:
        found.append((beats, f"{study.baseline}'s best loss"))
    return [*found, (whisker, "largest stable rate")]


def _draw_bar(axes: Axes, row: int, track: Track, how: Look, limits: tuple[float, float]) -> None:
    best, edge = track.best, track.edge
    assert best is not None
    if edge is not None:
        axes.barh(row, edge.value - best.lr, left=best.lr, height=0.36, color=how.colour, alpha=0.3)
        if edge.low is not None:
            # An end that lies beyond the axis, or is not known, has no cap.
            start, end = max(edge.low, limits[0]), min(edge.high or edge.value, limits[1])
            axes.plot([start, end], [row, row], color=INK, linewidth=1.2)
            caps = [lr for lr in (edge.low, edge.high) if lr is not None and limits[0] < lr < limits[1]]
            axes.plot(caps, [row] * len(caps), linestyle="", marker="|", color=INK, markersize=6, markeredgewidth=1.2)
        axes.plot([edge.value], [row], marker="D", markersize=4, color=INK)
        if edge.at_least:
            axes.annotate(
                "",
                (edge.value * 1.55, row),
                (edge.value, row),
                arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0},
                annotation_clip=False,
            )
    face = "white" if track.end else how.colour
    axes.plot(
        [best.lr],
        [row],
        marker=how.marker,
        markersize=8,
        color=how.colour,
        markerfacecolor=face,
        markeredgecolor=how.colour if track.end else INK,
        markeredgewidth=1.4,
    )


def place_panels(study: ToleranceStudy) -> list[tuple[str, str]]:
    """(what, SVG) pairs: every strategy against the baseline over places; none for fewer than two.

    Loss minus the baseline's, as strategies come and tuned, that on every other text, and the ratio of the edges, with
    their intervals. Only a lower end: a triangle there. "edge": what stands on an end of what was tried.
    """
    if len(study.places) < 2:
        return []

    def over_places(value: Callable[[Pair], Estimate | None], *, tuned: bool = False) -> list[dict[str, _Compared]]:
        pairs = [place.pairs(tuned=tuned) for place in study.places]
        return [{name: (value(pair), pair.at_end) for name, pair in at_place.items()} for at_place in pairs]

    found = [("loss", over_places(lambda pair: pair.difference))]
    if study.tune:
        found.append(("loss, both tuned", over_places(lambda pair: pair.difference, tuned=True)))
    for text, name in study.evaluated.items():
        found.append((f"loss on {name}", over_places(lambda pair, text=text: pair.difference_on(text))))
    if study.follows_rates:
        found.append((RATE, over_places(_with_interval)))
    return [
        (what, _place_panel(study, what, values, f"places{index}"))
        for index, (what, values) in enumerate(found)
        if any(value for at_place in values for value, _ in at_place.values())
    ]


def _place_panel(study: ToleranceStudy, what: str, values: Sequence[Mapping[str, _Compared]], prefix: str) -> str:
    others, base = list(study.others), study.baseline
    with style():
        names = [", ".join(value_text(value) for _, value in place.told) for place in study.places]
        steep = sum(map(len, names)) > 36
        figure = new_figure(_PANEL, 2.9 + legend_height(others, _PANEL) + (0.06 * max(map(len, names)) if steep else 0))
        axes = figure.add_subplot()
        if what == RATE:
            axes.set_yscale("log")
        axes.axhline(1.0 if what == RATE else 0.0, color=MUTED, linestyle=":", linewidth=1.5)
        joined = [_a_line_joins(*pair) for pair in pairwise(study.places)]
        for index, name in enumerate(others):
            shift = 0.5 * (index - (len(others) - 1) / 2) / max(len(others), 3)
            points = [(x + shift, *at_place.get(name, (None, False))) for x, at_place in enumerate(values)]
            _draw_points(axes, name, points, joined, look(study.about.strategies.index(name)))
        if what == RATE:
            log_ticks(axes.yaxis)
        axes.set_xticks(range(len(names)), names, rotation=45 if steep else 0, ha="right" if steep else "center")
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(", ".join(study.heads))
        title = f"{RATE} over {base}'s" if what == RATE else what.replace("loss", f"loss minus {base}'s", 1)
        # A panel is narrow; a line of its own for what is said after a comma.
        axes.set_title(title.replace(", ", "\n"), fontsize=10)
        axes.set_ylabel("times" if what == RATE else "nats per token")
        legend_below(figure, axes)
        return to_svg(figure, prefix)


def _a_line_joins(place: Place, following: Place) -> bool:
    """Whether places differ in one number alone, so that there is something between them."""
    changed = [(a, b) for (_, a), (_, b) in zip(place.told, following.told, strict=True) if a != b]
    return len(changed) == 1 and all(finite(value) is not None for value in changed[0])


def _draw_points(
    axes: Axes, name: str, points: Sequence[tuple[float, Estimate | None, bool]], joined: Sequence[bool], how: Look
) -> None:
    """Each place's value with its interval; of one known from below only, a triangle at the lower end.

    Args:
        joined: between each two neighbours, whether a line is drawn; there is none to or from one without a value.
    """
    lines: list[tuple[float, float]] = []
    for (x, found, _), join in zip(points, [False, *joined], strict=True):
        lower_end = found is not None and found.low is not None and found.high is None
        if not join:
            lines.append((np.nan, np.nan))
        lines.append((x, np.nan if found is None or lower_end else found.value))
    axes.plot(
        *zip(*lines, strict=True),
        color=how.colour,
        linestyle=how.dash,
        linewidth=1.2,
        marker=how.marker,
        label=name,
    )
    for x, found, at_end in points:
        if found is not None and at_end:
            at = found.low if found.low is not None and found.high is None else found.value
            axes.annotate("edge", (x, at), xytext=(4, 4), textcoords="offset points", fontsize=8, color=MUTED)
        if found is None or found.low is None:
            continue
        if found.high is not None:
            axes.plot([x, x], [found.low, found.high], color=how.colour, linewidth=1.5, marker="_", markersize=6)
        else:
            axes.plot([x], [found.low], color=how.colour, marker="^", markersize=8, markerfacecolor="white")


def training_panels(study: ToleranceStudy, place: Place, prefix: str, points: int) -> list[tuple[str, str]]:
    """(strategy, SVG) pairs: training loss of each strategy as it comes, a line per rate that the picking seeds tried.

    Each line is the mean over all seeds that left one, and ends where the first of them ends.

    Args:
        points: of each line, about.
    """
    panels, lrs = [], set()
    for name in study.about.strategies:
        track = place.own.get(name)
        if track is None:
            continue
        wanted = {point.lr for point in track.picked}
        curves = curves_of(study.about.folder, [trial.cell for trial in track.trials if trial.point.lr in wanted])
        # Judged by its seed's best, as everywhere else on the page.
        judged = [*track.picked, *(point for _, points in track.mean_curve() for point in points)]
        unstable = {point.lr for point in judged if not point.stable}
        lines = [RateCurve(lr, curve, lr in unstable, lr not in unstable) for (_, lr), curve in sorted(curves.items())]
        panels.append((name, lines))
        lrs |= {line.lr for line in lines}
    return rate_panels(panels, sorted(lrs), prefix, points)


def _value(found: Estimate | Kept | None) -> float | None:
    return None if found is None else found.value


def _with_interval(pair: Pair) -> Estimate | None:
    ratio = pair.edge_ratio
    return None if ratio is None or ratio.low is None else ratio
