"""The tolerance study: how far each strategy's learning rate can be pushed, and what it loses on the way.

Which runs it makes is `gptnorm.study.planner`'s, what is read off them `gptnorm.report.tolerance`'s. The folder is
`gptnorm.study.ledger`'s; `cells/<strategy>/[<setup>/]lr-<rate>-seed-<n>/` is a full run folder each.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from gptnorm.config import Config, OptionsConfig
from gptnorm.errors import UserError, bad_value, said_as
from gptnorm.recipe import Recipe
from gptnorm.strategies import make_strategy
from gptnorm.study.cell import Cell, Pairs, Setup, as_overrides, as_pairs, hashable
from gptnorm.study.config import (
    ToleranceConfig,
    combinations,
    read_axes,
    read_places,
    read_table_of,
    refuse_other_ladders,
)
from gptnorm.study.grid import EVERY_RUN, SET_BY_STUDY, shared_overrides
from gptnorm.study.join import Part
from gptnorm.study.ladder import sizes_at
from gptnorm.study.measures import Point
from gptnorm.study.outcome import from_json, point_of, to_json
from gptnorm.study.planner import Group, Run, wanted_runs
from gptnorm.study.run import Entropy, Lines
from gptnorm.study.schema import Facts
from gptnorm.study.search import CLOSEST

if TYPE_CHECKING:
    from gptnorm.strategies.base import Strategy


@dataclass(frozen=True)
class Tolerance:
    """The kind of study (`gptnorm.study.run.Kind`) that the module is about."""

    part: Part = (1, 1)
    """Which strategies and places to run, K of N, every Nth; the rest is somebody else's."""
    words: tuple[str, ...] = ("study", "tolerance")

    def read(self, recipe: Recipe, overrides: tuple[str, ...]) -> ToleranceConfig:
        """The `[study]` table with `study.…` arguments over it; UserError if it is not that of such a study."""
        return self.checked(read_table_of(ToleranceConfig, recipe, overrides))

    def checked(self, study: ToleranceConfig) -> ToleranceConfig:
        """The study; UserError where its parts contradict each other."""
        refuse_other_ladders(study, None)
        for low, high in itertools.pairwise(sorted(study.lrs)):
            if high / low < CLOSEST:
                allowed = f"needs rates a factor {CLOSEST:g} or more apart"
                raise bad_value("study.lrs", [low, high], allowed)
        both = sorted(set(study.pick) & set(study.seeds))
        if both:
            allowed = f"must be other seeds than study.pick = {list(study.pick)}: a rate picked on a seed flatters it"
            raise bad_value("study.seeds", list(study.seeds), allowed)
        if study.baseline is not None and study.baseline not in study.strategies:
            raise bad_value("study.baseline", study.baseline, f"must be one of {', '.join(study.strategies)}")
        common = read_axes(study.tune, "study.tune").keys() & dict(read_places(study)[0]).keys()
        if common:
            raise UserError(f"study.tune.{min(common)}: is in {study.where}, too; it is either tuned or mapped")
        return study

    def grown(self, study: ToleranceConfig, earlier: Facts, said: frozenset[str]) -> ToleranceConfig:
        """What either asks for."""
        before = earlier.get("tolerance", {})
        grown: dict[str, Any] = {}
        for key in ("strategies", "lrs", "seeds"):
            grown[key] = tuple(dict.fromkeys([*earlier[key], *getattr(study, key)]))
        tune = {name: list(values) for name, values in before.get("tune", {}).items()}
        for name, values in read_axes(study.tune, "study.tune").items():
            there = [hashable(value) for value in tune.get(name, [])]
            tune[name] = [*tune.get(name, []), *(value for value in values if value not in there)]
        grown["tune"] = tune
        asked = [place for place in read_places(study) if place]
        places = [as_pairs(place) for place in before.get("places", ())]
        if asked and places and [key for key, _ in asked[0]] != [key for key, _ in places[0]]:
            places = []  # the ledger refuses them: another study
        places += [place for place in asked if place not in places]
        # Those of the ledger and those asked for, written out: a map of both would have more.
        grown |= {"map": {}, "places": tuple(dict(place) for place in places)}
        # What neither recipe nor command says now stays as it was said.
        for key in ("baseline", "epsilon", "report", "shortlist", "evaluate"):
            if key in before and key not in said:
                grown[key] = hashable(before[key])
        for key in ("search", "stability"):
            kept = {
                leaf: value for leaf, value in from_json(before.get(key, {})).items() if f"{key}.{leaf}" not in said
            }
            grown[key] = replace(getattr(study, key), **kept)
        grown["seeds"] = tuple(seed for seed in grown["seeds"] if seed not in study.pick)
        return self.checked(replace(study, **grown))

    def plan(self, recipe: Recipe, study: ToleranceConfig, overrides: tuple[str, ...]) -> TolerancePlan:
        """The study with its settings resolved; UserError where one is wrong."""
        if study.shortlist and not study.tune:
            raise bad_value("study.shortlist", study.shortlist, "needs study.tune: it is about the settings tuned")
        if study.shortlist and (study.report == "best" or len(study.seeds) < 2):
            allowed = "needs two study.seeds or more and another study.report than 'best', so that all seeds can choose"
            raise bad_value("study.shortlist", study.shortlist, allowed)
        return TolerancePlan(recipe, study, overrides, self.part)


class TolerancePlan:
    """A tolerance study's `gptnorm.study.run.Plan`."""

    def __init__(self, recipe: Recipe, study: ToleranceConfig, overrides: tuple[str, ...], part: Part = (1, 1)) -> None:
        self.study = study
        self._part = part
        self._recipe = recipe
        self._tune, self._places = read_axes(study.tune, "study.tune"), read_places(study)
        placed = dict.fromkeys(dict(self._places[0]), study.where.removeprefix("study."))
        set_by = {**SET_BY_STUDY, **dict.fromkeys(self._tune, "tune"), **placed}
        self._shared = shared_overrides(overrides, set_by)
        self._cells: dict[Run, Cell] = {}
        self._refused: dict[tuple[str, Pairs, Pairs], UserError] = {}
        """Why a strategy is not trained with a combination of what is tuned, by strategy, place and combination."""
        self._groups = [self._group(strategy, place) for place in self._places for strategy in study.strategies]
        self._refuse_what_none_takes()
        self._setups = {
            (group.strategy, setup.place, setup.variant): setup for group in self._groups for setup in group.setups
        }
        self.samples = [
            self._cell(Run(group.strategy, setup, min(study.lrs), min(study.pick)))
            for group in self._groups
            for setup in group.setups
        ]
        """One cell of every strategy, place and setting."""

    def describe(self) -> dict[str, Any]:
        """What is asked for beyond a grid."""
        study = self.study
        refused = dict.fromkeys(f"{strategy}: {error}" for (strategy, *_), error in self._refused.items())
        return {
            "tolerance": {
                "pick": list(study.pick),
                "report": study.report,
                "baseline": study.baseline or study.strategies[0],
                "epsilon": study.epsilon,
                "tune": {key: list(values) for key, values in self._tune.items()},
                "shortlist": study.shortlist,
                "places": [dict(place) for place in self._places if place],
                "evaluate": list(study.evaluate),
                "search": asdict(study.search),
                "stability": to_json(asdict(study.stability)),
                **({"refused": list(refused)} if refused else {}),
            }
        }

    def wanted(self, done: Lines, entropy: Entropy) -> list[Cell]:
        """The cells to run now, those of the part's groups in turn, so that every strategy grows alike."""
        known: dict[Run, Point] = {}
        for line in done.values():
            setup = self._setups.get(
                (str(line["strategy"]), as_pairs(line.get("place")), as_pairs(line.get("variant")))
            )
            if setup is not None:
                point = point_of(line, self.study.stability, entropy(line))
                known[Run(str(line["strategy"]), setup, point.lr, int(line["seed"]))] = point
        number, parts = self._part
        runs = [wanted_runs(group, known, self.study) for group in self._groups[number - 1 :: parts]]
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*runs))
        return [self._cell(run) for run in in_turn if run is not None]

    def _cell(self, run: Run) -> Cell:
        if run not in self._cells:
            arguments = [*self._shared, *run.setup.overrides, *EVERY_RUN, f"optim.lr={run.lr!r}", f"seed={run.seed}"]
            self._cells[run] = Cell(
                strategy=run.strategy,
                lr=run.lr,
                seed=run.seed,
                config=self._recipe.resolve(arguments, strategy=run.strategy),
                setup=run.setup,
                measured="nonlinearity",
                evaluated=self.study.evaluate,
            )
        return self._cells[run]

    def _group(self, strategy: str, place: Pairs) -> Group:
        """The strategy at a place, as it comes and with every other combination of what is tuned."""
        follows = self._follows(strategy, place)
        at_place = [*self._shared, *as_overrides(dict((*follows, *place)))]
        with _said_as(self.study.where, place):
            self._recipe.resolve(at_place, strategy=strategy)
        variants: dict[Pairs, None] = {(): None}
        for combination in combinations(self._tune):
            try:
                variants[self._in_effect(combination, at_place, strategy)] = None
            except UserError as error:
                self._refused[strategy, place, combination] = error
        setups = (Setup(place=place, variant=variant, follows=follows) for variant in variants)
        return Group(strategy=strategy, setups=tuple(setups))

    def _in_effect(self, combination: Pairs, at_place: list[str], strategy: str) -> Pairs:
        """Of a combination, the settings without which it would be another run; UserError if it makes no sense."""

        def run_of(settings: Pairs) -> tuple[Strategy, Config]:
            config = self._recipe.resolve([*at_place, *as_overrides(dict(settings))], strategy=strategy)
            made = make_strategy(strategy, config.strategy, config.options)
            return made, replace(config, strategy={}, options=OptionsConfig())

        with _said_as("study.tune", combination):
            whole = run_of(combination)
        found = combination
        for pair in combination:
            rest = tuple(other for other in found if other != pair)
            with contextlib.suppress(UserError):  # what is left makes no sense without it
                if run_of(rest) == whole:
                    found = rest
        return found

    def _refuse_what_none_takes(self) -> None:
        """UserError where a combination makes no sense with any strategy: a value that is wrong, for one."""
        for combination in combinations(self._tune):
            found = {key: error for key, error in self._refused.items() if key[-1] == combination}
            if len(found) < len(self._groups):
                continue
            if len(set(map(str, found.values()))) == 1:
                raise next(iter(found.values()))
            # Each knows other keys, or has reasons of its own.
            told = dict.fromkeys(f"{strategy}: {error}" for (strategy, *_), error in found.items())
            raise UserError("; ".join(told))

    def _follows(self, strategy: str, place: Pairs) -> Pairs:
        width, key = dict(place).get("model.d_model"), f"{self.study.where}.model.d_model"
        if width is None:
            return ()
        if not isinstance(width, int) or isinstance(width, bool):
            raise bad_value(key, width, "must be whole numbers")
        model = self._recipe.resolve(self._shared, strategy=strategy).model
        sizes = sizes_at(width, model, key)
        return tuple((key, value) for key, value in sizes.items() if key != "model.d_model" and key not in dict(place))


@contextlib.contextmanager
def _said_as(table: str, settings: Pairs) -> Iterator[None]:
    """Has an error of any of the settings name the study's table that they are from."""
    with contextlib.ExitStack() as stack:
        for key, _ in settings:
            stack.enter_context(said_as(f"{table}.{key}", key))
        yield
