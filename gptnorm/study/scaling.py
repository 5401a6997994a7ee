"""The scaling study: models of several sizes on several amounts of text, at several batches, each at its own best rate.

It is a tolerance study whose places are written as models with tokens. Batches of b sequences take tokens / (b sequence
length) steps; tokens are rounded to what every batch divides, so that all batches of a model see as much. What the
study says is read off by `gptnorm.report.scaling`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as typed

from gptnorm.config import STRICT, Positive
from gptnorm.errors import UserError, bad_value
from gptnorm.recipe import Recipe
from gptnorm.study.config import RESERVED, Report, ToleranceConfig, read_table_of
from gptnorm.study.grid import SET_BY_STUDY, shared_overrides
from gptnorm.study.tolerance import Tolerance
from gptnorm.tables import flatten

SET_BY_SCALING = {**SET_BY_STUDY, "train.steps": "models", "train.batch_size": "batches"}
"""The settings that the study sets, each with the key to look at instead."""


@typed(frozen=True, kw_only=True, config=STRICT)
class ScalingConfig(ToleranceConfig):
    """A scaling study; `map` and `places` are its own to write."""

    models: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    """Tables of `model.` settings, the same ones in each, with `tokens`: the list of how many the model sees."""
    batches: tuple[Positive, ...] = ()
    """Sequences per step, each tried with each model and amount of text. Left out: the recipe's own."""
    report: Report = "around"

    @property
    def where(self) -> str:
        """The key that says where strategies are compared."""
        return "study.models"


@dataclass(frozen=True)
class Scaling(Tolerance):
    """The kind of study (`gptnorm.study.run.Kind`) that the module is about."""

    words: tuple[str, ...] = ("study", "scaling")

    def read(self, recipe: Recipe, overrides: tuple[str, ...]) -> ScalingConfig:
        """The `[study]` table with `study.…` arguments over it, its models as places; UserError if it is not such a
        study's."""
        study = read_table_of(ScalingConfig, recipe, overrides)
        for key in ("map", "places"):
            if getattr(study, key):
                raise UserError(f"study.{key}: is for 'gptnorm study tolerance'; here study.models says where")
        shared = shared_overrides(overrides, SET_BY_SCALING)
        train = recipe.resolve(shared, strategy=study.strategies[0]).train
        places = as_places(study.models, study.batches, train.batch_size, train.seq_len)
        whole = replace(study, places=tuple(places))
        self.checked(whole)
        return whole


def as_places(
    models: tuple[dict[str, Any], ...], batches: tuple[int, ...], batch_size: int, seq_len: int
) -> list[dict[str, Any]]:
    """Every model with every amount of text and every batch, as settings.

    Args:
        batches: none: `batch_size`, and the places do not name it.

    Raises:
        UserError: a table without model settings or with others, or tokens that are no list of whole numbers above 0,
            or fewer than one step of the largest batch, or far from whole steps of every batch.
    """
    sizes = batches or (batch_size,)
    whole = math.lcm(*sizes) * seq_len
    places: list[dict[str, Any]] = []
    names: set[str] = set()
    for table in models:
        settings = flatten({key: value for key, value in table.items() if key != "tokens"})
        names = names or set(settings)
        wrong = min((key for key in settings if not key.startswith("model.") or key in RESERVED), default=None)
        if wrong is not None or not settings:
            allowed = "must have model settings and tokens alone, such as {model.d_model = 64, tokens = [1e6]}"
            raise bad_value("study.models", wrong or table, allowed)
        if set(settings) != names:
            raise bad_value("study.models", table, f"must set the same as the first: {', '.join(sorted(names))}")
        amounts: set[int] = set()
        for tokens in _tokens(table.get("tokens")):
            if tokens < max(sizes) * seq_len:
                least = f"must be {max(sizes) * seq_len:,} or more, one step of {max(sizes)} sequences"
                raise bad_value("study.models.tokens", tokens, least)
            rounded = max(1, round(tokens / whole)) * whole
            if not 0.9 <= rounded / tokens <= 1.1:
                allowed = f"must be within a tenth of a multiple of {whole:,} tokens, whole steps of every batch"
                raise bad_value("study.models.tokens", tokens, allowed)
            if rounded in amounts:
                allowed = f"is {rounded:,} in whole steps of every batch, as another of them"
                raise bad_value("study.models.tokens", tokens, allowed)
            amounts.add(rounded)
            for size in sizes:
                batch = {"train.batch_size": size} if batches else {}
                places.append({**settings, **batch, "train.steps": rounded // (size * seq_len)})
    return list({repr(sorted(place.items())): place for place in places}.values())


def _tokens(value: Any) -> list[int]:
    """A list of whole numbers, also written like 1e6."""
    numbers = value if isinstance(value, list) else []
    whole = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool) and n > 0 and n % 1 == 0]
    if not numbers or len(whole) < len(numbers):
        raise bad_value("study.models.tokens", value, "must be a list of whole numbers above 0, such as [3e5, 1e6]")
    return [int(n) for n in whole]
