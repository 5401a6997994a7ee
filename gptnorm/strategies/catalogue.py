"""The strategies' cards, for a terminal."""

from __future__ import annotations

import dataclasses
from typing import get_args

from rich.console import Console
from rich.table import Table

from gptnorm.config import BackboneName
from gptnorm.reference import list_settings, settings_table
from gptnorm.strategies.base import Card
from gptnorm.strategies.compose import OFFERED, offers
from gptnorm.strategies.measured import measurements
from gptnorm.strategies.registry import STRATEGIES, find_strategy


def show_all(console: Console) -> None:
    """One line a strategy."""
    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("title")
    table.add_column("equation")
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("at rate", justify="right", no_wrap=True)
    found = measurements()
    for name, strategy in STRATEGIES.items():
        loss = found[name].loss if name in found else "–"
        rate = f"{found[name].lr:g}" if name in found else ""
        table.add_row(name, strategy.card.title, strategy.card.equation, loss, rate)
    seeds = "/".join(str(n) for n in sorted({len(measured.losses) for measured in found.values()}))
    table.caption = (
        f"loss: validation, nats per token, mean ± sd over {seeds} seeds, of the laptop recipe (d 64, 4 blocks, 400 "
        "steps) at the strategy's own best rate, which was picked on another seed; docs/results/catalogue.md"
    )
    table.caption_justify = "left"
    console.print(table)


def options_markdown() -> str:
    """Which strategy takes which option, as a Markdown table with the reasons below it."""
    reasons: list[str] = []
    lines = [f"| strategy | {' | '.join(f'`{name}`' for name in OFFERED)} |", f"|:--|{':-:|' * len(OFFERED)}"]
    for name, cls in STRATEGIES.items():
        strategy = cls()
        presets = {key.removeprefix("options."): value for key, value in strategy.recipe_defaults.items()}
        cells = []
        for option, reason in offers(strategy).items():
            key, _, value = option.partition("=")
            if reason:
                if reason not in reasons:
                    reasons.append(reason)
                cells.append(f"no ({reasons.index(reason) + 1})")
            else:
                preset = presets.get(key)
                cells.append("preset" if preset not in (None, "none") and value in ("", preset) else "yes")
        lines.append(f"| {name} | {' | '.join(cells)} |".replace("_", "\\_"))
    notes = "\n".join(f"{n}. {reason}" for n, reason in enumerate(reasons, 1))
    return "\n".join(lines) + f"\n\n{notes}\n"


def published(card: Card) -> str:
    """With what the strategy was published, and what that makes of the other pairs."""
    return (
        f"{card.published_with}. Every pair of backbone ({', '.join(get_args(BackboneName))}) and feed-forward (dense, "
        "experts) not named there counts as our extrapolation"
    )


def show_one(name: str, console: Console) -> None:
    """The whole card, what the strategy changes of the defaults, and its options."""
    strategy = find_strategy(name)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for field in dataclasses.fields(strategy.card):
        text = published(strategy.card) if field.name == "published_with" else getattr(strategy.card, field.name)
        table.add_row(field.name, text)
    table.add_row("measured", str(measurements().get(name, "not measured yet")))
    refused = [f"{option}: {reason}" for option, reason in offers(strategy()).items() if reason]
    if refused:
        table.add_row("refuses", "\n".join(refused))
    if strategy.recipe_defaults:
        table.add_row("defaults", ", ".join(f"{k} = {v}" for k, v in strategy.recipe_defaults.items()))
    console.print(table)
    console.print()
    console.print(settings_table(list_settings(strategy, "strategy.")))
