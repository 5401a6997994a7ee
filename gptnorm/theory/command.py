"""The command `gptnorm theory`: runs checks, and prints what they found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from gptnorm.environment import describe_environment
from gptnorm.report.theory_table import rich_table
from gptnorm.theory.checks import CHECKS, Asked

COLOURS = {"holds": "green", "does not hold": "red", "depends": "yellow"}


def run_theory(names: Sequence[str], asked: Asked, console: Console) -> dict[str, Any]:
    """The record of some checks: everything as plain JSON values.

    On one thread: matrices this small gain nothing from more, and how many there are would show in the last digits.
    """
    found, seconds, threads = [], {}, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names:
            start = time.monotonic()
            with console.status(f"{name} …"):
                found.append(CHECKS[name](asked).record())
            seconds[name] = round(time.monotonic() - start, 1)
    finally:
        torch.set_num_threads(threads)
    return {
        "seeds": len(asked.seeds),
        "widths": list(asked.widths),
        "recipe": asked.recipe.name,
        "checks": found,
        "seconds": seconds,
        "environment": describe_environment(torch.device("cpu")),
    }


def print_theory(record: dict[str, Any], console: Console) -> None:
    """Claim, tables and verdict of each check."""
    for number, check in enumerate(record["checks"]):
        if number:
            console.print()
        console.print(f"{check['title']} ({check['name']})", style="bold", highlight=False, markup=False)
        console.print(f"Claim: {check['claim']}", highlight=False, markup=False)
        for table in check["tables"]:
            if not table["detail"]:
                console.print()
                console.print(rich_table(table))
        console.print()
        colour = COLOURS[check["verdict"]]
        verdict = Text(f"{check['name']} {check['verdict']}", style=f"bold {colour}")
        console.print(Text.assemble(verdict, f": {check['reason']}"), highlight=False)
