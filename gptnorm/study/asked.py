"""The options of `gptnorm study tolerance` and `scaling` as the settings that they stand for."""

from __future__ import annotations

import itertools

from gptnorm.errors import UserError, bad_value
from gptnorm.recipe import Recipe
from gptnorm.study.config import ToleranceConfig, read_table_of
from gptnorm.study.search import log_grid
from gptnorm.tables import toml_value

ALLOWED = "must be LOW:HIGH or a list, such as 3e-4:3e-1 or 1e-3,3e-3,1e-2"


def as_settings(
    table: type[ToleranceConfig],
    recipe: Recipe,
    settings: tuple[str, ...],
    *,
    strategies: str | None,
    lrs: str | None,
    seeds: int | None,
) -> tuple[str, ...]:
    """The `key=value` arguments with those that the options stand for.

    Args:
        table: what the recipe's `[study]` table is read as.
        strategies: names with commas between.
        lrs: "LOW:HIGH", of which two rates a decade are taken, or rates with commas between.
        seeds: how many are reported: the first that do not pick, counted from 0.

    Raises:
        UserError: an option that says nothing, or says what a setting says, too.
    """
    given = {setting.partition("=")[0] for setting in settings}
    for key, value in {"strategies": strategies, "lrs": lrs, "seeds": seeds}.items():
        if value is not None and f"study.{key}" in given:
            raise UserError(f"--{key} and study.{key} say the same; give one of them")
    if strategies is not None:
        names = [name.strip() for name in strategies.split(",") if name.strip()]
        settings = (*settings, f"study.strategies={toml_value(names)}")
    if lrs is not None:
        settings = (*settings, f"study.lrs={toml_value(parse_rates(lrs))}")
    if seeds is not None:
        pick = read_table_of(table, recipe, settings).pick
        others = list(itertools.islice((n for n in itertools.count() if n not in pick), seeds))
        settings = (*settings, f"study.seeds={toml_value(others)}")
    return settings


def parse_rates(text: str) -> tuple[float, ...]:
    """ "3e-4:3e-1" or "1e-3,3e-3"; UserError for anything else."""
    ends = text.split(":")
    try:
        rates = [float(part) for part in (ends if len(ends) > 1 else text.split(","))]
    except ValueError:
        raise bad_value("--lrs", text, ALLOWED) from None
    if not all(1e-30 <= rate <= 1e30 for rate in rates):
        raise bad_value("--lrs", text, "must be between 1e-30 and 1e30")
    if len(ends) == 1:
        return tuple(rates)
    if len(ends) != 2 or rates[0] >= rates[1]:
        raise bad_value("--lrs", text, ALLOWED)
    low, high = rates
    return log_grid(low, high)
