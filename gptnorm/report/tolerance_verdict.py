"""The plain answer of a tolerance study in sentences, and what to hold against it.

Every sentence is computed from the data and plain text; whoever shows it escapes it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from gptnorm.format import loss_text, lr_text, names_text, plural
from gptnorm.report.estimates import difference_text, ratio_text, side
from gptnorm.report.scaling_table import scaling_answer
from gptnorm.report.tolerance import Pair, Place, ToleranceStudy
from gptnorm.report.tolerance_notes import partial_notes, seeds_text, shortlist_text
from gptnorm.report.track import End, Track
from gptnorm.study.measures import FEWEST_BOUNDED, Estimate

MOST_NAMED = 4
"""Strategies that a sentence lists one by one."""

NOTHING_YET = "Which strategy has the lowest loss cannot be told yet: of none are all seeds stable at the rate of each."
OTHER_SEEDS_YET = "Which strategy has the lowest loss cannot be told yet: the seeds that have ended are not the same."


def answer(study: ToleranceStudy) -> list[str]:
    """What the study says, most important sentence first."""
    if not any(track.best for place in study.places for track in place.own.values()):
        what = f"at no rate is any strategy stable{_why_none(study)}" if study.places else "no run has ended"
        return [f"There is nothing to compare yet: {what}.", *(partial_notes(study) if study.places else [])]
    if len(study.places) == 1:
        (place,) = study.places
        found = [*_lowest(study, place), *_tolerance(study, place), *_tuned(study, place), *_ends(study, place)]
    else:
        found = [*_lowest_of_many(study), *_against_of_many(study), *_ends_of_many(study), *scaling_answer(study)]
    return [*found, *partial_notes(study)]


def caveats(study: ToleranceStudy) -> list[str]:
    """What a careful reader should know before quoting the numbers."""
    seeds = len(study.seeds)
    found = []
    if study.screening:
        found.append(
            "A screening: every best rate was picked on the seeds that its loss is given for, so it is too good. Name "
            "study.seeds to have other seeds reported."
        )
    else:
        who = {
            "all": f"Each of {seeds_text(study.seeds)} is reported at the rate that all other seeds pick",
            "some": f"Rates were picked on {seeds_text(study.pick)}, or on all seeds but the one that is reported",
            "none": f"Best rates were picked on {seeds_text(study.pick)} and reported on {seeds_text(study.seeds)}",
        }[study.crossing]
        found.append(f"{who}, but on the same validation text: what is special to that text is not averaged out.")
        if study.crossing != "none":
            found.append(
                "Intervals hold most of the error of picking a rate, not all of it: where a curve is flat, nine of ten "
                "hold the truth."
            )
        if study.crossing != "all" and not study.unfinished:
            found.append(
                "Where the reported seeds did not try several rates, no interval holds the error of picking one on "
                f"{plural(len(study.pick), 'seed')}; study.report=neighbours and two seeds or more mend that."
            )
    if seeds == 1 or (study.screening and len(study.pick) == 1):
        found.append("One seed shows no spread: no difference or ratio here can be told from chance.")
    elif not study.screening:
        few = f" {plural(seeds, 'seed').capitalize()} make them wide; five or more are better." if seeds < 5 else ""
        found.append(
            "Intervals are Student's t over seeds, paired by seed, normal differences (of rates: logarithms) "
            f"assumed.{few}"
        )
    if len(study.about.strategies) * max(1, len(study.places)) > 2:
        found.append("With many comparisons, about one interval in twenty misses the truth.")
        found.append(
            "The strategy of the lowest loss was found on the seeds that its lead is measured on, which flatters the "
            "lead: of several that are equal the lucky one is named, and its interval excludes 0 too often."
        )
    tracks = [track for place in study.places for track in (*place.own.values(), *place.tuned.values())]
    if any(track.at_end for track in tracks):
        what = "rate or setting" if any(track.open_ends for track in tracks) else "rate"
        found.append(
            f"Where the best is the lowest or highest {what} tried, it is no optimum, and no comparison is fair."
        )
    if study.tune and not study.screening:
        found += _tuning_caveats(study)
    found.append(
        f"A best rate is known to about a factor {study.search.optimum:g}, an edge to a factor {study.search.edge:g}. "
        "What counts as stable is a choice; the tables say which."
    )
    if study.about.differing:
        found.append(
            "Each strategy comes with its own settings, listed above (warm-up, weight decay and the like); they may "
            "cause part of a difference." + ("" if study.tune else " Nothing but the rate was tuned.")
        )
    if any(track.step_seconds for place in study.places for track in place.own.values()):
        found.append("Times are of whatever machine ran it; where several ran at once, they are rough.")
    found.append(
        "Tolerance can change with model size, data, length of training and batch size; this study shows it for the "
        "settings above only."
    )
    return found


def _tuning_caveats(study: ToleranceStudy) -> list[str]:
    found = []
    if study.tuned_by_all != "none":
        found.append(
            "Of settings that are equally good the luckier is chosen. That flatters what tuning gains a little, and "
            "hardly the difference of two strategies that are both tuned. All seeds tried each strategy as it comes, "
            f"and with {shortlist_text(study)}; no interval holds the error of leaving a better setting out."
        )
        if study.shortlist:
            found.append(
                "Nor does an interval hold which of two equal settings was taken; the tables by the setting of each "
                "say how much of a difference hangs on that."
            )
    if study.tuned_by_all != "all":
        where = "Elsewhere the setting" if found else "What is tuned beside the rate"
        found.append(
            f"{where} was chosen on {seeds_text(study.pick)} alone, and no interval holds the error of that choice."
        )
    return found


def _why_none(study: ToleranceStudy) -> str:
    """Where every run has ended with a finite loss, and none well below the unigram entropy: nothing was learned."""
    losses = [
        (trial.point.loss, place.entropy)
        for place in study.places
        for track in place.own.values()
        for trial in track.trials
    ]
    margin = study.stability.margin
    learned = any(loss is None or entropy is None or loss <= entropy - margin for loss, entropy in losses)
    if learned or study.unfinished or not math.isfinite(margin):
        return ""
    return (
        f"; every run ended, but none {margin:g} nats or more below what token frequencies alone give: train for more "
        "steps, or at other rates"
    )


def _lowest(study: ToleranceStudy, place: Place) -> list[str]:
    ranked = [place.own[name] for name in study.ranked(place.own) if name in place.own and place.own[name].loss]
    if not ranked:
        return [NOTHING_YET]
    if not place.same_seeds:
        return [OTHER_SEEDS_YET]
    first, *others = ranked
    assert first.loss is not None
    assert first.best is not None
    flattered = ", on the seeds that picked it" if study.screening else ""
    if first.crossed:
        flattered = ", each seed at the rate that all others pick"
    count = len(study.about.strategies)
    some = f", of the {len(ranked)} of {count} strategies that have one" if 1 < len(ranked) < count else ""
    head = f"at its own best rate{some}: {loss_text(first.loss.value)} nats at {lr_text(first.best.lr)}{flattered}"
    if not others:
        only = "is the only strategy with a loss" if count > 1 else "has its lowest loss"
        return [f"{first.strategy} {only} {head}."]
    theirs = place.own.get(study.baseline)
    rivals = [(others[0], f"that of {others[0].strategy}, the next,")]
    if theirs is not None and theirs in others[1:]:
        rivals.insert(0, (theirs, f"{theirs.strategy}'s"))
    told = "; minus ".join(f"{who} {_compared(first, rival)}" for rival, who in rivals)
    return [f"{first.strategy} has the lowest loss {head}.", f"Seed by seed its loss minus {told}."]


def _compared(ours: Track, theirs: Track) -> str:
    """Whether our lower loss can be told from chance."""
    difference = Pair(ours=ours, theirs=theirs).difference
    if difference is None:
        return "is not known, for no seed has both"
    if side(difference) is None:
        return f"is {_difference(difference)}, one seed only, which cannot be told from chance"
    holds = "which excludes 0" if side(difference) else "which holds 0 and so may be chance"
    return f"is {_difference(difference)}, {holds}"


def _tolerance(study: ToleranceStudy, place: Place) -> list[str]:
    pairs = place.pairs(tuned=False)
    if not study.follows_rates or not any(pair.ours.edges or pair.theirs.edges for pair in pairs.values()):
        return []
    told: dict[str, Estimate] = {}
    for name, pair in pairs.items():
        ratio = pair.edge_ratio
        if ratio is not None and side(ratio, 1.0):
            told[name] = ratio
    unsure = [name for name in pairs if name not in told]
    sentences = []
    if told and len(told) <= MOST_NAMED:
        first, *rest = sorted(told, key=lambda name: -told[name].value)
        more = "".join(f", {name} {_times(told[name])}" for name in rest)
        sentences.append(
            f"{first} tolerates {_times(told[first])} the learning rate that {study.baseline} does{more} (largest "
            "stable rate; 95 % interval)."
        )
    elif told:
        up = [name for name in told if side(told[name], 1.0) == 1]
        sentences.append(
            f"{len(up)} strategies tolerate a higher learning rate than {study.baseline}, "
            f"{len(told) - len(up)} a lower one; the table says by how much."
        )
    if unsure:
        who = names_text(unsure) if len(unsure) <= MOST_NAMED else f"{len(unsure)} strategies"
        why = ""
        theirs = place.own.get(study.baseline)
        if theirs is not None and theirs.edge is not None and theirs.edge.at_least:
            why = f": {study.baseline} did not fail on every seed up to the highest rate tried"
        elif len(study.seeds) < FEWEST_BOUNDED and any(_is_bound(pairs[name]) for name in unsure):
            why = f": with fewer than {FEWEST_BOUNDED} seeds not where one did not fail at any rate tried"
        verb = "tolerates" if len(unsure) == 1 else "tolerate"
        sentences.append(f"Whether {who} {verb} more or less than {study.baseline} cannot be told{why}.")
    return sentences + (_while_useful(study, pairs) if told else [])


USEFUL = 1.05
"""Times the own lowest loss up to which a rate is still of use; the edge alone may lie far beyond."""


def _while_useful(study: ToleranceStudy, pairs: Mapping[str, Pair]) -> list[str]:
    """The same ratios of rates that still give a loss worth having; nothing where there is none."""
    found = {name: pair.ratio_at(USEFUL) for name, pair in pairs.items()}
    ratios = {name: ratio for name, ratio in found.items() if ratio and side(ratio, 1.0) is not None}
    if not ratios or len(ratios) > MOST_NAMED or study.stability.worse <= USEFUL:
        return []
    told = [f"{name} {_times(ratios[name])}" for name in sorted(ratios, key=lambda name: -ratios[name].value)]
    chance = [name for name, ratio in ratios.items() if not side(ratio, 1.0)]
    held = "that of {} holds 1 and so may" if len(chance) == 1 else "those of {} hold 1 and so may"
    but = f"; {held.format(names_text(chance))} be chance" if chance else ""
    whose = f"{study.baseline}'s rate"
    return [f"Up to a loss of {USEFUL:g} times the own lowest the ratios to {whose} are {names_text(told)}{but}."]


def _is_bound(pair: Pair) -> bool:
    """Whether our edge is only known to be larger than what was tried."""
    return pair.ours.edge is not None and pair.ours.edge.at_least


def _tuned(study: ToleranceStudy, place: Place) -> list[str]:
    pairs = place.pairs(tuned=True)
    ranked = [name for name in study.ranked(place.tuned) if name in pairs and pairs[name].difference]
    if not study.tune:
        return []
    if not ranked:
        return _open_ends(place)
    name = ranked[0]
    difference = pairs[name].difference
    assert difference is not None
    return [
        f"With {names_text(list(study.tune))} tuned for both, {name}'s loss minus {study.baseline}'s is "
        f"{_difference(difference)}.",
        *_open_ends(place),
    ]


def _open_ends(place: Place) -> list[str]:
    found: dict[tuple[str, End], list[str]] = {}
    for name, track in place.tuned.items():
        for open_end in track.open_ends:
            found.setdefault(open_end, []).append(name)
    return [
        f"For {names_text(names)} the chosen {key} is the {end} tried, so it is no result: a "
        f"{'higher' if end == 'highest' else 'lower'} one may do better."
        for (key, end), names in found.items()
    ]


def _ends(study: ToleranceStudy, place: Place) -> list[str]:
    sentences = []
    others = [track for track in place.tuned.values() if track.variant]
    what = f", {names_text(list(study.tune))} tuned," if study.tune else ""
    for tracks, said in ((list(place.own.values()), ""), (others, what)):
        for end, direction in (("highest", "higher"), ("lowest", "lower")):
            names = [track.strategy for track in tracks if track.end == end]
            if names:
                sentences.append(
                    f"For {names_text(names)}{said} the best is the {end} rate tried, so it is no result: a "
                    f"{direction} one may do better."
                )
    none = [track.strategy for track in place.own.values() if track.picked and track.best is None]
    if none:
        sentences.append(f"For {names_text(none)} no rate is stable.")
    return sentences


def _lowest_of_many(study: ToleranceStudy) -> list[str]:
    places = [(place, study.ranked(place.own)[0]) for place in study.places]
    known = [(place, name) for place, name in places if name in place.own and place.own[name].loss]
    if not known:
        return [NOTHING_YET]
    firsts = Counter(name for place, name in known if place.same_seeds)
    if not firsts:
        return [OTHER_SEEDS_YET]
    many = len(study.places)
    told = [f"{name} at {count} of {many} places" for name, count in firsts.most_common()]
    flattered = ", on the seeds that picked the rates" if study.screening else ""
    return [f"Lowest mean loss, by chance or not, each strategy at its own best rate{flattered}: {names_text(told)}."]


def _ends_of_many(study: ToleranceStudy) -> list[str]:
    tracks = [(*place.own.values(), *place.tuned.values()) for place in study.places]
    count = sum(any(track.at_end for track in at_place) for at_place in tracks)
    if not count:
        return []
    return [
        f"At {count} of {plural(len(tracks), 'place')} some best is an end of what was tried: what is compared with it "
        "is no result."
    ]


def _against_of_many(study: ToleranceStudy) -> list[str]:
    sentences = []
    pairs, tuned = ([place.pairs(tuned=which) for place in study.places] for which in (False, True))
    for name in study.others[:MOST_NAMED]:
        found = [at_place[name] for at_place in pairs if name in at_place]
        losses = [(pair.difference, pair.at_end) for pair in found]
        says = f"Against {study.baseline}, {name} has {_counted(losses, 0.0, 'a lower loss', 'a higher one', -1)}"
        if study.follows_rates:
            rates = [(pair.edge_ratio, pair.at_end) for pair in found]
            says += f", and tolerates {_counted(rates, 1.0, 'a higher learning rate', 'a lower one', 1)}"
        sentences.append(f"{says}.")
        if study.tune:
            losses = [(at_place[name].difference, at_place[name].at_end) for at_place in tuned if name in at_place]
            count = _counted(losses, 0.0, "a lower loss", "a higher one", -1)
            sentences.append(f"With {names_text(list(study.tune))} tuned for both it has {count}.")
    if len(study.others) > MOST_NAMED:
        sentences.append("The tables say it of the others.")
    return sentences


def _counted(found: Sequence[tuple[Estimate | None, bool]], zero: float, good: str, bad: str, sign: int) -> str:
    """ "a lower loss at 2 of 4 places (at 1 it cannot be told, at 1 nothing can be compared)".

    Args:
        found: each with whether it stands on an end of what was tried.
    """
    missing = sum(value is None for value, _ in found)
    ends = sum(at_end for value, at_end in found if value is not None)
    known = Counter(side(value, zero) for value, at_end in found if value is not None and not at_end)
    unsure = known[0] + known[None]
    text = f"{good} at {known[sign]} of {plural(len(found), 'place')}"
    if known[-sign]:
        text += f", {bad} at {known[-sign]}"
    counts = (
        (unsure, "it cannot be told"),
        (ends, "a best is an end of what was tried"),
        (missing, "nothing can be compared"),
    )
    asides = [f"at {count} {words}" for count, words in counts if count]
    return text + (f" ({', '.join(asides)})" if asides else "")


def _difference(found: Estimate) -> str:
    """ "-0.0657 (95 % interval -0.0712 to -0.0602, 5 seeds)"."""
    if found.low is None or found.high is None:
        return difference_text(found.value)
    return (
        f"{difference_text(found.value)} (95 % interval {difference_text(found.low)} to {difference_text(found.high)}, "
        f"{plural(found.seeds, 'seed')})"
    )


def _times(found: Estimate) -> str:
    """ "3.10× [2.20, 4.40]", "at least 2.20×" or "at most 0.70×"."""
    if found.low is not None and found.high is not None:
        return f"{ratio_text(found.value)}× [{ratio_text(found.low)}, {ratio_text(found.high)}]"
    if found.low is not None:
        return f"at least {ratio_text(found.low)}×"
    assert found.high is not None
    return f"at most {ratio_text(found.high)}×"
