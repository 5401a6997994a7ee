"""Comparisons: `gptnorm study …` and `gptnorm quickstart`."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import click

from gptnorm.cli.arguments import FOLDER_NAME, RECIPE, SETTINGS
from gptnorm.cli.output import console, say
from gptnorm.errors import UserError
from gptnorm.train.stop import SIGNALS

if TYPE_CHECKING:
    from gptnorm.study.config import ToleranceConfig
    from gptnorm.study.run import Kind
    from gptnorm.study.tolerance import Tolerance

Command = Callable[..., None]


def stacked(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, listed in their order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


FOLDER = stacked(
    click.option(
        "--dir",
        "folder",
        type=FOLDER_NAME,
        help="Study folder, by default runs/study-KIND. A study that is there is added to.",
    ),
    click.option("--fresh", is_flag=True, help="Begin again; an earlier study in the folder is moved aside."),
    click.option(
        "--part",
        metavar="K/N",
        help="Only every Nth run, of a tolerance or scaling study every Nth strategy and place; see 'study join'.",
    ),
)
LADDER = stacked(RECIPE, SETTINGS, FOLDER)
SEARCH = stacked(
    RECIPE,
    SETTINGS,
    click.option("--strategies", metavar="A,B,…", help="Which strategies; default: the recipe's."),
    click.option(
        "--lrs", metavar="LOW:HIGH", help="Peak rates to begin with: two a decade between them, or a list A,B,…."
    ),
    click.option("--seeds", type=click.IntRange(0, 1000), help="How many seeds are reported; five tell something."),
    FOLDER,
)


@click.command()
@SETTINGS
def quickstart(settings: tuple[str, ...]) -> None:
    """Compare three strategies over learning rates, in minutes on a laptop; the report is in runs/quickstart."""
    from gptnorm.study.grid import Grid
    from gptnorm.study.ledger import OtherStudy
    from gptnorm.study.run import run_study

    folder = Path("runs/quickstart")
    ask = partial(run_study, Grid(), "quickstart", settings, console=console, command=())
    with going_on():
        try:
            ask(folder)
        except OtherStudy:
            ask(folder, fresh=True)
    print_study(folder)


@click.group()
def study() -> None:
    """Compare strategies over learning rates, at one size or along a ladder of widths or depths."""


@study.command()
@LADDER
def grid(**asked: Any) -> None:
    """Every strategy at every learning rate with every seed, such as 'study/catalogue'.

    RECIPE has a [study] table.
    """
    run_ladder(None, **asked)


@study.command()
@LADDER
def width(**asked: Any) -> None:
    """A ladder of widths (study.widths) under each width rule (study.rules), such as 'study/width'.

    RECIPE has a [study] table. Heads keep their width; the feed-forward's follows by the backbone's rule.
    """
    run_ladder("width", **asked)


@study.command()
@LADDER
def depth(**asked: Any) -> None:
    """A ladder of depths (study.depths), such as 'study/depth', with gradients and cosines block by block.

    RECIPE has a [study] table.
    """
    run_ladder("depth", **asked)


@study.command()
@SEARCH
def tolerance(**asked: Any) -> None:
    """How far each strategy's learning rate can be pushed, such as 'study/tolerance'.

    RECIPE has a [study] table, or is any other with --strategies and --lrs. Rates are added where they matter: around
    each strategy's best, and at the edge where training fails. The best is picked on other seeds than those reported.
    study.tune and study.map set what is tuned beside the rate, and where strategies are compared; see
    docs/tolerance.md.
    """
    from gptnorm.study.config import ToleranceConfig
    from gptnorm.study.tolerance import Tolerance

    run_search(Tolerance, ToleranceConfig, **asked)


@study.command()
@SEARCH
def scaling(**asked: Any) -> None:
    """Loss against compute, and how best rate and batch move with the size, such as 'study/scaling'.

    RECIPE has a [study] table with study.models: sizes, each with the amounts of text that it sees. study.batches are
    tried with each. Every strategy is at its own best rate everywhere; see docs/scaling.md.
    """
    from gptnorm.study.scaling import Scaling, ScalingConfig

    run_search(Scaling, ScalingConfig, **asked)


@study.command()
@click.argument("folder", metavar="STUDY", type=click.Path(path_type=Path))
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown, and write nothing.")
def show(folder: Path, markdown: bool) -> None:
    """Print the tables of the study in folder STUDY, complete or not, and write its report."""
    from gptnorm.report import markdown_study

    if markdown:
        click.echo(markdown_study(folder), nl=False)
    else:
        print_study(folder)


@study.command()
@click.argument("parts", metavar="STUDY...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--dir", "folder", type=FOLDER_NAME, required=True, help="Folder of the whole study.")
def join(parts: tuple[Path, ...], folder: Path) -> None:
    """Put studies together that were made in several folders, such as the parts of a job array.

    Their runs must be comparable: the same recipe, settings and text.
    """
    from gptnorm.format import plural
    from gptnorm.study.join import join_studies

    added = join_studies(parts, folder)
    print_study(folder)
    say(f"{plural(added, 'run')} added")


def run_ladder(
    axis: Literal["depth", "width"] | None,
    *,
    recipe: str,
    settings: tuple[str, ...],
    folder: Path | None,
    fresh: bool,
    part: str | None,
) -> None:
    """Runs a ladder; None: a single grid."""
    from gptnorm.study.grid import Grid

    run_and_print(Grid(axis, part_of(part)), recipe, settings, folder, part, fresh)


def run_search(
    kind: type[Tolerance],
    table: type[ToleranceConfig],
    *,
    recipe: str,
    settings: tuple[str, ...],
    strategies: str | None,
    lrs: str | None,
    seeds: int | None,
    folder: Path | None,
    fresh: bool,
    part: str | None,
) -> None:
    """Runs a study that looks for each strategy's best rate; `table` is what its [study] is read as."""
    from gptnorm.recipe import load_recipe
    from gptnorm.study.asked import as_settings

    asked = as_settings(table, load_recipe(recipe), settings, strategies=strategies, lrs=lrs, seeds=seeds)
    run_and_print(kind(part=part_of(part)), recipe, asked, folder, part, fresh)


def part_of(part: str | None) -> tuple[int, int]:
    """Which part of a study is to be run."""
    from gptnorm.study.join import parse_part

    return (1, 1) if part is None else parse_part(part)


def run_and_print(
    kind: Kind, recipe: str, settings: tuple[str, ...], folder: Path | None, part: str | None, fresh: bool
) -> None:
    """Runs a study into the folder, by default one named after its kind, prints its tables and writes its report."""
    from gptnorm.study.join import part_folder
    from gptnorm.study.run import run_study

    whole = folder or Path("runs") / "-".join(kind.words)
    target = whole if part is None else part_folder(whole, kind.part)
    with going_on():
        made = run_study(kind, recipe, settings, target, console, fresh=fresh)
    print_study(made)


@contextlib.contextmanager
def going_on() -> Iterator[None]:
    """Says how a study goes on that Ctrl-C, SIGTERM or SIGHUP ends, and exits with 128 and the signal's number."""
    heard: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if len(heard) == 1:  # what comes while workers are being ended must not keep that from being done
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    hears = [number for number in SIGNALS if main and signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in hears}
    try:
        yield
    except KeyboardInterrupt:
        number = heard[0] if heard else signal.SIGINT
        how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        click.echo(f"gptnorm: {how}; runs that have ended are kept, and the same command goes on", err=True)
        raise click.exceptions.Exit(128 + number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_study(folder: Path) -> None:
    """Prints a study's tables and writes its report."""
    from gptnorm.report import rich_study
    from gptnorm.report.html import write_study_report

    # Written first, since whoever reads what is printed may leave; printed also where it cannot be written.
    try:
        said = f"report: {write_study_report(folder)}"
    except OSError as error:
        said, failed = "", UserError(f"{folder}: the report cannot be written ({error.strerror})")
    else:
        failed = None
    console.print(rich_study(folder))
    if failed is not None:
        raise failed
    say(said)
