"""A tolerance study's folder as `gptnorm.report.tolerance.ToleranceStudy`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from gptnorm.errors import UserError
from gptnorm.records import finite
from gptnorm.report.results import About, RunLine, about_of
from gptnorm.report.tolerance import Place, ToleranceStudy
from gptnorm.report.track import Track, Trial
from gptnorm.study.cell import TEXT, Pairs, as_pairs, text_name
from gptnorm.study.ledger import text_of
from gptnorm.study.outcome import Stability, from_json, point_of
from gptnorm.study.schema import Facts, read_cells, read_facts
from gptnorm.study.search import Search

Trials = dict[tuple[str, Pairs, Pairs], dict[str, Trial]]
"""By strategy, place and variant; of each, by its folder."""


def load_tolerance(folder: str | Path) -> ToleranceStudy:
    """Read a study folder, complete or not.

    Raises:
        UserError: `study.json` is missing, wrong, or another kind of study's.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    asked = facts.get("tolerance")
    if asked is None:
        raise UserError(f"{folder / 'study.json'}: no tolerance study")
    about = about_of(folder, facts)
    stability = Stability(**from_json(asked["stability"]))
    trials = _read_trials(folder / "cells.jsonl", facts, stability)
    evaluated = asked.get("evaluate", [])
    mapped = [text_name(dict(place)[TEXT]) for _, place, _ in trials if TEXT in dict(place)]
    names = short_names([*mapped, *evaluated])
    asked_places = [as_pairs(place) for place in asked["places"]]
    return ToleranceStudy(
        about=about,
        places=_places(trials, facts, about, asked_places, stability, names),
        baseline=asked["baseline"],
        pick=tuple(asked["pick"]),
        seeds=about.seeds,
        grid=_grid(facts),
        epsilon=float(asked["epsilon"]),
        follows_rates=asked["report"] in ("all", "near"),
        search=Search(**asked["search"]),
        stability=stability,
        tune=asked["tune"],
        refused=tuple(asked.get("refused", ())),
        shortlist=float(asked["shortlist"]),
        evaluated={name: names[name] for name in evaluated},
        complete=facts.get("complete", True),
        wanted_places=max(1, len(asked_places)),
        cells=tuple(trial.cell for found in trials.values() for trial in found.values()),
    )


def in_order(places: Iterable[Pairs], asked: Sequence[Pairs]) -> list[Pairs]:
    """By their settings, the first first: numbers by size, then anything else as it was asked for.

    A study grows by places, so the order in which they were asked for says when somebody had time for them.
    """
    words = list(dict.fromkeys(pair for place in asked for pair in place if finite(pair[1]) is None))

    def rank(pair: tuple[str, Any]) -> tuple[bool, float]:
        number = finite(pair[1])
        return (True, words.index(pair)) if number is None else (False, number)

    return sorted(places, key=lambda place: [rank(pair) for pair in place])


def short_names(texts: Sequence[str]) -> dict[str, str]:
    """The end of each text's path that tells it from the others, without the file's type where that will do."""
    whole = dict.fromkeys(texts)
    longest = max((len(PurePath(text).parts) for text in whole), default=0)
    for count in range(1, longest + 1):
        for bare in (True, False):
            names = {text: _tail(text, count, bare=bare) for text in whole}
            if len(set(names.values())) == len(names):
                return names
    return {text: text for text in whole}


def _tail(text: str, parts: int, *, bare: bool) -> str:
    """The last parts of a path, of several paths those of each."""
    found = []
    for path in map(PurePath, text.split(", ")):
        *folders, name = path.parts[-parts:] or (str(path),)
        found.append("/".join([*folders, name.partition(".")[0] or name if bare else name]))
    return ", ".join(found)


def _places(
    trials: Trials,
    facts: Facts,
    about: About,
    asked: Sequence[Pairs],
    stability: Stability,
    names: Mapping[str, str],
) -> tuple[Place, ...]:
    """Those where a run has ended."""
    found = in_order({place for _, place, _ in trials}, asked)
    common = set.intersection(*map(set, found)) if len(found) > 1 else set()
    return tuple(
        Place(
            settings=place,
            told=tuple(
                (key, names[text_name(value)] if key == TEXT else value)
                for key, value in place
                if (key, value) not in common
            ),
            tracks=tuple(
                _track(key, tuple(trials[key].values()), facts, about, stability)
                for name in about.strategies
                for key in trials
                if key[0] == name and key[1] == place
            ),
            baseline=facts["tolerance"]["baseline"],
            shortlist=float(facts["tolerance"]["shortlist"]),
            entropy=finite(text_of(facts, dict(place)).get("unigram_entropy")),
        )
        for place in found
    )


def _track(
    key: tuple[str, Pairs, Pairs], trials: tuple[Trial, ...], facts: Facts, about: About, stability: Stability
) -> Track:
    strategy, place, variant = key
    settings = {**about.shared, **{key: by.get(strategy) for key, by in about.differing.items()}, **dict(place)}
    batch = _size(settings.get("train.batch_size")), _size(settings.get("train.seq_len"))
    # The loss of a model that knows nothing.
    vocab = finite(text_of(facts, dict(place)).get("vocab"))
    pick = tuple(facts["tolerance"]["pick"])
    return Track(
        strategy=strategy,
        variant=variant,
        tuned={key: dict(variant).get(key, settings.get(key)) for key in facts["tolerance"]["tune"]},
        width=_size(settings.get("model.d_model")),
        trials=trials,
        pick=pick,
        seeds=about.seeds or pick,
        grid=_grid(facts),
        epsilon=float(facts["tolerance"]["epsilon"]),
        worse=stability.worse,
        cap=math.log(vocab) if vocab else None,
        steps=_size(settings.get("train.steps")),
        step_tokens=batch[0] * batch[1] if batch[0] and batch[1] else None,
    )


def _size(setting: object) -> int | None:
    """What a run's own settings may hold (`gptnorm.config.Positive`); None: nothing that they could."""
    number = finite(setting)
    return int(number) if number is not None and 1 <= number < 2**31 else None


def _read_trials(path: Path, facts: Facts, stability: Stability) -> Trials:
    """UserError where a run is at no place of this study."""
    found: Trials = {}
    places = {as_pairs(place) for place in facts["tolerance"]["places"]} or {()}
    for line in read_cells(path):
        entropy = finite(text_of(facts, line.get("place", {})).get("unigram_entropy"))
        trial = _read_trial(line, stability, entropy)
        key = (trial.cell.strategy, as_pairs(line.get("place")), as_pairs(line.get("variant")))
        if key[1] not in places:
            raise UserError(f"{path}: the place of {trial.cell.run} is none of study.json's: {_words(key[1])}")
        found.setdefault(key, {})[trial.cell.run] = trial
    return found


def _read_trial(line: Mapping[str, Any], stability: Stability, entropy: float | None) -> Trial:
    cell = RunLine.read(line)
    blocks = [finite(value) for value in line.get("nonlinearity") or ()]
    values = [value for value in blocks if value is not None]
    return Trial(
        cell=cell,
        point=point_of(line, stability, entropy),
        tail=finite(line.get("tail_loss")),
        spikes=line.get("spikes", 0),
        nonlinearity=sum(values) / len(values) if values and len(values) == len(blocks) else None,
        memory=finite(line.get("memory")),
        flops=finite(line.get("flops")),
        elsewhere={name: finite(loss) for name, loss in (line.get("elsewhere") or {}).items()},
    )


def _words(place: Pairs) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in place) or "no settings"


def _grid(facts: Facts) -> tuple[float, ...]:
    return tuple(sorted(float(lr) for lr in facts["lrs"]))
