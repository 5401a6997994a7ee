"""Theory, checked by experiments: `gptnorm theory`."""

from __future__ import annotations

from pathlib import Path

import click

from gptnorm.cli.arguments import JSON, REPORT
from gptnorm.cli.output import console, refuse_unwritable, write_all


@click.command()
@click.argument("checks", metavar="[CHECK]...", nargs=-1)
@click.option(
    "--recipe",
    metavar="RECIPE",
    default="quickstart",
    show_default=True,
    help="Whose models 'activation' builds: each strategy of its [study] table, or its own.",
)
@click.option(
    "--seeds", type=click.IntRange(2, 100), default=5, show_default=True, help="How many; each interval is over them."
)
@click.option(
    "--widths",
    metavar="LOW:HIGH",
    default="32:512",
    show_default=True,
    help="Doubled from LOW to HIGH, or a list A,B,….",
)
@JSON
@REPORT
def theory(
    checks: tuple[str, ...], recipe: str, seeds: int, widths: str, json_path: Path | None, page_path: Path | None
) -> None:
    """Check what is claimed of a norm after a linear map, by experiments that can come out either way.

    \b
    scale       W → cW leaves L, C and H in x alone, and gives H in W 1/c²
    width       ‖C‖/‖L‖ falls as the width grows, in four regimes of the loss
    activation  ‖y‖ is of the size of √d, in a recipe's models
    alignment   ‖C‖ stays below ‖L‖ however x, g and z are aligned
    kinds       the identities of a norm of degree 0, kind by kind

    No CHECK: all of them, about a minute on one core. H = L + C is the Hessian in x of a loss of y = N(Wx),
    L its Gauss-Newton part, C the norm's own curvature. See docs/theory.md for every number.
    """
    from gptnorm.probe.show import dump
    from gptnorm.report.theory_page import theory_page
    from gptnorm.theory.checks import ask, parse_checks, parse_widths
    from gptnorm.theory.command import print_theory, run_theory

    names = parse_checks(checks)
    asked = ask(names, seeds, parse_widths(widths), recipe)
    refuse_unwritable("--json", json_path)
    refuse_unwritable("--report", page_path)
    record = run_theory(names, asked, console)
    write_all(("--json", json_path, lambda: dump(record)), ("--report", page_path, lambda: theory_page(record)))
    print_theory(record, console)
