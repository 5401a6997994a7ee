"""The plain answer of a study in sentences, and what to hold against it.

Every sentence is computed from the data and plain text; whoever shows it escapes it.
"""

from __future__ import annotations

from gptnorm.format import loss_text, lr_text, names_text, plural, spread_text
from gptnorm.report.gaps import may_be_chance, paired_gaps
from gptnorm.report.results import Row, Study, best_loss
from gptnorm.study.measures import Estimate


def verdict(study: Study) -> list[str]:
    """The answer, most important sentence first."""
    if not study.ranked:
        return [
            f"There is nothing to compare yet: {study.done} of {plural(study.planned, 'run')} ended, and no strategy "
            "has a learning rate at which every seed finished.",
            *_diverged(study),
        ]
    return [
        _winner(study),
        *_runner_up(study),
        *_collapsed(study),
        *_edges(study),
        *_diverged(study),
        *_unfinished(study),
    ]


def caveats(study: Study) -> list[str]:
    """What a careful reader should know before quoting the numbers."""
    seeds = len(study.seeds)
    notes = [
        "Each best learning rate was picked on the same seeds and the same validation data that its loss is "
        "reported on, so every best loss is slightly too good, and the more so the finer the grid.",
    ]
    if seeds < 2:
        notes.append("One seed shows no spread: no difference here can be told from chance.")
    else:
        few = (
            f" {plural(seeds, 'seed').capitalize()} make it wide: five or more are needed to tell small gaps."
            if seeds < 5
            else ""
        )
        notes.append(
            "A gap “may be chance” if its 95 % paired t-interval over the seeds holds zero "
            f"(normal differences assumed).{few}"
        )
    if len(study.ranked) > 2:
        notes.append(
            f"{len(study.ranked)} strategies were compared; with many comparisons, some gap looks large by chance."
        )
    if any(row.at_edge for row in study.ranked):
        notes.append("A best at the edge of the grid is no optimum. Widen the grid before comparing that strategy.")
    if any(entry.diverged for row in study.rows for entry in row.entries):
        notes.append(
            "Where any seed diverged no mean is shown: a mean over the survivors would flatter that learning rate."
        )
    if study.outside:
        notes.append(f"{plural(study.outside, 'recorded run')} outside the grid of this study left out.")
    notes.append(
        "The order of strategies can change with model size, data, length of training and batch size; "
        "this study shows it for the settings above only."
    )
    return notes


def gap_reading(gap: Estimate) -> str:
    """What a paired gap says, in a few careful words."""
    if gap.seeds < 2:
        return "one seed: cannot be told from chance"
    return "may be chance" if may_be_chance(gap) else "more than chance explains"


def _winner(study: Study) -> str:
    first = study.ranked[0]
    assert first.best is not None
    over = f"mean ± seed sd over {len(study.seeds)} seeds" if len(study.seeds) > 1 else "one seed"
    loss = spread_text(first.best.mean, first.best.sd)
    if len(study.strategies) == 1:
        return (
            f"{first.strategy} reached its lowest validation loss, {loss} nats, at {lr_text(first.best.lr)} ({over})."
        )
    gaps = list(paired_gaps(study).values())
    unsure = ", but the lead may be chance" if gaps and may_be_chance(gaps[0]) else ""
    return (
        f"{first.strategy} reached the lowest validation loss, each strategy at its own best learning rate: "
        f"{loss} nats at {lr_text(first.best.lr)} ({over}){unsure}."
    )


def _runner_up(study: Study) -> list[str]:
    gaps = paired_gaps(study)
    if not gaps:
        return []
    second = study.ranked[1]
    assert second.best is not None
    gap = gaps[second.strategy]
    head = f"Next is {second.strategy} with {loss_text(best_loss(second))} at {lr_text(second.best.lr)}"
    if gap.seeds < 2:
        return [f"{head}, {loss_text(gap.value)} higher; with one seed that cannot be told from chance."]
    reading = f"{loss_text(gap.value)} higher seed by seed (95 % interval {interval_text(gap)}, {gap.seeds} seeds)"
    sentences = [f"{head}, {reading}: {gap_reading(gap)}."]
    close = [name for name, other in gaps.items() if name != second.strategy and may_be_chance(other)]
    if close:
        verb = "lead" if len(close) == 1 else "leads"
        also = " too" if may_be_chance(gap) else ""
        sentences.append(f"The {verb} over {names_text(close)} may be chance{also}.")
    return sentences


def interval_text(gap: Estimate) -> str:
    """The interval of a gap, such as "-0.0114 to 0.0174"."""
    return "" if gap.low is None or gap.high is None else f"{gap.low:.4f} to {gap.high:.4f}"


def _collapsed(study: Study) -> list[str]:
    names = [
        row.strategy for row in study.ranked if row.best is not None and study.no_better_than_frequencies(row.best)
    ]
    if not names:
        return []
    return [
        f"{names_text(names)} learned nothing beyond token frequencies at any learning rate with which all seeds ended "
        f"(unigram entropy {loss_text(study.unigram_entropy)} nats)."
    ]


def _edges(study: Study) -> list[str]:
    def named(edge: str) -> list[str]:
        return [row.strategy for row in study.ranked if row.edge == edge]

    sentences = []
    for edge, direction in (("highest", "higher"), ("lowest", "lower")):
        if names := named(edge):
            sentences.append(
                f"For {names_text(names)} the best is the {edge} learning rate tried, so it is no optimum: "
                f"a {direction} one may do better."
            )
    if names := named("only"):
        sentences.append(f"For {names_text(names)} only one learning rate was tried, so the best is no optimum.")
    return sentences


def _diverged(study: Study) -> list[str]:
    count = sum(cell.diverged for cell in study.cells)
    if not count:
        return [f"None of the {study.done} runs that ended diverged."] if study.done > 1 else []

    def where(row: Row) -> str | None:
        lrs = [lr_text(entry.lr) for entry in row.entries if entry.diverged]
        return f"{row.strategy} at {names_text(lrs)}" if lrs else None

    places = [place for row in study.rows if (place := where(row))]
    if len(places) > 4:
        return [f"{count} of {study.done} runs diverged, from {len(places)} of the strategies; the table says where."]
    return [f"{count} of {study.done} runs diverged: {'; '.join(places)}."]


def _unfinished(study: Study) -> list[str]:
    if study.done == study.planned:
        return []
    unranked = [row.strategy for row in study.rows if row.best is None]
    tail = f"; {names_text(unranked)} cannot be ranked yet" if unranked else ""
    return [f"This report is partial: {study.done} of {study.planned} runs ended{tail}. The answer may change."]
