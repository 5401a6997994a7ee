"""What a study asks for: the `[study]` table of a recipe."""

from __future__ import annotations

import itertools
from dataclasses import field, fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT, Count, NonNegativeFloat, Positive, PositiveFloat, WidthRuleName
from gptnorm.errors import UserError, bad_value
from gptnorm.recipe import Recipe, parse_overrides
from gptnorm.study.cell import TEXT, Pairs, as_pairs, hashable
from gptnorm.study.ladder import FEWEST, Axis
from gptnorm.study.outcome import Stability
from gptnorm.study.search import Search
from gptnorm.tables import flatten, merge
from gptnorm.typed import read_table

Report = Literal["all", "near", "around", "neighbours", "best"]
"""At which rates reported seeds train."""

Axes = dict[str, tuple[Any, ...]]
"""Dotted settings, each with the values it takes."""

RESERVED = ("model.strategy", "optim.lr", "seed", "train.log_every")
"""Settings that every study sets itself."""

FIXED = ("data.", "run.", "checkpoint.", "watch.", "gauge.", "parallel.", "study.")
"""Tables that no study may vary from cell to cell, since its runs would not be comparable. `TEXT` alone may differ from
place to place, each of which is a comparison of its own."""

Rate = Annotated[float, Field(ge=1e-30, le=1e30)]
"""A peak learning rate, with room to go on beyond."""

BUDGET = ("model.", "moe.", "train.")
"""Tables whose settings make a run longer or a model larger: what has more of it has won nothing."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudyConfig:
    """A grid, or a ladder of them."""

    title: str
    """Heads the report."""
    strategies: Annotated[tuple[str, ...], Field(min_length=1)]
    """Rows of the table; each with its own defaults, on the recipe's shared settings."""
    lrs: Annotated[tuple[Rate, ...], Field(min_length=1)]
    """Peak learning rates: the columns."""
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Each draws the weights and the order of the data, the same for every strategy and rate."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that run cells; 0: one per GPU, on a CPU one for every `train.threads` cores (one if that is not set)
    as far as memory goes."""
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToleranceConfig(StudyConfig):
    """A tolerance study: the grid is where the search for each strategy's best rate and edge begins."""

    lrs: Annotated[tuple[Rate, ...], Field(min_length=2)]
    """Peak learning rates to begin with; from the first to the last the sensitivity is taken."""
    seeds: tuple[Count, ...] = ()
    """Seeds that are reported. None: a screening, by the seeds that pick."""
    pick: Annotated[tuple[Count, ...], Field(min_length=1)] = (0,)
    """Seeds that pick each strategy's best rate and setting; none of those reported."""
    report: Report = "all"
    """Rates that reported seeds train at: every one that the picking seeds tried ("all"), those from the best's lower
    neighbour up to the edge ("near"), the best with its two neighbours ("around" and "neighbours"), or the best alone.
    With the first two each seed's own edge is bracketed, with "around" its own optimum; only the first two look for
    edges at all."""
    baseline: str | None = None
    """The strategy that the others are compared with. Left out: the first."""
    epsilon: PositiveFloat = 0.05
    """Nats above a strategy's own best loss up to which a rate counts as nearly as good."""
    tune: dict[str, Any] = field(default_factory=dict)
    """Settings tuned beside the rate, each with its values: every combination is tried for every strategy."""
    shortlist: NonNegativeFloat = 0.0
    """Nats above the lowest loss that the picking seeds find with any setting of `tune`: the settings less than that
    above it are reported, too, and the one that is best on all seeds is chosen. 0: that of the lowest loss, and the
    strategy as it comes."""
    map: dict[str, Any] = field(default_factory=dict)
    """Settings with the values at which strategies are compared: every combination is a comparison of its own."""
    places: tuple[dict[str, Any], ...] = ()
    """The same, each combination written out: tables of the same settings, one value each."""
    evaluate: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that every run is evaluated on beside its own, on their validation windows; anything that `data.path`
    takes but a list, with the tokens of the run's own."""
    search: Search = Search()
    """How closely best and edge are bracketed."""
    stability: Stability = Stability()
    """When a run counts as stable."""

    @property
    def where(self) -> str:
        """The key that says where strategies are compared."""
        return "study.places" if self.places else "study.map"


T = TypeVar("T", bound=StudyConfig)


def read_table_of(cls: type[T], recipe: Recipe, overrides: tuple[str, ...]) -> T:
    """The recipe's `[study]` table with `study.…` arguments over it; a missing title is made of the recipe's name.

    Raises:
        UserError: there is none, or it has an unknown key, a wrong value or an entry twice.
    """
    table = _table(recipe, overrides)
    if not table:
        needed = "study.strategies, study.lrs and study.seeds"
        raise UserError(f"recipe {recipe.name!r}: has no [study] table, as those under study/ have; or give {needed}")
    study = read_table(cls, {"title": f"Strategies over learning rates: {recipe.name}", **table}, key="study")
    for entry in fields(study):
        values = getattr(study, entry.name)
        if isinstance(values, tuple) and len(set(map(repr, values))) != len(values):
            raise bad_value(f"study.{entry.name}", list(values), "must not repeat an entry")
    return study


def said_keys(recipe: Recipe, overrides: tuple[str, ...]) -> frozenset[str]:
    """The dotted keys of `[study]` that recipe or arguments name, also where they say what is so by default."""
    return frozenset(flatten(_table(recipe, overrides)))


def _table(recipe: Recipe, overrides: tuple[str, ...]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    merge(table, recipe.study)
    extra = parse_overrides(overrides).get("study", {})
    if not isinstance(extra, dict):
        raise bad_value("study", extra, "must be a table; write its keys as study.KEY")
    merge(table, extra)
    return table


def refuse_other_ladders(study: StudyConfig, ladder: Axis | None) -> None:
    """UserError where the study has rungs of another ladder, or too few of this one."""
    for axis, fewest in FEWEST.items():
        key, sizes = f"study.{axis}s", study.sizes(axis)
        if sizes and axis != ladder:
            here = f"'gptnorm study {ladder}'" if ladder else "this command"
            raise bad_value(key, list(sizes), f"must be left out: {here} climbs no {axis}s")
        if axis == ladder and len(sizes) < fewest:
            raise bad_value(key, list(sizes), f"needs {fewest} {axis}s or more")
    if study.rules and ladder != "width":
        raise bad_value("study.rules", list(study.rules), "only 'gptnorm study width' takes it")


def read_places(study: ToleranceConfig) -> list[Pairs]:
    """Where strategies are compared; one place without settings where nothing is said.

    Raises:
        UserError: `map` and `places` are both given, or the tables of `places` have not the same settings, differ in
            none, or set what no study may vary.
    """
    if not study.places:
        return combinations(read_axes(study.map, "study.map"))
    if study.map:
        raise UserError("study.places: is given beside study.map, which says the same; give one of them")
    tables = [flatten(table) for table in study.places]
    names = sorted(tables[0])
    for table in tables:
        if sorted(table) != sorted(names) or not table:
            raise bad_value("study.places", table, f"must set the same as the first: {', '.join(names) or 'something'}")
    for name in names:
        values = [table[name] for table in tables]
        _refuse_fixed(name, f"study.places.{name}", values)
        _refuse_tables(f"study.places.{name}", values)
    places = [as_pairs(table) for table in tables]
    if len(set(places)) != len(places):
        raise bad_value("study.places", tables, "must not repeat an entry")
    return places


def combinations(axes: Axes) -> list[Pairs]:
    """Every combination of the axes' values, each once; one empty one where there are no axes."""
    found = (as_pairs(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values()))
    return list(dict.fromkeys(found))


def _refuse_fixed(name: str, where: str, values: Any) -> None:
    if name == TEXT and not where.startswith("study.tune"):
        return
    if name in RESERVED or name.startswith(FIXED):
        raise bad_value(where, values, "the study sets it itself, or keeps it the same in every run")


def _refuse_tables(where: str, values: list[Any]) -> None:
    for value in values:
        try:
            hash(hashable(value))
        except TypeError:
            raise bad_value(where, value, "must be a value of the setting, not a table") from None


def read_axes(table: dict[str, Any], key: str) -> Axes:
    """`{"init.std": ["published", "twin"]}`, from a table with dotted or nested keys.

    Raises:
        UserError: a setting that no study may vary, or that has no list of different values.
    """
    axes: Axes = {}
    for name, values in flatten(table).items():
        where = f"{key}.{name}"
        _refuse_fixed(name, where, values)
        if key == "study.tune" and name.startswith(BUDGET):
            raise bad_value(where, values, "is part of the budget, which is the same for all; compare with study.map")
        if not isinstance(values, list) or not values:
            raise bad_value(where, values, "must be a list of its values, such as [0.0, 0.1]")
        _refuse_tables(where, values)
        if len({repr(value) for value in values}) != len(values):
            raise bad_value(where, values, "must not repeat an entry")
        axes[name] = tuple(map(hashable, values))
    return axes
