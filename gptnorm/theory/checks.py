"""Every check by its name: the only list of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gptnorm.errors import bad_value
from gptnorm.recipe import Recipe, load_recipe
from gptnorm.theory.activation import check_activation, configs
from gptnorm.theory.alignment import check_alignment
from gptnorm.theory.finding import Finding
from gptnorm.theory.kinds import check_kinds
from gptnorm.theory.scale import check_scale
from gptnorm.theory.width import check_width

SMALLEST, LARGEST = 8, 2048
"""Widths that can be asked for: whole matrices of the larger ones take hours."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What all checks are asked for."""

    seeds: Sequence[int]
    """Two or more, for intervals."""
    widths: Sequence[int]
    """Two or more, ascending, for exponents."""
    recipe: Recipe
    """Whose models `activation` builds."""


CHECKS: Mapping[str, Callable[[Asked], Finding]] = {
    "scale": lambda asked: check_scale(asked.seeds),
    "width": lambda asked: check_width(asked.seeds, asked.widths),
    "activation": lambda asked: check_activation(asked.seeds, asked.widths, asked.recipe),
    "alignment": lambda asked: check_alignment(asked.seeds),
    "kinds": lambda asked: check_kinds(asked.seeds),
}


def parse_checks(names: Sequence[str]) -> list[str]:
    """Each once, in the order of `CHECKS`; none: all. UserError for a name that is none."""
    for name in names:
        if name not in CHECKS:
            close = difflib.get_close_matches(name, CHECKS, n=1)
            raise bad_value(
                "CHECK", name, f"one of {', '.join(CHECKS)}{f'; did you mean {close[0]}?' if close else ''}"
            )
    return [name for name in CHECKS if name in names or not names]


def parse_widths(text: str) -> list[int]:
    """ "32:512", doubled from the one to the other, or "32,96,256"; UserError for anything else."""
    allowed = "must be LOW:HIGH, doubled from one to the other, or two widths or more with commas, such as 32,96,256"
    ends = text.split(":")
    parts = [part.strip() for part in (ends if len(ends) > 1 else text.split(","))]
    if not all(part.isascii() and part.isdecimal() and len(part) < 9 for part in parts) or len(ends) > 2:
        raise bad_value("--widths", text, allowed)
    found = [int(part) for part in parts]
    if not all(SMALLEST <= width <= LARGEST for width in found):
        raise bad_value("--widths", text, f"each must be {SMALLEST} … {LARGEST}")
    if len(ends) == 2:
        low, high = found
        found = [low << step for step in range(20) if low << step <= high]
    if len(set(found)) < 2:
        raise bad_value("--widths", text, allowed)
    return sorted(set(found))


def ask(names: Sequence[str], seeds: int, widths: Sequence[int], recipe: str) -> Asked:
    """What a person asked for; UserError where a recipe's model cannot have a width, before anything is computed."""
    asked = Asked(seeds=range(seeds), widths=widths, recipe=load_recipe(recipe))
    if "activation" in names:
        for width in widths:
            list(configs(asked.recipe, width, 0))
    return asked
