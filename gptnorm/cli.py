"""The command `gptnorm`.

Exit codes: 0 done, 2 bad input (one line on stderr says what), 3 the run diverged, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from rich.console import Console

import gptnorm
from gptnorm.errors import EXIT_DIVERGED, EXIT_USER_ERROR, UserError, bad_value

if TYPE_CHECKING:
    from gptnorm.config import Config
    from gptnorm.train.loop import Result

EXIT_INTERRUPTED = 130

console = Console()

RECIPE = click.argument("recipe", metavar="RECIPE")
RUN = click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
SETTINGS = click.argument("settings", metavar="[KEY=VALUE]...", nargs=-1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(gptnorm.__version__, message="%(version)s")
def app() -> None:
    """Choose, train and understand how a GPT is normalised."""


@app.command()
@RECIPE
@SETTINGS
def train(recipe: str, settings: tuple[str, ...]) -> None:
    """Train one run.

    RECIPE is a file, or the name of one that ships ('gptnorm recipes' lists them). KEY=VALUE sets
    one thing, such as optim.lr=3e-3 or seed=1 ('gptnorm settings' lists the keys).
    """
    # Imports that bring torch stand inside the commands, so that --help is quick.
    from gptnorm.data import prepare
    from gptnorm.recipe import load_recipe
    from gptnorm.train.loop import start_run
    from gptnorm.train.progress import make_watcher
    from gptnorm.train.run_folder import free_run_dir

    found = load_recipe(recipe)
    config = found.resolve(settings)
    path = Path(config.run.dir) if config.run.dir else free_run_dir(found.name, config.model.strategy)
    with console.status("preparing the text …"):
        shards = prepare(config.data)
    say(f"{config.model.strategy} on {config.model.backbone}, into {path}")
    warn(config)
    finish(path, start_run(config, shards, path, make_watcher(console)))


@app.command()
@RUN
def resume(run: Path) -> None:
    """Continue the run in folder RUN from its newest complete checkpoint."""
    from gptnorm.data import prepare
    from gptnorm.train.loop import resume_run
    from gptnorm.train.progress import make_watcher
    from gptnorm.train.run_folder import RunFolder

    with console.status("preparing the text …"):
        config = RunFolder.open(run).config()
        shards = prepare(config.data)
    warn(config)
    finish(run, resume_run(run, shards, make_watcher(console)))


@app.command()
@click.argument("source", metavar="RECIPE|RUN")
@SETTINGS
@click.option("--step", type=click.IntRange(min=0), help="Checkpoint of a run; default: the newest, 0: initialisation.")
@click.option("--tokens", type=click.Choice(["text", "random"]), default="text", help="First training batch, or noise.")
@click.option("--dtype", type=click.Choice(["fp32", "fp64"]), default="fp32", help="What is computed in.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write every number here.")
@click.option("--report", "page_path", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with plots.")
def inspect(
    source: str,
    settings: tuple[str, ...],
    step: int | None,
    tokens: str,
    dtype: Literal["fp32", "fp64"],
    json_path: Path | None,
    page_path: Path | None,
) -> None:
    """Measure signal propagation: activations and gradients, block by block.

    RECIPE is measured at initialisation, RUN (a run folder) at its newest checkpoint. KEY=VALUE as in 'gptnorm train';
    for a run only what concerns the batch, such as train.batch_size=4. See docs/inspect.md for every number.
    """
    from gptnorm.probe import probe
    from gptnorm.probe.show import dump, make_record, print_probe
    from gptnorm.probe.source import find_config, open_source
    from gptnorm.report.probe_page import probe_page
    from gptnorm.train.loop import within_memory

    config, folder = find_config(source, settings)
    with within_memory(config), console.status("measuring …"):
        found = open_source(source, config, folder, step=step, random_tokens=tokens == "random", dtype=dtype)
        reading = probe(found.model, found.tokens)
    record = make_record(found, reading, dtype)
    for option, path, text in (
        ("--json", json_path, lambda: dump(record)),
        ("--report", page_path, lambda: probe_page(record)),
    ):
        if path is not None:
            write(option, path, text())
    print_probe(found, reading, dtype, console)


@app.command()
@SETTINGS
def quickstart(settings: tuple[str, ...]) -> None:
    """Compare three strategies over learning rates, in minutes on a laptop."""
    from gptnorm.report import load_study, rich_table
    from gptnorm.report.html import write_study_report
    from gptnorm.study.grid import run_study

    folder = run_study("quickstart", settings, Path("runs/quickstart"), console, command=())
    report = write_study_report(folder)
    console.print(rich_table(load_study(folder)))
    say(f"report: {report}")


@app.group()
def study() -> None:
    """Compare strategies over learning rates, at one size or along a ladder of widths or depths."""


STUDY_DIR = click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Study folder; an earlier one there is moved aside."
)


@study.command()
@RECIPE
@SETTINGS
@STUDY_DIR
def grid(recipe: str, settings: tuple[str, ...], folder: Path | None) -> None:
    """Every strategy at every learning rate with every seed, such as 'study/catalogue'.

    RECIPE has a [study] table.
    """
    from gptnorm.report import load_study, rich_table
    from gptnorm.report.html import write_study_report
    from gptnorm.study.grid import run_study

    folder = run_study(recipe, settings, folder or Path("runs/study-grid"), console)
    report = write_study_report(folder)
    console.print(rich_table(load_study(folder)))
    say(f"report: {report}")


@study.command()
@RECIPE
@SETTINGS
@STUDY_DIR
def width(recipe: str, settings: tuple[str, ...], folder: Path | None) -> None:
    """A ladder of widths (study.widths) under each width rule (study.rules), such as 'study/width'.

    RECIPE has a [study] table. Heads keep their width; the feed-forward's follows by the backbone's rule.
    """
    climb("width", recipe, settings, folder)


@study.command()
@RECIPE
@SETTINGS
@STUDY_DIR
def depth(recipe: str, settings: tuple[str, ...], folder: Path | None) -> None:
    """A ladder of depths (study.depths), such as 'study/depth', with gradients and cosines block by block.

    RECIPE has a [study] table.
    """
    climb("depth", recipe, settings, folder)


def climb(axis: Literal["depth", "width"], recipe: str, settings: tuple[str, ...], folder: Path | None) -> None:
    """Runs a ladder, prints its tables and writes its report."""
    from gptnorm.report import load_ladder, rich_ladder
    from gptnorm.report.html import write_study_report
    from gptnorm.study.grid import run_study

    folder = run_study(recipe, settings, folder or Path("runs") / f"study-{axis}", console, ladder=axis)
    report = write_study_report(folder)
    console.print(rich_ladder(load_ladder(folder)))
    say(f"report: {report}")


@app.command()
@click.argument("name", required=False)
def strategies(name: str | None) -> None:
    """List the strategies, or show the card and the options of NAME."""
    from gptnorm.strategies.catalogue import show_all, show_one

    if name is None:
        show_all(console)
    else:
        show_one(name, console)


@app.command()
def recipes() -> None:
    """List the recipes that ship with the package."""
    from gptnorm.recipe import shipped_recipes

    for name in shipped_recipes():
        say(name)


@app.command("settings")
def settings_() -> None:
    """List every setting, its default and its meaning."""
    from gptnorm.reference import settings_table

    console.print(settings_table())


def write(option: str, path: Path, text: str) -> None:
    """A file that an option names; UserError if it cannot be written."""
    from gptnorm.files import write_atomic

    try:
        write_atomic(path, text)
    except OSError as error:
        raise bad_value(option, str(path), f"cannot be written: {error.strerror}") from None


def say(line: str) -> None:
    """A plain line, never wrapped or coloured."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def warn(config: Config) -> None:
    """Says before a run what will make it slow."""
    from gptnorm.model.moe import slow_experts

    line = slow_experts(config)
    if line:
        say(f"warning: {line}")


def finish(path: Path, result: Result) -> None:
    """Writes the run's report and says how it ended."""
    from gptnorm.report.html import write_run_report

    say(f"report: {write_run_report(path)}")
    if result.status == "diverged":
        say(f"diverged at step {result.step}: the {result.reason} was non-finite first; nothing was updated with it")
        raise click.exceptions.Exit(EXIT_DIVERGED)
    say(f"{result.parameters:,} parameters, {result.step} steps, {result.seconds:.1f} s")
    say(f"validation loss {result.val_loss:.4f}")


def main() -> None:
    """Runs the command; every error that a person can mend is one line and exit code 2."""
    try:
        code = app(prog_name="gptnorm", standalone_mode=False)
    except UserError as error:
        code = complain(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        code = EXIT_USER_ERROR
    except click.ClickException as error:
        code = complain(error.format_message())
    except (KeyboardInterrupt, click.Abort):
        print("gptnorm: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`gptnorm settings | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def complain(message: str) -> int:
    print(f"gptnorm: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    main()
