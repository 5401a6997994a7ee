"""What is written down about a study beside its outcomes: `study.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptnorm.data import Shards
from gptnorm.recipe import Recipe, to_tree
from gptnorm.study.ladder import SETS
from gptnorm.study.ledger import Facts, split
from gptnorm.tables import flatten
from gptnorm.train.inputs import check_vocab, refuse_unknown_ids

VARIED = ("model.strategy", "optim.lr", "seed", "run.dir")
"""What differs from run to run in every study."""

if TYPE_CHECKING:
    from gptnorm.study.cell import Cell
    from gptnorm.study.run import Plan


def unigram_entropy(train: np.ndarray, val: np.ndarray, vocab: int) -> float:
    """Loss in nats per token on `val` of the best model that knows token frequencies alone.

    Frequencies are counted on `train` with one added to each, so that no token has none.
    """
    counts = _count(train, vocab) + 1.0
    share = _count(val, vocab) / len(val)
    return float(-(share * np.log(counts / counts.sum())).sum())


def _count(tokens: np.ndarray, vocab: int) -> np.ndarray:
    """How often each id occurs; in parts, since bincount makes eight bytes of every token."""
    counts = np.zeros(vocab, np.int64)
    for start in range(0, len(tokens), 1 << 24):
        part = tokens[start : start + (1 << 24)]
        refuse_unknown_ids(part, vocab)
        counts += np.bincount(part, minlength=vocab)
    return counts


def split_settings(cells: list[Cell]) -> dict[str, Any]:
    """The settings that all strategies share, and those that differ, with each strategy's value: of its first cell.

    What differs from cell to cell of a strategy is left out.
    """
    by_strategy: dict[str, dict[str, Any]] = {}
    for cell in cells:
        settings = flatten(to_tree(cell.config))
        placed = [key for key, _ in (*cell.setup.place, *cell.setup.follows)]
        for varied in (*VARIED, *(SETS[cell.rung.axis] if cell.rung else ()), *placed):
            settings.pop(varied, None)
        by_strategy.setdefault(cell.strategy, settings)
    return split(by_strategy)


def describe_study(
    recipe: Recipe,
    plan: Plan,
    shards: Shards,
    overrides: Sequence[str],
    command: str,
    environment: dict[str, Any],
) -> Facts:
    """What `study.json` holds before the first cell has ended."""
    study, config = plan.study, plan.samples[0].config
    data, vocab = config.data, shards.vocab_size or check_vocab(config, shards)
    entropy = unigram_entropy(shards.train, shards.val, vocab)
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
            "fingerprint": shards.fingerprint,
            "vocab": check_vocab(config, shards),
            "train_tokens": len(shards.train),
            "val_tokens": len(shards.val),
        },
        "settings": {**split_settings(plan.samples), "recipe": _said(recipe, overrides)},
        "environments": [{key: value for key, value in environment.items() if key != "started"}],
        "unigram_entropy": entropy if math.isfinite(entropy) else None,
        "seconds": None,
    }


def _said(recipe: Recipe, overrides: Sequence[str]) -> dict[str, Any]:
    said = flatten(recipe.said([argument for argument in overrides if not argument.startswith("study.")]))
    return {key: value for key, value in said.items() if key not in VARIED}
