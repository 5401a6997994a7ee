"""What is written down about a study beside its outcomes: `study.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptnorm.config import Config
from gptnorm.recipe import HOW, Recipe, to_tree
from gptnorm.study.cell import TEXT
from gptnorm.study.ladder import SETS
from gptnorm.study.ledger import split
from gptnorm.study.schema import Facts
from gptnorm.study.texts import Texts, describe_texts
from gptnorm.tables import flatten

VARIED = ("model.strategy", "optim.lr", "seed", "run.dir")
"""What differs from run to run in every study."""

if TYPE_CHECKING:
    from gptnorm.study.cell import Cell
    from gptnorm.study.run import Plan


def split_settings(cells: list[Cell]) -> dict[str, Any]:
    """The settings that all strategies share, and those that differ, with each strategy's value: of its first cell.

    What differs from cell to cell of a strategy is left out, and how a run computes, which may change as a study grows.
    """
    by_strategy: dict[str, dict[str, Any]] = {}
    for cell in cells:
        settings = {key: value for key, value in flatten(to_tree(cell.config)).items() if not key.startswith(HOW)}
        placed = [key for key, _ in (*cell.setup.place, *cell.setup.follows)]
        for varied in (*VARIED, *(SETS[cell.rung.axis] if cell.rung else ()), *placed):
            settings.pop(varied, None)
        by_strategy.setdefault(cell.strategy, settings)
    return split(by_strategy)


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
            "path": data.path if isinstance(data.path, str) else list(data.path),
            "tokenizer": data.tokenizer,
            **text,
        },
        **({"texts": described} if len(described) > 1 or TEXT in dict(first.setup.place) else {}),
        "settings": {**split_settings(plan.samples), "recipe": _said(recipe, overrides)},
        "environments": [{**{k: v for k, v in environment.items() if k != "started"}, **_how(first)}],
        "unigram_entropy": entropy,
        "seconds": None,
    }


def _how(cell: Cell) -> dict[str, Any]:
    """How the runs compute, where it is not as the settings' defaults say, and no place says it."""
    usual, place = flatten(to_tree(Config())), dict(cell.setup.place)
    computed = {key: value for key, value in flatten(to_tree(cell.config)).items() if key.startswith(HOW)}
    return {key: value for key, value in computed.items() if value != usual[key] and key not in place}


def _said(recipe: Recipe, overrides: Sequence[str]) -> dict[str, Any]:
    said = flatten(recipe.said([argument for argument in overrides if not argument.startswith("study.")]))
    return {key: value for key, value in said.items() if key not in VARIED and not key.startswith(HOW)}
