"""A grid study: every strategy at every learning rate with every seed, on the same data in the same order.

A ladder is such a grid at each of several depths or widths.

The study folder is `gptnorm.study.ledger`'s; `cells/<strategy>/[<rung>/]lr-<rate>-seed-<n>/` is a full run folder each.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as typed
from rich.console import Console

from gptnorm.config import STRICT, Config, Count, Positive, PositiveFloat, WidthRuleName
from gptnorm.data import Shards, prepare
from gptnorm.environment import describe_environment
from gptnorm.errors import UserError, bad_value
from gptnorm.model import build_gpt
from gptnorm.recipe import Recipe, load_recipe, parse_overrides
from gptnorm.study.facts import describe_study
from gptnorm.study.ladder import FEWEST, SETS, Axis, Rung, depth_rungs, width_rungs
from gptnorm.study.ledger import Facts, Ledger
from gptnorm.study.pool import Outcome, run_cells
from gptnorm.train.inputs import check_vocab, open_batches, resolve_device
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
    depths: tuple[Positive, ...] = ()
    """Numbers of blocks: the rungs of `gptnorm study depth`."""
    widths: tuple[Positive, ...] = ()
    """Values of model.d_model: the rungs of `gptnorm study width`."""
    rules: tuple[WidthRuleName, ...] = ()
    """Values of optim.width_rule, each at every width. Left out: the recipe's own."""

    def sizes(self, axis: Axis) -> tuple[int, ...]:
        """The rungs of that ladder."""
        return self.depths if axis == "depth" else self.widths

    @property
    def axis(self) -> Axis | None:
        """Which ladder the study climbs, if any."""
        return "depth" if self.depths else "width" if self.widths else None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid."""

    strategy: str
    lr: float
    seed: int
    config: Config
    rung: Rung | None = None
    """Its place on a ladder."""

    @property
    def folder(self) -> str:
        """Relative to the study folder."""
        rung = f"{self.rung.label}/" if self.rung else ""
        return f"cells/{self.strategy}/{rung}lr-{self.lr!r}-seed-{self.seed}"


def run_study(
    name: str,
    overrides: tuple[str, ...],
    folder: Path,
    console: Console,
    *,
    ladder: Axis | None = None,
    command: tuple[str, ...] | None = None,
    fresh: bool = False,
) -> Path:
    """Runs the study of a recipe into `folder`, or what is missing of it there.

    What the folder's study asked for and what is asked now are one grid, of which every run that has not ended is made.

    Args:
        name: the recipe, with a `[study]` table.
        overrides: `key=value` arguments; `study.…` sets the grid, the rest holds for every cell.
        ladder: what changes from rung to rung; None: a single grid.
        command: the words after `gptnorm` that ask for this study, for its record; None: "study" and its kind.
        fresh: begin again; an earlier study there is moved aside.

    Raises:
        UserError: anything wrong with recipe or settings, before anything is written. OtherStudy: the folder holds one
            with other settings.
    """
    recipe = load_recipe(name)
    study = read_study(recipe, overrides, ladder)
    make_cells(recipe, study, overrides)  # whatever is wrong with them is said before a study is moved aside
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(Ledger(folder))
        if ledger.earlier is not None and not fresh:
            study = _with_earlier(study, ledger.earlier)
        cells = make_cells(recipe, study, overrides)
        with console.status("preparing the text …"):
            shards = prepare(cells[0].config.data)
        _check(cells, shards)
        device = resolve_device(cells[0].config.train.device)
        words = ("study", ladder or "grid") if command is None else command
        line = shlex.join(["gptnorm", *words, name, *overrides])
        facts = describe_study(recipe, study, cells, shards, overrides, line, describe_environment(device))
        if fresh and ledger.earlier is not None:
            stack.close()
            _move_aside(folder)
            ledger = stack.enter_context(Ledger(folder))
        ledger.begin(facts)
        missing = [cell for cell in cells if cell.folder not in ledger.done]
        if not missing:
            return folder
        workers = min(study.workers or (1 if device.type == "cuda" else _cores()), len(missing))
        started = time.monotonic()
        try:
            for cell, outcome in run_cells(missing, shards.folder, folder, workers, console):
                ledger.add(cell.folder, **_line(cell, outcome))
        finally:
            ledger.spent(time.monotonic() - started)
    return folder


def _line(cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """What the ledger keeps of a run."""
    result, training = outcome.result, outcome.training
    record: dict[str, Any] = {"strategy": cell.strategy, "lr": cell.lr, "seed": cell.seed}
    record |= {key: getattr(result, key) for key in ("status", "val_loss", "seconds", "parameters", "reason")}
    record |= {"tail_loss": training.tail, "lowest_loss": training.lowest, "spikes": training.spikes}
    if cell.rung:
        record |= {"size": cell.rung.size, "rule": cell.rung.rule, "signal": outcome.signal}
    return record


def _with_earlier(study: StudyConfig, earlier: Facts) -> StudyConfig:
    """The grid of both."""

    def both(key: str, there: list[Any]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys([*there, *getattr(study, key)]))

    grown = {key: both(key, earlier[key]) for key in ("strategies", "lrs", "seeds")}
    ladder = earlier.get("ladder")
    if ladder and study.axis == ladder["axis"]:
        grown[f"{study.axis}s"] = both(f"{study.axis}s", ladder["sizes"])
        if study.rules:
            grown["rules"] = both("rules", ladder["rules"])
    return replace(study, **grown)


def read_study(recipe: Recipe, overrides: tuple[str, ...], ladder: Axis | None = None) -> StudyConfig:
    """The `[study]` table with `study.…` arguments over it; UserError if it is not that of such a ladder."""
    table = dict(recipe.study)
    extra = parse_overrides(overrides).get("study", {})
    if not isinstance(extra, dict):
        raise bad_value("study", extra, "must be a table; write its keys as study.KEY")
    table.update(extra)
    if not table:
        raise UserError(f"recipe {recipe.name!r}: has no [study] table")
    study = read_table(StudyConfig, table, key="study")
    for key in ("strategies", "lrs", "seeds", "depths", "widths", "rules"):
        values = getattr(study, key)
        if len(set(values)) != len(values):
            raise bad_value(f"study.{key}", list(values), "must not repeat an entry")
    for axis, fewest in FEWEST.items():
        key, sizes = f"study.{axis}s", study.sizes(axis)
        if sizes and axis != ladder:
            here = f"'gptnorm study {ladder}'" if ladder else "this command"
            raise bad_value(key, list(sizes), f"must be left out: {here} climbs no {axis}s")
        if axis == ladder and len(sizes) < fewest:
            raise bad_value(key, list(sizes), f"needs {fewest} {axis}s or more")
    if study.rules and ladder != "width":
        raise bad_value("study.rules", list(study.rules), "only 'gptnorm study width' takes it")
    return study


def make_cells(recipe: Recipe, study: StudyConfig, overrides: tuple[str, ...]) -> list[Cell]:
    """Every cell with its resolved settings; seeds outermost, so that a study cut short is still a grid."""
    shared = [o for o in overrides if not o.startswith("study.")]
    given = {o.partition("=")[0] for o in shared}
    for key, hint in _set_by(study).items():
        if key in given:
            raise UserError(f"{key}: the study sets it itself{hint}")
    rungs = {strategy: _rungs(recipe, study, shared, strategy) for strategy in study.strategies}
    count = len(rungs[study.strategies[0]])
    return [
        Cell(
            strategy=strategy,
            lr=lr,
            seed=seed,
            config=recipe.resolve(
                [*shared, *(rung.overrides if rung else ()), f"optim.lr={lr!r}", f"seed={seed}"], strategy=strategy
            ),
            rung=rung,
        )
        for seed, index, lr, strategy in itertools.product(
            study.seeds, range(count), sorted(study.lrs), study.strategies
        )
        for rung in [rungs[strategy][index]]
    ]


def _set_by(study: StudyConfig) -> dict[str, str]:
    """The settings that no argument may set, each with where to look instead."""
    keys = {"model.strategy": "strategies", "optim.lr": "lrs", "seed": "seeds"}
    if study.axis:
        keys[SETS[study.axis][0]] = f"{study.axis}s"
    if study.rules:
        keys["optim.width_rule"] = "rules"
    return {"run.dir": "", **{key: f"; see study.{name}" for key, name in keys.items()}}


def _rungs(recipe: Recipe, study: StudyConfig, shared: list[str], strategy: str) -> list[Rung] | list[None]:
    """The strategy's ladder, smallest first: what it costs to wait for grows as the study goes on."""
    if study.axis is None:
        return [None]
    if study.axis == "depth":
        return depth_rungs(study.depths)
    return width_rungs(study.widths, study.rules, recipe.resolve(shared, strategy=strategy))


def _check(cells: list[Cell], shards: Shards) -> None:
    """Finds what else can be wrong with the input: the text, the vocabulary, what a strategy or rule refuses."""
    built = set()
    for cell in cells:
        open_batches(cell.config, shards)
        kind = (cell.strategy, cell.rung.label if cell.rung else "")
        if kind not in built:
            built.add(kind)
            build_gpt(cell.config, vocab=check_vocab(cell.config, shards), device="meta")


def _cores() -> int:
    """Cores that this process may use, where the system tells (Linux), else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _move_aside(folder: Path) -> None:
    """Renames the folder to the first free NAME.1, NAME.2, …"""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(f"{folder}: cannot be moved aside: {error.strerror}") from None
