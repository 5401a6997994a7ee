"""What is written down about a study beside its outcomes: `study.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptnorm.config import Config
from gptnorm.recipe import HOW, Recipe, to_tree
from gptnorm.study.cell import TEXT, text_name
from gptnorm.study.ladder import SETS
from gptnorm.study.ledger import split
from gptnorm.study.schema import Facts
from gptnorm.study.texts import Texts, describe_texts
from gptnorm.tables import flatten, within

VARIED = ("model.strategy", "optim.lr", "seed", "run.dir", "data.cache")
"""What differs from run to run in every study, and where a machine keeps its shards."""

FILES = ("data.path", "data.tokenizer")
"""Settings that may name local files. A ledger records the files' names without their folder, so that a study can move
to where they lie elsewhere; `data.fingerprint` identifies what they hold."""

if TYPE_CHECKING:
    from gptnorm.study.cell import Cell
    from gptnorm.study.run import Plan


def split_settings(cells: list[Cell]) -> dict[str, Any]:
    """The settings that all strategies share, and those that differ, with each strategy's value: of its first cell.

    What differs from cell to cell of a strategy is left out, and how a run computes, which may change as a study grows.
    """
    by_strategy: dict[str, dict[str, Any]] = {}
    for cell in cells:
        settings = {key: value for key, value in flatten(to_tree(cell.config)).items() if not within(key, HOW)}
        placed = [key for key, _ in (*cell.setup.place, *cell.setup.follows)]
        for varied in (*VARIED, *(SETS[cell.rung.axis] if cell.rung else ()), *placed):
            settings.pop(varied, None)
        by_strategy.setdefault(cell.strategy, _files_by_name(settings))
    return split(by_strategy)


def _files_by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _file_name(value) if key in FILES else value for key, value in settings.items()}


def _file_name(value: Any) -> Any:
    """Of a path, or of each in a list; what is no path (a built-in text) keeps its own."""
    if isinstance(value, str):
        return Path(value).name or value
    return [_file_name(path) for path in value] if isinstance(value, list | tuple) else value


def describe_study(
    recipe: Recipe,
    plan: Plan,
    texts: Texts,
    overrides: Sequence[str],
    command: str,
    environment: dict[str, Any],
) -> Facts:
    """What `study.json` holds before the first cell has ended."""
    study, first = plan.study, plan.samples[0]
    data, described = first.config.data, describe_texts(plan.samples, texts)
    text = dict(described[first.text])
    mapped, own = TEXT in dict(first.setup.place), text_name(_file_name(data.path))
    # One that is evaluated on may have the same name and be another.
    if not mapped and described.get(own, text)["fingerprint"] == text["fingerprint"]:
        described = {own if name == first.text else name: about for name, about in described.items()}
    entropy = text.pop("unigram_entropy")
    del text["trained"]
    return {
        "title": study.title,
        "recipe": recipe.name,
        "commands": [command],
        "strategies": list(study.strategies),
        "lrs": sorted(study.lrs),
        "seeds": list(study.seeds),
        **plan.describe(),
        "data": {
            "path": _file_name(data.path),
            "tokenizer": _file_name(data.tokenizer),
            **text,
        },
        **({"texts": described} if len(described) > 1 or mapped else {}),
        "settings": {**split_settings(plan.samples), "recipe": _said(recipe, overrides)},
        "environments": [{**{k: v for k, v in environment.items() if k != "started"}, **_how(first)}],
        "unigram_entropy": entropy,
        "seconds": None,
    }


def _how(cell: Cell) -> dict[str, Any]:
    """How the runs compute, where it is not as the settings' defaults say, and no place says it."""
    usual, place = flatten(to_tree(Config())), dict(cell.setup.place)
    computed = {key: value for key, value in flatten(to_tree(cell.config)).items() if within(key, HOW)}
    return {key: value for key, value in computed.items() if value != usual[key] and key not in place}


def _said(recipe: Recipe, overrides: Sequence[str]) -> dict[str, Any]:
    said = flatten(recipe.said([argument for argument in overrides if not argument.startswith("study.")]))
    return _files_by_name({k: v for k, v in said.items() if k not in VARIED and not within(k, HOW)})
