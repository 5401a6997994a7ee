"""What `study.json` and `cells.jsonl` must hold, checked before anything of them is used.

Folders are shared, joined and mended by hand, so each may be another's, half a one or a wrong one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from gptnorm.config import Count, NonNegativeFloat, Positive, PositiveFloat, WidthRuleName
from gptnorm.errors import UserError, bad_value
from gptnorm.records import numbered_lines, read_object
from gptnorm.study.cell import TEXT, hashable
from gptnorm.study.config import Rate, Report
from gptnorm.study.ladder import Axis
from gptnorm.study.outcome import Stability, from_json
from gptnorm.study.search import Search
from gptnorm.typed import read_table

Facts = dict[str, Any]
"""study.json."""

T = TypeVar("T")

LEFT_OUT: Any = None
"""Of a table that need not be there; null in its stead is an error."""

# More than is known here may stand in either file, but for the tables that are settings: `search` and `stability`.
LENIENT = ConfigDict(extra="ignore")


def _without_repeats(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) != len(values):
        raise PydanticCustomError("repeats", "must not hold a value twice")
    return values


def _setting(value: Any) -> Any:
    """Anything but a table, or a list with one."""
    found = hashable(value)
    try:
        hash(found)
    except TypeError:
        raise PydanticCustomError("table", "must hold no table") from None
    return found


def _place(settings: dict[str, Any]) -> dict[str, Any]:
    text = settings.get(TEXT, "")
    if not all(isinstance(path, str) for path in (text if isinstance(text, tuple) else [text])):
        raise PydanticCustomError("text", f"must name texts by their paths in {TEXT}")
    return settings


def _alike(places: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    if any(place.keys() != places[0].keys() for place in places):
        raise PydanticCustomError("places", "must set the same in each")
    return places


Setting = Annotated[Any, AfterValidator(_setting)]
Place = Annotated[dict[str, Setting], AfterValidator(_place)]
Distinct = Annotated[tuple[T, ...], AfterValidator(_without_repeats)]
Some = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(_without_repeats)]
Number = float | None
"""None: missing, or not finite."""
Amount = Annotated[float, Field(ge=0)] | None
"""None: missing, or not finite."""
Whole = Annotated[int, Field(ge=0, lt=2**63)]
"""Bounded so that it can be shown and computed with."""


@dataclass(frozen=True, kw_only=True, config=LENIENT)
class Text:
    """What a study trains or is evaluated on."""

    fingerprint: str
    train_tokens: Whole
    val_tokens: Whole
    vocab: Annotated[int, Field(ge=2, lt=2**63)] | None = None
    unigram_entropy: float | None = None


@dataclass(frozen=True, kw_only=True, config=LENIENT)
class Settings:
    """By dotted key: those that all strategies share, and of the others the value of each strategy."""

    shared: dict[str, Any]
    differing: dict[str, dict[str, Any]]
    recipe: dict[str, Any] = LEFT_OUT
    """What the recipe and the command say; left out: the study was made before it was written down, and cannot grow."""


@dataclass(frozen=True, kw_only=True, config=LENIENT)
class Ladder:
    """What is asked of a grid over sizes."""

    axis: Axis
    sizes: Some[Positive]
    rules: Distinct[WidthRuleName]
    settings: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True, config=LENIENT)
class Tolerance:
    """What is asked of a tolerance study beyond strategies, rates and seeds."""

    pick: Some[Count]
    report: Report
    baseline: str
    epsilon: PositiveFloat
    tune: dict[str, tuple[Setting, ...]]
    shortlist: NonNegativeFloat
    places: Annotated[tuple[Place, ...], AfterValidator(_alike)]
    search: Search
    stability: Annotated[Stability, BeforeValidator(from_json)]
    evaluate: Distinct[Annotated[str, Field(min_length=1)]] = ()
    refused: Distinct[str] = ()
    """Why a strategy is not trained with a setting of `tune`, in words."""


@dataclass(frozen=True, kw_only=True, config=LENIENT)
class StudyFile:
    """`study.json`."""

    title: str
    recipe: str
    commands: tuple[str, ...]
    strategies: Some[str]
    lrs: Some[Rate]
    seeds: Distinct[Count]
    data: Text
    settings: Settings
    environments: tuple[dict[str, Any], ...]
    unigram_entropy: float | None
    seconds: float | None
    texts: dict[str, Text] = Field(default_factory=dict)
    complete: bool = True
    ladder: Ladder = LEFT_OUT
    tolerance: Tolerance = LEFT_OUT


@dataclass(frozen=True, kw_only=True, config=LENIENT)
class Signal:
    """`gptnorm.study.signal`: a number for each block, one for the model."""

    grad: Annotated[tuple[Number, ...], Field(min_length=1)]
    cosine: Annotated[tuple[Number, ...], Field(min_length=1)]
    token_cosine: Number


@dataclass(frozen=True, kw_only=True, config=LENIENT)
class Line:
    """A run that has ended, as `gptnorm.study.cell` and `gptnorm.study.aftermath` write it."""

    strategy: str
    lr: PositiveFloat
    seed: Count
    status: Literal["finished", "diverged"]
    val_loss: Number
    run: str
    seconds: Amount = None
    parameters: Whole | None = None
    environment: int = 0
    place: Place = Field(default_factory=dict)
    variant: Place = Field(default_factory=dict)
    tail_loss: Number = None
    lowest_loss: Number = None
    spikes: Whole = 0
    nonlinearity: tuple[Number, ...] | None = None
    elsewhere: dict[str, Number] | None = None
    signal: dict[str, Signal | None] | None = None
    flops: Amount = None
    memory: Amount = None


def read_facts(folder: Path) -> Facts:
    """A folder's `study.json`.

    Raises:
        UserError: it is missing, no JSON object, lacks a key, or holds a wrong value, which is named.
    """
    path = folder / "study.json"
    facts = read_object(path)
    try:
        read_table(StudyFile, facts)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if "tolerance" in facts and len(facts["lrs"]) < 2:
        raise bad_value(f"{path}: lrs", facts["lrs"], "needs two rates or more in a tolerance study")
    return facts


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The lines of a study's `cells.jsonl`; a missing file is empty, half a last line, as a kill leaves it,
    is left out.

    Raises:
        UserError: another line is no JSON object, lacks a key, or holds a wrong value, which is named.
    """
    rows: list[dict[str, Any]] = []
    for number, row in numbered_lines(path):
        if row is None:
            raise UserError(f"{path}: line {number} cannot be read as a JSON object; mend it, or take it out")
        try:
            read_table(Line, row)
        except UserError as error:
            raise UserError(f"{path}: line {number}: {error}") from None
        rows.append(row)
    return rows
