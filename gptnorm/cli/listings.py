"""What there is: `gptnorm strategies`, `gptnorm recipes` and `gptnorm settings`."""

from __future__ import annotations

import click

from gptnorm.cli.output import console, say


@click.command()
@click.argument("name", required=False)
def strategies(name: str | None) -> None:
    """List the strategies, or show the card and the options of NAME."""
    from gptnorm.strategies.catalogue import show_all, show_one

    if name is None:
        show_all(console)
    else:
        show_one(name, console)


@click.command()
def recipes() -> None:
    """List the recipes that ship with the package."""
    from gptnorm.recipe import shipped_recipes

    for name in shipped_recipes():
        say(name)


@click.command("settings")
@click.argument("table", required=False)
def settings_(table: str | None) -> None:
    """List every setting, its default and its meaning, or those of TABLE, such as optim, study or init.std."""
    from gptnorm.reference import settings_of, settings_table

    console.print(settings_table(settings_of(table)))
