"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class FolderName(click.Path):
    """A folder, which "" is none: an unset variable of a shell would mean the current one."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("must not be empty; . is the current folder", param, ctx)
        return super().convert(value, param, ctx)


FOLDER_NAME = FolderName(path_type=Path)
RECIPE = click.argument("recipe", metavar="RECIPE")
RUN = click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
SETTINGS = click.argument("settings", metavar="[KEY=VALUE]...", nargs=-1)
JSON = click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write every number here."
)
REPORT = click.option(
    "--report", "page_path", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with plots."
)
