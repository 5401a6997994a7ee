"""A grid study: every strategy at every learning rate with every seed, on the same data in the same order.

A ladder is such a grid at each of several depths or widths.

The study folder is `gptnorm.study.ledger`'s; `cells/<strategy>/[<rung>/]lr-<rate>-seed-<n>/` is a full run folder each.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from gptnorm.errors import UserError
from gptnorm.recipe import Recipe
from gptnorm.study.cell import Cell
from gptnorm.study.config import StudyConfig, read_table_of, refuse_other_ladders
from gptnorm.study.join import Part
from gptnorm.study.ladder import SETS, Axis, Rung, depth_rungs, width_rungs
from gptnorm.study.run import Entropy, Lines
from gptnorm.study.schema import Facts


@dataclass(frozen=True)
class Grid:
    """The kind of study (`gptnorm.study.run.Kind`) that the module is about."""

    ladder: Axis | None = None
    """What changes from rung to rung; None: a single grid."""
    part: Part = (1, 1)
    """The runs to make, K of N, every Nth; the rest is somebody else's."""

    @property
    def words(self) -> tuple[str, ...]:
        """As `gptnorm study depth`."""
        return ("study", self.ladder or "grid")

    def read(self, recipe: Recipe, overrides: tuple[str, ...]) -> StudyConfig:
        """The `[study]` table with `study.…` arguments over it; UserError if it is not that of such a ladder."""
        study = read_table_of(StudyConfig, recipe, overrides)
        refuse_other_ladders(study, self.ladder)
        return study

    def grown(self, study: StudyConfig, earlier: Facts, said: frozenset[str]) -> StudyConfig:
        """The grid of both; a grid has no setting that one of the two would have to give up."""

        def both(key: str, there: list[Any]) -> tuple[Any, ...]:
            return tuple(dict.fromkeys([*there, *getattr(study, key)]))

        grown = {key: both(key, earlier[key]) for key in ("strategies", "lrs", "seeds")}
        ladder = earlier.get("ladder")
        if ladder and study.axis == ladder["axis"]:
            grown[f"{study.axis}s"] = both(f"{study.axis}s", ladder["sizes"])
            own = earlier["settings"]["recipe"].get("optim.width_rule", "none")
            if study.rules or ladder["rules"] not in ([], [own]):
                grown["rules"] = both("rules", ladder["rules"])
        return replace(study, **grown)

    def plan(self, recipe: Recipe, study: StudyConfig, overrides: tuple[str, ...]) -> GridPlan:
        """Every cell with its settings."""
        return GridPlan(study, make_cells(recipe, study, overrides), self.part)


@dataclass(frozen=True)
class GridPlan:
    """A grid's `gptnorm.study.run.Plan`."""

    study: StudyConfig
    cells: list[Cell]
    part: Part

    @property
    def samples(self) -> list[Cell]:
        """Of every strategy at every rung the first cell: rate and seed change nothing that is checked."""
        firsts: dict[tuple[str, str], Cell] = {}
        for cell in self.cells:
            firsts.setdefault((cell.strategy, cell.label), cell)
        return list(firsts.values())

    def wanted(self, done: Lines, entropy: Entropy) -> list[Cell]:
        """Those of the part that have not ended."""
        number, parts = self.part
        return [cell for cell in self.cells[number - 1 :: parts] if cell.folder not in done]

    def describe(self) -> dict[str, Any]:
        """The ladder, if it is one."""
        axis = self.study.axis
        if axis is None:
            return {}
        rungs = [cell.rung for cell in self.cells if cell.rung is not None]
        ladder = {
            "axis": axis,
            "sizes": sorted(self.study.sizes(axis)),
            "rules": list(dict.fromkeys(rung.rule for rung in rungs if rung.rule)),
            "settings": {rung.label: dict(rung.settings) for rung in rungs},
        }
        return {"ladder": ladder}


def make_cells(recipe: Recipe, study: StudyConfig, overrides: tuple[str, ...]) -> list[Cell]:
    """Every cell with its resolved settings; seeds outermost, so that a study cut short is still a grid."""
    shared = shared_overrides(overrides, _set_by(study))
    rungs = {strategy: _rungs(recipe, study, shared, strategy) for strategy in study.strategies}
    count = len(rungs[study.strategies[0]])
    return [
        Cell(
            strategy=strategy,
            lr=lr,
            seed=seed,
            config=recipe.resolve(
                [*shared, *(rung.overrides if rung else ()), *EVERY_RUN, f"optim.lr={lr!r}", f"seed={seed}"],
                strategy=strategy,
            ),
            rung=rung,
            measured="signal" if rung else None,
        )
        for seed, index, lr, strategy in itertools.product(
            study.seeds, range(count), sorted(study.lrs), study.strategies
        )
        for rung in [rungs[strategy][index]]
    ]


SET_BY_STUDY = {
    "model.strategy": "strategies",
    "optim.lr": "lrs",
    "seed": "seeds",
    "run.dir": "",
    "train.log_every": "",
}
"""The settings that every study sets itself, each with the key to look at instead."""

EVERY_RUN = ("train.log_every=1",)
"""Whether a run is stable, and its spikes, are read off the loss of every step, whatever the recipe logs."""


def shared_overrides(overrides: tuple[str, ...], set_by: dict[str, str]) -> list[str]:
    """The `key=value` arguments that hold for every cell; UserError for a setting that the study sets itself.

    Args:
        set_by: these settings, each with the key of `[study]` to look at instead, or "".
    """
    shared = [o for o in overrides if not o.startswith("study.")]
    given = {o.partition("=")[0] for o in shared}
    for key, name in set_by.items():
        if key in given:
            raise UserError(f"{key}: the study sets it itself" + (f"; see study.{name}" if name else ""))
    return shared


def _set_by(study: StudyConfig) -> dict[str, str]:
    keys = dict(SET_BY_STUDY)
    if study.axis:
        keys[SETS[study.axis][0]] = f"{study.axis}s"
    if study.rules:
        keys["optim.width_rule"] = "rules"
    return keys


def _rungs(recipe: Recipe, study: StudyConfig, shared: list[str], strategy: str) -> list[Rung] | list[None]:
    """The strategy's ladder, smallest first: what it costs to wait for grows as the study goes on."""
    if study.axis is None:
        return [None]
    if study.axis == "depth":
        return depth_rungs(study.depths)
    return width_rungs(study.widths, study.rules, recipe.resolve(shared, strategy=strategy))
