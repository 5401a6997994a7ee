"""What the words and signs in the tables of a tolerance study mean."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from gptnorm.format import MISSING, loss_text, lr_text, names_text, plural
from gptnorm.report.budget_table import EQUAL_TIME, SPEED_UP
from gptnorm.report.elsewhere_table import ON_EACH
from gptnorm.report.grids import TextTable
from gptnorm.report.scaling_table import scaling_words
from gptnorm.report.tolerance import ToleranceStudy
from gptnorm.study.outcome import SPIKE, SPIKE_WINDOW, TAIL

LINE = "Rate up to which the loss stays below so many times the own best, over {}'s"


def notes(study: ToleranceStudy, grids: Sequence[TextTable]) -> list[str]:
    """Plain lines that explain the words and signs of `grids`, and only those that occur."""
    if not grids:
        return partial_notes(study)
    titles = " ".join(grid.title for grid in grids)
    entries = [str(entry) for grid in grids for row in grid.rows for entry in row[1:]]
    heads = " ".join(head for grid in grids for head in grid.head)

    def marked(pattern: str) -> bool:
        return any(re.search(pattern, entry) for entry in entries)

    return [
        *partial_notes(study),
        _loss(study),
        _best(study),
        *(text for pattern, text in _SIGNS.items() if marked(pattern)),
        *_few(study),
        stability_note(study),
        *(text for word, text in _words(study).items() if word in heads or word in titles),
        *([f"Not tuned where a strategy refuses it: {'; '.join(study.refused)}."] if study.refused else []),
        *([f"{MISSING}: no number, or a ratio whose interval is not known."] if MISSING in entries else []),
    ]


def partial_notes(study: ToleranceStudy) -> list[str]:
    """What is missing."""
    if not study.places:
        return ["No run has ended yet."]
    if not study.unfinished:
        return []
    absent = [name for name in study.about.strategies if any(name not in place.own for place in study.places)]
    tail = (
        f" There is no run yet of {names_text(absent)}{' somewhere' if len(study.places) > 1 else ''}."
        if absent
        else ""
    )
    runs = plural(len(study.cells), "run")
    return [f"Partial: the study has not come to its end, or was joined and not run since ({runs} so far).{tail}"]


def stability_note(study: ToleranceStudy) -> str:
    """When a run counts as stable, with the numbers of this study."""
    rules = ["the run finished"]
    if math.isfinite(study.stability.margin) and any(place.entropy is not None for place in study.places):
        value = "that of its text" if study.entropy is None else loss_text(study.entropy)
        rules.append(
            f"its validation loss is {study.stability.margin:g} nats or more below the unigram entropy, {value} (the "
            "loss of a model that knows token frequencies alone)"
        )
    if math.isfinite(study.stability.rise):
        rules.append(
            f"its training loss over the last {100 * TAIL:g} % of the steps is at most {study.stability.rise:g} nats "
            "above its lowest over any stretch as long"
        )
    if math.isfinite(study.stability.worse):
        rules.append(f"above its best rate, its validation loss is at most {study.stability.worse:g} times that there")
    return f"Stable: {'; '.join(rules)}."


def seeds_text(seeds: Sequence[int]) -> str:
    """ "seed 0", "seeds 1, 2 and 3"."""
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {names_text([str(seed) for seed in seeds])}"


def _loss(study: ToleranceStudy) -> str:
    if study.screening:
        return (
            f"A screening: the numbers are those of the {plural(len(study.pick), 'seed')} that picked each best rate, "
            "so every best loss is flattered. Loss: validation, nats per token."
        )
    told = f"Loss: validation, nats per token, over {plural(len(study.seeds), 'seed')}"
    if not any(cell.seed in study.seeds for cell in study.cells):
        return f"{told} that do not pick the rate; none of their runs has ended yet."
    how = {
        "all": ", each at the rate that is best on the mean of all other seeds.",
        "some": " that did not pick the rate; where all tried several, each at that which is best on all others.",
        "none": " that did not pick the rate.",
    }
    return told + how[study.crossing]


def _best(study: ToleranceStudy) -> str:
    ends = any(track.end for place in study.places for track in place.tracks)
    but = ", but where it is an end of what was tried" if ends else ""
    within = f"neighbours were tried until they were within a factor {study.search.optimum:g}{but}"
    picked = f"that of the lowest loss on {seeds_text(study.pick)}"
    pooled = "that of the lowest mean loss over all seeds; a seed's own may be the next"
    if study.screening:
        return f"Best rate: {picked}; {within}."
    alone = "no interval holds the error of that choice"
    return {
        "all": f"Best rate: {pooled}; {within}.",
        "some": f"Best rate: {pooled}; where they did not try several, {picked}, and {alone}. There {within}.",
        "none": f"Best rate: {picked}; {within}. The reported seeds did not try several, and {alone}.",
    }[study.crossing]


def _few(study: ToleranceStudy) -> list[str]:
    seeds = len(study.seeds)
    return [f"Few seeds: {seeds} make intervals wide; five or more are better."] if 1 < seeds < 5 else []


def _tuning(study: ToleranceStudy) -> str:
    picked = f"that of the lowest loss on {seeds_text(study.pick)}"
    pooled = (
        "that of the lowest mean loss over all seeds, of those that all tried, which flatters what it gains a little"
    )
    alone = "no interval holds the error of that choice"
    told = {
        "all": f"{pooled}.",
        "some": f"{pooled}; where this cannot be told, {picked}, and {alone}.",
        "none": f"{picked}; {alone}.",
    }[study.tuned_by_all]
    return f"Tuned: the chosen setting, as it comes among them, is {told}"


def shortlist_text(study: ToleranceStudy) -> str:
    """Which settings the reported seeds tried."""
    best = f"the best on {seeds_text(study.pick)}"
    return f"every setting less than {study.shortlist:g} nats above {best}" if study.shortlist else best


def _sensitive(study: ToleranceStudy) -> str:
    tracks = [track for place in study.places for track in place.own.values() if track.sensitivity]
    reported = sum(track.sensitivity_reported for track in tracks)
    if reported == len(tracks):
        return f"Of {seeds_text(study.seeds or study.pick)}."
    if reported:
        return f"Of the reported seeds where all trained over all of the grid, else of {seeds_text(study.pick)}."
    return f"Of {seeds_text(study.pick)} alone, since the others did not train over all of the grid."


_SIGNS = {
    r" edge( |$)": "edge: lowest or highest rate (or batch, or value of what is tuned) tried, so no optimum; beside a "
    "loss or a comparison, it stands on one like that. What is compared at it is no result.",
    r"^unstable": "unstable (k of n): k of n seeds are not stable at the row's rate, or where there is none at that "
    "which the others pick, so no mean is given: one over the others would flatter.",
    r"^[^u]* \(\d+ of \d+\)$": "(k of n): only k of n seeds have trained at their rate so far.",
    r"\[": "[low, high]: 95 % t-interval over seeds, of the mean; of rates and ratios that of the mean logarithm. "
    "Differences and ratios are taken seed by seed. A ratio stands with its interval only.",
    r"≥": "≥: known from below only, since no failure or rise was seen on some seed or of the mean; of a ratio, the "
    "lower end of its interval.",
    r"≤": "≤: known from above only, the upper end of the interval.",
    r"^none\b": "none: at no rate.",
}
"""What signs mean, by a pattern of the entries that bear them."""


def _words(study: ToleranceStudy) -> dict[str, str]:
    """What words of heads and titles mean."""
    low, high = (lr_text(lr) for lr in (study.grid[0], study.grid[-1]))
    base, near = study.baseline, f"ithin {study.epsilon:g} nats of own best"
    beats = f"t most {base}'s best loss"
    return {
        "argest stable rate": "Largest stable rate: going up from the best, midway in the logarithm between the last "
        "stable rate tried and the first unstable one, seed by seed, geometric mean. The interval also holds how "
        "closely it is known.",
        near: f"W{near}: the largest rate up to which the loss stays so, interpolated in ln(rate), seed by seed.",
        LINE.format(base): "So many times the own best: the largest stable rate, were that where a run has failed.",
        beats: f"A{beats}: going up from the own best rate, that up to which the mean over seeds of the loss minus "
        f"{base}'s at its own best stays at or below 0, interpolated in ln(rate); a rate that is unstable on some seed "
        "ends it. Its interval runs from where the upper limit of that mean's 95 % interval leaves 0 (–: at the own "
        "best already) to where the lower limit does (∞: nowhere up to the highest rate tried). ≤: the mean is above 0 "
        "at the own best already, but the lower limit is not. none: that is, too, or there is one seed.",
        "oss at every rate": "Loss at every rate: mean over the reported seeds at the rate of the row, not each at its "
        "own.",
        "LR sensitivity": f"LR sensitivity: mean excess over the own lowest loss, over ln(rate) from {low} to {high}, "
        f"in nats; a loss counts for at most that of a model that knows nothing. {_sensitive(study)}",
        "spikes": f"Spikes: training losses more than {SPIKE:g} nats above the median of the {SPIKE_WINDOW} before, "
        "mean over seeds.",
        "validation gap": f"Validation gap: validation loss minus training loss over the last {100 * TAIL:g} % of the "
        "steps.",
        "branch nonlinearity": "Branch nonlinearity: 1 − R² of the best affine map from what a feed-forward reads to "
        "what it returns, mean over blocks; 0 is an affine map.",
        "seconds per step": "Seconds per step: median over runs of all environments, whatever else the machine did; no "
        "comparison of strategies.",
        "peak memory": "Peak memory: most bytes that tensors took at once; on a CPU not measured, but planned for a "
        "step, uncompiled and with the CPU's kernels.",
        "chosen setting": _tuning(study),
        SPEED_UP.format(base): f"Speed-up at T steps: T over the steps of the full schedule that reaches {base}'s loss "
        "at T; between budgets the loss is a line in ln(steps), beyond them a bound is known, from five seeds on.",
        ON_EACH: "On each text: mean loss over at most as many validation windows as of the own text, of the model as "
        "it was trained on the own.",
        EQUAL_TIME.format(base): f"After the same time: with the steps that take as long as {base}'s, by the seconds "
        "per step of the same seed's runs in the same environment; no number where that is outside the budgets.",
        **scaling_words(),
    }
