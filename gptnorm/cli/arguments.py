"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

RECIPE = click.argument("recipe", metavar="RECIPE")
RUN = click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
SETTINGS = click.argument("settings", metavar="[KEY=VALUE]...", nargs=-1)
JSON = click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write every number here."
)
REPORT = click.option(
    "--report", "page_path", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with plots."
)
