"""A tolerance study's folder as `gptnorm.report.tolerance.ToleranceStudy`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from gptnorm.errors import UserError
from gptnorm.records import finite, read_cells, read_object
from gptnorm.report.results import About, Cell, read_about
from gptnorm.report.tolerance import Place, ToleranceStudy
from gptnorm.report.track import Track, Trial
from gptnorm.study.cell import TEXT, Pairs, as_pairs, text_name
from gptnorm.study.ledger import refuse_half_a_study, text_of
from gptnorm.study.outcome import Stability, point_of
from gptnorm.study.search import Search

Trials = dict[tuple[str, Pairs, Pairs], dict[str, Trial]]
"""By strategy, place and variant; of each, by its folder."""


def is_tolerance(folder: str | Path) -> bool:
    """Whether the folder holds a tolerance study."""
    return "tolerance" in read_object(Path(folder) / "study.json")


def load_tolerance(folder: str | Path) -> ToleranceStudy:
    """Read a study folder, complete or not.

    Raises:
        UserError: `study.json` is missing, cannot be read, or is another kind of study's.
    """
    folder = Path(folder)
    path = folder / "study.json"
    raw = read_object(path)
    asked = raw.get("tolerance")
    if not isinstance(asked, dict):
        raise UserError(f"{path}: no tolerance study")
    about = read_about(folder, raw)
    refuse_half_a_study(asked, path)
    stability = Stability(**{key: float(value) for key, value in asked["stability"].items()})
    trials = _read_trials(folder / "cells.jsonl", raw, stability)
    evaluated = [str(name) for name in asked.get("evaluate", ())]
    mapped = [text_name(dict(place)[TEXT]) for _, place, _ in trials if TEXT in dict(place)]
    names = short_names([*mapped, *evaluated])
    asked_places = [as_pairs(place) for place in asked.get("places", ())]
    return ToleranceStudy(
        about=about,
        places=_places(trials, raw, about, asked_places, stability, names),
        baseline=str(asked["baseline"]),
        pick=_pick(asked),
        seeds=about.seeds,
        grid=_grid(raw),
        epsilon=float(asked["epsilon"]),
        follows_rates=asked["report"] in ("all", "near"),
        search=Search(**asked["search"]),
        stability=stability,
        tune={key: list(values) for key, values in asked["tune"].items()},
        evaluated={name: names[name] for name in evaluated},
        complete=raw.get("complete", True) is True,
        wanted_places=max(1, len(asked_places)),
        cells=tuple(trial.cell for found in trials.values() for trial in found.values()),
    )


def in_order(places: Iterable[Pairs], asked: Sequence[Pairs]) -> list[Pairs]:
    """By their settings, the first first: numbers by size, anything else as it was first asked for.

    A study grows by places, so the order in which they were asked for says when somebody had time for them.
    """
    words = list(dict.fromkeys(pair for place in asked for pair in place if finite(pair[1]) is None))

    def rank(pair: tuple[str, Any]) -> tuple[float, str]:
        number = finite(pair[1])
        if number is None:
            number = float(words.index(pair) if pair in words else len(words))
        return number, str(pair[1])

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
    raw: Mapping[str, Any],
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
                _track(key, tuple(trials[key].values()), raw, about, stability)
                for name in about.strategies
                for key in trials
                if key[0] == name and key[1] == place
            ),
            baseline=str(raw["tolerance"]["baseline"]),
            entropy=finite(text_of(raw, dict(place)).get("unigram_entropy")),
        )
        for place in found
    )


def _track(
    key: tuple[str, Pairs, Pairs], trials: tuple[Trial, ...], raw: Mapping[str, Any], about: About, stability: Stability
) -> Track:
    strategy, place, variant = key
    settings = {**about.shared, **{key: by.get(strategy) for key, by in about.differing.items()}, **dict(place)}
    steps, *batch = (finite(settings.get(f"train.{key}")) for key in ("steps", "batch_size", "seq_len"))
    step_tokens = None if None in batch else math.prod(number for number in batch if number is not None)
    # The loss of a model that knows nothing.
    vocab = finite(text_of(raw, dict(place)).get("vocab"))
    pick = _pick(raw["tolerance"])
    width = finite(settings.get("model.d_model"))
    return Track(
        strategy=strategy,
        place=place,
        variant=variant,
        tuned={key: dict(variant).get(key, settings.get(key)) for key in raw["tolerance"]["tune"]},
        width=None if width is None else int(width),
        trials=trials,
        pick=pick,
        seeds=about.seeds or pick,
        grid=_grid(raw),
        epsilon=float(raw["tolerance"]["epsilon"]),
        worse=stability.worse,
        cap=math.log(vocab) if vocab else None,
        steps=None if steps is None else int(steps),
        step_tokens=None if step_tokens is None else int(step_tokens),
    )


def _read_trials(path: Path, raw: Mapping[str, Any], stability: Stability) -> Trials:
    found: Trials = {}
    for line in read_cells(path):
        try:
            entropy = finite(text_of(raw, line.get("place") or {}).get("unigram_entropy"))
            trial = _read_trial(line, stability, entropy)
            key = (trial.cell.strategy, as_pairs(line.get("place")), as_pairs(line.get("variant")))
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"{path}: a line is none of a tolerance study: {line!r}") from None
        found.setdefault(key, {})[trial.cell.run] = trial
    return found


def _read_trial(line: Mapping[str, Any], stability: Stability, entropy: float | None) -> Trial:
    cell = Cell.read(line)
    spikes = int(line.get("spikes") or 0)
    blocks = [finite(value) for value in line.get("nonlinearity") or ()]
    values = [value for value in blocks if value is not None]
    return Trial(
        cell=cell,
        point=point_of(line, stability, entropy),
        tail=finite(line.get("tail_loss")),
        spikes=spikes,
        nonlinearity=sum(values) / len(values) if values and len(values) == len(blocks) else None,
        memory=finite(line.get("memory")),
        flops=finite(line.get("flops")),
        elsewhere={str(name): finite(loss) for name, loss in (line.get("elsewhere") or {}).items()},
    )


def _grid(raw: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(sorted(float(lr) for lr in raw["lrs"]))


def _pick(asked: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(seed) for seed in asked["pick"])
