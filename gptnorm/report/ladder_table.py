"""The tables of a ladder for the terminal, as Markdown and for the page, all from the same text."""

from __future__ import annotations

import math

from rich.console import Group

from gptnorm.format import MISSING, loss_text, lr_text, plural
from gptnorm.report.grids import TextTable, markdown_grids, rich_grids
from gptnorm.report.ladder import Climb, Ladder, Level, MeanSignal
from gptnorm.report.optimum import MARGIN

BESIDE = "‡"
NONE = "none"


def grids(ladder: Ladder) -> list[TextTable]:
    """The tables, the answer first."""
    signals = _signal_grid(ladder)
    return [_shift_grid(ladder), _rung_grid(ladder), *([signals] if signals else [])]


def rate_text(level: Level) -> str:
    """A best rate with its mark."""
    best = level.best
    if best is None:
        return MISSING if level.pending else NONE
    rate = f"{best.lr:.2g}" if best.kind == "fit" else ""
    mark = {"fit": "", "beside": f" {BESIDE}", "only": " edge", "lowest": " edge", "highest": " edge"}[best.kind]
    return (lr_text(float(rate)) if rate else lr_text(best.lr)) + mark


def stable_text(level: Level) -> str:
    """A largest stable rate; "≥" where a higher one may be stable, too."""
    stable = level.stable
    if stable is None:
        return MISSING if level.pending else NONE
    return f"≥ {lr_text(stable.lr)}" if stable.open else lr_text(stable.lr)


def octaves_text(octaves: float | None, sd: float | None = None) -> str:
    """ "+0.42", or "-1.58 ± 0.21"."""
    if octaves is None:
        return MISSING
    # Adding zero makes -0.0 the +0.0 that it is.
    return f"{round(octaves, 2) + 0.0:+.2f}" + ("" if sd is None else f" ± {sd:.2f}")


def stable_shift_text(climb: Climb) -> str:
    """Octaves from the first rung's largest stable rate to the last's; a bound where one of the two is one."""
    first, last = climb.levels[0].stable, climb.levels[-1].stable
    if first is None or last is None:
        return MISSING
    if first.open and last.open:
        return "not bounded"
    sign = "≤ " if first.open else "≥ " if last.open else ""
    return sign + octaves_text(math.log2(last.lr / first.lr))


def notes(ladder: Ladder) -> list[str]:
    """Plain lines that explain the words and signs of the tables, and only those."""
    seeds = len(ladder.study.seeds)
    levels = [level for climb in ladder.climbs for level in climb.levels]
    kinds = {level.best.kind if level.best else None for level in levels if level.best or not level.pending}
    found = [
        "Best rate: vertex of the parabola through the lowest loss (mean over seeds) of the grid and its neighbours, "
        "against the logarithm of the rate. Loss: at the grid's best, validation, nats per token, "
        + (f"mean ± seed sd over {plural(seeds, 'seed')}." if seeds > 1 else "one seed."),
        f"Stable: every seed finished and ended {MARGIN} nats or more below the unigram entropy"
        + ("." if ladder.study.unigram_entropy is None else f", {loss_text(ladder.study.unigram_entropy)}."),
        "Shift and slope: octaves (-1 is half the rate) from the first to the last size with an optimum, and per "
        "doubling (least squares)" + ("; ± seed sd." if any(climb.shift_sd for climb in ladder.climbs) else "."),
        "Keeping the rate: what the largest size loses at the grid's best rate of the smallest, against its own best.",
    ]
    if kinds & {"only", "lowest", "highest"}:
        found.append("edge: lowest or highest rate tried, so no optimum and left out of shift and slope.")
    if "beside" in kinds:
        found.append(f"{BESIDE} a neighbouring rate is not stable, so the grid's best stands unfitted.")
    if None in kinds:
        found.append(f"{NONE}: no rate of the grid is stable.")
    if any(level.stable and level.stable.open for level in levels):
        found.append("≥: stable at the highest rate tried.")
    if any(level.signals for level in levels):
        found.append(
            "Signal: at initialisation → after training, at the rate of the lowest loss, on one batch. Gradient: "
            "of the loss by the stream, after the first block over after the last. Cosine: of a block's input "
            "and output, last quarter of the blocks. Token cosine: of two tokens of a sequence after the last block."
        )
    if ladder.done < ladder.planned:
        found.append(
            f"Partial: {ladder.done} of {ladder.planned} runs ended. A rate counts once all of its seeds have, or one "
            "has failed."
        )
    return found


def rich_ladder(ladder: Ladder) -> Group:
    """The tables for the terminal; print it with a `rich.console.Console`."""
    return rich_grids(ladder.study.title, grids(ladder), notes(ladder))


def markdown_ladder(ladder: Ladder) -> str:
    """The tables and their notes as Markdown, ending in a newline."""
    return markdown_grids(grids(ladder), notes(ladder))


def _names(ladder: Ladder) -> tuple[str, ...]:
    return ("strategy", "rule") if any(climb.rule for climb in ladder.climbs) else ("strategy",)


def _name(climb: Climb) -> tuple[str, ...]:
    return (climb.strategy, climb.rule) if climb.rule else (climb.strategy,)


def _shift_grid(ladder: Ladder) -> TextTable:
    rows = []
    for climb in ladder.climbs:
        usable, cost = climb.usable, climb.kept_cost
        sizes = f"{usable[0].size} → {usable[-1].size}" if len(usable) > 1 else MISSING
        row = [
            sizes,
            octaves_text(climb.shift, climb.shift_sd) + (f" {BESIDE}" if _coarse(climb) else ""),
            octaves_text(climb.slope, climb.slope_sd),
            stable_shift_text(climb),
            MISSING if cost is None else "not stable" if math.isinf(cost) else f"{cost:+.3f}",
        ]
        rows.append((*_name(climb), *row))
    names = _names(ladder)
    head = (ladder.unit, "best rate, octaves", "per doubling", "stable rate, octaves", "keeping the rate")
    title = f"How far the rates move with the {ladder.axis}"
    return TextTable(title=title, head=(*names, *head), rows=tuple(rows), words=len(names))


def _coarse(climb: Climb) -> bool:
    """Whether the shift is between rates of which one at least is known to half a step of the grid only."""
    ends = climb.usable[:1] + climb.usable[-1:]
    return len(climb.usable) > 1 and any(level.best and level.best.kind == "beside" for level in ends)


def _rung_grid(ladder: Ladder) -> TextTable:
    rows = [
        (*_name(climb), str(level.size), rate_text(level), _loss(level), stable_text(level))
        for climb in ladder.climbs
        for level in climb.levels
    ]
    names = _names(ladder)
    head = (*names, ladder.unit, "best rate", "loss there", "largest stable rate")
    title = f"Best and largest stable rate at every {ladder.axis}"
    return TextTable(title=title, head=head, rows=tuple(rows), words=len(names))


def _loss(level: Level) -> str:
    entry = next((e for e in level.row.entries if level.best and e.lr == level.best.grid_lr), None)
    if entry is None:
        return MISSING
    return loss_text(entry.mean) + ("" if entry.sd is None else f" ± {loss_text(entry.sd)}")


def _signal_grid(ladder: Ladder) -> TextTable | None:
    if not any(level.signals for climb in ladder.climbs for level in climb.levels):
        return None

    def pair(level: Level, number: str) -> str:
        ends = (level.signal("init"), level.signal("trained"))
        return " → ".join(_number(signal, number) for signal in ends)

    rows = [
        (*_name(climb), str(level.size), *(pair(level, n) for n in ("grad_ratio", "top_cosine", "token_cosine")))
        for climb in ladder.climbs
        for level in climb.levels
    ]
    names = _names(ladder)
    head = (*names, ladder.unit, "gradient, first / last", "cosine", "token cosine")
    return TextTable(title="Signal, before → after training", head=head, rows=tuple(rows), words=len(names))


def _number(signal: MeanSignal | None, name: str) -> str:
    value = getattr(signal, name) if signal else None
    if value is None:
        return MISSING
    if name != "grad_ratio":
        return f"{value:.3f}"
    return f"{value:.3g}" if 0.01 <= value < 1000 else f"{value:.1e}".replace("e+", "e")
