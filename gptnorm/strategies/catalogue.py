"""The strategies' cards, for a terminal."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from gptnorm.reference import settings_table
from gptnorm.strategies.registry import STRATEGIES, find_strategy


def show_all(console: Console) -> None:
    """One line a strategy."""
    table = Table(box=None, pad_edge=False)
    for column in ("name", "title", "equation"):
        table.add_column(column, no_wrap=column == "name", style="bold" if column == "name" else "")
    for name, strategy in STRATEGIES.items():
        table.add_row(name, strategy.card.title, strategy.card.equation)
    console.print(table)


def show_one(name: str, console: Console) -> None:
    """The whole card, what the strategy changes of the defaults, and its options."""
    strategy = find_strategy(name)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for field in dataclasses.fields(strategy.card):
        table.add_row(field.name, getattr(strategy.card, field.name))
    if strategy.recipe_defaults:
        table.add_row("defaults", ", ".join(f"{k} = {v}" for k, v in strategy.recipe_defaults.items()))
    console.print(table)
    console.print()
    console.print(settings_table(strategy, "strategy."))
