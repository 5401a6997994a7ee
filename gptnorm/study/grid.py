"""A grid study: every strategy at every learning rate with every seed, on the same data in the same order.

The study folder holds `study.json` (what was asked and where it ran), `cells.jsonl` (one line per
finished cell) and `cells/<strategy>/lr-<rate>-seed-<n>/`, a full run folder each.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as typed
from rich.console import Console

from gptnorm.config import STRICT, Config, Count, PositiveFloat
from gptnorm.data import Shards, prepare
from gptnorm.environment import describe_environment
from gptnorm.errors import UserError, bad_value
from gptnorm.files import write_atomic
from gptnorm.recipe import Recipe, load_recipe, parse_overrides, to_tree
from gptnorm.study.pool import run_cells
from gptnorm.tables import flatten
from gptnorm.train.loop import check_vocab, open_batches, refuse_unknown_ids, resolve_device
from gptnorm.typed import read_table


@typed(frozen=True, kw_only=True, config=STRICT)
class StudyConfig:
    """The `[study]` table of a recipe."""

    title: str
    """Heads the report."""
    strategies: Annotated[tuple[str, ...], Field(min_length=1)]
    """Rows of the table; each with its own defaults, on the recipe's shared settings."""
    lrs: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    """Peak learning rates: the columns."""
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Each draws the weights and the order of the data, the same for every strategy and rate."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that run cells; 0: one per core."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid."""

    strategy: str
    lr: float
    seed: int
    config: Config

    @property
    def folder(self) -> str:
        """Relative to the study folder."""
        return f"cells/{self.strategy}/lr-{self.lr!r}-seed-{self.seed}"


def run_study(name: str, overrides: tuple[str, ...], folder: Path, console: Console) -> Path:
    """Runs the study of a recipe into `folder`; an earlier study there is moved aside, never overwritten.

    Args:
        name: the recipe, with a `[study]` table.
        overrides: `key=value` arguments; `study.…` sets the grid, the rest holds for every cell.

    Raises:
        UserError: anything wrong with recipe or settings, before anything is written.
    """
    recipe = load_recipe(name)
    study = read_study(recipe, overrides)
    cells = make_cells(recipe, study, overrides)
    with console.status("preparing the text …"):
        shards = prepare(cells[0].config.data)
    for cell in cells:
        open_batches(cell.config, shards)
    device = resolve_device(cells[0].config.train.device)
    workers = study.workers or (1 if device.type == "cuda" else _cores())
    facts = _describe(recipe, study, cells, shards, overrides, describe_environment(device))

    try:
        _move_aside(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    write_atomic(folder / "study.json", json.dumps(facts, indent=2) + "\n")
    started = time.monotonic()
    with (folder / "cells.jsonl").open("a", encoding="utf-8") as ledger:
        for cell, result in run_cells(cells, shards.folder, folder, min(workers, len(cells)), console):
            line = {"strategy": cell.strategy, "lr": cell.lr, "seed": cell.seed, "run": cell.folder}
            line |= {key: getattr(result, key) for key in ("status", "val_loss", "seconds", "parameters", "reason")}
            ledger.write(json.dumps(line) + "\n")
            ledger.flush()
    facts["seconds"] = round(time.monotonic() - started, 1)
    write_atomic(folder / "study.json", json.dumps(facts, indent=2) + "\n")
    return folder


def read_study(recipe: Recipe, overrides: tuple[str, ...]) -> StudyConfig:
    """The `[study]` table with `study.…` arguments over it."""
    table = dict(recipe.study)
    extra = parse_overrides(overrides).get("study", {})
    if not isinstance(extra, dict):
        raise bad_value("study", extra, "must be a table; write its keys as study.KEY")
    table.update(extra)
    if not table:
        raise UserError(f"recipe {recipe.name!r}: has no [study] table")
    study = read_table(StudyConfig, table, key="study")
    for key in ("strategies", "lrs", "seeds"):
        values = getattr(study, key)
        if len(set(values)) != len(values):
            raise bad_value(f"study.{key}", list(values), "must not repeat an entry")
    return study


def make_cells(recipe: Recipe, study: StudyConfig, overrides: tuple[str, ...]) -> list[Cell]:
    """Every cell with its resolved settings; seeds outermost, so that a study cut short is still a grid."""
    shared = [o for o in overrides if not o.startswith("study.")]
    for key in ("model.strategy", "optim.lr", "seed", "run.dir"):
        if any(o.partition("=")[0] == key for o in shared):
            raise UserError(f"{key}: the study sets it itself; see study.strategies, study.lrs and study.seeds")
    return [
        Cell(
            strategy=strategy,
            lr=lr,
            seed=seed,
            config=recipe.resolve([*shared, f"optim.lr={lr!r}", f"seed={seed}"], strategy=strategy),
        )
        for seed, lr, strategy in itertools.product(study.seeds, sorted(study.lrs), study.strategies)
    ]


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


def _cores() -> int:
    """Cores that this process may use, where the system tells (Linux), else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_settings(cells: list[Cell]) -> dict[str, Any]:
    """The settings that all strategies share, and those that differ, with each strategy's value."""
    flat: dict[str, dict[str, Any]] = {}
    for cell in cells:
        settings = flatten(to_tree(cell.config))
        for varied in ("model.strategy", "optim.lr", "seed", "run.dir"):
            settings.pop(varied)
        flat.setdefault(cell.strategy, settings)
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    values = {key: {strategy: settings.get(key) for strategy, settings in flat.items()} for key in keys}
    same = {key for key, by in values.items() if all(v == next(iter(by.values())) for v in by.values())}
    return {
        "shared": {key: next(iter(values[key].values())) for key in keys if key in same},
        "differing": {key: values[key] for key in keys if key not in same},
    }


def _describe(
    recipe: Recipe,
    study: StudyConfig,
    cells: list[Cell],
    shards: Shards,
    overrides: tuple[str, ...],
    environment: dict[str, Any],
) -> dict[str, Any]:
    data = cells[0].config.data
    vocab = shards.vocab_size or check_vocab(cells[0].config, shards)
    entropy = unigram_entropy(shards.train, shards.val, vocab)
    return {
        "title": study.title,
        "recipe": recipe.name,
        "command": shlex.join(["gptnorm", recipe.name, *overrides]),
        "strategies": list(study.strategies),
        "lrs": sorted(study.lrs),
        "seeds": list(study.seeds),
        "data": {
            "path": data.path if isinstance(data.path, str) else list(data.path),
            "tokenizer": data.tokenizer,
            "fingerprint": shards.fingerprint,
            "train_tokens": len(shards.train),
            "val_tokens": len(shards.val),
        },
        "settings": split_settings(cells),
        "environment": environment,
        "unigram_entropy": entropy if math.isfinite(entropy) else None,
        "seconds": None,
    }


def _move_aside(folder: Path) -> None:
    """Renames an existing folder to the first free NAME.1, NAME.2, …"""
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
